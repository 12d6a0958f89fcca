"""Runs the race in its environment, and writes what came out."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from amqptasks.testing.servers import RedisServer
from benchmarks.race import chart, report
from benchmarks.race.environment import PEERS, ROOT
from benchmarks.race.field import SYSTEMS, chosen
from benchmarks.race.heats import Race, Sizes, spin_rounds
from benchmarks.race.node import Machine, machine, private_node
from benchmarks.race.records import Record, Records
from benchmarks.race.running import Place

__all__ = ["PAGE", "run"]

PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"


def _race(options: argparse.Namespace) -> tuple[Records, dict[str, str | int | float]]:
    systems = chosen(options.systems)
    sizes = Sizes(options.tasks, options.seconds, options.calls)
    started = time.monotonic()
    with ExitStack() as stack:
        node = stack.enter_context(private_node(options.rabbitmq))
        here = machine(node.url, options.rabbitmq)
        redis = stack.enter_context(RedisServer()).url if "trip" in options.only else ""
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="race-")))
        spin = spin_rounds()
        places = [Place(node.url, kind, folder, redis, spin) for kind in options.queues.split(",")]
        race = Race(
            systems,
            options.only,
            sizes,
            everything=options.all,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        if set(options.only) != {"help"}:
            race.prepare(places)
        for number in range(options.rounds):
            race.round(number, places)
    minutes = (time.monotonic() - started) / 60
    return race.records, {
        **asdict(here),
        "rounds": options.rounds,
        "minutes": round(minutes, 1),
        "command": report.given_command("benchmarks.race"),
    }


def _about(facts: dict[str, str | int | float]) -> str:
    here = Machine(*(facts[name] for name in ("rabbitmq", "python", "cores", "load")))  # type: ignore[arg-type]
    return (
        f"{here}. {facts['rounds']} rounds in {facts['minutes']} minutes by `{facts['command']}`. Medians; in brackets "
        "how many times better amqptasks is: the median of the rounds' own ratios."
    )


def settings() -> str:
    """Every system's settings, as they stand in its file."""
    rows = []
    for system in SYSTEMS:
        told = ". ".join(f"**{what}** {why.rstrip('.')}" for what, why in system.settings.items())
        rows.append([system.name, f"{told}."])
    versions = ", ".join(peer.replace("==", " ") for peer in PEERS)
    return f"Versions: {versions}.\n\n| system | settings |\n| --- | --- |\n" + "\n".join(
        f"| {name} | {told} |" for name, told in rows
    )


def run(options: argparse.Namespace) -> None:
    """Race, or read what a race wrote; print, and write what was asked for."""
    if options.read:
        told = json.loads(options.read.read_text())
        records, facts = Records(Record(**one) for one in told["records"]), told["facts"]
    else:
        records, facts = _race(options)
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "records": [asdict(one) for one in records.all]}, indent=1))
    series = ".".join(str(facts["rabbitmq"]).split(".")[:2])
    picture = None
    if options.docs:
        picture = f"race-{series}.svg"
        chart.draw(records, IMAGES / picture)
    text = report.markdown(records, _about(facts), picture and f"images/{picture}")
    print(text)
    if options.docs:
        report.replace_block(PAGE, f"race {series}", text)
        report.replace_block(PAGE, "race settings", settings())
