"""The code of the agent itself, and facts of the machine it runs on."""

import hashlib
import importlib.util
import platform
from pathlib import Path
from typing import Final

from node_agent.attestation.base import Findings

PACKAGES: Final = ("broker", "capability_schemas", "foam", "node_agent")
"""What a node runs of this project."""

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_CACHES: Final = frozenset({"__pycache__"})


class SoftwareSource:
    """Digests of whole packages as they lie on the disk: code, data, everything but caches.

    Args:
        packages: Names of packages; those that are not installed are left out.
    """

    name = "code"

    def __init__(self, packages: tuple[str, ...] = PACKAGES) -> None:
        self._packages = packages

    def collect(self, challenge: str | None) -> Findings:
        """Hash the packages; some tens of milliseconds."""
        return Findings(
            measurements={
                package: tree_digest(folder)
                for package in self._packages
                if (folder := _folder_of(package)) is not None
            },
            platform={
                "system": f"{platform.system()} {platform.release()}"[:200],
                "machine": platform.machine()[:200],
                "python": f"{platform.python_implementation()} {platform.python_version()}"[:200],
            },
        )


def tree_digest(folder: Path) -> str:
    """Return one digest of all files below a folder, by relative path and content.

    Whoever wants to check it: SHA-256 over lines of hex digest, two spaces and path with ``/``,
    sorted by path, as ``sha256sum`` writes them.

    Raises:
        OSError: A file cannot be read.
    """
    lines = []
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        if path.is_file() and not _CACHES & set(inside.parts):
            lines.append((inside.as_posix(), _file_digest(path)))
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(lines))
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def boot_id() -> str | None:
    """Return the identifier of this boot of the machine, where the kernel tells."""
    try:
        return _BOOT.read_text("ascii").strip()[:64] or None
    except (OSError, UnicodeDecodeError):
        return None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_of(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return Path(places[0]) if places else None
