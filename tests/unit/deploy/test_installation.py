"""The set-up's decisions, with the machine replaced at its one seam."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from deploy.installation import Installation, SetupError
from deploy.machine import Shell, services_held_back

PROGRAMS = {"mosquitto", "mosquitto_pub", "nats-server", "c++", "apt-get", "systemctl"}
PYPROJECT = """
[build-system]
requires = ["setuptools"]
[project]
name = "foam-mesh"
version = "{version}"
[tool.ruff]
line-length = {line_length}
"""


class FakeShell(Shell):
    """A machine that does what is told, remembers it, and fails where a test wants it to."""

    def __init__(self, root: Path, log: Path, say: Callable[[str], None]) -> None:
        super().__init__(root=root, log=log, say=say)
        self.root_folder = root
        self.commands: list[str] = []
        self.environments: list[Mapping[str, str]] = []
        self.failing: dict[str, str] = {}  # part of a command -> what it prints
        self.programs = set(PROGRAMS)
        self.root = False
        self.free = 50 * 10**9
        self.importable = {"ensurepip", "llama_cpp"}
        self._printed = ""

    def run(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> int:
        line = " ".join(argv)
        self.commands.append(line)
        self.environments.append(env or {})
        for part, printed in self.failing.items():
            if part in line:
                self._printed = printed
                return 1
        self._act(list(argv))
        return 0

    def _act(self, argv: list[str]) -> None:
        if argv[1:3] == ["-m", "venv"]:
            python = Path(argv[3]) / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
            python.with_name("activate").write_text(f"VIRTUAL_ENV={argv[3]}\n")
        elif "wheel" in argv:
            out = Path(argv[argv.index("-w") + 1])
            out.mkdir(parents=True)
            (out / f"{argv[argv.index('--no-binary') + 1]}-1-any.whl").touch()
        elif argv[1:2] == ["install"]:
            self.programs |= PROGRAMS
        elif argv[-1] == "registry.encoders.export":
            (self.root_folder / "encoder").mkdir(exist_ok=True)

    def tail(self, lines: int) -> list[str]:
        return self._printed.splitlines()[-lines:]

    def answer(self, argv: Sequence[str]) -> str:
        code = argv[-1]
        if "default_folder" in code:
            return str(self.root_folder / "encoder")
        if "version_info" in code and Path(argv[0]).exists():
            return "{}.{}".format(*sys.version_info[:2])
        return "1" if any(f"import {name};" in code for name in self.importable) else ""

    def which(self, name: str) -> str | None:
        return str(self.root_folder / "sbin" / name) if name in self.programs else None

    def is_root(self) -> bool:
        return self.root

    def free_bytes(self, folder: Path) -> int:
        return self.free

    @contextlib.contextmanager
    def services_held_back(self) -> Iterator[None]:
        self.commands.append("hold services back")
        yield
        self.commands.append("let services go")

    def ran(self, part: str) -> bool:
        return any(part in command for command in self.commands)


class Clone:
    """A clone in a temporary folder, with a cache that other clones may share."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root = root
        self.said: list[str] = []
        self.shell = FakeShell(root, root / "log", self.said.append)
        self.environ = {"PATH": "/usr/bin", "PYTHONPATH": "elsewhere"}
        self._cache = cache
        locks = root / "deploy" / "locks"
        locks.mkdir(parents=True)
        for name in ("requirements", "build", "engine-wheel"):
            (locks / f"{name}.lock").write_text("some==1 \\\n    --hash=sha256:00\n")
        (locks / "native.lock").write_text(
            "hnswlib==1 \\\n    --hash=sha256:11\nllama-cpp-python==1 \\\n    --hash=sha256:22\n"
        )
        self.describe()
        (root / "sbin").mkdir()
        for name in PROGRAMS:
            (root / "sbin" / name).touch()

    def describe(self, version: str = "0.1.0", line_length: int = 100) -> None:
        text = PYPROJECT.format(version=version, line_length=line_length)
        (self.root / "pyproject.toml").write_text(text)

    def ensure(self, *, again: bool = False) -> str:
        """Set up, and return what was said; only the commands of this round are remembered."""
        self.said.clear()
        self.shell.commands.clear()
        self.shell.environments.clear()
        Installation(
            root=self.root,
            cache=self._cache,
            shell=self.shell,
            say=self.said.append,
            environ=self.environ,
        ).ensure(again=again)
        return "\n".join(self.said)


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "one", tmp_path / "cache")


def test_first_run_goes_through_every_step_and_the_second_through_none(clone: Clone) -> None:
    said = clone.ensure()
    assert all(f"[{n}/8]" in said for n in range(1, 9))
    assert clone.shell.ran("--require-hashes -r deploy/locks/requirements.lock")
    assert clone.shell.ran("install --no-deps --no-build-isolation --no-index -e .")
    assert clone.ensure() == ""
    assert clone.shell.commands == []


def test_again_ignores_the_stamp(clone: Clone) -> None:
    clone.ensure()
    clone.ensure(again=True)
    assert clone.shell.ran("requirements.lock")


def test_changed_lock_or_project_sets_up_again_but_tool_settings_do_not(clone: Clone) -> None:
    clone.ensure()
    clone.describe(line_length=80)
    clone.ensure()
    assert not clone.shell.commands
    clone.describe(version="0.2.0")
    clone.ensure()
    assert clone.shell.ran("-e .")
    (clone.root / "deploy" / "locks" / "requirements.lock").write_text("other==2\n")
    clone.ensure()
    assert clone.shell.ran("requirements.lock")


@pytest.mark.parametrize("lost", ["encoder", ".venv/bin/python", "sbin/mosquitto"])
def test_something_that_vanished_is_set_up_again(clone: Clone, lost: str) -> None:
    clone.ensure()
    path = clone.root / lost
    path.rmdir() if path.is_dir() else path.unlink()
    clone.ensure()
    assert clone.shell.commands


def test_environment_is_kept_unless_the_clone_was_moved(clone: Clone) -> None:
    clone.ensure()
    assert "already there" in clone.ensure(again=True).split("[3/8]")[0].split("[2/8]")[1]
    (clone.root / ".venv" / "bin" / "activate").write_text("VIRTUAL_ENV=/the/old/place/.venv\n")
    clone.ensure(again=True)
    assert clone.shell.ran(f"-m venv {clone.root / '.venv'}")


def test_damaged_stamp_is_no_stamp(clone: Clone) -> None:
    clone.ensure()
    (clone.root / ".venv" / "foam-setup.json").write_text("{")
    clone.ensure()
    assert clone.shell.commands


def test_native_packages_are_compiled_portably_from_locked_sources(clone: Clone) -> None:
    clone.ensure()
    built = [
        (line, env)
        for line, env in zip(
            [c for c in clone.shell.commands if "services" not in c],
            clone.shell.environments,
            strict=True,
        )
        if " wheel " in line
    ]
    assert len(built) == 2
    for line, env in built:
        assert "--require-hashes" in line
        assert "--no-cache-dir" in line
        assert "-DGGML_NATIVE=OFF" in env["CMAKE_ARGS"]
        assert env["HNSWLIB_NO_NATIVE"] == "1"
        assert "PYTHONPATH" not in env


def test_second_clone_compiles_nothing(clone: Clone, tmp_path: Path) -> None:
    clone.ensure()
    second = Clone(tmp_path / "two", tmp_path / "cache")
    said = second.ensure()
    assert "llama-cpp-python from the cache" in said
    assert not second.shell.ran(" wheel ")


def test_without_a_compiler_the_wheel_engine_serves_and_it_is_said_every_time(clone: Clone) -> None:
    clone.shell.programs.discard("c++")
    said = clone.ensure()
    assert "no C++ compiler (g++): llama-cpp-python is left out, xllamacpp runs" in said
    assert clone.shell.ran("engine-wheel.lock")
    assert not clone.shell.ran(" wheel ")
    assert "no C++ compiler" in clone.ensure()
    assert clone.shell.commands == []


def test_failing_build_shows_its_last_lines_and_falls_back(clone: Clone) -> None:
    clone.shell.failing = {"--no-binary llama-cpp-python": "fatal error: no space for objects"}
    said = clone.ensure()
    assert "fatal error: no space for objects" in said
    assert "llama-cpp-python could not be compiled" in said
    assert "hnswlib compiled" in said


def test_no_engine_at_all_stops_with_a_remedy(clone: Clone) -> None:
    clone.shell.programs.discard("c++")
    clone.shell.importable.discard("llama_cpp")
    clone.shell.failing = {"engine-wheel.lock": "no matching distribution"}
    with pytest.raises(SetupError, match="no language model engine") as caught:
        clone.ensure()
    assert "apt install g++" in caught.value.remedy


def test_missing_wheel_engine_is_no_failure_when_the_other_compiled(clone: Clone) -> None:
    clone.shell.failing = {"engine-wheel.lock": "no matching distribution"}
    assert "llama-cpp-python is the only engine" in clone.ensure()


def test_failing_step_tells_what_failed_and_leaves_no_stamp(clone: Clone) -> None:
    clone.shell.failing = {"requirements.lock": "Looking in links\nERROR: no route to the index"}
    with pytest.raises(SetupError) as caught:
        clone.ensure()
    assert "requirements.lock` ended with status 1" in str(caught.value)
    assert "ERROR: no route to the index" in str(caught.value)
    assert "Looking in" not in str(caught.value)
    assert "package index" in caught.value.remedy
    clone.shell.failing = {}
    clone.ensure()
    assert clone.shell.ran("requirements.lock")


def test_torch_prefers_the_cpu_build(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    clone.environ["FOAM_TORCH_INDEX"] = "file:///wheels"
    clone.ensure()
    torch = [c for c in clone.shell.commands if "torch==" in c]
    assert len(torch) == 1
    assert "--index-url file:///wheels torch==" in torch[0]
    assert torch[0].endswith("+cpu")
    assert sum("file:///wheels" in c for c in clone.shell.commands) == 1


def test_torch_falls_back_aloud_to_the_standard_build(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    clone.shell.failing = {"+cpu": "no matching distribution"}
    said = clone.ensure()
    assert "no CPU build on offer" in said
    assert "standard build" in said
    assert "--no-deps" not in next(c for c in clone.shell.commands if c.endswith("torch==2.13.0"))


def test_without_root_the_external_brokers_are_skipped_aloud(clone: Clone) -> None:
    clone.shell.programs -= {"mosquitto", "nats-server"}
    said = clone.ensure()
    assert "mosquitto, nats-server not installed (no root rights" in said
    assert not clone.shell.ran("apt-get")
    assert "not installed" in clone.ensure()


def test_root_on_debian_installs_brokers_without_their_services(clone: Clone) -> None:
    clone.shell.programs -= {"mosquitto", "nats-server", "mosquitto_pub"}
    clone.shell.root = True
    clone.ensure()
    commands = clone.shell.commands
    install = next(i for i, c in enumerate(commands) if "mosquitto-clients" in c)
    assert commands[install - 1 : install + 2 : 2] == ["hold services back", "let services go"]
    after = " ".join(commands[install + 2 : install + 4])
    assert "systemctl disable --now mosquitto " in after
    assert "systemctl disable --now nats-server" in after


def test_unreachable_debian_archive_is_a_note(clone: Clone) -> None:
    clone.shell.programs.discard("nats-server")
    clone.shell.root = True
    clone.shell.failing = {"apt-get": "E: Unable to locate package nats-server"}
    assert "apt-get failed: E: Unable to locate package" in clone.ensure()


def test_full_disk_is_said_before_anything_is_done(clone: Clone) -> None:
    clone.shell.free = 10**9
    with pytest.raises(SetupError, match=r"1\.0 GB free, 4 GB needed"):
        clone.ensure()
    assert clone.shell.commands == []


def test_python_without_ensurepip_names_the_package(clone: Clone) -> None:
    clone.shell.importable.discard("ensurepip")
    with pytest.raises(SetupError, match="no ensurepip") as caught:
        clone.ensure()
    assert "-venv" in caught.value.remedy


def test_services_are_held_back_and_released(tmp_path: Path) -> None:
    policy = tmp_path / "policy-rc.d"
    with services_held_back(policy):
        assert "exit 101" in policy.read_text()
        assert policy.stat().st_mode & 0o111
    assert not policy.exists()


def test_a_machine_keeps_its_own_service_policy(tmp_path: Path) -> None:
    policy = tmp_path / "policy-rc.d"
    policy.write_text("exit 0\n")
    with services_held_back(policy):
        assert policy.read_text() == "exit 0\n"
    assert policy.read_text() == "exit 0\n"
