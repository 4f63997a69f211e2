"""The seam between the set-up and the machine: programs, rights, disk, Debian packages."""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

HEARTBEAT_S = 20.0
_PACKAGES_WITH_SERVICES = ("mosquitto", "nats-server")


class Shell:
    """The seam to the machine: programs, rights, disk. Tests put a double in its place.

    Args:
        root: folder that programs run in.
        log: file that collects the output of every program run.
        say: takes one line for the person watching.
    """

    def __init__(self, *, root: Path, log: Path, say: Callable[[str], None]) -> None:
        self._root = root
        self._log = log
        self._say = say
        self._start = 0

    def run(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> int:
        """Run a program to its end with its output in the log; say it is alive now and then.

        Returns:
            The exit status.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        with self._log.open("ab") as log:
            self._start = log.tell()
            log.write(("$ " + " ".join(argv) + "\n").encode())
            log.flush()
            with subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._root,
                env=env,
            ) as process:
                while True:
                    try:
                        return process.wait(timeout=HEARTBEAT_S)
                    except subprocess.TimeoutExpired:
                        last = (self.tail(1) or [""])[0].strip()[:90]
                        self._say(f"      ... {time.monotonic() - begun:.0f} s  {last}")

    def tail(self, lines: int) -> list[str]:
        """Return the last lines that the last program wrote."""
        with self._log.open("rb") as log:
            log.seek(self._start)
            text = log.read().decode("utf-8", "replace").replace("\r", "\n")
        return [line for line in text.splitlines() if line.strip()][-lines:]

    def answer(self, argv: Sequence[str]) -> str:
        """Return what a program prints, or nothing when it fails."""
        try:
            done = subprocess.run(
                list(argv), capture_output=True, text=True, cwd=self._root, check=False, timeout=60
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    def which(self, name: str) -> str | None:
        """Find a program, also in the system folders that a plain user's PATH leaves out."""
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"])
        return shutil.which(name, path=path)

    def is_root(self) -> bool:
        """Tell whether system packages may be installed."""
        return os.geteuid() == 0

    def free_bytes(self, folder: Path) -> int:
        """Return the free space of the disk that a folder is on."""
        return shutil.disk_usage(folder).free

    def services_held_back(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which installed packages start no service."""
        return services_held_back()


@contextlib.contextmanager
def services_held_back(policy: Path = Path("/usr/sbin/policy-rc.d")) -> Iterator[None]:
    """Forbid Debian's package scripts to start services, unless the machine has its own policy.

    Source: Debian policy manual 9.3.3.1, ``invoke-rc.d``; exit status 101 means forbidden.
    """
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n", encoding="utf-8")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink(missing_ok=True)


def install_debian(shell: Shell, packages: Sequence[str], environ: Mapping[str, str]) -> str:
    """Install Debian packages without starting or enabling their services.

    Returns:
        Why it was not done, or an empty string.
    """
    apt = shell.which("apt-get")
    if not apt:
        return "no apt-get on this machine"
    if not shell.is_root():
        return f"no root rights; `sudo apt-get install {' '.join(packages)}` would do it"
    env = {**environ, "DEBIAN_FRONTEND": "noninteractive"}
    options = ["-qq", "-o", "DPkg::Lock::Timeout=120"]
    shell.run([apt, "update", *options], env)
    with_services = [name for name in packages if name in _PACKAGES_WITH_SERVICES]
    with shell.services_held_back():
        status = shell.run(
            [apt, "install", "-y", "--no-install-recommends", *options, *packages], env
        )
    if status != 0:
        return "apt-get failed: " + " ".join(shell.tail(1))
    for name in with_services:
        _disable_service(shell, name, env)
    return ""


def _disable_service(shell: Shell, name: str, env: Mapping[str, str]) -> None:
    """Keep a service that we just brought along from starting, now and at the next boot.

    Each way covers machines that lack the others: running systemd, its unit links, boot scripts.
    """
    for program, arguments in (
        ("systemctl", ["disable", "--now", name]),
        ("deb-systemd-helper", ["disable", f"{name}.service"]),
        ("update-rc.d", [name, "disable"]),
    ):
        path = shell.which(program)
        if path:  # the helper works for package scripts only, and asks for their variable
            shell.run([path, *arguments], {**env, "DPKG_MAINTSCRIPT_PACKAGE": name})


def machine_tag() -> str:
    """Name what a compiled wheel depends on: interpreter, platform, C library."""
    return " ".join(
        [sysconfig.get_platform(), *platform.libc_ver(), *map(str, sys.version_info[:2])]
    )
