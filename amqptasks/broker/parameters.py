"""From settings to pika's connection parameters."""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import pika

from amqptasks import __version__
from amqptasks.config import BrokerSettings
from amqptasks.config.models import TlsSettings
from amqptasks.errors import ConfigError

__all__ = ["aio_url", "connection_parameters", "node_name"]


def connection_parameters(
    settings: BrokerSettings, name: str, *, timeout: float | None = None
) -> list[pika.ConnectionParameters]:
    """Parameters for each node, in the order of the settings.

    Args:
        name: the connection's name in the management UI.
        timeout: seconds for connecting to one node; `settings.connection_timeout` by default.

    Raises:
        ConfigError: a URL or a certificate cannot be used. Passwords are not shown.
    """
    limit = timeout or settings.connection_timeout
    result = []
    for url in settings.url:
        parameters = _parse(url)
        parameters.heartbeat = settings.heartbeat
        parameters.connection_attempts = 1
        parameters.socket_timeout = limit
        parameters.stack_timeout = limit
        parameters.blocked_connection_timeout = None
        parameters.client_properties = {
            "connection_name": name,
            "product": "amqptasks",
            "version": __version__,
        }
        parameters.tcp_options = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
        if settings.tls is not None or url.startswith("amqps://"):
            parameters.ssl_options = _tls(settings, parameters.host)
        result.append(parameters)
    return result


def _parse(url: str) -> pika.URLParameters:
    try:
        _ = urlsplit(url).port
    except ValueError:
        # The text of the error may hold a piece of the password.
        raise ConfigError(
            "broker.url: the port is not a number; write special characters of user name and password in percent "
            "notation (`/` is %2F, `@` is %40, `:` is %3A)"
        ) from None
    try:
        # `amqp://host//` is Celery's way to write the default virtual host.
        return pika.URLParameters(url[:-2] + "/%2F" if url.endswith("//") and url.count("//") == 2 else url)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"broker.url: not an AMQP URL: {error}") from None


def aio_url(parameters: pika.ConnectionParameters) -> str:
    """The same node, user, virtual host and TLS as a URL for aio-pika: one reading of the settings for both clients."""
    secure = parameters.ssl_options is not None
    credentials = parameters.credentials
    user, password = quote(credentials.username, safe=""), quote(credentials.password, safe="")
    host = f"[{parameters.host}]" if ":" in parameters.host else parameters.host
    query = urlencode({"heartbeat": parameters.heartbeat})
    vhost = quote(parameters.virtual_host, safe="")
    return f"{'amqps' if secure else 'amqp'}://{user}:{password}@{host}:{parameters.port}/{vhost}?{query}"


def _tls(settings: BrokerSettings, host: str) -> pika.SSLOptions:
    tls = settings.tls
    try:
        context = ssl.create_default_context(cafile=tls.ca_file if tls is not None else None)
        if tls is not None and tls.cert_file is not None:
            # Without a password OpenSSL would ask for one at the terminal, and wait.
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"broker.tls: {_tls_problem(tls, error)}") from None
    if tls is not None and not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return pika.SSLOptions(context, host)


def _tls_problem(tls: TlsSettings | None, error: OSError) -> str:
    if tls is not None:
        for key, file in (("ca_file", tls.ca_file), ("cert_file", tls.cert_file), ("key_file", tls.key_file)):
            try:
                if file is not None:
                    Path(file).read_bytes()
            except OSError as missing:
                return f"{key} {file}: {missing.strerror}"
    what = "ca_file" if tls is None or tls.cert_file is None else "cert_file or key_file"
    return f"{what} cannot be used (an encrypted key must be decrypted first): {error}"


def node_name(parameters: pika.ConnectionParameters) -> str:
    """``host:port/vhost``, without user and password."""
    vhost = parameters.virtual_host
    return f"{parameters.host}:{parameters.port}/{'' if vhost == '/' else vhost}"
