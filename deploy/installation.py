"""Bring one clone from nothing to ready: the steps of the set-up and the stamp that spares them.

`Installation.ensure` is the way in. The first run makes ``.venv``, installs the locked packages,
compiles the two native ones with portable flags (kept in the user's cache, so that a second clone
compiles nothing), exports the sentence encoder and, where it runs as root on Debian, installs the
external brokers. A stamp in ``.venv`` makes every later run start at once, without a network.

Standard library only: this runs before anything is installed.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from deploy.locking import LOCKS, TORCH, lock_blocks
from deploy.machine import Shell, install_debian, machine_tag

# Portable code: GGML_NATIVE=ON crashes on AMX processors when GCC 12 builds it, and binaries built
# for this processor would be worthless in a cache shared by machines. The image parts are not used.
BUILD_ENVIRONMENT = {
    "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF",
    "HNSWLIB_NO_NATIVE": "1",
}
ENGINE = "llama-cpp-python"
NATIVE = ("hnswlib", ENGINE)
NEEDED_BYTES = 4 * 10**9
NEEDED_BYTES_CUDA = 12 * 10**9
BROKER_PROGRAMS = {  # program -> Debian package
    "mosquitto": "mosquitto",
    "mosquitto_pub": "mosquitto-clients",
    "nats-server": "nats-server",
}
NOISE = ("$ ", "Ignoring ", "Looking in ", "Requirement already", "WARNING: Retrying")
OFFLINE_HINT = "Connect to a package index for this first set-up; later runs need no network."


class SetupError(Exception):
    """A step that cannot go on, with what a person can do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


class Installation:
    """Brings one clone from nothing to ready, step by step.

    Args:
        root: folder of the clone.
        cache: folder kept between clones, for compiled wheels.
        shell: the machine.
        say: takes one line for the person watching.
        environ: environment of this process; ``FOAM_TORCH_INDEX`` may name a package index with
            CPU builds of torch.
    """

    def __init__(
        self,
        *,
        root: Path,
        cache: Path,
        shell: Shell,
        say: Callable[[str], None],
        environ: Mapping[str, str],
    ) -> None:
        self._root = root
        self._cache = cache
        self._shell = shell
        self._say = say
        self._environ = environ
        self._notes: list[str] = []
        self._needs: list[str] = []
        self.venv = root / ".venv"
        self.python = self.venv / "bin" / "python"
        self._stamp = self.venv / "foam-setup.json"

    def ensure(self, *, again: bool = False) -> None:
        """Set up whatever is missing; with a fitting stamp, nothing.

        Raises:
            SetupError: a step failed.
        """
        if not again and self._is_ready():
            for note in self._notes:
                self._say(f"note: {note}")
            return
        self._notes, self._needs = [], []
        self._stamp.unlink(missing_ok=True)
        steps = (
            ("system packages", self._system_packages),
            ("virtual environment", self._environment),
            ("locked packages", self._packages),
            ("torch", self._torch),
            ("native packages", self._native),
            ("second language model engine", self._second_engine),
            ("foam-mesh itself", self._project),
            ("sentence encoder", self._encoder),
        )
        self._say("Setting FOAM up: minutes the first time, nothing later.")
        self._check_disk(NEEDED_BYTES)
        begun = time.monotonic()
        for number, (title, step) in enumerate(steps, 1):
            self._say(f"[{number}/{len(steps)}] {title}")
            started = time.monotonic()
            outcome = step()
            self._say(f"      {outcome} ({time.monotonic() - started:.1f} s)")
        stamp = {"digest": self._digest(), "needs": self._needs, "notes": self._notes}
        self._stamp.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
        self._say(f"Ready after {time.monotonic() - begun:.0f} s.")

    # ------------------------------------------------------------------ stamp

    def _is_ready(self) -> bool:
        try:
            stamp = json.loads(self._stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        self._notes = list(stamp.get("notes", []))
        needs = [str(self.python), *stamp.get("needs", [])]
        return stamp.get("digest") == self._digest() and all(Path(n).exists() for n in needs)

    def _digest(self) -> str:
        """Identify everything that the environment is made from."""
        project = tomllib.loads((self._root / "pyproject.toml").read_text(encoding="utf-8"))
        parts = [
            json.dumps([project["project"], project["build-system"]], sort_keys=True),
            json.dumps([BUILD_ENVIRONMENT, TORCH, str(self._root), machine_tag()]),
        ]
        parts += [path.read_text(encoding="utf-8") for path in self._locks()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _locks(self) -> list[Path]:
        return sorted((self._root / LOCKS).glob("*.lock"))

    # ------------------------------------------------------------------ steps

    def _check_disk(self, needed: int) -> None:
        free = self._shell.free_bytes(self._root)
        if free < needed and not self.python.exists():
            raise SetupError(
                f"{free / 1e9:.1f} GB free, {needed / 1e9:.0f} GB needed",
                f"Free some space on the disk of {self._root}, or clone onto a larger one.",
            )

    def _system_packages(self) -> str:
        missing = [p for program, p in BROKER_PROGRAMS.items() if not self._shell.which(program)]
        if missing:
            reason = install_debian(self._shell, missing, self._environ)
            if reason:
                self._notes.append(
                    f"{', '.join(missing)} not installed ({reason}): the embedded broker serves, "
                    "and tests against these brokers are skipped"
                )
                return self._notes[-1]
        found = [self._shell.which(program) for program in BROKER_PROGRAMS]
        self._needs += [path for path in found if path]
        return "installed " + ", ".join(missing) if missing else "already there"

    def _environment(self) -> str:
        version = "import sys; print('%d.%d' % sys.version_info[:2])"
        wanted = "{}.{}".format(*sys.version_info[:2])
        works = self._shell.answer([str(self.python), "-c", version]) == wanted
        if works and self._was_made_here():
            return f"Python {wanted}, already there"
        if not self._shell.answer([sys.executable, "-c", "import ensurepip; print(1)"]):
            package = f"python{wanted}-venv"
            if install_debian(self._shell, [package], self._environ):
                raise SetupError(
                    f"{sys.executable} cannot make virtual environments (no ensurepip)",
                    f"Install it: `apt install {package}`, or use a complete Python.",
                )
        # --clear would delete the log, which lies inside; an unusable interpreter goes by itself.
        shutil.rmtree(str(self.venv / "bin"), ignore_errors=True)
        shutil.rmtree(str(self.venv / "lib"), ignore_errors=True)
        self._do([sys.executable, "-m", "venv", str(self.venv)], "Look at the lines above.")
        return f"Python {wanted}, made"

    def _was_made_here(self) -> bool:
        """Tell a moved clone apart: its programs still start the interpreter of the old place."""
        activate = self.venv / "bin" / "activate"
        return activate.is_file() and str(self.venv) in activate.read_text(encoding="utf-8")

    def _packages(self) -> str:
        lock = str(LOCKS / "requirements.lock")
        self._pip(["install", "--no-deps", "--require-hashes", "-r", lock], OFFLINE_HINT)
        return "installed, every file checked against its hash"

    def _torch(self) -> str:
        present = "import importlib.metadata as m; print(m.version('torch'))"
        have = self._shell.answer([str(self.python), "-c", present])
        if have.split("+")[0] == TORCH:
            return f"{have}, already there"
        index = self._environ.get("FOAM_TORCH_INDEX")
        source = ["--index-url", index] if index else []
        cpu = ["install", "--no-deps", *source, f"torch=={TORCH}+cpu"]
        if sys.platform == "linux":
            if self._shell.run(self._pip_command(cpu), self._pip_environment()) == 0:
                return f"{TORCH}, CPU build"
            self._say("      no CPU build on offer (FOAM_TORCH_INDEX may name an index with one):")
            self._say("      taking the standard build, which on some machines brings CUDA along")
            self._check_disk(NEEDED_BYTES_CUDA)
        self._pip(["install", f"torch=={TORCH}"], OFFLINE_HINT)
        return f"{TORCH}, standard build"

    def _native(self) -> str:
        outcomes = []
        for name in NATIVE:
            wheels = self._cache / "wheels" / f"{name}-{self._native_key(name)}"
            wheel = next(iter(sorted(wheels.glob("*.whl"))), None)
            built = wheel is None
            if wheel is None:
                wheel = self._build(name, wheels)
            if wheel is not None:
                self._pip(["install", "--no-deps", "--no-index", str(wheel)], "Look at the log.")
                outcomes.append(f"{name} " + ("compiled" if built else "from the cache"))
        return ", ".join(outcomes) or "none"

    def _build(self, name: str, wheels: Path) -> Path | None:
        """Compile one locked source package into the cache.

        Returns:
            The wheel, or None when this machine cannot build it; a note then says so.
        """
        instead = "xllamacpp runs the language models" if name == ENGINE else "search stays exact"
        compiler = self._environ.get("CXX") or "c++"
        if not any(self._shell.which(c) for c in (compiler, "g++", "clang++")):
            self._note(f"no C++ compiler (g++): {name} is left out, {instead}")
            return None
        minutes = ": this takes some minutes" if name == ENGINE else ""
        self._say(f"      compiling {name}{minutes}")
        wheels.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=str(wheels.parent), prefix=".build-") as folder:
            work = Path(folder)
            (work / "one.lock").write_text("".join(self._native_lock(name)), encoding="utf-8")
            tools, env = work / "tools", self._pip_environment(BUILD_ENVIRONMENT)
            env["PATH"] = str(tools / "bin") + os.pathsep + env.get("PATH", os.defpath)
            pip = [str(tools / "bin" / "python"), "-m", "pip", "--no-input"]
            lock = ["--no-deps", "--require-hashes", "-r"]
            commands = (
                [sys.executable, "-m", "venv", str(tools)],
                [*pip, "install", *lock, str(LOCKS / "build.lock")],
                # Without the caches: pip would hand out a wheel built with other flags.
                [*pip, "wheel", "-v", "--no-build-isolation", "--no-cache-dir", "--no-binary", name,
                 "-w", str(work / "out"), *lock, str(work / "one.lock")],
            )  # fmt: skip
            for command in commands:
                if self._shell.run(command, env) != 0:
                    for line in self._shell.tail(8):
                        self._say(f"      | {line[:120]}")
                    self._note(f"{name} could not be compiled: it is left out, {instead}")
                    return None
            shutil.rmtree(str(wheels), ignore_errors=True)
            (work / "out").rename(wheels)
        return next(iter(sorted(wheels.glob("*.whl"))), None)

    def _native_lock(self, name: str) -> list[str]:
        text = (self._root / LOCKS / "native.lock").read_text(encoding="utf-8")
        return [block for package, block in lock_blocks(text) if package == name]

    def _native_key(self, name: str) -> str:
        parts = [*self._native_lock(name), json.dumps(BUILD_ENVIRONMENT), machine_tag()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def _second_engine(self) -> str:
        lock = str(LOCKS / "engine-wheel.lock")
        command = ["install", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", lock]
        if self._shell.run(self._pip_command(command), self._pip_environment()) == 0:
            return "xllamacpp"
        if not self._shell.answer([str(self.python), "-c", "import llama_cpp; print(1)"]):
            raise SetupError(
                "no language model engine: neither compiled nor as a wheel for this machine",
                "Install a C++ compiler (Debian: `apt install g++`) and run this again.",
            )
        self._note("no xllamacpp wheel for this machine: llama-cpp-python is the only engine")
        return "not available"

    def _project(self) -> str:
        self._pip(
            ["install", "--no-deps", "--no-build-isolation", "--no-index", "-e", "."],
            "pyproject.toml or the setuptools of the lock is at fault; look at the log.",
        )
        return "installed in place"

    def _encoder(self) -> str:
        python = str(self.python)
        self._do([python, "-m", "registry.encoders.export"], "Look at the lines above.")
        where = "from registry.encoders import default_folder; print(default_folder())"
        folder = self._shell.answer([python, "-c", where])
        self._needs += [folder] if folder else []
        return folder or "exported"

    # ------------------------------------------------------------------ programs

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._say(f"      NOTE: {text}")

    def _pip_command(self, arguments: Iterable[str]) -> list[str]:
        return [str(self.python), "-m", "pip", "--no-input", *arguments]

    def _pip_environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        env = {**self._environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(extra or {})}
        env["PIP_ROOT_USER_ACTION"] = "ignore"
        for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_USER", "PIP_PREFIX"):
            env.pop(name, None)
        return env

    def _pip(self, arguments: Iterable[str], remedy: str) -> None:
        self._do(self._pip_command(arguments), remedy)

    def _do(self, command: Sequence[str], remedy: str) -> None:
        status = self._shell.run(command, self._pip_environment())
        if status != 0:
            telling = [line for line in self._shell.tail(60) if not line.startswith(NOISE)]
            shown = "\n".join("      | " + line[:160] for line in telling[-10:])
            program = " ".join(command[1:])
            raise SetupError(f"`{program}` ended with status {status}:\n{shown}", remedy)
