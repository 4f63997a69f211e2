"""The process of one instance; started by `node_agent.runtimes.child`, never by hand."""

import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
from typing import Any, Final, NoReturn

from node_agent.worker.base import Host, InvocationError, Request
from node_agent.worker.confinement import Confinement
from node_agent.worker.frames import Frame, FrameError, FrameSocket

_PR_SET_PDEATHSIG: Final = 1
"""``prctl(2)``: signal to get when the thread that started this process ends (Linux only)."""


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the agent dies, also if the agent is killed.

    End of file on the socket does the same wherever a thread still runs; this covers native code
    that holds the interpreter lock. Elsewhere than on Linux only the end of file remains.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the call above
        os._exit(1)


def make_host(load: Frame, channel: FrameSocket, confinement: Confinement) -> Host:
    """Return the host that the ``load`` frame asks for, not loaded yet.

    Raises:
        InvocationError: No runtime of that name lives in a worker.
    """
    runtime = load.get("runtime")
    if runtime == "python":
        from node_agent.worker.python_host import PythonHost  # noqa: PLC0415 - only what is needed: a child starts fast

        return PythonHost(
            entry=str(load["entry"]),
            concurrency=int(load.get("concurrency", 1)),
            emit=channel.send,
            explain=confinement.explain,
        )
    if runtime == "llama_cpp":
        from node_agent.worker.engine_host import EngineHost  # noqa: PLC0415 - only what is needed: a child starts fast

        return EngineHost(options=load.get("options") or {}, emit=channel.send)
    if runtime == "embeddings":
        from node_agent.worker.embedding_host import EmbeddingHost  # noqa: PLC0415 - only what is needed: a child starts fast

        return EmbeddingHost(options=load.get("options") or {}, emit=channel.send)
    if runtime == "command":
        from node_agent.worker.command_host import CommandHost  # noqa: PLC0415 - only what is needed: a child starts fast

        return CommandHost(
            options=load["options"], concurrency=int(load["concurrency"]), emit=channel.send
        )
    if runtime == "wasm":
        from node_agent.worker.wasm_host import WasmHost  # noqa: PLC0415 - only what is needed: a child starts fast

        return WasmHost(
            entry=str(load["entry"]),
            options=load["options"],
            concurrency=int(load["concurrency"]),
            emit=channel.send,
        )
    if runtime == "mcp":
        from node_agent.worker.mcp_host import McpHost  # noqa: PLC0415 - only what is needed: a child starts fast

        return McpHost(
            server=load["server"], concurrency=int(load["concurrency"]), emit=channel.send
        )
    raise InvocationError("internal", f"no runtime {runtime!r} in a worker")


def end_group() -> NoReturn:
    """End this process and everything in its process group, which it leads when started so."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def read_frames(channel: FrameSocket, host: Host, confinement: Confinement) -> None:
    """Hand the agent's frames to the host until ``close``; the reader thread.

    The agent's end closing means that nobody wants this process any more: it ends at once, and
    with it what it started.
    """
    while True:
        try:
            frame = channel.receive()
        except FrameError:
            frame = None
        if frame is None:
            end_group()
        if frame["t"] == "invoke":
            confinement.begin_call()
            host.submit(Request.from_frame(frame))
        elif frame["t"] == "cancel":
            host.cancel(str(frame["id"]))
        elif frame["t"] == "close":
            host.close()


def run(channel: FrameSocket, load: Frame) -> int:
    """Load, report readiness and serve; returns the exit status."""
    if load.get("folder"):
        os.chdir(str(load["folder"]))
        sys.path.append(str(load["folder"]))
    confinement = Confinement(load.get("limits") or {}, **load.get("confinement") or {})
    network = confinement.apply()
    if load["t"] == "describe":
        from node_agent.worker.describe import describe  # noqa: PLC0415 - only what is needed: a child starts fast

        return _describe(channel, load, describe, confinement)
    try:
        host = make_host(load, channel, confinement)
        info = host.load()
    except BaseException as exc:  # noqa: BLE001 - supervision boundary: user code runs when it is imported
        return _failed(channel, exc, confinement)
    threading.Thread(target=read_frames, args=(channel, host, confinement), daemon=True).start()
    channel.send({"t": "ready", "info": {**info, "network": network}})
    host.serve()
    return 0


def _describe(channel: FrameSocket, load: Frame, describe: Any, confinement: Confinement) -> int:
    try:
        fields, problems = describe(
            str(load["where"]), load["names"], everything=bool(load["everything"])
        )
        channel.send({"t": "described", "functions": fields, "problems": problems})
    except BaseException as exc:  # noqa: BLE001 - supervision boundary: user code runs when it is imported
        return _failed(channel, exc, confinement)
    return 0


def _failed(channel: FrameSocket, exc: BaseException, confinement: Confinement) -> int:
    """Tell the agent why there will be no instance; returns the exit status."""
    if not isinstance(exc, InvocationError):
        traceback.print_exception(exc)
        hint = confinement.explain(exc).get("hint")
        said = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        exc = InvocationError("execution_failed", f"{said} ({hint})" if hint else said)
    channel.send({"t": "failed", "code": exc.code, "message": exc.message})
    return 1


def main(arguments: list[str]) -> int:
    """Run one instance.

    Args:
        arguments: File descriptor of the socket pair's end, and the agent's process id.
    """
    descriptor, parent_pid = int(arguments[0]), int(arguments[1])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which then closes us
    os.set_inheritable(descriptor, False)  # it is ours, not of programs that we start
    channel = FrameSocket(socket.socket(fileno=descriptor))
    load = channel.receive()
    if load is None:
        return 0
    try:
        return run(channel, load)
    except OSError:  # the agent went away while we were writing to it
        return 1


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of user code and native destructors must not keep the process alive.
    os._exit(status)
