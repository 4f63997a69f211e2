"""Which certificates were issued: without it nobody could tell a broker which count no more.

Brokers that see certificates but not the store (Mosquitto) learn from a revocation list, and a list
can only name what is known to exist. One line for each certificate, of those that have not run out.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from broker.access.credentials import write_private
from capability_schemas.errors import ConfigurationError

_TIDY_ABOVE_BYTES: Final = 256 * 1024


class IssuedLog:
    """Serial numbers with the end of their validity, in a file of mode 0600. Blocking.

    Several processes may write; each line is appended whole, under a lock.

    Args:
        path: The file; made with the first certificate.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, serial: str, not_after: int, *, now: int) -> None:
        """Write down a certificate.

        Args:
            serial: Its serial number, hexadecimal.
            not_after: End of its validity, UTC milliseconds.
            now: UTC milliseconds; what has run out by then may be forgotten.

        Raises:
            ConfigurationError: The file cannot be written.
        """
        try:
            with self._path.with_suffix(".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._path.exists() and self._path.stat().st_size > _TIDY_ABOVE_BYTES:
                    kept = (f"{name} {until}\n" for name, until in self._lines() if until > now)
                    write_private(self._path, "".join(kept))
                descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                with os.fdopen(descriptor, "w", encoding="ascii") as file:
                    file.write(f"{serial} {not_after}\n")
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as exc:
            raise ConfigurationError(f"{self._path} cannot be written: {exc}") from exc

    def valid(self, now: int) -> list[str]:
        """Return the serial numbers that have not run out at a time, UTC milliseconds.

        Raises:
            ConfigurationError: The file cannot be read.
        """
        return [serial for serial, until in self._lines() if until > now]

    def _lines(self) -> Iterator[tuple[str, int]]:
        try:
            lines = self._path.read_text(encoding="ascii", errors="replace").splitlines()
        except FileNotFoundError:
            return
        except OSError as exc:
            raise ConfigurationError(f"{self._path} cannot be read: {exc}") from exc
        for line in lines:
            serial, _, until = line.partition(" ")
            if until.isdigit():  # a line that was cut off by a crash names no certificate in use
                yield serial, int(until)
