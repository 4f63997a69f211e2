"""The lock files cover what pyproject.toml asks for, with hashes and without addresses."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.locking import LOCKS, TORCH, lock_blocks

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / LOCKS).glob("*.lock"))
LEFT_OUT = re.compile(r"torch|triton|(nvidia|cuda)-.*")


def locked() -> dict[str, str]:
    """Return the locked version of every package that a set-up installs."""
    versions = {"torch": TORCH}
    for path in FILES:
        if path.stem != "build":
            for name, block in lock_blocks(path.read_text("utf-8")):
                versions[canonicalize_name(name)] = block.split("==")[1].split()[0]
    return versions


def direct_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        lines += extra
    return [r for r in map(Requirement, lines) if r.name != project["name"]]


def test_the_four_locks_are_there() -> None:
    assert [p.stem for p in FILES] == ["build", "engine-wheel", "native", "requirements"]


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_direct_dependency_is_locked_at_a_fitting_version(requirement: Requirement) -> None:
    versions = locked()
    name = canonicalize_name(requirement.name)
    assert name in versions, "run `python3 deploy/bootstrap.py lock`"
    assert requirement.specifier.contains(versions[name], prereleases=True)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_package_carries_hashes_and_no_address(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "://" not in text
    blocks = list(lock_blocks(text))
    assert blocks
    for name, block in blocks:
        assert "--hash=sha256:" in block, name
        assert not LEFT_OUT.fullmatch(name), f"{name} depends on the index at hand"
    assert len({(name, block) for name, block in blocks}) == len(blocks)
