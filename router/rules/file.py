"""The rules file of a router, followed while it runs."""

from pathlib import Path
from typing import Any

from broker.followed import FollowedFile
from broker.followed import read_text as read_any
from router.rules.book import RuleBook


class RuleFile(FollowedFile[RuleBook]):
    """Keeps the rules of a file, and takes up its edits as ``FollowedFile`` says.

    Args:
        path: The file.
        required: Whether it must be there: somebody named it.
    """

    def __init__(self, path: Path, *, required: bool = False) -> None:
        super().__init__(path, what="rules", parse=RuleBook.parse, required=required)

    @property
    def book(self) -> RuleBook:
        """The rules in force."""
        return self.value

    def describe(self) -> dict[str, Any]:
        """Return the rules in force as JSON, and what keeps the file from being in force."""
        return {
            "file": str(self.path),
            "problem": self.problem,
            "rules": self.book.describe(),
        }


def read_text(path: Path, *, missing_ok: bool = False) -> str | None:
    """Return the text of a rules file; None when it is not there and need not be.

    Raises:
        ConfigurationError: It cannot be read, is too large, or is no text.
    """
    return read_any(path, what="rules", missing_ok=missing_ok)
