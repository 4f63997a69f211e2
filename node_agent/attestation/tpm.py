"""A quote of the TPM 2.0 of this machine, by ``tpm2_quote`` of tpm2-tools.

The attestation key is made once by the operator (``tpm2_createek``, ``tpm2_createak``, and
``tpm2_evictcontrol`` to keep it under a handle); its public half goes into the registry's
``attestation.toml``.
"""

import base64
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from capability_schemas.errors import ConfigurationError
from node_agent.attestation.base import Findings

PROGRAM: Final = "tpm2_quote"
DEFAULT_REGISTERS: Final = "sha256:0,1,2,3,4,7"
"""Firmware, its settings, the boot loader, and whether Secure Boot is on (TCG PC Client Platform
Firmware Profile, section 3.3.4)."""

_LIMIT_S: Final = 30.0
_MOST_BYTES: Final = 8 * 1024
_ERROR_SHOWN: Final = 300


class TpmSource:
    """Asks the TPM to sign its registers together with the challenge.

    Args:
        key: Handle (``0x81010002``) or context file of the attestation key.
        registers: Bank and registers as ``tpm2_quote -l`` takes them.
        program: The executable.
    """

    name = "tpm2"

    def __init__(
        self, key: str, *, registers: str = DEFAULT_REGISTERS, program: str = PROGRAM
    ) -> None:
        self._key = key
        self._registers = registers
        self._program = program

    def collect(self, challenge: str | None) -> Findings:
        """Quote; without a challenge there is nothing to prove, and nothing is asked.

        Raises:
            ConfigurationError: The program is missing, fails, or writes no quote in 30 seconds.
        """
        if challenge is None:
            return Findings()
        program = shutil.which(self._program)
        if program is None:
            raise ConfigurationError(
                f"{self._program} is not on this machine: install tpm2-tools, or take FOAM_TPM_KEY "
                "away"
            )
        with TemporaryDirectory(prefix="foam-quote-") as folder:
            quoted, signature = Path(folder) / "quoted", Path(folder) / "signature"
            command = [
                *(program, "--key-context", self._key, "--pcr-list", self._registers),
                *("--hash-algorithm", "sha256", "--qualification", challenge),
                *("--message", str(quoted), "--signature", str(signature)),
            ]
            self._run(command)
            return Findings(
                statement={"quoted": _text(quoted), "signature": _text(signature)},
            )

    def _run(self, command: list[str]) -> None:
        try:
            done = subprocess.run(  # noqa: S603 - the operator's program, without a shell
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise ConfigurationError(f"{self._program} did not end in {_LIMIT_S:.0f} s") from exc
        except OSError as exc:
            raise ConfigurationError(f"{self._program} cannot be run: {exc}") from exc
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip()[-_ERROR_SHOWN:]
            raise ConfigurationError(f"{self._program} failed ({done.returncode}): {said}")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as exc:
        raise ConfigurationError(f"{PROGRAM} wrote no {path.name}") from exc
    if not 0 < len(content) <= _MOST_BYTES:
        raise ConfigurationError(f"{PROGRAM} wrote {len(content)} bytes of {path.name}")
    return base64.b64encode(content).decode()
