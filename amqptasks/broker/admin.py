"""Declaring a topology, purging and unbinding: short visits on a connection of their own.

Errors of one entity close only its channel (AMQP 0-9-1), so that a visit goes on with the next entity and reports
everything that is wrong at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker

from amqptasks.broker.versions import accepted_arguments
from amqptasks.broker.visits import Channels, on_some_node
from amqptasks.config.models import BrokerSettings
from amqptasks.errors import AccessRefused, ConfigError, TopologyConflict
from amqptasks.topology.conflicts import MAX_DIFFERENCES, Conflict, adopted, explain, parse_conflict, telling
from amqptasks.topology.entities import Binding, Exchange, Queue, Topology

__all__ = ["declare", "purge", "remove_bindings"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


def declare(
    topology: Topology, broker_settings: BrokerSettings, *, passive: bool = False, name: str = "declare"
) -> None:
    """Make the broker hold this topology; what stands already is left as it is. With `passive`, only check.

    What the user may not configure has to stand already. A passive check, and a user without permission to configure,
    see that queues and exchanges exist; AMQP shows them neither arguments nor bindings.

    Raises TopologyConflict where a queue or exchange exists with other arguments (all of them in the message, the
    first one in the attributes), ConfigError for what is missing in a passive check or what the broker does not
    accept, AccessRefused for a missing permission, BrokerUnreachable when no node answers.
    """
    on_some_node(broker_settings, name, lambda connection, vhost: _Declaring(connection, vhost, passive).run(topology))


def remove_bindings(broker_settings: BrokerSettings, bindings: Iterable[Binding], *, name: str = "unbind") -> None:
    """Remove bindings (queue.unbind, RabbitMQ's exchange.unbind). Raises AccessRefused and BrokerUnreachable."""

    def visit(connection: pika.BlockingConnection, vhost: str) -> None:
        channel = connection.channel()
        for one in bindings:
            arguments = dict(one.arguments)
            try:
                if one.destination_type == "queue":
                    channel.queue_unbind(one.destination, one.source, one.routing_key, arguments)
                else:
                    channel.exchange_unbind(one.destination, one.source, one.routing_key, arguments)
            except ChannelClosedByBroker as closed:
                raise AccessRefused(f"removing a binding of {one.source!r}: {closed.reply_text}") from closed

    on_some_node(broker_settings, name, visit)


def purge(broker_settings: BrokerSettings, queue: str, *, name: str = "purge") -> int:
    """Delete the messages that wait in a queue; what a consumer holds stays (AMQP 0-9-1, queue.purge). Their number.

    Raises ConfigError when there is no such queue, AccessRefused without the permission to read it, BrokerUnreachable
    when no node answers.
    """

    def visit(connection: pika.BlockingConnection, vhost: str) -> int:
        try:
            return int(connection.channel().queue_purge(queue).method.message_count)
        except ChannelClosedByBroker as closed:
            kind = AccessRefused if closed.reply_code == 403 else ConfigError
            raise kind(f"purging queue {queue!r} in virtual host {vhost!r}: {closed.reply_text}") from closed

    return on_some_node(broker_settings, name, visit)


# --- declaring -------------------------------------------------------------------------------------------------------


class _Declaring:
    """One visit: declares in order, collects what is wrong, raises it at the end."""

    def __init__(self, connection: pika.BlockingConnection, vhost: str, passive: bool) -> None:
        self._channels = Channels(connection)
        self._vhost = vhost
        self._passive = passive
        self._configured = 0
        #: Kinds ("exchange", "queue") of which the user may not configure something. They are looked up first from
        #: then on, or each start of a worker would leave a page of errors in the broker's log.
        self._reserved: set[str] = set()
        self._conflicts: list[list[Conflict]] = []
        self._invalid: list[str] = []
        self._missing: list[str] = []
        self._refused: list[str] = []
        #: What this user may not even ask for.
        self._hidden: list[str] = []

    def run(self, topology: Topology) -> None:
        step = self._check if self._passive else self._declare
        for exchange in topology.exchanges:
            step(exchange)
        for queue in topology.queues:
            step(queue)
        if len(self._hidden) == len(topology.exchanges) + len(topology.queues):
            self._refused.append(
                f"the user has no permission here: {self._hidden[0]}. Give the user what its role needs "
                "(`amqptasks topology permissions`), or configure permission to make it all"
            )
        self._raise_problems()
        if not self._passive:
            self._bind_all(topology.bindings)
            self._raise_problems()

    def _declare(self, entity: Exchange | Queue) -> None:
        kind = _kind(entity)
        if kind in self._reserved and self._exists(entity):
            return
        try:
            _send_declare(self._channels.get(), entity)
        except ChannelClosedByBroker as closed:
            if closed.reply_code == 403:
                self._declare_refused(entity, closed.reply_text)
            else:
                self._note(entity, closed)
        else:
            self._configured += 1

    def _declare_refused(self, entity: Exchange | Queue, reply_text: str) -> None:
        kind = _kind(entity)
        self._reserved.add(kind)
        if not self._exists(entity):
            self._refused.append(
                f"the {kind} {entity.name!r} does not exist, and the user may not make it: {reply_text}. "
                f"Give the user configure permission on it{_more_permissions(entity)}, or make it with another user"
            )

    def _exists(self, entity: Exchange | Queue) -> bool:
        """Whether the broker holds an entity of that name.

        Before RabbitMQ 4.3 every user may ask; 4.3.0 wants configure permission on it, later ones any permission. What
        may not be asked for belongs to somebody else, who has made it: a worker needs no permission on what only the
        broker publishes to.
        """
        try:
            _send_passive(self._channels.get(), entity)
        except ChannelClosedByBroker as closed:
            if closed.reply_code == 403:
                self._hide(entity, closed.reply_text)
            elif closed.reply_code != 404:
                self._note(entity, closed)
            return bool(closed.reply_code != 404)
        return True

    def _hide(self, entity: Exchange | Queue, reply_text: str) -> None:
        logger.info("%s %r may not be looked up; taken as made already", _kind(entity), entity.name)
        self._hidden.append(f"the {_kind(entity)} {entity.name!r} may not be looked up: {reply_text}")

    def _check(self, entity: Exchange | Queue) -> None:
        try:
            _send_passive(self._channels.get(), entity)
        except ChannelClosedByBroker as closed:
            kind = _kind(entity)
            if closed.reply_code == 404:
                self._missing.append(f"{kind} {entity.name!r}")
            elif closed.reply_code == 403:
                self._hide(entity, closed.reply_text)
            else:
                self._note(entity, closed)

    def _note(self, entity: Exchange | Queue, closed: ChannelClosedByBroker) -> None:
        conflict = parse_conflict(entity, closed.reply_text)
        if conflict is not None:
            self._note_conflicts(entity, self._differences(conflict))
        elif closed.reply_code == 405:  # RESOURCE_LOCKED
            self._conflicts.append([Conflict(entity, "exclusive", declared="false", live="true")])
        else:
            self._invalid.append(f"{entity.origin or entity.name}: the broker refuses it: {closed.reply_text}")

    def _note_conflicts(self, entity: Exchange | Queue, found: list[Conflict]) -> None:
        defaults = entity.defaults if isinstance(entity, Queue) else frozenset()
        serious = [conflict for conflict in found if conflict.argument not in defaults]
        if serious:
            self._conflicts.append(telling(serious))
            return
        for conflict in found:
            logger.info("queue %r has %s=%s; taken as it is", entity.name, conflict.argument, conflict.live)

    def _differences(self, first: Conflict) -> list[Conflict]:
        """All arguments that differ. The broker names one an answer, so ask on with its live values until it agrees.

        Nothing is made by this: the entity exists, and the last question declares it as it is.
        """
        found = [first]
        while len(found) < MAX_DIFFERENCES:
            entity = adopted(found[-1])
            if entity is None:
                break
            try:
                _send_declare(self._channels.get(), entity)
                break
            except ChannelClosedByBroker as closed:
                following = parse_conflict(entity, closed.reply_text)
                if following is None or following.argument in [conflict.argument for conflict in found]:
                    break
                found.append(following)
        return found

    def _bind_all(self, bindings: Iterable[Binding]) -> None:
        for binding in bindings:
            try:
                _send_bind(self._channels.get(), binding)
            except ChannelClosedByBroker as closed:
                if closed.reply_code == 403:
                    logger.info("binding %s: %s; taken as made already", _describe(binding), closed.reply_text)
                    if self._configured == 0:
                        return  # A topology made by somebody else: the other bindings would be refused as well.
                else:
                    self._invalid.append(f"{binding.origin}: binding {_describe(binding)}: {closed.reply_text}")

    def _raise_problems(self) -> None:
        texts = [explain(conflicts, self._vhost) for conflicts in self._conflicts] + self._invalid
        texts += self._refused
        if self._missing:
            texts.append(
                f"virtual host {self._vhost!r} lacks {', '.join(self._missing)}. Make them with "
                "`amqptasks topology apply`, or set topology.declare: true"
            )
        message = "\n".join(texts)
        if self._conflicts:
            first = self._conflicts[0][0]
            raise TopologyConflict(
                message,
                entity=first.entity.name,
                argument=first.argument,
                declared=first.declared,
                live=first.live,
            )
        if self._invalid or self._missing:
            raise ConfigError(message)
        if self._refused:
            raise AccessRefused(message)


def _kind(entity: Exchange | Queue) -> str:
    return "exchange" if isinstance(entity, Exchange) else "queue"


def _describe(binding: Binding) -> str:
    return f"{binding.source!r} -> {binding.destination_type} {binding.destination!r} by {binding.routing_key!r}"


def _more_permissions(entity: Exchange | Queue) -> str:
    """Declaring a dead-letter or alternate exchange takes more (RabbitMQ, access control)."""
    table = dict(entity.arguments)
    target = table.get("x-dead-letter-exchange") or table.get("alternate-exchange")
    return f" (with read on it and write on {target!r})" if target else ""


def _send_declare(channel: BlockingChannel, entity: Exchange | Queue) -> None:
    if isinstance(entity, Exchange):
        channel.exchange_declare(
            entity.name,
            entity.type,
            durable=entity.durable,
            auto_delete=entity.auto_delete,
            internal=entity.internal,
            arguments=dict(entity.arguments),
        )
    else:
        channel.queue_declare(
            entity.name,
            durable=entity.durable,
            exclusive=entity.exclusive,
            auto_delete=entity.auto_delete,
            # pika's blocking connection keeps what the server said of itself to itself.
            arguments=accepted_arguments(entity, channel.connection._impl.server_properties),
        )


def _send_passive(channel: BlockingChannel, entity: Exchange | Queue) -> None:
    if isinstance(entity, Exchange):
        channel.exchange_declare(entity.name, entity.type, passive=True)
    else:
        channel.queue_declare(entity.name, passive=True)


def _send_bind(channel: BlockingChannel, binding: Binding) -> None:
    arguments = dict(binding.arguments)
    if binding.destination_type == "exchange":
        channel.exchange_bind(binding.destination, binding.source, binding.routing_key, arguments=arguments)
    else:
        channel.queue_bind(binding.destination, binding.source, binding.routing_key, arguments=arguments)
