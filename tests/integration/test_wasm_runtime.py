"""WebAssembly programs as functions: their limits, and what they cannot reach."""

import asyncio
import importlib.util
from contextlib import aclosing
from pathlib import Path

import pytest

from capability_schemas.errors import ConfigurationError, ExecutionFailed, TaskCancelled, TooLarge
from node_agent.runtimes.base import InstanceFailed, RuntimeContext
from node_agent.runtimes.wasm import WasmRuntime
from support.calls import answer_of, collect, request, running, spec_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("wasmtime") is None, reason="wasmtime is not installed"
)

FUNCTIONS = Path(__file__).parents[1] / "data" / "functions"
PROGRAM = FUNCTIONS / "program.wat"
RUNTIME = WasmRuntime(RuntimeContext(cancel_grace_s=10))
RECUR, FOREVER, FAIL, SPIN, GROW = 0, 2, 3, 5, 6
UNREACHABLE, BEYOND, READ, WRITE = 7, 8, 9, -1
# Of WASI preview 1 (witx, typename errno).
BAD_DESCRIPTOR, NOT_PERMITTED, ACCESS_DENIED, READ_ONLY = 8, 63, 2, 69


def program(entry=PROGRAM, limits=None, concurrency=1, **options):
    return spec_of(
        "wasm", entry=str(entry), options=options, limits=limits or {}, concurrency=concurrency
    )


async def fails(spec, asked):
    """Return how a call fails, after which the instance must still answer."""
    async with running(RUNTIME, spec) as instance:
        with pytest.raises(ExecutionFailed) as raised:
            await collect(instance, request(RUNTIME, spec, asked))
        again = await collect(instance, request(RUNTIME, spec, 1, request_id="again"))
        assert again[-1].output == "1\n"
        return raised.value


async def test_it_reads_its_input_and_says_it_again():
    *pieces, final = await answer_of(RUNTIME, program(), "x" * 5000)
    assert final.output == f'"{"x" * 5000}"\n'
    assert "".join(piece.data for piece in pieces) == final.output


async def test_its_output_may_be_json():
    assert (await answer_of(RUNTIME, program(output="json"), 17))[-1].output == 17


async def test_an_endless_loop_is_interrupted_and_the_instance_stays():
    spec = program(fuel=2**62)
    async with running(RUNTIME, spec) as instance:
        async with aclosing(instance.invoke(request(RUNTIME, spec, SPIN))) as answers:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await anext(answers)
        async with asyncio.timeout(8):
            await instance.settled("r1")
        assert instance.alive
        again = await collect(instance, request(RUNTIME, spec, 1, request_id="again"))
        assert again[-1].output == "1\n"


async def test_an_interruption_is_for_one_call_only():
    spec = program(fuel=2**62, concurrency=2)
    async with running(RUNTIME, spec) as instance, asyncio.TaskGroup() as group:
        spinning = group.create_task(
            collect_error(instance, request(RUNTIME, spec, SPIN, request_id="spins"))
        )
        async with aclosing(
            instance.invoke(request(RUNTIME, spec, FOREVER, request_id="talks"))
        ) as answers:
            await anext(answers)
            instance.cancel("spins")
            assert isinstance(await spinning, TaskCancelled)
            for _ in range(300):  # more than had been sent when the other one was interrupted
                assert (await anext(answers)).data


async def collect_error(instance, asked):
    try:
        await collect(instance, asked)
    except TaskCancelled as error:
        return error
    return None


async def test_out_of_fuel_it_fails_and_says_so():
    error = await fails(program(fuel=100_000), SPIN)
    assert error.message == ("program.wat used up its 100000 units of fuel: raise options.fuel")
    assert error.detail["trap"] == "out_of_fuel"


async def test_memory_is_what_its_limit_says():
    assert (await answer_of(RUNTIME, program(), GROW))[-1].output == "grown\n"
    error = await fails(program(limits={"memory_bytes": 1_000_000}), GROW)
    assert error.detail["exit_status"] == 9  # its own way of saying that memory did not grow


async def test_its_exit_status_and_stderr_are_the_error():
    error = await fails(program(), FAIL)
    assert error.message == "program.wat ended with exit status 3: it went wrong"
    assert error.detail == {"exit_status": 3, "stderr": ["it went wrong"]}


@pytest.mark.parametrize(
    ("asked", "trap", "words"),
    [
        (UNREACHABLE, "unreachable", "`unreachable` instruction executed"),
        (RECUR, "stack_overflow", "call stack exhausted"),
        (BEYOND, "memory_out_of_bounds", "out of bounds memory access"),
    ],
)
async def test_a_trap_is_the_error(asked, trap, words):
    error = await fails(program(), asked)
    assert words in error.message
    assert error.detail["trap"] == trap


async def test_every_slot_has_stack_enough_to_run_out_of_it_well():
    spec = program(concurrency=3)
    async with running(RUNTIME, spec) as instance:
        for number in range(12):  # whichever thread takes it
            with pytest.raises(ExecutionFailed, match="call stack exhausted"):
                await collect(instance, request(RUNTIME, spec, RECUR, request_id=f"r{number}"))
        assert instance.alive


async def test_a_flood_is_cut_off():
    spec = program(limits={"output_bytes": 1000})
    async with running(RUNTIME, spec) as instance:
        with pytest.raises(TooLarge):
            await collect(instance, request(RUNTIME, spec, FOREVER))
        again = await collect(instance, request(RUNTIME, spec, 1, request_id="again"))
        assert again[-1].output == "1\n"


@pytest.mark.parametrize("asked", [READ, WRITE])
async def test_no_file_can_be_reached(asked):
    assert (await fails(program(), asked)).detail["exit_status"] == BAD_DESCRIPTOR


async def test_a_granted_folder_can_be_read_and_not_written(tmp_path):
    (tmp_path / "note.txt").write_text("from outside\n")
    spec = program(folders={"/data": str(tmp_path)})
    assert (await answer_of(RUNTIME, spec, READ))[-1].output == "from outside\n"
    (tmp_path / "note.txt").unlink()
    status = (await fails(spec, WRITE)).detail["exit_status"]
    assert status in (NOT_PERMITTED, ACCESS_DENIED, READ_ONLY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.wasm", b"", "is no WebAssembly file"),
        ("a.wasm", b"\0asm\1\0\0\0cut", "is no WebAssembly module"),
        ("a.wat", b"(module (func", "is no WebAssembly module"),
        ("a.wat", b"(module)", "no function _start"),
        (
            "a.wat",
            b'(module (import "env" "open_port" (func)) (func (export "_start")))',
            r"imports env\.open_port: only wasi_snapshot_preview1",
        ),
    ],
)
async def test_a_file_that_is_no_program_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ConfigurationError, InstanceFailed), match=message):
        await answer_of(RUNTIME, program(tmp_path / name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entry": "numbers.py"}, r"write path/to/file\.wasm"),
        ({"entry": "/gone/a.wasm"}, "does not exist"),
        ({"folders": {"data": "."}}, "write an absolute path"),
        ({"folders": {"/data": "/gone"}}, "/gone is no folder"),
        ({"fuel": 0}, r"options\.fuel"),
        ({"args": "all"}, r"options\.args"),
        ({"network": True}, r"options\.network"),
    ],
)
def test_what_cannot_run_is_found_before_it_should(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        RUNTIME.check(program(**fields))
