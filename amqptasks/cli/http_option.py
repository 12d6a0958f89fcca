"""The flag of programs that serve probes and metrics."""

from __future__ import annotations

import click

from amqptasks.config.fields import http_address

__all__ = ["http_option"]


class _Address(click.ParamType[str]):
    name = "address"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return http_address(value)
        except ValueError as error:
            self.fail(str(error))


http_option = click.option(
    "--http", type=_Address(), metavar="HOST:PORT", help="Serve /livez, /readyz, /startupz and /metrics here."
)
