"""Signals: who is called, with what, in which order; and what a handler cannot break."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import pytest

from amqptasks import AmqpTasks, ConfigError, Ignore, Reject, SerializationError, Task, signals
from amqptasks.signals import ExceptionInfo, Family, Signal

EAGER = {"testing": {"always_eager": True}}
ALL = [one for one in vars(signals).values() if isinstance(one, Signal)]


@pytest.fixture(autouse=True)
def _no_handlers_of_others() -> Iterator[None]:
    """Other tests of this process have handlers of their own: they are set aside, and come back."""
    before = {signal: signal.receivers for signal in ALL}
    connected = signals.task_signals.connected
    for signal in ALL:
        signal.receivers = ()
    signals.task_signals.connected = False
    yield
    for signal in ALL:
        signal.receivers = before[signal]
    signals.task_signals.connected = connected


def test_handlers_are_called_in_their_order_with_keyword_arguments() -> None:
    signal, calls = Signal("happened", "what"), []

    def first(sender: Any = None, what: str = "", **kwargs: Any) -> str:
        calls.append(("first", sender, what, kwargs["signal"]))
        return "one"

    @signal.connect
    def second(what: str, **kwargs: Any) -> None:
        calls.append(("second", kwargs["sender"], what, kwargs["signal"]))

    signal.connect(first)
    assert signal.send(sender="me", what="x") == [(second, None), (first, "one")]
    assert calls == [("second", "me", "x", signal), ("first", "me", "x", signal)]
    assert signal.disconnect(first)
    assert not signal.disconnect(first)
    assert len(signal.send(what="y")) == 1


def test_a_handler_that_raises_is_logged_and_the_others_are_called(caplog: pytest.LogCaptureFixture) -> None:
    signal, calls = Signal("happened"), []

    @signal.connect
    def broken(**kwargs: Any) -> None:
        raise ValueError("no")

    @signal.connect
    def sound(**kwargs: Any) -> None:
        calls.append(1)

    with caplog.at_level(logging.ERROR, "amqptasks.signals"):
        answers = signal.send()
    assert isinstance(answers[0][1], ValueError)
    assert calls == [1]
    assert "A handler of happened raised" in caplog.text
    assert "broken" in caplog.text


def test_weak_handlers_go_with_their_owner_and_strong_ones_stay() -> None:
    family = Family()
    signal = Signal("happened", family=family)

    class Owner:
        def handle(self, **kwargs: Any) -> None: ...

    owner = Owner()
    signal.connect(owner.handle)
    signal.connect(lambda **kwargs: None)
    assert family.connected
    assert len(signal.receivers) == 1, "a lambda that nobody keeps is gone at once"
    del owner
    gc.collect()
    assert not signal.receivers
    assert not family.connected
    signal.connect(lambda **kwargs: None, weak=False)
    gc.collect()
    assert len(signal.send()) == 1


def test_a_sender_is_a_task_its_name_or_any_object() -> None:
    app = AmqpTasks("shop", config=EAGER)
    signal, calls = Signal("happened"), []

    @app.task(name="shop.add")
    def add() -> None: ...

    thing = object()

    def count(sender: Any = None, **kwargs: Any) -> None:
        calls.append(sender)

    for wanted in (add, thing):
        signal.connect(count, sender=wanted)
    for sender in (add, "shop.add", "shop.other", thing, object(), None):
        signal.send(sender=sender)
    assert calls == [add, "shop.add", thing]


def test_what_is_connected_twice_is_called_once() -> None:
    signal, calls = Signal("happened"), []

    def make(number: int) -> Any:
        return lambda **kwargs: calls.append(number)

    one, two = make(1), make(2)
    signal.connect(one)
    signal.connect(one)
    signal.connect(two, dispatch_uid="only")
    signal.connect(make(3), dispatch_uid="only", weak=False)
    signal.send()
    assert calls == [1, 2]
    assert signal.disconnect(dispatch_uid="only")


def test_what_cannot_be_a_handler_is_refused_at_once() -> None:
    signal = Signal("happened")

    async def later(**kwargs: Any) -> None: ...

    def narrow(sender: Any) -> None: ...

    with pytest.raises(TypeError, match="happened: a handler is a plain function"):
        signal.connect(later)
    with pytest.raises(TypeError, match=r"narrow must take \*\*kwargs"):
        signal.connect(narrow)
    with pytest.raises(TypeError, match="plain function, not 'text'"):
        signal.connect("text")  # type: ignore[call-overload]


# -- around tasks -------------------------------------------------------------------------------------------------


class Watched(Task[..., Any]):
    """Writes down what it is told."""

    max_retries = 1
    default_retry_delay = 0.0

    def __init__(self) -> None:
        self.told: list[Any] = []

    def before_start(self, task_id: Any, args: Any, kwargs: Any) -> None:
        self.told.append(("before_start", self.request.id == task_id, list(args), dict(kwargs)))
        if kwargs.get("how") == "unready":
            raise RuntimeError("not ready")

    def on_success(self, retval: Any, task_id: Any, args: Any, kwargs: Any) -> None:
        self.told.append(("on_success", retval))
        raise SystemExit(9)

    def on_failure(self, exc: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        self.told.append(("on_failure", repr(exc), type(exc).__name__ in str(einfo)))
        raise ValueError("a broken hook")

    def on_retry(self, exc: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        self.told.append(("on_retry", repr(exc)))

    def after_return(self, status: Any, retval: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        self.told.append(("after_return", str(status), einfo is None))


@pytest.fixture
def shop() -> AmqpTasks:
    app = AmqpTasks("shop", config=EAGER)

    @app.task(base=Watched, name="shop.act", bind=True)
    def act(self: Any, how: str = "") -> str:
        if how == "retry":
            raise self.retry(exc=KeyError("again"))
        if how == "ignore":
            raise Ignore
        if how == "reject":
            raise Reject("no")
        if how:
            raise ValueError(how)
        return "value"

    for name in ("task_received", "task_prerun", "task_postrun", "task_success", "task_failure", "task_retry"):

        def note(sender: Any, name: str = name, **named: Any) -> None:
            assert set(named) - {"signal"} == set(getattr(signals, name).arguments)
            sender.told.append((name, str(named.get("state", ""))))
            raise ZeroDivisionError

        getattr(signals, name).connect(note, sender="shop.act", weak=False)
    return app


def test_hooks_and_signals_come_in_celerys_order(shop: AmqpTasks) -> None:
    act = shop.tasks["shop.act"]
    assert act.delay().get() == "value"
    assert act.told == [  # type: ignore[attr-defined]
        ("task_received", ""),
        ("task_prerun", ""),
        ("before_start", True, [], {}),
        ("on_success", "value"),
        ("task_success", ""),
        ("after_return", "SUCCESS", True),
        ("task_postrun", "SUCCESS"),
    ]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            "wrong",
            [
                ("on_failure", "ValueError('wrong')", True),
                ("task_failure", ""),
                ("after_return", "FAILURE", False),
                ("task_postrun", "FAILURE"),
            ],
        ),
        (
            "unready",
            [
                ("on_failure", "RuntimeError('not ready')", True),
                ("task_failure", ""),
                ("after_return", "FAILURE", False),
                ("task_postrun", "FAILURE"),
            ],
        ),
        ("ignore", [("task_postrun", "IGNORED")]),
        ("reject", [("task_postrun", "REJECTED")]),
    ],
)
def test_each_end_of_a_task_is_told_and_no_hook_changes_it(shop: AmqpTasks, how: str, told: list[Any]) -> None:
    act = shop.tasks["shop.act"]
    handle = act.apply_async(kwargs={"how": how})
    assert act.told[3:] == told  # type: ignore[attr-defined]
    if how in ("wrong", "unready"):
        assert handle.state == "FAILURE"


def test_a_retry_is_told_and_then_the_failure(shop: AmqpTasks) -> None:
    act = shop.tasks["shop.act"]
    assert act.options.max_retries == 1, "an option of the class"
    act.delay(how="retry")
    names = [entry[0] for entry in act.told]  # type: ignore[attr-defined]
    first = ["task_received", "task_prerun", "before_start"]
    assert names == [
        *first,
        *("on_retry", "task_retry", "task_postrun"),
        *first,
        *("on_failure", "task_failure", "after_return", "task_postrun"),
    ]
    assert ("on_retry", "KeyError('again')") in act.told  # type: ignore[attr-defined]


def test_arguments_that_do_not_fit_are_a_failure_without_a_start(shop: AmqpTasks) -> None:
    act = shop.tasks["shop.act"]
    shop.apply_signature(act.s() | act.si(too="many"))  # what follows a task is checked where it would run
    own = act.told[7:]  # type: ignore[attr-defined]
    assert [entry[0] for entry in own] == ["on_failure", "task_failure"]
    assert "InvalidArguments" in own[0][1]


def test_a_task_is_a_class_with_options_and_a_run_method() -> None:
    app = AmqpTasks("shop", config=EAGER)

    class Charge(Task[..., Any]):
        name = "shop.charge"
        time_limit = 5.0

        def run(self, order: int) -> str:
            return f"{self.name} {order} {self.request.retries}"

    charge = app.register_task(Charge)
    assert charge.delay(7).get() == "shop.charge 7 0"
    assert charge.options.time_limit == 5.0
    assert charge(8) == "shop.charge 8 0"


def test_a_base_that_is_none_is_refused_by_name() -> None:
    app = AmqpTasks("shop", config=EAGER)

    class Needy(Task[..., Any]):
        def __init__(self, needed: int) -> None: ...

    class Odd(Task[..., Any]):
        max_retries = -1

    with pytest.raises(ConfigError, match=r"task shop\.a: base must be a subclass of amqptasks\.Task"):
        app.task(name="shop.a", base=dict)(lambda: None)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"task shop\.a: its base .*Needy cannot be made"):
        app.task(name="shop.a", base=Needy)(lambda: None)
    with pytest.raises(ConfigError, match=r"task shop\.a: max_retries must be"):
        app.task(name="shop.a", base=Odd)(lambda: None)
    with pytest.raises(ConfigError, match="a method `run`"):
        app.register_task(Odd)


# -- around publishing --------------------------------------------------------------------------------------------


def test_a_handler_adds_headers_to_calls_and_to_what_follows_them() -> None:
    app = AmqpTasks("shop", config=EAGER)
    seen = []

    class Colour(StrEnum):
        RED = "red"

    @app.task(bind=True, name="shop.see")
    def see(self: Any, before: Any = None) -> Any:
        seen.append((self.request.headers["x-colour"], type(self.request.headers["x-colour"])))
        return before

    @signals.before_task_publish.connect(sender="shop.see")
    def add(headers: dict[str, Any], body: Any, properties: Any, **kwargs: Any) -> None:
        headers["x-colour"] = Colour.RED
        assert body[0] in ((), [], (1,), [1], (None,))
        assert properties["correlation_id"] == headers["id"]

    (see.s(1) | see.s()).apply_async()
    assert seen == [("red", str), ("red", str)]


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("id", "other", ConfigError, "changed id"),
        ("task", "other", ConfigError, "changed task"),
        ("x-thing", object(), SerializationError, "added header 'x-thing': a object cannot be an AMQP header"),
        ("x-deep", {"a": [{"b": {1}}]}, SerializationError, r"header 'x-deep\.a\.b': a set"),
        ("x-large", 2**70, SerializationError, "x-large': .* does not fit 64 bits"),
        (7, "x", SerializationError, "header '7': a name is a string"),
        ("x" * 300, "x", SerializationError, "at most 255 bytes"),
    ],
)
def test_a_change_that_breaks_the_message_is_an_error_at_the_call(
    name: Any, value: Any, error: type[Exception], text: str
) -> None:
    app = AmqpTasks("shop", config=EAGER)
    ran = []

    @app.task(name="shop.see")
    def see() -> None:
        ran.append(1)

    @signals.before_task_publish.connect
    def spoil(headers: dict[Any, Any], **kwargs: Any) -> None:
        headers[name] = value

    with pytest.raises(error, match=text):
        see.delay()
    assert ran == []


def test_a_callers_own_header_is_not_blamed_on_a_handler() -> None:
    app = AmqpTasks("shop", config=EAGER)

    @app.task(name="shop.see")
    def see() -> None: ...

    @signals.before_task_publish.connect
    def watch(**kwargs: Any) -> None: ...

    with pytest.raises(SerializationError, match=r"^task shop.see: header 'trace': a object"):
        see.apply_async(headers={"trace": object()})


def test_exception_info_has_celerys_attributes() -> None:
    try:
        raise ValueError("x")
    except ValueError as error:
        info = ExceptionInfo(error)
    assert (info.type, info.exception.args, info.tb is not None) == (ValueError, ("x",), True)
    assert str(info).startswith("Traceback")
    assert "ValueError: x" in info.traceback
