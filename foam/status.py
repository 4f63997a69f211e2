"""How a ``foam`` process says where it stands: to a person, or to the supervisor that started it.

To a person: ``FOAM BROKER READY {json}`` on stdout, everything else in words on stderr. To a
supervisor: one JSON object per line on stdout, ``{"status": "ready" | "waiting" | "failed", …}``.
Losing the reader (the supervisor was killed) never disturbs the process: it ends by its parent
watch, in order.
"""

import contextlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

from capability_schemas.errors import FoamError
from capability_schemas.wire import parse_json

__all__ = ["ProcessStatus", "StatusLine", "parse_status"]


@dataclass(frozen=True, slots=True)
class StatusLine:
    """One report of a supervised process.

    Attributes:
        status: Where it stands.
        facts: Fields of the report; ``message`` and ``code`` for a failure.
    """

    status: Literal["ready", "waiting", "failed"]
    facts: dict[str, Any] = field(default_factory=dict)


class ProcessStatus:
    """The reporting end in the process itself.

    Args:
        title: What it is: ``broker``, ``router`` …
        supervised: Whether a supervisor reads stdout.
        out: Stream of the reports; None means stdout.
        err: Stream of words for people; None means stderr.
    """

    def __init__(
        self, *, title: str, supervised: bool, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self.supervised = supervised
        self._title = title
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err

    def ready(self, **facts: Any) -> None:
        """Say that it serves.

        Args:
            facts: What the reader needs to use it; JSON values.
        """
        if self.supervised:
            self._report("ready", facts)
        else:
            self._write(self._out, f"FOAM {self._title.upper()} READY {json.dumps(facts)}")

    def waiting(self, message: str) -> None:
        """Say what it waits for, in one sentence."""
        if self.supervised:
            self._report("waiting", {"message": message})
        else:
            self._write(self._err, f"foam {self._title}: {message}")

    def failed(self, error: FoamError) -> None:
        """Say why it ends; the exit code says it again."""
        if self.supervised:
            self._report("failed", {"message": error.message, "kind": type(error).__name__})
        else:
            self._write(self._err, f"foam {self._title}: {error.message}")

    def _report(self, status: str, facts: dict[str, Any]) -> None:
        self._write(self._out, json.dumps({"status": status, **facts}))

    @staticmethod
    def _write(stream: TextIO, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the reader is gone: see the module's docstring
            stream.write(line + "\n")
            stream.flush()


def parse_status(line: bytes) -> StatusLine | None:
    """Read one line of a supervised process.

    Returns:
        The report; None for a line that is none (something in the process printed).
    """
    try:
        value = parse_json(line)
    except FoamError:
        return None
    if not isinstance(value, dict) or value.get("status") not in {"ready", "waiting", "failed"}:
        return None
    status = value.pop("status")
    return StatusLine(status=status, facts=value)
