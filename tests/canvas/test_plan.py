"""What a composition becomes: which tasks are sent first, and what travels in their messages."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import count
from typing import Any, ClassVar

import celery
import pytest
from celery import canvas as celery_canvas
from hypothesis import given, settings
from hypothesis import strategies as st

from amqptasks import Signature, chain, chord, chunks, group, signature
from amqptasks.canvas import from_dict, starmap, xmap
from amqptasks.canvas.plan import COLLECT, JOIN, casualties, expand, freeze, normal, part_of, replaced


def task(name: str, *args: Any, immutable: bool = False, **options: Any) -> Signature:
    return Signature(name, args, options=options, immutable=immutable)


def planned(one: Signature, *args: Any) -> tuple[list[Signature], Any]:
    numbers = count(1)
    made = normal(one)
    handle = freeze(made, lambda: f"id{next(numbers)}", common={"reply_to": "reply"})
    return expand(made, args), handle


def names(tables: Any) -> list[str]:
    return [one["task"] for one in tables or ()]


a, b, c, d = (task(name) for name in "abcd")


def test_a_chain_sends_its_first_and_carries_the_rest_reversed():
    (first,), handle = planned(a | b | c)
    assert (first.task, first.options["task_id"], names(first.options["chain"])) == ("a", "id1", ["c", "b"])
    assert [one["options"]["task_id"] for one in first.options["chain"]] == ["id3", "id2"]
    assert all(one["options"]["reply_to"] == "reply" for one in first.options["chain"])
    assert handle == (("id3", (("id2", (("id1", None), None)), None)), None)


def test_chains_in_chains_are_one_chain():
    for whole in (chain(a, chain(b, c), d), (a | b) | (c | d), chain([a, b, c, d]), chain(chain(chain(a, b), c), d)):
        (first,), _ = planned(whole)
        assert names(first.options["chain"]) == ["d", "c", "b"]


def test_a_group_sends_all_and_nested_groups_are_one():
    sent, handle = planned(group(a, group(b, group(c))))
    assert [(one.task, one.options["group_id"], one.options["group_index"]) for one in sent] == [
        ("a", "id1", 0),
        ("b", "id1", 1),
        ("c", "id1", 2),
    ]
    assert handle == (("id1", None), [(("id2", None), None), (("id3", None), None), (("id4", None), None)])


def test_what_follows_a_group_is_the_body_of_a_chord():
    for whole in (group(a, b) | c | d, chain(group(a, b), c, d), chord([a, b], c) | d, chord(group(a, b), chain(c, d))):
        sent, handle = planned(whole)
        assert [one.task for one in sent] == ["a", "b"]
        table = sent[0].options["chord"]
        assert (table["chord_size"], table[JOIN]) == (2, sent[0].options["group_id"])
        body = from_dict(table)
        (following,) = expand(body, ([1, 2],))
        assert (following.task, following.args, names(following.options["chain"])) == ("c", ([1, 2],), ["d"])
        assert handle[0][0] == following.options["chain"][0]["options"]["task_id"]


def test_a_part_that_ends_in_a_group_is_collected_so_that_it_has_one_result():
    sent, _ = planned(chord([a | group(b, c)], d))
    (inner,) = sent[0].options["chain"]
    assert inner["subtask_type"] == "chord"
    assert inner["kwargs"]["body"]["task"] == COLLECT
    assert inner["options"]["chord"]["task"] == "d"
    following = expand(from_dict(inner), (42,))
    assert [one.task for one in following] == ["b", "c"]
    collect = following[0].options["chord"]
    assert collect["options"]["chord"]["task"] == "d"
    assert part_of(collect["options"]).number == 0


def test_partial_arguments_go_to_the_first_and_options_to_all():
    (first,), _ = planned((task("a", 2) | b).clone((1,)))
    assert first.args == (1, 2)
    sent, _ = planned(group(task("a", 2), task("b", immutable=True)).clone((1,)))
    assert [one.args for one in sent] == [(1, 2), ()]
    sent, _ = planned(chord([a, b], c).clone((1,), queue="email", priority=3))
    assert [(one.args, one.options["queue"], one.options["priority"]) for one in sent] == [((1,), "email", 3)] * 2
    assert sent[0].options["chord"]["options"]["queue"] == "email"
    (first,), _ = planned((a | task("b", queue="own")).clone(queue="email", countdown=5, task_id="mine"))
    assert (first.options["queue"], first.options["countdown"]) == ("email", 5)
    (last,) = first.options["chain"]
    assert (last["options"]["queue"], last["options"]["task_id"], "countdown" in last["options"]) == (
        "own",
        "mine",
        False,
    )


def countdowns(one: Signature) -> dict[str, float | None]:
    sent, _ = planned(one)
    return {f"{found.task}{number}": found.options.get("countdown") for number, found in enumerate(sent)}


def test_countdown_and_eta_are_for_all_that_is_sent_first():
    five = {"a0": 5, "b1": 5}
    assert countdowns(group(a, b).clone(countdown=5)) == five
    assert countdowns(group(a, group(b)).clone(countdown=5)) == five
    assert countdowns((group(a, b) | c).clone(countdown=5)) == five
    assert countdowns((group(a, b) | c | d).clone(countdown=5)) == five
    assert countdowns(chord([a, b], c).clone(countdown=5)) == five
    assert countdowns(chain(group(a, b).set(countdown=5), c)) == five
    assert countdowns(group(a | c, b).clone(countdown=5)) == five
    assert countdowns(group(group(a, b) | c, chord([d], c)).clone(countdown=5)) == {**five, "d2": 5}
    assert countdowns(chord([group(a, b) | c], d).clone(countdown=5)) == five
    assert countdowns((a | b).clone(countdown=5)) == {"a0": 5}
    assert countdowns(chord([], c).clone(countdown=5)) == {"c0": 5}
    chunked = chunks(a, [(1,), (2,)], 1).clone(countdown=5)
    assert countdowns(chunked) == {"celery.starmap0": 5, "celery.starmap1": 5}
    # What says its own time keeps it.
    assert countdowns(group(task("a", countdown=1), b).clone(countdown=5)) == {"a0": 1, "b1": 5}
    later = datetime(2030, 1, 1, tzinfo=UTC)
    sent, _ = planned(group(task("a", countdown=1), b).clone(eta=later))
    assert [(one.options.get("eta"), one.options.get("countdown")) for one in sent] == [(None, 1), (later, None)]
    # A body, and what follows in a chain, is not delayed with it.
    (first, _), _ = planned((group(a, b) | c).clone(countdown=5))
    assert "countdown" not in first.options["chord"]["options"]
    (first,), _ = planned(chain(a, group(b, c).set(countdown=3), d))
    (table,) = first.options["chain"]
    assert [one.options["countdown"] for one in expand(from_dict(table), (1,))] == [3, 3]


def test_compositions_are_sent_by_calling_them():
    class Desk:
        """Keeps what is sent."""

        sent: ClassVar[list[tuple[Signature, tuple[Any, ...], dict[str, Any]]]] = []

        def apply_signature(self, one: Signature, args: Any, kwargs: Any) -> str:
            self.sent.append((one, tuple(args), dict(kwargs)))
            return "handle"

    one = Signature("a", sender=Desk())
    for workflow in (chain(one, b), group(one, b), chord([one], b), chunks(one, [(1,)], 1), one.clone() | b):
        assert workflow() == "handle"
        assert Desk.sent.pop() == (workflow, (), {})
    assert chain(one, b)(1, k=2) == "handle"
    assert Desk.sent.pop()[1:] == ((1,), {"k": 2})
    assert group(one, b)(1, k=2) == "handle"
    assert Desk.sent.pop()[1:] == ((1,), {"k": 2})


def test_links_stand_at_the_end_and_errbacks_everywhere():
    whole = (a | b).clone()
    whole.link(c)
    whole.link_error(d)
    (first,), _ = planned(whole)
    assert "link" not in first.options
    assert [one.task for one in first.options["link_error"]] == ["d"]
    (last,) = first.options["chain"]
    assert (names(last["options"]["link"]), names(last["options"]["link_error"])) == (["c"], ["d"])
    sent, _ = planned(chord([a, b], c).on_error(d))
    assert "link_error" not in sent[0].options
    assert names(sent[0].options["chord"]["options"]["link_error"]) == ["d"]


def test_an_empty_header_sends_the_body():
    ((sent,), _) = planned(chord([], c))
    assert (sent.task, sent.args) == ("c", ([],))
    assert planned(group()) == ([], (("id1", None), []))
    with pytest.raises(ValueError, match="empty chain"):
        planned(chain())
    with pytest.raises(ValueError, match="no body"):
        planned(chord([a]))


def test_chunks_are_a_group_of_starmaps_and_map_is_one_task():
    sent, _ = planned(chunks(task("add"), [(1, 2), (3, 4), (5, 6)], 2))
    assert [(one.task, one.kwargs["it"]) for one in sent] == [
        ("celery.starmap", [(1, 2), (3, 4)]),
        ("celery.starmap", [(5, 6)]),
    ]
    ((one,), _) = planned(xmap(task("add"), range(3)))
    assert (one.task, one.kwargs["it"], one.kwargs["task"]["task"]) == ("celery.map", [0, 1, 2], "add")
    with pytest.raises(ValueError, match="at least 1"):
        chunks(a, [], 0)


def test_a_signature_is_not_changed_by_sending_it():
    whole = chord([a | b, group(c, d)], c) | d
    before = whole.to_dict()
    planned(whole, 1)
    assert whole.to_dict() == before


def test_what_replaces_a_task_ends_with_its_id_and_what_followed_it():
    follow = {"task_id": "old", "chain": [c.to_dict()], "chord": {"task": "body"}, "group_id": "g", "group_index": 1}
    made = replaced(a | b, {**follow, "link": None, "link_error": [d.to_dict()]})
    freeze(made, lambda: "new")
    (first,) = expand(made)
    (last,) = first.options["chain"]
    assert (first.options["task_id"], last["options"]["task_id"]) == ("new", "old")
    assert names(last["options"]["chain"]) == ["c"]
    assert part_of(last["options"]).group_id == "g"
    assert names(last["options"]["link_error"]) == ["d"]


def test_a_failure_names_all_that_does_not_run_any_more():
    (first,), _ = planned(chain(a, b, chord([c, d], task("e"))))
    never, lost = casualties(first.options["chain"], None)
    assert ([one.task for one in never], lost) == (["b", "c", "d", "e"], None)
    sent, _ = planned(chord([a | b, c], d))
    never, lost = casualties(sent[0].options["chain"], None)
    assert [one.task for one in never] == ["b"]
    assert lost is not None
    assert (lost.body["task"], lost.number) == ("d", 0)


# --- Celery's form ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def their_app():
    return celery.Celery("theirs", broker="memory://", set_as_current=False)


def test_our_form_is_celerys(their_app):
    theirs = {name: celery_canvas.Signature(name, (1,), {"k": 2}, app=their_app) for name in "ab"}
    for name, one in theirs.items():
        ours = Signature(name, (1,), {"k": 2})
        assert {key: ours.to_dict()[key] for key in one} == {**one, "args": [1]}
    for kind in ("chain", "group"):
        built = getattr(celery_canvas, kind)(*theirs.values(), app=their_app)
        ours = from_dict(json.loads(json.dumps(built)))
        assert ours.subtask_type == kind
        assert [one.task for one in ours.tasks] == ["a", "b"]
        assert celery_canvas.Signature.from_dict(ours.to_dict(), app=their_app).tasks[0]["task"] == "a"
    built = celery_canvas.chord([theirs["a"]], theirs["b"], app=their_app)
    ours = from_dict(json.loads(json.dumps(built)))
    assert ([one.task for one in ours.header.tasks], ours.body.task) == (["a"], "b")


def test_nonsense_is_no_signature():
    for value in ({}, {"task": 5}, "abc", None, []):
        with pytest.raises(ValueError, match="not a signature"):
            from_dict(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"write task\.s"):
        group(a, lambda: None)  # type: ignore[arg-type]


# --- property --------------------------------------------------------------------------------------------------------

leaves = st.sampled_from("abcde").map(Signature)
signatures = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(chain),
        st.lists(inner, min_size=1, max_size=3).map(group),
        st.tuples(st.lists(inner, min_size=1, max_size=3), inner).map(lambda both: chord(both[0], both[1])),
    ),
    max_leaves=12,
)


class Simulation:
    """Runs a composition as workers would, with the sum of all arguments as each task's value."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.joins: dict[str, dict[int, Any]] = {}
        self.results: dict[str, Any] = {}

    def run(self, tasks: list[Signature]) -> None:
        for one in tasks:
            self.ran.append(one.task)
            value = one.args[0] if one.task == COLLECT else [one.task, *one.args]
            self.results[one.options["task_id"]] = value
            rest = list(one.options.get("chain") or ())
            if rest:
                following = from_dict(rest.pop())
                if rest:
                    following.options["chain"] = [*rest, *(following.options.get("chain") or [])]
                made = normal(following)
                assert freeze(made, lambda: pytest.fail("every id is known before"))
                self.run(expand(made, (value,)))
            part = part_of(one.options)
            if part is not None:
                parts = self.joins.setdefault(part.group_id, {})
                assert part.number not in parts
                parts[part.number] = value
                assert len(parts) <= part.body["chord_size"]
                if len(parts) == part.body["chord_size"]:
                    self.run(expand(from_dict(part.body), ([parts[n] for n in sorted(parts)],)))


@settings(max_examples=300, deadline=None)
@given(signatures)
def test_in_every_composition_each_task_runs_once_and_every_handle_gets_a_result(whole: Signature):
    leaves = sorted(one.task for one in whole.walk() if one.subtask_type is None)
    sent, handle = planned(whole)
    simulation = Simulation()
    simulation.run(sent)
    assert sorted(name for name in simulation.ran if name != COLLECT) == leaves

    def check(node: Any) -> None:
        (identifier, parent), children = node
        if children is None:
            assert identifier in simulation.results
        for child in children or ():
            check(child)
        if parent is not None:
            check(parent)

    check(handle)
    for sub in signature(whole).walk():
        assert from_dict(sub.to_dict()).to_dict() == sub.to_dict()
    assert starmap(a, [(1,)]).to_dict()["task"] == "celery.starmap"


def test_a_stamp_is_on_every_task_and_callback_of_a_composition() -> None:
    errback, callback = Signature("e"), Signature("c")
    whole = chain(Signature("a"), group(Signature("b"), Signature("b2")), Signature("d"))
    whole.tasks[0].link(callback).stamp(own=1)
    whole.tasks[0].link_error(errback)
    assert whole.stamp(customer="acme") is whole
    stamped = {one.task: one.options for one in whole.walk() if one.subtask_type is None}
    stamped |= {one.task: one.options for name in ("link", "link_error") for one in whole.tasks[0].linked(name)}
    assert set(stamped) == {"a", "b", "b2", "d", "c", "e"}
    assert all(one["customer"] == "acme" for one in stamped.values())
    assert stamped.pop("c")["stamped_headers"] == ["own", "customer"]
    assert all(one["stamped_headers"] == ["customer"] for one in stamped.values())
    assert "customer" not in whole.options
