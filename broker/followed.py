"""A file that a person edits while its reader runs: good edits count, bad ones do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

import structlog

from capability_schemas.errors import ConfigurationError

MOST_BYTES: Final = 1024 * 1024
"""Largest file that is read, unless its owner says otherwise."""

_Stamp = tuple[int, int, int]
"""Time of the last change (nanoseconds), size (bytes) and number of a file."""

_T = TypeVar("_T")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class FollowedFile(Generic[_T]):
    """Keeps what a file says, and takes up its edits.

    An edit counts when the file looks the same at two looks running, so that one still being
    written is left alone. An edit with a mistake is logged and told, and what held before it stays
    in force. A file that was removed means the empty text, unless it is required: then it is a
    mistake.

    ``load`` and ``refresh`` block and are for one thread at a time; ``value`` and ``problem`` may
    be read from any.

    Args:
        path: The file.
        what: What it holds, for messages: ``rules``, ``quotas``, ``attestation``.
        parse: Makes the value of a text and the name of the file; raises ``ConfigurationError``.
        required: Whether it must be there: somebody named it.
        most_bytes: Largest file that is read.
    """

    def __init__(
        self,
        path: Path,
        *,
        what: str,
        parse: Callable[[str, str], _T],
        required: bool = False,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.path = path
        self.value = parse("", str(path))
        self.problem: str | None = None
        """What keeps the file as it is now from being in force, a mistake a line; None: nothing."""
        self._what = what
        self._parse = parse
        self._required = required
        self._most_bytes = most_bytes
        self._known: _Stamp | None = None
        self._last: _Stamp | None = None
        self._content: str | None = None

    def load(self) -> None:
        """Read the file for the first time.

        Raises:
            ConfigurationError: It is not usable; the message has a line for every mistake.
        """
        self._known = self._last = self._stamp()
        self.value, self._content = self._read()
        self.problem = None
        _log.info(f"{self._what}.loaded", file=str(self.path), found=self._content is not None)

    def refresh(self) -> bool:
        """Look at the file, and take up a change of it that has lasted since the look before.

        Returns:
            Whether something else is in force now.
        """
        now = self._stamp()
        settled, self._last = now == self._last, now
        if now == self._known or not settled:
            return False
        self._known = now
        before = self._content
        try:
            value, content = self._read()
        except ConfigurationError as exc:
            self.problem = exc.message
            _log.error(f"{self._what}.refused", file=str(self.path), error=exc.message)
            return False
        self.problem = None
        if content == before:
            return False
        self.value, self._content = value, content
        _log.info(f"{self._what}.changed", file=str(self.path))
        return True

    def _stamp(self) -> _Stamp | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> tuple[_T, str | None]:
        """Return the value, and the text it was read from; None when there is no file."""
        text = read_text(
            self.path,
            what=self._what,
            missing_ok=not self._required,
            most_bytes=self._most_bytes,
        )
        return self._parse(text or "", str(self.path)), text


def read_text(
    path: Path, *, what: str, missing_ok: bool = False, most_bytes: int = MOST_BYTES
) -> str | None:
    """Return the text of a file; None when it is not there and need not be.

    Args:
        path: The file, UTF-8.
        what: What it holds, for messages.
        missing_ok: Whether it may be missing.
        most_bytes: Largest file that is read.

    Raises:
        ConfigurationError: It cannot be read, is too large, or is no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except FileNotFoundError as exc:
        if missing_ok:
            return None
        raise ConfigurationError(f"{path}: {what} file does not exist", path=str(path)) from exc
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise ConfigurationError(
            f"{path}: {what} file cannot be read: {reason}", path=str(path)
        ) from exc
    if len(content) > most_bytes:
        raise ConfigurationError(f"{path}: {what} file has over {most_bytes} bytes", path=str(path))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        wrong = exc.object[exc.start]
        raise ConfigurationError(
            f"{path}: {what} file is no UTF-8 text: byte {exc.start} is {wrong}", path=str(path)
        ) from exc
