"""From settings to connection parameters, the same for both clients."""

from __future__ import annotations

from typing import Any

import pytest
from yarl import URL

from amqptasks.broker.parameters import aio_url, connection_parameters, node_name
from amqptasks.config import BrokerSettings
from amqptasks.errors import ConfigError


def parameters(url: Any, **more: Any) -> Any:
    return connection_parameters(BrokerSettings.model_validate({"url": url, **more}), "shop")


def test_one_set_a_node_in_the_order_of_the_settings() -> None:
    found = parameters(["amqp://a/", "amqp://b:5673/shop"])
    assert [node_name(one) for one in found] == ["a:5672/", "b:5673/shop"]
    assert {one.connection_attempts for one in found} == {1}
    assert {one.client_properties["connection_name"] for one in found} == {"shop"}


def test_celerys_double_slash_is_the_default_virtual_host() -> None:
    assert parameters("amqp://a:5672//")[0].virtual_host == "/"


@pytest.mark.parametrize("url", ["amqp://ann:pa/ss@host:5672/", "amqp://ann:p@ss:w@host:1x/"])
def test_a_password_that_breaks_the_url_is_not_shown(url: str) -> None:
    settings = BrokerSettings().model_copy(update={"url": (url,)})  # the settings' own check left out
    with pytest.raises(ConfigError, match="percent notation") as caught:
        connection_parameters(settings, "shop")
    assert "pa" not in str(caught.value).replace("password", "").replace("part", "")


@pytest.mark.parametrize(
    ("url", "tls"),
    [
        ("amqp://ann:p%40ss%2Fword@host:5673/shop", None),
        ("amqps://ann:x@host/%2F", None),
        ("amqp://ann:x@[::1]:5672/a%2Fb", {"verify": False}),
    ],
)
def test_aio_pika_gets_the_same_node_user_virtual_host_and_tls(url: str, tls: dict[str, Any] | None) -> None:
    made = parameters(url, tls=tls, heartbeat=17)[0]
    read = URL(aio_url(made))
    assert (read.host, read.port, read.user) == (made.host, made.port, made.credentials.username)
    assert read.password == made.credentials.password
    assert read.path[1:] == made.virtual_host
    assert read.query["heartbeat"] == "17"
    assert (read.scheme == "amqps") is (made.ssl_options is not None)
    assert (read.scheme == "amqps") is (tls is not None or url.startswith("amqps"))
