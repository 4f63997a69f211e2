"""Runs WebAssembly programs (WASI preview 1 commands) in wasmtime; the door to it.

The module is compiled once; every call gets a store of its own, so nothing is left from one to
the next. A program has its standard streams, clocks, random numbers, the arguments and variables
of its declaration, and the folders granted there, read only; no other file and no network. Each
slot has an engine of its own, because wasmtime's epoch, which interrupts a running program, is
the engine's. A sleeping program (``poll_oneoff``) is not interrupted, for it is in the host; the
agent then kills the instance after the grace time.
"""

import re
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import wasmtime

from node_agent.worker.base import Emit, InvocationError, Request
from node_agent.worker.programs import ErrorLines, ProgramOutput, exit_error, input_document
from node_agent.worker.threaded import ThreadedHost

_WASI: Final = "wasi_snapshot_preview1"
_EIO: Final = -5
_CAUSE = re.compile(r"wasm trap: (?P<cause>.+)")


class WasmHost(ThreadedHost):
    """Host of one WebAssembly program.

    Args:
        entry: The ``.wasm`` or ``.wat`` file.
        options: ``args``, ``env``, ``folders``, ``fuel``, ``output``, ``output_bytes``,
            ``memory_bytes``.
        concurrency: Calls at a time.
        emit: Sends a frame.
    """

    # Programs run on it: wasmtime stops them at 512 KiB (max_wasm_stack) and needs some itself.
    stack_bytes = 4 * 1024 * 1024

    def __init__(
        self, *, entry: str, options: dict[str, Any], concurrency: int, emit: Emit
    ) -> None:
        super().__init__(slots=concurrency, emit=emit)
        self._entry = Path(entry)
        self._options = options
        self._engines: list[wasmtime.Engine] = []
        self._modules: list[wasmtime.Module] = []
        self._linkers: list[wasmtime.Linker] = []
        self._lock = threading.Lock()  # of the running calls, whose slot an interruption needs
        self._running: dict[str, int] = {}

    def load(self) -> dict[str, Any]:
        """Compile the module; returns ``{"slots": calls at a time, "engine": ...}``."""
        try:
            code = self._entry.read_bytes()
        except OSError as exc:
            raise InvocationError("internal", f"{self._entry}: {exc.strerror}") from exc
        self._engines = [_engine() for _ in range(self.slots)]
        try:
            if self._entry.suffix == ".wat":
                code = bytes(wasmtime.wat2wasm(code))
            first = wasmtime.Module(self._engines[0], code)
        except wasmtime.WasmtimeError as exc:
            raise InvocationError(
                "internal", f"{self._entry} is no WebAssembly module: {_first_line(exc)}"
            ) from exc
        self._check(first)
        compiled = first.serialize()
        others = [wasmtime.Module.deserialize(e, compiled) for e in self._engines[1:]]
        self._modules = [first, *others]
        self._linkers = [wasmtime.Linker(engine) for engine in self._engines]
        for linker in self._linkers:
            linker.define_wasi()
        return {"slots": self.slots, "engine": f"wasmtime {version('wasmtime')}"}

    def _check(self, module: wasmtime.Module) -> None:
        foreign = sorted({f"{i.module}.{i.name}" for i in module.imports if i.module != _WASI})
        if foreign:
            raise InvocationError(
                "internal",
                f"{self._entry} imports {', '.join(foreign)}: only {_WASI} is there",
            )
        if not any(
            e.name == "_start" and isinstance(e.type, wasmtime.FuncType) for e in module.exports
        ):
            raise InvocationError(
                "internal", f"{self._entry} has no function _start: build it as a WASI command"
            )

    def call(self, request: Request, slot: int) -> Any:
        """Run the program once; see `ThreadedHost.call`."""
        output = ProgramOutput(
            request_id=request.id,
            kind=self._options["output"],
            limit_bytes=self._options["output_bytes"],
            emit=self.emit,
        )
        errors = ErrorLines()
        problems: list[Exception] = []

        def on_output(data: bytes) -> int:
            try:
                if not problems:
                    output.feed(data)
            except Exception as exc:  # noqa: BLE001 - native code is in between; raised again below
                problems.append(exc)
            if problems:
                self._engines[slot].increment_epoch()
                return _EIO
            return len(data)

        def on_error(data: bytes) -> int:
            errors.feed(data)
            return len(data)

        with tempfile.NamedTemporaryFile(prefix="foam-wasm-") as document:
            document.write(input_document(request))
            document.flush()
            wasi = self._wasi(document.name)
            wasi.stdout_custom = on_output
            wasi.stderr_custom = on_error
            failure = self._run(request, slot, wasi, errors)
        if problems:
            raise problems[0]
        if failure is not None:
            raise failure
        return output.output()

    def _wasi(self, stdin: str) -> wasmtime.WasiConfig:
        wasi = wasmtime.WasiConfig()
        wasi.argv = [self._entry.name, *self._options["args"]]
        wasi.env = list(self._options["env"].items())
        for inside, outside in self._options["folders"].items():
            wasi.preopen_dir(outside, inside, False)  # not writable
        wasi.stdin_file = stdin
        return wasi

    def _run(
        self, request: Request, slot: int, wasi: wasmtime.WasiConfig, errors: ErrorLines
    ) -> InvocationError | None:
        store = wasmtime.Store(self._engines[slot])
        try:
            store.set_fuel(self._options["fuel"])
            store.set_epoch_deadline(1)
            if self._options["memory_bytes"] is not None:
                store.set_limits(memory_size=self._options["memory_bytes"])
            store.set_wasi(wasi)
            with self._lock:
                self._running[request.id] = slot
            if request.cancelled.is_set():  # before there was anything to interrupt
                return InvocationError("cancelled", "cancelled before it ran")
            module = self._linkers[slot].instantiate(store, self._modules[slot])
            program = module.exports(store)["_start"]
            if isinstance(program, wasmtime.Func):
                program(store)
        except wasmtime.ExitTrap as exc:
            if exc.code == 0:
                return None
            return exit_error(self._entry.name, exc.code, errors.last())
        except (wasmtime.Trap, wasmtime.WasmtimeError) as exc:
            return self._trapped(exc, errors)
        finally:
            with self._lock:
                self._running.pop(request.id, None)
            store.close()
        return None

    def _trapped(self, exc: Exception, errors: ErrorLines) -> InvocationError:
        code = exc.trap_code if isinstance(exc, wasmtime.Trap) else None
        name = self._entry.name
        detail = {"stderr": errors.last(), "trap": None if code is None else code.name.lower()}
        if code is wasmtime.TrapCode.OUT_OF_FUEL:
            fuel = self._options["fuel"]
            message = f"{name} used up its {fuel} units of fuel: raise options.fuel"
        else:
            cause = _CAUSE.search(str(exc))
            message = f"{name}: {cause['cause'] if cause else _first_line(exc)}"
        return InvocationError("execution_failed", message, **detail)

    def interrupt(self, request: Request) -> None:
        """End a running program at its next loop or call."""
        with self._lock:
            slot = self._running.get(request.id)
            if slot is not None:
                self._engines[slot].increment_epoch()


def _engine() -> wasmtime.Engine:
    config = wasmtime.Config()
    config.consume_fuel = True
    config.epoch_interruption = True
    return wasmtime.Engine(config)


def _first_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0]
