"""``foam ask``: one task from the terminal, streamed."""

import asyncio
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from broker.replies import AnswerText
from capability_schemas.errors import (
    DeadlineExceeded,
    FoamError,
    InvalidTask,
    NotFound,
    TaskCancelled,
)
from capability_schemas.reply import Chunk, ErrorEvent, Result, Routed, Step, Working
from foam.cli.app import app, complain, drop_output, run_async
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import connected
from foam.settings import Settings

if TYPE_CHECKING:
    from broker.lifecycle import ProcessEnd
    from capability_schemas.reply import ReplyEvent
    from foam.sdk.client import TaskHandle
    from foam.sdk.direct import Direct

__all__ = ["EventPrinter", "ask", "read_json_option", "read_numbers"]

_CANCEL_GRACE_S: Final = 5.0
_STEP_CHARS: Final = 60

_WANTED: Final = ("text", "function", "skills", "input")
"""What says what is wanted; without any of it an id is that of a task asked before."""


def read_json_option(value: str | None, what: str) -> Any:
    """Read an option that is JSON, or ``@file`` naming a file with JSON.

    Args:
        value: The option; None gives None.
        what: Name of the option, for messages.

    Raises:
        InvalidTask: It is not JSON, or the file cannot be read.
    """
    if value is None:
        return None
    try:
        text = Path(value[1:]).read_text(encoding="utf-8") if value.startswith("@") else value
        return json.loads(text)
    except OSError as exc:
        raise InvalidTask(f"{what} {value}: {exc.strerror or exc}", field=what) from exc
    except ValueError as exc:
        raise InvalidTask(f"{what} is not JSON: {exc}", field=what) from exc


def read_numbers(given: Sequence[str] | None, what: str) -> dict[str, float | None]:
    """Read ``NAME=NUMBER`` arguments.

    Args:
        given: The arguments; ``NAME=none`` gives None.
        what: What they are, for messages.

    Raises:
        InvalidTask: One is not of that form.
    """
    numbers: dict[str, float | None] = {}
    for one in given or ():
        name, equals, value = one.rpartition("=")
        if not equals or not name:
            raise InvalidTask(f"{what} is NAME=NUMBER, not {one!r}", field=what)
        try:
            number = None if value.lower() == "none" else float(value)
        except ValueError as exc:
            raise InvalidTask(f"{what} {name}: {value!r} is no number", field=what) from exc
        if number is not None and not math.isfinite(number):
            raise InvalidTask(f"{what} {name}: {value!r} is no number", field=what)
        numbers[name] = number
    return numbers


def _read_text(text: str) -> str:
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidTask(
            f"standard input is not UTF-8 text (byte {exc.start})", field="text"
        ) from exc


class EventPrinter:
    """Shows reply events: the answer on stdout as it comes, everything about it on stderr.

    Args:
        as_json: Write every event as one JSON line on stdout instead.
        quiet: Leave stderr alone but for errors.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._text_open = False
        self._shown = False
        self._waits_for = ""
        self._answer = AnswerText()

    def show(self, event: "ReplyEvent") -> None:
        """Show one event."""
        if self._as_json:
            sys.stdout.write(event.model_dump_json(exclude_none=True) + "\n")
            sys.stdout.flush()
            return
        match event:
            case Chunk(data=str()):
                self._say_text(self._answer.add(event))
            case Chunk(data=data):
                self._say_json(data)
            case Routed(is_nobodys=True):  # the error after it tells
                pass
            case Routed():
                self._close_text()
                again = f", attempt {event.attempt}" if event.attempt > 1 else ""
                why = f" ({event.reason})" if event.reason else ""
                self._note(
                    f"-> {event.node}: {event.function} {event.version}, "
                    f"score {event.score:.2f}{again}{why}"
                )
            case Working(reason=str(reason)) if reason != self._waits_for:
                self._close_text()
                self._waits_for = reason
                self._note("   " + "".join(c if c.isprintable() else " " for c in reason), dim=True)
            case Step(state=state) if state != "running":
                self._close_text()
                self._note(_step_line(event), dim=True)
            case Result():
                self._close(event)
            case ErrorEvent():
                self._close_text()
            case _:
                pass

    def show_direct(self, direct: "Direct") -> None:
        """Say that a node was asked itself, and what nobody sees to then."""
        self._close_text()
        self._note(str(direct))

    def show_wait(self, why: str) -> None:
        """Say what the task waits for."""
        self._note(why)

    def _close(self, event: Result) -> None:
        if self._shown:
            if self._answer.begun:
                self._say_text(self._answer.add(event))
        elif isinstance(event.output, str):
            sys.stdout.write(event.output.rstrip("\n") + "\n")
        else:
            self._say_json(event.output)
        self._close_text()
        facts = []
        if event.timing is not None:
            facts.append(f"{event.timing.total_ms:.0f} ms on the node")
            if event.timing.first_ms is not None:
                facts.append(f"first output after {event.timing.first_ms:.0f} ms")
        if event.usage is not None and event.usage.output_tokens:
            facts.append(f"{event.usage.output_tokens} tokens")
        if event.confidence is not None:
            facts.append(f"confidence {event.confidence:.2f}")
        if facts:
            self._note("   " + ", ".join(facts))
        for line in _cascade_lines(event):
            self._note(line, dim=True)

    def _say_text(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._text_open = not text.endswith("\n")
            self._shown = True

    def _say_json(self, data: Any) -> None:
        self._close_text()
        sys.stdout.write(
            json.dumps(data, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None) + "\n"
        )
        sys.stdout.flush()
        self._shown = True

    def _close_text(self) -> None:
        if self._text_open:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._text_open = False

    def _note(self, line: str, *, dim: bool = False) -> None:
        if not self._quiet:
            sys.stderr.write(typer.style(line, dim=True) if dim and sys.stderr.isatty() else line)
            sys.stderr.write("\n")
            sys.stderr.flush()


def _step_line(step: Step) -> str:
    """Say in one line how a tool call of an agent, or a step of a plan, ended."""
    detail = step.detail
    arguments = detail.get("arguments")
    said = detail.get("error") if step.state in ("failed", "refused") else detail.get("result")
    took = f", {detail['ms']:.0f} ms" if isinstance(detail.get("ms"), int | float) else ""
    tool = detail.get("tool")
    given = "" if arguments is None else _short(arguments)
    what = _short(step.step) if tool is None else f"{_short(tool)}({given})"
    outcome = "" if said is None else f": {_short(said)}"
    return f"   {what} {_short(step.state)}{took}{outcome}"


def _cascade_lines(result: Result) -> list[str]:
    """Say a line on each step of a cascade, and what all of them cost."""
    steps = result.cascade or ()
    lines = []
    for number, step in enumerate(steps, 1):
        facts = [f"{step.node}: {step.function} {_short(step.version)}"]
        if step.confidence is not None:
            facts.append(f"confidence {step.confidence:.2f}")
        if step.cost:
            facts.append(f"cost {step.cost:g}")
        if step.total_ms is not None:
            facts.append(f"{step.total_ms:.0f} ms")
        if (step.node, step.function) == (result.node, result.function):
            facts.append("the answer")
        lines.append(f"   step {number}: " + ", ".join(facts))
    spent = sum(step.cost for step in steps)
    if len(steps) > 1 and spent:
        lines.append(f"   cost in all {spent:g}")
    return lines


def _short(value: Any) -> str:
    """Return a value in one short line without control characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _STEP_CHARS else text[: _STEP_CHARS - 1] + "…"


async def _follow(
    handle: "TaskHandle", printer: EventPrinter, *, asked_now: bool
) -> FoamError | None:
    failure: FoamError | None = None
    told: Direct | None = None
    heard = False
    try:
        async for event in handle:
            if handle.direct is not None and handle.direct != told:
                told = handle.direct
                printer.show_direct(told)
            printer.show(event)
            heard = True
            if isinstance(event, ErrorEvent):
                failure = event.to_error()
    except DeadlineExceeded as error:
        if asked_now or heard or error.detail.get("gone"):
            return error
        return NotFound(
            f"nothing was heard of {handle.id}: no router knows such a task of this client (any "
            "more), or it has said nothing yet; say what is wanted to ask it anew"
        )
    except FoamError as error:
        return error
    except OSError as error:  # a reader that left (EPIPE), a full disk
        drop_output()
        await handle.cancel()
        return TaskCancelled(f"cancelled: the output cannot be written: {error.strerror}")
    return failure


async def _cancel_when_asked(handle: "TaskHandle", end: "ProcessEnd") -> None:
    await end.wait()
    sys.stderr.write("\ncancelling …\n")
    await handle.cancel()


def _is_asked_now(task: dict[str, Any]) -> bool:
    return task["task_id"] is None or any(task[name] not in (None, ()) for name in _WANTED)


async def _run(
    settings: Settings, *, printer: EventPrinter, task: dict[str, Any], direct: bool
) -> int:
    from broker.lifecycle import ProcessEnd
    from foam.sdk.address import find_mesh
    from foam.sdk.client import MeshClient

    address = find_mesh(settings)
    mesh = MeshClient.at(address, direct=direct, on_wait=printer.show_wait)
    async with ProcessEnd() as end, mesh:
        asked_now = _is_asked_now(task)
        handle = await (
            mesh.submit(**task)
            if asked_now
            else mesh.follow(task["task_id"], timeout_s=task["timeout_s"])
        )
        async with asyncio.TaskGroup() as group:
            following = group.create_task(
                _follow(handle, printer, asked_now=asked_now), name="foam.cli.ask.follow"
            )
            cancelling = group.create_task(
                _cancel_when_asked(handle, end), name="foam.cli.ask.cancel"
            )
            await asyncio.wait({following, cancelling}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                await asyncio.wait({following}, timeout=_CANCEL_GRACE_S)
            following.cancel()
            cancelling.cancel()
        if following.cancelled():
            return complain(TaskCancelled("cancelled; the mesh did not confirm it in time"))
        error = following.result()
        return 0 if error is None else complain(error)


@app.command(epilog=CODES_EPILOG)
@connected()
def ask(
    settings: Settings,
    text: Annotated[
        str | None, typer.Argument(help="What is wanted, in words; - reads standard input.")
    ] = None,
    *,
    input_: Annotated[
        str | None, typer.Option("--input", help="Input for the function: JSON or @file.")
    ] = None,
    function: Annotated[
        str | None, typer.Option("--function", help="Address a function by name, or name@>=1.2.")
    ] = None,
    skills: Annotated[
        list[str] | None, typer.Option("--skills", help="Skill the function must offer.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds allowed.", min=0.0, max=86_400.0)
    ] = 60.0,
    session: Annotated[
        str | None, typer.Option("--session", help="Affinity key of a conversation.")
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(
            "--prefer", help="What decides among equals: balanced, best, cheapest or fastest."
        ),
    ] = "balanced",
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", help="Weight in place of the router's.", metavar="NAME=NUMBER"),
    ] = None,
    min_confidence: Annotated[
        float | None,
        typer.Option(
            "--min-confidence",
            help="Ask small nodes first, and stronger ones while the answer is less sure (0 to 1).",
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Demands on the node: JSON or @file.")
    ] = None,
    priority: Annotated[
        int, typer.Option("--priority", help="0 (last) to 9 (first).", min=0, max=9)
    ] = 5,
    task_id: Annotated[
        str | None,
        typer.Option("--id", help="Id of the task; the same id again gives the same outcome."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Show the answer as it comes.")
    ] = True,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Take a result only with the signature of the node that it names."
        ),
    ] = False,
    direct: Annotated[
        bool,
        typer.Option(
            "--direct/--no-direct", help="Ask a node itself when every router is gone, or wait."
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write every reply event as a JSON line.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the answer.")] = False,
) -> None:
    """Ask the mesh, and watch the answer come. Ctrl-C cancels the task.

    With --id alone it shows what became of a task that was asked before under this id.
    """
    task = {
        "text": _read_text(text) if text is not None else None,
        "input": read_json_option(input_, "input"),
        "function": function,
        "skills": tuple(skills or ()),
        "timeout_s": timeout,
        "session": session,
        "prefer": prefer,
        "weights": read_numbers(weight, "weight"),
        "min_confidence": min_confidence,
        "policy": read_json_option(policy, "policy"),
        "priority": priority,
        "task_id": task_id,
        "stream": stream,
        "verify": verify,
    }
    printer = EventPrinter(as_json=as_json, quiet=quiet)
    run_async(_run(settings, printer=printer, task=task, direct=direct))
