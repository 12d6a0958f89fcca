"""``amqptasks topology export``."""

from __future__ import annotations

import json
import re
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

import click
import yaml

from amqptasks.broker.versions import accepted_arguments
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_declared
from amqptasks.topology.entities import Topology
from amqptasks.topology.export import definitions, manifests

__all__ = ["export_command"]


class _Version(click.ParamType[str]):
    """A version of RabbitMQ: 4.3 or 4.3.1."""

    name = "VERSION"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"\d+\.\d+(\.\d+)?", value):
            self.fail(f"{value!r} is not a version such as 4.3 or 4.3.1")
        return value if value.count(".") == 2 else f"{value}.0"


@click.command(
    "export",
    epilog="\b\nExamples:\n  amqptasks topology export -o shop.json && rabbitmqctl import_definitions shop.json\n"
    "  amqptasks topology export --format manifests --cluster messaging/rabbit | kubectl apply -n shop -f -",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["definitions", "manifests"]),
    default="definitions",
    help="JSON for `rabbitmqctl import_definitions`, or YAML for the Messaging Topology Operator.",
)
@click.option("--cluster", metavar="[NAMESPACE/]NAME", help="The RabbitmqCluster that manifests are for.")
@click.option("--rabbitmq", type=_Version(), help="Leave out what this version of RabbitMQ refuses.")
@click.option("-o", "--output", type=click.File("w"), default="-", help="A file (default: stdout).")
@click.pass_obj
def export_command(obj: CliContext, form: str, cluster: str | None, rabbitmq: str | None, output: TextIO) -> None:
    """Write what the settings declare for other tools that declare it. The broker is not asked.

    Workers then need no permission to configure anything; set topology.declare: false to have them only look.
    """
    if (form == "manifests") != (cluster is not None):
        raise click.UsageError("--format manifests and --cluster belong together")
    settings, topology = load_declared(obj)
    vhost = unquote(urlsplit(settings.broker.url[0]).path.removeprefix("/")) or "/"
    server = {"product": "RabbitMQ", "version": rabbitmq} if rabbitmq is not None else None
    sent = {queue.name: accepted_arguments(queue, server) for queue in topology.queues}
    if rabbitmq is None:
        _warn(topology)
    if cluster is None:
        output.write(json.dumps(definitions(topology, vhost, sent), indent=2, ensure_ascii=False) + "\n")
        return
    namespace, _, name = cluster.rpartition("/")
    reference = {"name": name, "namespace": namespace} if namespace else {"name": name}
    made: list[dict[str, Any]] = list(manifests(topology, vhost, sent, reference))
    # Whole numbers stay whole, and what looks like a number or a yes in a name is quoted.
    yaml.safe_dump_all(made, output, sort_keys=False, allow_unicode=True)


def _warn(topology: Topology) -> None:
    newest = {"product": "RabbitMQ", "version": "99.0.0"}
    refused = [queue.name for queue in topology.queues if accepted_arguments(queue, newest) != dict(queue.arguments)]
    if refused:
        click.echo(
            f"Note: RabbitMQ 4.3 and later refuse x-consumer-timeout on classic queues ({', '.join(refused)}). "
            "For these, say --rabbitmq 4.3",
            err=True,
        )
