"""How a process of the mesh ends."""

import os
import subprocess
import sys

import pytest

_CODE = """
import threading

from capability_schemas.errors import BrokerUnavailable, ConfigurationError
from foam.cli.processes import run_reporting
from foam.status import ProcessStatus


async def main():
    threading.Thread(target=threading.Event().wait).start()  # nobody waits for it
    {last}


run_reporting(main(), ProcessStatus(title="router", supervised=True))
"""


@pytest.mark.parametrize(
    ("last", "code", "said"),
    [
        ("return 0", 0, ""),
        ("return 7", 7, ""),
        (
            "raise ConfigurationError('no such file')",
            20,
            '{"status": "failed", "message": "no such file", "kind": "ConfigurationError"}\n',
        ),
    ],
)
def test_a_supervised_process_ends_with_its_parts(last: str, code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE.format(last=last)],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, said), done.stderr
