"""The rules file of a router, followed while it runs."""

from pathlib import Path
from typing import Any, Final

import structlog

from capability_schemas.errors import ConfigurationError
from router.rules.book import RuleBook

_MOST_BYTES: Final = 1024 * 1024

_Stamp = tuple[int, int, int]
"""Time of the last change (nanoseconds), size (bytes) and number of a file."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class RuleFile:
    """Keeps the rules of a file, and takes up its edits.

    An edit counts when the file looks the same at two looks running, so that one still being
    written is left alone. An edit with a mistake is logged and told, and the rules before it stay
    in force. A file that was removed means no rules, unless it is required: then it is a mistake.

    ``load`` and ``refresh`` block and are for one thread at a time; ``book`` and ``problem`` may be
    read from any.

    Args:
        path: The file.
        required: Whether it must be there: somebody named it.
    """

    def __init__(self, path: Path, *, required: bool = False) -> None:
        self.path = path
        self.book = RuleBook()
        self.problem: str | None = None
        """What keeps the file as it is now from being in force, a mistake a line; None: nothing."""
        self._required = required
        self._known: _Stamp | None = None
        self._last: _Stamp | None = None
        self._content: str | None = None

    def load(self) -> None:
        """Read the file for the first time.

        Raises:
            ConfigurationError: It is not usable; the message has a line for every mistake.
        """
        self._known = self._last = self._stamp()
        self.book, self._content = self._read()
        self.problem = None
        _log.info("rules.loaded", file=str(self.path), rules=len(self.book))

    def refresh(self) -> bool:
        """Look at the file, and take up a change of it that has lasted since the look before.

        Returns:
            Whether other rules are in force now.
        """
        now = self._stamp()
        settled, self._last = now == self._last, now
        if now == self._known or not settled:
            return False
        self._known = now
        before = self._content
        try:
            book, content = self._read()
        except ConfigurationError as exc:
            self.problem = exc.message
            _log.error("rules.refused", file=str(self.path), error=exc.message)
            return False
        self.problem = None
        if content == before:
            return False
        self.book, self._content = book, content
        _log.info("rules.changed", file=str(self.path), rules=len(book))
        return True

    def describe(self) -> dict[str, Any]:
        """Return the rules in force as JSON, and what keeps the file from being in force."""
        return {
            "file": str(self.path),
            "problem": self.problem,
            "rules": self.book.describe(),
        }

    def _stamp(self) -> _Stamp | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> tuple[RuleBook, str | None]:
        """Return the rules, and the text they were read from; None when there is no file."""
        text = read_text(self.path, missing_ok=not self._required)
        return (RuleBook(), None) if text is None else (RuleBook.parse(text, str(self.path)), text)


def read_text(path: Path, *, missing_ok: bool = False) -> str | None:
    """Return the text of a rules file; None when it is not there and need not be.

    Raises:
        ConfigurationError: It cannot be read, is too large, or is no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError as exc:
        if missing_ok:
            return None
        raise ConfigurationError(f"{path}: rules file does not exist", path=str(path)) from exc
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise ConfigurationError(
            f"{path}: rules file cannot be read: {reason}", path=str(path)
        ) from exc
    if len(content) > _MOST_BYTES:
        raise ConfigurationError(f"{path}: rules file has over {_MOST_BYTES} bytes", path=str(path))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        wrong = exc.object[exc.start]
        raise ConfigurationError(
            f"{path}: rules file is no UTF-8 text: byte {exc.start} is {wrong}", path=str(path)
        ) from exc
