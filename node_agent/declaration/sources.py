"""The files behind a declaration: their digests, and whether they have changed since."""

import ast
import hashlib
import importlib.machinery
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

Stamp = tuple[int, int]
"""Time of the last change (nanoseconds) and size (bytes) of a file."""

_PACKAGE_FILE: Final = "__init__.py"


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file; None when it cannot be read now."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def file_digest(path: Path) -> str:
    """Return ``sha256:`` and the hex digest of a file; blocks, run it in a thread.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


class SourceFiles:
    """The files that were looked at, each with its stamp from before it was read.

    An edit while they are read is thus seen as one afterwards. Not safe for threads.
    """

    def __init__(self) -> None:
        self.stamps: dict[Path, Stamp | None] = {}
        """Stamp by path; None for a file that was not there."""

    def note(self, path: Path) -> Path:
        """Remember a file that is about to be read; returns its absolute path."""
        path = path.absolute()
        self.stamps.setdefault(path, stamp_of(path))
        return path

    def code_digest(self, paths: Iterable[Path]) -> str | None:
        """Return one digest of files and of the Python files beside them that they import.

        Only imports of plain neighbours (``import gears``, ``from .gears import ratio``) are
        followed; what is installed elsewhere does not change under a running node.

        Args:
            paths: The files; those that are missing are left out, but noted.

        Returns:
            ``sha256:`` and a hex digest; None when there is no file.
        """
        found: dict[Path, str] = {}
        ahead = [path.absolute() for path in paths]
        while ahead:
            path = self.note(ahead.pop())
            if path in found:
                continue
            try:
                content = path.read_bytes()
            except OSError:
                continue
            found[path] = hashlib.sha256(content).hexdigest()
            if path.suffix == ".py":
                ahead += _imported_neighbours(path, content)
        if not found:
            return None
        if len(found) == 1:
            return "sha256:" + next(iter(found.values()))
        lines = "".join(f"{path} {digest}\n" for path, digest in sorted(found.items()))
        return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def module_file(name: str) -> Path | None:
    """Return the file of an importable module without importing it or its packages.

    Args:
        name: Dotted name.

    Returns:
        None when there is no such module, or it is not made of Python source.
    """
    folders = [*sys.path, str(Path.cwd())]
    origin: str | None = None
    for part in name.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, folders)
        if spec is None:
            return None
        folders, origin = list(spec.submodule_search_locations or ()), spec.origin
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def _imported_neighbours(path: Path, content: bytes) -> list[Path]:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # whoever imports it will say so
        return []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level <= 1:
            before = f"{node.module}." if node.module else ""
            names.update(before + alias.name for alias in node.names)
            names.add(node.module or "")
    found = []
    for name in sorted(filter(None, names)):
        file = path.parent.joinpath(*name.split("."))
        found += [one for one in (file.with_suffix(".py"), file / _PACKAGE_FILE) if one.is_file()]
    return found
