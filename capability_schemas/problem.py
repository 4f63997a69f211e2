"""What is wrong with a file that a person wrote, so exactly that it is mended without a search."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from capability_schemas.errors import ConfigurationError
from capability_schemas.wire import problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, or could be better.

    Attributes:
        file: Path, or name of a module.
        line: Line of the file where the table begins, or the mistake stands; None when unknown.
        what: What of it: ``function "triage"``, ``[node]``; empty for the file as a whole.
        field: Path of the field in it: ``limits.memory_bytes``, ``examples[2]``; may be empty.
        message: What is wrong with it.
        warning: Whether a node runs all the same.
    """

    file: str
    line: int | None = None
    what: str = ""
    field: str = ""
    message: str
    warning: bool = False

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(filter(None, (place, self.what, self.field, self.message)))


def field_problems(error: ValidationError) -> Iterable[tuple[str, str]]:
    """Yield path and text of every problem that pydantic found."""
    for path, text in problems(error):
        named = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        yield named.removeprefix("."), text


def unknown(name: str, known: Iterable[str]) -> str:
    """Say that a name is unknown, and which one may be meant."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown; did you mean {close[0]}?" if close else "unknown; remove it"


def refusal(found: Iterable[Problem]) -> ConfigurationError | None:
    """Return the error that says everything that is wrong, one thing a line; None when all is well.

    Args:
        found: Problems; warnings are passed over.
    """
    wrong = [str(problem) for problem in found if not problem.warning]
    return ConfigurationError("\n".join(wrong), problems=len(wrong)) if wrong else None
