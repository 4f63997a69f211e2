"""Folders for the temporary files of instances: locked in use, swept up when their agent died.

An agent holds a lock (``flock(2)``) on each such folder for as long as the instance needs it. The
kernel gives the lock back however the agent ends, so that a folder that can be locked is nobody's.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

_PREFIX: Final = "foam-instance-"
_TRIES: Final = 10


class LockedFolder:
    """A new, empty folder of mode 0700 that no agent of this machine sweeps up before `remove`.

    Attributes:
        path: Where it is.

    Raises:
        OSError: There is no folder or descriptor to be had.
    """

    def __init__(self) -> None:
        for _ in range(_TRIES):
            path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            try:
                descriptor = _open(path)
            except FileNotFoundError:  # a sweep came between the making and the lock
                continue
            except OSError:
                path.rmdir()
                raise
            if _lock(descriptor) is not False and _is_at(descriptor, path):
                self.path = path
                self._descriptor: int | None = descriptor
                return
            os.close(descriptor)  # likewise
        raise OSError(f"no folder for temporary files in {tempfile.gettempdir()}: others delete it")

    def remove(self) -> None:
        """Delete it with all it holds, as far as that can be done; blocks. May be called again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(descriptor)


def sweep_folders() -> int:
    """Delete what agents of this user that were killed have left among the temporary files; blocks.

    Returns:
        How many folders are gone.
    """
    swept = 0
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or another agent sweeps, too
            descriptor = _open(path)
            try:
                is_ours = os.fstat(descriptor).st_uid == os.getuid()
                if is_ours and _lock(descriptor) and _is_at(descriptor, path):
                    shutil.rmtree(path, ignore_errors=True)
                    swept += not path.exists()
            finally:
                os.close(descriptor)
    return swept


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _lock(descriptor: int) -> bool | None:
    """Lock a folder; False when somebody else has, None where folders cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
