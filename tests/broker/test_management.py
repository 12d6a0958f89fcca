"""The management API's address."""

from __future__ import annotations

import pytest

from amqptasks.broker.management import ManagementApi
from amqptasks.config import BrokerSettings


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://guest:guest@host", "http://host:15672/api/"),
        ("https://guest:guest@host", "https://host/api/"),
        ("https://guest:guest@host:15671/rabbit/", "https://host:15671/rabbit/api/"),
        ("http://guest:guest@[::1]", "http://[::1]:15672/api/"),
    ],
)
def test_a_url_without_a_port(url: str, asked: str) -> None:
    """https is a proxy's or a cloud's, on 443."""
    settings = BrokerSettings.model_validate({"url": "amqp://guest:guest@host", "management_url": url})
    with ManagementApi(settings, purpose="a test") as api:
        assert str(api._client.base_url) == asked
