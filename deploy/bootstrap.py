#!/usr/bin/env python3
"""FOAM's commands for a fresh clone: each sets up what is missing, then does its work.

``python3 deploy/bootstrap.py demo`` and ``... test`` are all that a machine with Python needs; the
same commands serve people and CI. ``installation.py`` beside this file holds the set-up.

The syntax of this file stays readable by old interpreters, so that one of those can look for a
newer one, or say what to install, instead of failing on the first line.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM = (3, 11)
NEWER = ("python3.13", "python3.12", "python3.11", "python3.14", "python3")
VERBS = {
    "demo": "run the demonstration plant: tasks, chosen nodes, streamed answers",
    "up": "leave the same mesh running",
    "test": "run the tests (arguments go to pytest)",
    "check": "ruff, mypy and the import rules",
    "bench": "measure (arguments go to tests/benchmarks/run.py)",
    "lock": "write the lock files anew (--upgrade: newest versions)",
    "setup": "set up only (--again: go through every step)",
}


def find_interpreter() -> str | None:
    """Return a program that runs Python 3.11 or newer, if the PATH has one."""
    question = f"import sys; sys.exit(sys.version_info[:2] < {MINIMUM})"
    for name in NEWER:
        program = shutil.which(name)
        if program:
            asked = subprocess.run([program, "-c", question], check=False, capture_output=True)
            if asked.returncode == 0:
                return program
    return None


def command_environment(environ: dict[str, str], venv: Path) -> dict[str, str]:
    """Return the environment of a command: the virtual environment's programs come first."""
    env = {k: v for k, v in environ.items() if k not in ("PYTHONHOME", "PYTHONPATH")}
    env["VIRTUAL_ENV"] = str(venv)
    env["PATH"] = str(venv / "bin") + os.pathsep + environ.get("PATH", os.defpath)
    return env


def commands(verb: str, arguments: list[str], venv: Path) -> list[list[str]]:
    """Return the programs that a verb runs, one after another."""
    python, tools = str(venv / "bin" / "python"), venv / "bin"
    if verb in ("demo", "up"):
        return [[str(tools / "foam"), verb, *arguments]]
    if verb == "test":
        return [[python, "-m", "pytest", *arguments]]
    if verb == "bench":
        return [[python, str(ROOT / "tests" / "benchmarks" / "run.py"), *arguments]]
    if verb == "check":
        ruff = str(tools / "ruff")
        return [
            [ruff, "check", "."],
            [ruff, "format", "--check", "."],
            [str(tools / "mypy")],
            [str(tools / "lint-imports")],
        ]
    return []


def must_have_brokers(environ: dict[str, str]) -> bool:
    """Tell whether missing external brokers fail the tests instead of skipping some.

    They do in CI, and where this program could have installed them.
    """
    could_install = os.geteuid() == 0 and shutil.which("apt-get") is not None
    return environ.get("CI", "").lower() in ("1", "true") or could_install


def run_all(programs: list[list[str]], env: dict[str, str]) -> int:
    """Run programs in turn, all of them, and return the first bad exit status."""
    worst = 0
    for program in programs:
        print("$ " + " ".join([Path(program[0]).name, *program[1:]]), flush=True)
        status = subprocess.run(program, env=env, cwd=str(ROOT), check=False).returncode
        worst = worst or status
    return worst


def say(line: str) -> None:
    """Show one line of progress; stdout belongs to the command that follows."""
    print(line, file=sys.stderr, flush=True)


def cache_folder(environ: dict[str, str]) -> Path:
    """Return the user's cache folder of FOAM, shared by all clones."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "foam"
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foam"


def main(argv: list[str]) -> int:
    """Set up, then run a verb.

    Returns:
        The exit status: the command's own, or 2 when the set-up failed.
    """
    if sys.version_info[:2] < MINIMUM:
        newer = find_interpreter()
        if newer is None:
            say(f"FOAM needs Python {MINIMUM[0]}.{MINIMUM[1]}+; this is {sys.version.split()[0]}.")
            say("Install one (Debian 12 or newer: `apt install python3 python3-venv`).")
            return 2
        os.execv(newer, [newer, str(Path(__file__).resolve()), *argv])
    listing = "\n".join(f"  {verb:6} {what}" for verb, what in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="bootstrap.py",
        description="Set FOAM up in this clone, then run one of its commands:\n" + listing,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="see above")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the command")
    options = parser.parse_args(argv)
    return run_verb(options.verb, options.arguments, dict(os.environ))


def run_verb(verb: str, arguments: list[str], environ: dict[str, str]) -> int:
    """Set up and do what a verb says, in this process's place where it is a single program."""
    sys.path.insert(0, str(ROOT))
    from deploy.installation import Installation, SetupError  # noqa: PLC0415 - newer syntax
    from deploy.locking import write_locks  # noqa: PLC0415 - newer syntax
    from deploy.machine import Shell  # noqa: PLC0415 - newer syntax

    log = ROOT / ".venv" / "bootstrap.log"
    shell = Shell(root=ROOT, log=log, say=say)
    setup = Installation(
        root=ROOT, cache=cache_folder(environ), shell=shell, say=say, environ=environ
    )
    try:
        setup.ensure(again=verb == "setup" and "--again" in arguments)
    except SetupError as error:
        say(f"\nSet-up stopped: {error}\nWhat to do: {error.remedy}\nWhole log: {log}")
        return 2
    env = command_environment(environ, setup.venv)
    if verb == "lock":
        write_locks(ROOT, uv=setup.venv / "bin" / "uv", upgrade="--upgrade" in arguments)
    if verb == "test" and must_have_brokers(environ):
        env["FOAM_REQUIRE_BROKERS"] = "1"
    programs = commands(verb, arguments, setup.venv)
    if len(programs) == 1:
        sys.stdout.flush()
        os.chdir(str(ROOT))
        os.execve(programs[0][0], programs[0], env)
    return run_all(programs, env)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
