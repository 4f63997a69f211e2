"""The lock files: what is in which, and how they are written anew.

One resolution of ``pyproject.toml`` with all extras is parted into

- ``requirements.lock``: everything that installs as it is;
- ``native.lock``: packages that are compiled here, with flags of our own;
- ``engine-wheel.lock``: the second language model engine, which some machines have no wheel for.

torch and the CUDA packages that its standard build pulls are in none of them: which file of torch
is right depends on the index at hand, so only its version is pinned (`TORCH`). ``build.lock`` holds
what the compiling needs. Everything else carries hashes.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCKS = Path("deploy") / "locks"
TORCH = "2.13.0"

_HEADER = "# Written by `python3 deploy/bootstrap.py lock`: do not edit.\n"
_PARTS = {"native": ("hnswlib", "llama-cpp-python"), "engine-wheel": ("xllamacpp",)}
_LEFT_OUT = re.compile(r"torch|triton|(nvidia|cuda)-.*")
_BUILD_TOOLS = ("cmake", "ninja", "numpy", "pybind11", "scikit-build-core", "setuptools", "wheel")


def lock_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Part a lock file into packages.

    Yields:
        The name of a package, and its lines: the requirement followed by its indented hashes.
    """
    block: list[str] = []
    for line in [*text.splitlines(keepends=True), "end"]:
        if line.startswith("#"):
            continue
        if block and not line.startswith((" ", "\t")):
            yield re.split(r"[^A-Za-z0-9._-]", block[0], maxsplit=1)[0], "".join(block)
            block = []
        block.append(line)


def write_locks(root: Path, *, uv: Path, upgrade: bool = False) -> None:
    """Resolve the dependencies and write all four lock files.

    Args:
        root: folder of the clone.
        uv: the resolver's program.
        upgrade: take the newest versions that ``pyproject.toml`` admits, instead of keeping those
            already locked.

    Raises:
        subprocess.CalledProcessError: there is no resolution, or no package index.
    """
    folder = root / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        everything, pins = work / "everything.txt", work / "pins.txt"
        old = [folder / f"{name}.lock" for name in ("requirements", *_PARTS)]
        everything.write_text("".join(p.read_text("utf-8") for p in old if p.is_file()), "utf-8")
        pins.write_text(f"torch=={TORCH}\n", "utf-8")
        flags = ["--upgrade"] if upgrade else []
        project = str(root / "pyproject.toml")
        _compile(uv, [project, "--all-extras", "--constraints", str(pins), *flags], everything)
        parts: dict[str, list[str]] = {"requirements": [], **{name: [] for name in _PARTS}}
        for package, block in lock_blocks(everything.read_text("utf-8")):
            if not _LEFT_OUT.fullmatch(package):
                parts[_part_of(package)].append(block)
        for name, blocks in parts.items():
            (folder / f"{name}.lock").write_text(_HEADER + "".join(blocks), "utf-8")

        tools, build = work / "tools.in", folder / "build.lock"
        tools.write_text("\n".join(_BUILD_TOOLS) + "\n", "utf-8")
        _compile(
            uv, [str(tools), "--constraints", str(folder / "requirements.lock"), *flags], build
        )
        build.write_text(_HEADER + build.read_text("utf-8"), "utf-8")


def _part_of(package: str) -> str:
    return next((name for name, members in _PARTS.items() if package in members), "requirements")


def _compile(uv: Path, arguments: list[str], out: Path) -> None:
    options = ["--universal", "--fork-strategy", "fewest", "--generate-hashes"]
    plain = ["--no-header", "--no-annotate", "--quiet", "--python-version", "3.11"]
    subprocess.run(
        [str(uv), "pip", "compile", *arguments, *options, *plain, "--output-file", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
