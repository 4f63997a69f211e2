"""A real OpenAI-compatible server: llama-cpp-python's, with the shipped model, in a process."""

import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
_READY = re.compile(r"running on (http://127\.0\.0\.1:\d+)")
_START_S = 60.0


class OpenAIServer:
    """The server; started by the constructor, on a free port.

    Args:
        n_ctx: Context length, tokens.

    Attributes:
        base_url: Its address, with the version prefix.
        model: The name under which it lists the model.
    """

    def __init__(self, *, n_ctx: int = 1024) -> None:
        self.model = "foam-tiny"
        options = {
            "--model": str(MODEL),
            "--model_alias": self.model,
            "--host": "127.0.0.1",
            "--port": "0",
            "--n_threads": "1",
            "--n_threads_batch": "1",
            "--n_ctx": str(n_ctx),
            # Or else a second request ends the first one: one model, one lock.
            "--interrupt_requests": "false",
        }
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "llama_cpp.server",
                *(x for pair in options.items() for x in pair),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._addresses: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            address = self._addresses.get(timeout=_START_S)
        except queue.Empty:
            address = None
        if address is None:
            self.end()
            raise AssertionError("the server did not start:\n" + "\n".join(self._lines[-20:]))
        self.base_url = f"{address}/v1"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line.rstrip())
            if found := _READY.search(line):
                self._addresses.put(found[1])
        self._addresses.put(None)

    def kill(self) -> None:
        """End it as a power cut does, and wait until it is gone."""
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        """End it and release everything."""
        self.process.terminate()
        until = time.monotonic() + 10
        while self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        self.kill()
        self._reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()


@contextmanager
def openai_server(*, n_ctx: int = 1024) -> Iterator[OpenAIServer]:
    """Run a server for the body of a ``with``."""
    server = OpenAIServer(n_ctx=n_ctx)
    try:
        yield server
    finally:
        server.end()
