"""What a program writes, as the answer of a function: shared by ``command`` and ``wasm``.

A program gets one JSON document on its standard input. What it writes to its standard output is
the answer, in one of three kinds:

==========  ==============================  =====================================================
kind        pieces                          output
==========  ==============================  =====================================================
``text``    lines, as they come             everything that was written, unchanged
``jsonl``   the value of every line         the list of the values
``json``    none                            the value of the whole
==========  ==============================  =====================================================

Exit status 0 is success; 65 (``EX_DATAERR`` of sysexits.h) says that the input is at fault.
"""

import codecs
import json
import signal
import sys
from collections import deque
from typing import Any, Final, Literal

from node_agent.worker.base import Emit, InvocationError, Request
from node_agent.worker.frames import to_json

OutputKind = Literal["text", "json", "jsonl"]

DATA_ERROR: Final = 65
"""Exit status of a program that refuses its input (``EX_DATAERR``, sysexits.h)."""

_TEXT_LIMIT: Final = 16 * 1024
"""Characters of an unfinished line after which it becomes a piece as it is."""

_TAIL_LINES: Final = 5
_TAIL_LINE_LIMIT: Final = 500


def input_document(request: Request) -> bytes:
    """Return what a program reads: its effective input as one line of JSON."""
    return to_json(request.input).encode("utf-8", errors="replace") + b"\n"


class ProgramOutput:
    """Turns the bytes of one call into pieces and an output; one thread at a time.

    Args:
        request_id: The call.
        kind: How to read the bytes.
        limit_bytes: Most bytes taken.
        emit: Sends a frame.
    """

    def __init__(self, *, request_id: str, kind: OutputKind, limit_bytes: int, emit: Emit) -> None:
        self._id = request_id
        self._kind = kind
        self._limit_bytes = limit_bytes
        self._emit = emit
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._size_bytes = 0
        self._pending = ""
        self._texts: list[str] = []
        self._values: list[Any] = []

    def feed(self, data: bytes) -> None:
        """Take what was written.

        Raises:
            InvocationError: ``too_large``: more than the limit; ``execution_failed``: a line that
                should be JSON is not.
        """
        self._size_bytes += len(data)
        if self._size_bytes > self._limit_bytes:
            raise InvocationError(
                "too_large",
                f"output of more than {self._limit_bytes} bytes: raise limits.output_bytes",
                size_bytes=self._size_bytes,
                limit_bytes=self._limit_bytes,
            )
        self._take(self._decoder.decode(data))

    def output(self) -> Any:
        """Return the output, now that there is nothing more to come.

        Raises:
            InvocationError: ``execution_failed``: it should be JSON and is not.
        """
        self._take(self._decoder.decode(b"", final=True))
        if self._kind == "json":
            return _parse("".join(self._texts) + self._pending, "its output")
        rest, self._pending = self._pending, ""
        if self._kind == "jsonl":
            self._lines(rest)
            return self._values
        self._piece(rest)
        return "".join(self._texts)

    def _take(self, text: str) -> None:
        if self._kind == "json":
            self._texts.append(text)
            return
        whole, newline, self._pending = (self._pending + text).rpartition("\n")
        if self._kind == "jsonl":
            self._lines(whole)
            return
        self._piece(whole + newline)
        if len(self._pending) > _TEXT_LIMIT:
            rest, self._pending = self._pending, ""
            self._piece(rest)

    def _piece(self, text: str) -> None:
        if text:
            self._texts.append(text)
            self._emit({"t": "piece", "id": self._id, "d": text})

    def _lines(self, text: str) -> None:
        for line in text.split("\n"):
            if line.strip():
                value = _parse(line, f"value {len(self._values) + 1} of its output")
                self._values.append(value)
                self._emit({"t": "piece", "id": self._id, "d": value})


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise InvocationError(
            "execution_failed", f"{what} is not JSON: {exc}; it begins {text[:80]!r}"
        ) from exc


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class ErrorLines:
    """The last lines a program wrote to its standard error; all of them go to the log."""

    def __init__(self) -> None:
        self._rest = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)

    def feed(self, data: bytes) -> None:
        """Take what was written."""
        text = self._decoder.decode(data)
        sys.stderr.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        self._rest = self._rest[-_TEXT_LIMIT:]
        self._lines.extend(line[:_TAIL_LINE_LIMIT] for line in lines if line.strip())

    def last(self) -> list[str]:
        """Return the last lines, the unfinished one included."""
        rest = [self._rest[:_TAIL_LINE_LIMIT]] if self._rest.strip() else []
        return [*self._lines, *rest][-_TAIL_LINES:]


def exit_error(program: str, status: int, lines: list[str]) -> InvocationError:
    """Say how a program failed.

    Args:
        program: Its name.
        status: Exit status, not 0; negative for a signal.
        lines: What it wrote last to its standard error.
    """
    detail: dict[str, Any] = {"stderr": lines}
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        how = f"was ended by {name}"
        if name == "SIGXCPU":
            how += ", for it used more processor time than limits.cpu_s"
        detail["signal"] = name
    else:
        how = f"ended with exit status {status}"
        detail["exit_status"] = status
    said = f": {lines[-1]}" if lines else ""
    code = "invalid_task" if status == DATA_ERROR else "execution_failed"
    return InvocationError(code, f"{program} {how}{said}", **detail)
