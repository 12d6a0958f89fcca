"""An application that listens to every signal, and writes what it hears into a file."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from amqptasks import AmqpTasks, Reject, Task, signals
from amqptasks.request import current_request
from amqptasks.signals import Signal
from integration.apps.hearing import FILE, write

app = AmqpTasks("listening")


def listen(signal: Signal) -> None:
    def handler(sender: Any = None, **named: Any) -> None:
        request = named.get("request") or current_request()
        write(
            signal.name,
            sender=getattr(sender, "name", None) or getattr(sender, "hostname", None) or sender,
            arguments=sorted(set(named) - {"signal"}),
            missing=sorted(set(signal.arguments) - set(named)),
            id=named.get("task_id") or getattr(request, "id", None) or named.get("id"),
            state=named.get("state"),
            how=named.get("how"),
            expired=named.get("expired"),
            terminated=named.get("terminated"),
            signum=named.get("signum"),
            error=repr(named.get("exception") or named.get("exc")),
        )
        raise RuntimeError(f"the handler of {signal.name} is broken")

    signal.connect(handler, weak=False)


if FILE in os.environ:
    for one in list(vars(signals).values()):
        if isinstance(one, Signal) and one.name != "setup_logging":
            listen(one)


class Loud(Task[..., Any]):
    """Writes which hook was called."""

    def before_start(self, task_id: Any, args: Any, kwargs: Any) -> None:
        write("before_start", id=task_id)

    def on_success(self, retval: Any, task_id: Any, args: Any, kwargs: Any) -> None:
        write("on_success", id=task_id, value=retval)
        if kwargs.get("hook") == "dies":
            os.kill(os.getpid(), signal.SIGKILL)

    def on_failure(self, exc: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        write("on_failure", id=task_id, error=repr(exc))
        raise ValueError("a broken hook")

    def after_return(self, status: Any, retval: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        write("after_return", id=task_id, state=status)


@app.task(base=Loud, bind=True, default_retry_delay=0.1, max_retries=1, time_limit=20.0)
def act(self: Any, how: str = "", hook: str = "") -> str:
    write("act", id=self.request.id, colour=self.request.headers.get("x-colour"))
    if how == "retry":
        raise self.retry(exc=KeyError("again"))
    if how == "reject":
        raise Reject("no")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "sleep":
        time.sleep(60)
    if how:
        raise ValueError(how)
    return "value"


@app.task(base=Loud)
async def wait() -> str:
    return "waited"


@signals.before_task_publish.connect
def paint(headers: dict[str, Any], **kwargs: Any) -> None:
    headers["x-colour"] = "red"
