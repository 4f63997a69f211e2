"""Shows the demo: every task as it happens on a terminal, as finished blocks anywhere else."""

import json
import textwrap
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from foam.demo.recording import Recording
from foam.demo.traces import Summary, Trace

__all__ = ["DemoView"]

_PLAIN_WIDTH: Final = 100
_TERMINAL_WIDTH: Final = 110
_INDENT: Final = " " * 7
_ANSWER_LINES: Final = 2


class DemoView:
    """Writes to a console; used from the event loop alone.

    On a terminal the tasks under way stand at the bottom with their answers growing; a finished
    task moves up as a block of three lines. Elsewhere only the blocks are written.

    Args:
        console: Where to write; None means stdout, at most 110 columns wide.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or self._default_console()
        self._live: Live | None = None
        self._open: dict[str, Trace] = {}

    @staticmethod
    def _default_console() -> Console:
        probe = Console()
        if probe.is_terminal:
            return Console(width=min(probe.width, _TERMINAL_WIDTH), highlight=False)
        return Console(width=_PLAIN_WIDTH, highlight=False)

    def __enter__(self) -> Self:
        """Begin to show tasks under way, on a terminal."""
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=12, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Clear the tasks under way."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, sentence: str, style: str = "dim") -> None:
        """Write one sentence of the conductor."""
        self._console.print(Text(sentence, style=style))

    def plant(self, recording: Recording, facts: Mapping[str, Any]) -> None:
        """Introduce the mesh and the shift.

        Args:
            recording: What will be played.
            facts: Fields of the ``FOAM READY`` line.
        """
        console = self._console
        console.print(Text(f"mesh at {facts['broker']}", style="bold"), end="  ")
        console.print(Text(f"nodes: {', '.join(facts.get('nodes', ()))}", style="dim"))
        planted = ", ".join(f"{fault['machine']} {fault['fault']}" for fault in recording.faults)
        console.print(Text(f"planted faults: {planted}", style="dim"))
        console.print(
            Text(
                f"{len(recording.devices)} devices, each a process that only speaks MQTT 3.1.1, "
                f"ask {len(recording.texts)} tasks",
                style="dim",
            )
        )
        console.print()

    def progress(self, trace: Trace, clock: str) -> None:
        """Show a task that began, grew or ended.

        Args:
            trace: The task.
            clock: Time of day in the shift, ``HH:MM``.
        """
        if trace.ended:
            self._open.pop(trace.task, None)
            self._console.print(self._block(trace, clock))
        else:
            self._open[trace.task] = trace
        if self._live is not None:
            self._live.update(Group(*(self._growing(one) for one in self._open.values())))

    def summary(self, summary: Summary) -> None:
        """Show what it came to."""
        table = Table(title="what the devices saw", title_style="bold", title_justify="left")
        table.add_column("node")
        for name in ("tasks", "right", "first p50", "first p95", "total p50", "total p95"):
            table.add_column(name, justify="right")
        for node, count, right, *times in summary.rows:
            table.add_row(node, str(count), str(right), *(f"{ms:.0f} ms" for ms in times))
        self._console.print(table)
        if summary.tokens_per_s:
            self._console.print(
                Text(
                    f"language node: {summary.tokens_per_s:.0f} tokens/s while running", style="dim"
                )
            )
        verdict = f"{summary.right} of {summary.tasks} right, {summary.wrong} wrong, "
        verdict += f"{summary.missing} missing"
        self._console.print(Text(verdict, style="bold green" if summary.passed else "bold red"))

    def _block(self, trace: Trace, clock: str) -> Group:
        mark = "right" if trace.verdict.right else "WRONG"
        style = "green" if trace.verdict.right else "bold red"
        head = Text.assemble(
            (f"{clock}  ", "dim"), (f"{trace.device:<13}", "bold cyan"), trace.text
        )
        way = Text.assemble(
            _INDENT,
            (f"{trace.node or 'nobody'}/{trace.function or '-'}", "magenta"),
            f"  score {trace.score:.2f}" if trace.score is not None else "",
            f"  first {trace.first_ms:.0f} ms" if trace.first_ms is not None else "",
            f"  total {trace.total_ms:.0f} ms" if trace.total_ms is not None else "",
            "  ",
            (mark, style),
        )
        lines: list[Text] = [head, way, self._wrapped(self._answer(trace))]
        if not trace.verdict.right:
            reason = self._wrapped(trace.verdict.reason)
            reason.stylize("red")
            lines.append(reason)
        for line in (head, way):
            line.truncate(self._console.width, overflow="ellipsis")
        return Group(*lines, Text(""))

    def _growing(self, trace: Trace) -> Text:
        line = Text.assemble(
            (f"{_INDENT}{trace.device:<13}", "cyan"),
            (f"{trace.function or 'being matched'}  ", "magenta"),
            trace.streamed,
            ("▌", "blink"),
        )
        line.truncate(self._console.width, overflow="ellipsis")
        return line

    def _answer(self, trace: Trace) -> str:
        output = trace.output
        if isinstance(output, str):
            return output
        if isinstance(output, dict):
            if output.get("quote"):
                return f"[{output['section']} {output['title']}] {output['quote']}"
            if output.get("explanation"):
                return ": ".join(filter(None, (output.get("finding"), output["explanation"])))
        return json.dumps(output) if output is not None else ""

    def _wrapped(self, text: str) -> Text:
        room = self._console.width - len(_INDENT)
        lines = textwrap.wrap(text, room, max_lines=_ANSWER_LINES, placeholder=" …")
        return Text("\n".join(_INDENT + line for line in lines))
