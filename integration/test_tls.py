"""TLS to the broker: a node with certificates of an authority that the test makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from amqptasks import AmqpTasks
from amqptasks.errors import BrokerError, ConfigError, PublishError
from amqptasks.testing.management import Management
from amqptasks.testing.rabbitmq import PrivateNode, free_port
from integration.conftest import Bench, Broker, VirtualHost


@dataclass(frozen=True)
class Tls:
    """A node that takes TLS, and one port that wants a client's certificate."""

    node: PrivateNode
    authority: trustme.CA
    port: int

    def url(self, host: str = "localhost", *, password: str = "guest") -> str:
        return f"amqps://guest:{password}@{host}:{self.port}/"


def node_with_tls(authority: trustme.CA, *names: str, **more: str) -> tuple[PrivateNode, int]:
    port = free_port()
    certificate = authority.issue_cert(*names)
    config = {
        "listeners.ssl.1": f"127.0.0.1:{port}",
        "ssl_options.cacertfile": "{folder}/ca.pem",
        "ssl_options.certfile": "{folder}/cert.pem",
        "ssl_options.keyfile": "{folder}/key.pem",
        **more,
    }
    files = {
        "ca.pem": authority.cert_pem.bytes(),
        "cert.pem": b"".join(blob.bytes() for blob in certificate.cert_chain_pems),
        "key.pem": certificate.private_key_pem.bytes(),
    }
    return PrivateNode("tls", config=config, files=files), port


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls(authority: trustme.CA) -> Iterator[Tls]:
    made, port = node_with_tls(authority, "localhost")
    with made as node:
        yield Tls(node, authority, port)


@pytest.fixture(scope="module")
def strict(authority: trustme.CA) -> Iterator[Tls]:
    """Refuses clients without a certificate of the authority."""
    both = {"ssl_options.verify": "verify_peer", "ssl_options.fail_if_no_peer_cert": "true"}
    made, port = node_with_tls(authority, "localhost", **both)
    with made as node:
        yield Tls(node, authority, port)


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path) -> str:
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    return str(file)


def app_on(url: str, **tls: Any) -> AmqpTasks:
    return AmqpTasks("tls", config={"broker": {"url": url, **({"tls": tls} if tls else {})}})


def send(app: AmqpTasks) -> None:
    try:
        app.send_task("any", retry=False)
    finally:
        app.close()


def bench_on(tls: Tls, folder: Path, **options: Any) -> Bench:
    node = tls.node
    vhost = VirtualHost("/", node.url, Management(node.management_url), Broker("own", node.url, node.management_url))
    made = Bench(vhost, folder)
    made.settings["broker"] = {"url": tls.url(), "tls": options}
    return made


def runs_tasks(bench: Bench) -> None:
    try:
        app = bench.client()
        bench.worker("default", "-c", "1")
        result = app.send_task("integration.apps.jobs.add", (1, 2))
        assert result.get(timeout=10) == 3
    finally:
        bench.close()


def test_publisher_worker_and_results_go_over_tls(tls: Tls, trusted: str, tmp_path: Path) -> None:
    runs_tasks(bench_on(tls, tmp_path, ca_file=trusted))
    connections = Management(tls.node.management_url).connections()
    assert all(one.get("ssl") for one in connections)


async def test_asyncio_callers_publish_over_tls(tls: Tls, trusted: str) -> None:
    app = app_on(tls.url(), ca_file=trusted)
    app.declare()
    await app.asend_task("any")
    await app.aclose()


@pytest.mark.fault
def test_a_certificate_of_an_unknown_authority_is_refused_and_named(tls: Tls) -> None:
    with pytest.raises(PublishError, match="certificate") as caught:
        send(app_on(tls.url()))
    assert "broker.tls.ca_file" in str(caught.value)


@pytest.mark.fault
async def test_asyncio_callers_refuse_it_too(tls: Tls) -> None:
    app = app_on(tls.url())
    with pytest.raises(PublishError, match="certificate"):
        await app.asend_task("any", retry=False)
    await app.aclose()


@pytest.mark.fault
def test_a_certificate_of_another_host_is_refused(tls: Tls, trusted: str) -> None:
    with pytest.raises(PublishError, match=r"certificate.*127\.0\.0\.1"):
        send(app_on(tls.url("127.0.0.1"), ca_file=trusted))


def test_verification_can_be_turned_off(tls: Tls) -> None:
    app = app_on(tls.url("127.0.0.1"), verify=False)
    app.declare()
    send(app)


@pytest.mark.fault
def test_a_client_without_tls_is_told(tls: Tls) -> None:
    with pytest.raises(PublishError, match=r"127\.0\.0\.1"):
        send(app_on(f"amqp://guest:guest@127.0.0.1:{tls.port}/"))


def test_a_broker_that_wants_a_certificate_gets_it(strict: Tls, trusted: str, tmp_path: Path) -> None:
    certificate = strict.authority.issue_cert("client.example")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "client.pem"))
    files = {"cert_file": str(tmp_path / "client.pem"), "key_file": str(tmp_path / "client.pem")}
    runs_tasks(bench_on(strict, tmp_path, ca_file=trusted, **files))


@pytest.mark.fault
def test_a_client_without_a_certificate_is_refused(strict: Tls, trusted: str) -> None:
    with pytest.raises(PublishError) as caught:
        send(app_on(strict.url(), ca_file=trusted))
    assert "certificate" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ca_file": "/nowhere/ca.pem"}, r"broker\.tls: ca_file /nowhere/ca\.pem: No such file"),
        ({"cert_file": "{junk}", "key_file": "{junk}"}, r"broker\.tls: cert_file or key_file cannot be used"),
        ({"cert_file": "{locked}", "key_file": "{locked}"}, r"an encrypted key must be decrypted first"),
    ],
)
def test_files_that_cannot_be_used_are_named_at_once(tmp_path: Path, change: dict[str, str], words: str) -> None:
    (tmp_path / "junk").write_text("not a certificate")
    certificate = trustme.CA().issue_cert("client.example")
    key = serialization.load_pem_private_key(certificate.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"a word"),
    )
    (tmp_path / "locked").write_bytes(locked + certificate.cert_chain_pems[0].bytes())
    places = {"junk": tmp_path / "junk", "locked": tmp_path / "locked"}
    options = {key: value.format(**places) for key, value in change.items()}
    with pytest.raises((ConfigError, BrokerError), match=words):
        send(app_on("amqps://guest:guest@localhost:1/", **options))
