"""Programs as functions: what they may do wrong, and what is left of them."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from capability_schemas.errors import (
    ConfigurationError,
    ExecutionFailed,
    InvalidTask,
    TooLarge,
)
from node_agent.runtimes.base import Final, InstanceDied, Piece, RuntimeContext
from node_agent.runtimes.command import CommandRuntime
from support.calls import answer_of, collect, request, running, spec_of

ROOT = Path(__file__).parents[2]
RUNTIME = CommandRuntime(RuntimeContext(cancel_grace_s=6))


def command(*words, limits=None, concurrency=1, schema=None, **options):
    return spec_of(
        "command",
        options={"command": list(words), **options},
        limits=limits or {},
        concurrency=concurrency,
        input_schema=schema,
    )


def shell(script, **more):
    return command("sh", "-c", script, **more)


def is_gone(pid):
    """Tell whether a process has ended, a zombie that nobody has waited for yet included."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def written(path):
    return path.exists() and path.read_text().strip()


async def test_lines_come_while_the_program_runs(tmp_path):
    spec = shell("echo one; while [ ! -e go ]; do sleep 0.02; done; echo two", folder=str(tmp_path))
    async with running(RUNTIME, spec) as instance:
        answers = instance.invoke(request(RUNTIME, spec))
        async with aclosing(answers):
            assert await anext(answers) == Piece("one\n")
            (tmp_path / "go").touch()  # it waits for this: the line came before its end
            assert [item async for item in answers] == [Piece("two\n"), Final(output="one\ntwo\n")]


@pytest.mark.parametrize(
    ("kind", "output", "pieces"),
    [("text", '{"a":[1,2]}\n', 1), ("json", {"a": [1, 2]}, 0), ("jsonl", [{"a": [1, 2]}], 1)],
)
async def test_the_kinds_of_output(kind, output, pieces):
    *shown, final = await answer_of(RUNTIME, command("cat", output=kind), {"a": [1, 2]})
    assert final.output == output
    assert len(shown) == pieces


async def test_arguments_are_never_split_nor_seen_by_a_shell():
    spec = command("printf", "%s|", "{text}", "{size}", "{list}", "{not a name}", "x{size}")
    asked = {"text": "a b; echo $HOME *", "size": 3, "list": [1, "2"]}
    final = (await answer_of(RUNTIME, spec, asked))[-1]
    assert final.output == 'a b; echo $HOME *|3|[1,"2"]|{not a name}|x{size}|'


@pytest.mark.parametrize("asked", [{}, {"name": "a\0b"}, "name", ["name"]])
async def test_an_argument_that_cannot_be_made_is_the_callers_fault(asked):
    with pytest.raises(InvalidTask, match=r"input\.name"):
        await answer_of(RUNTIME, command("echo", "{name}"), asked)


async def test_it_gets_its_variables_and_its_folder_and_none_of_our_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("FOAM_PASSWORD", "secret")
    spec = shell("pwd; env", env={"SITE": "north hall"}, folder=str(tmp_path))
    output = (await answer_of(RUNTIME, spec))[-1].output
    assert output.splitlines()[0] == str(tmp_path)
    assert "SITE=north hall" in output
    assert "secret" not in output


async def test_it_fails_with_its_status_and_what_it_said_last():
    with pytest.raises(ExecutionFailed, match="sh ended with exit status 3: worse") as raised:
        await answer_of(RUNTIME, shell("echo bad >&2; echo worse >&2; exit 3"))
    assert raised.value.detail["exit_status"] == 3
    assert raised.value.detail["stderr"] == ["bad", "worse"]


async def test_its_signal_is_named():
    with pytest.raises(ExecutionFailed, match="SIGSEGV") as raised:
        await answer_of(RUNTIME, shell("kill -SEGV $$"))
    assert raised.value.detail["signal"] == "SIGSEGV"


async def test_status_65_refuses_the_input():
    with pytest.raises(InvalidTask, match="no such pump"):
        await answer_of(RUNTIME, shell("echo no such pump >&2; exit 65"))


async def test_one_that_does_not_read_is_fine():
    final = (await answer_of(RUNTIME, shell("exec 0<&-; echo done"), {"big": "x" * 500_000}))[-1]
    assert final.output == "done\n"


async def test_one_that_reads_and_writes_much_at_a_time_does_not_stall():
    big = "x" * 500_000
    final = (await answer_of(RUNTIME, command("cat", output="json"), {"big": big}))[-1]
    assert final.output == {"big": big}


async def test_one_that_closes_its_output_is_waited_for():
    with pytest.raises(ExecutionFailed, match="exit status 4"):
        await answer_of(RUNTIME, shell("exec 1>&- 2>&-; sleep 0.2; exit 4"))


async def test_a_flood_is_cut_off_and_the_instance_stays():
    flood = shell("read -r x; case $x in *go*) yes;; *) echo fine;; esac")
    async with running(RUNTIME, flood) as instance:
        with pytest.raises(TooLarge):
            await collect(instance, request(RUNTIME, flood, {"x": "go"}))
        assert (await collect(instance, request(RUNTIME, flood)))[-1].output == "fine\n"


async def test_text_where_json_was_promised_ends_the_program(tmp_path, eventually):
    pid_file = tmp_path / "pid"
    spec = shell(f"echo $$ > {pid_file}; echo 1; echo oops; exec sleep 60", output="jsonl")
    with pytest.raises(ExecutionFailed, match="value 2 of its output is not JSON"):
        await answer_of(RUNTIME, spec)
    await eventually(lambda: is_gone(int(written(pid_file))))


async def test_one_that_ignores_sigterm_is_killed_with_all_below_it(tmp_path, eventually):
    pid_file = tmp_path / "pid"
    spec = shell(f"trap '' TERM; sleep 60 & echo $! > {pid_file}; echo on; wait; sleep 60")
    async with running(RUNTIME, spec) as instance:
        async with aclosing(instance.invoke(request(RUNTIME, spec))) as answers:
            await anext(answers)
        async with asyncio.timeout(20):
            await instance.settled("r1")
        assert instance.alive
        await eventually(lambda: is_gone(int(written(pid_file))))


async def test_what_it_leaves_behind_does_not_outlive_the_call(tmp_path, eventually):
    pid_file = tmp_path / "pid"
    daemon = f"setsid sh -c 'echo $$ > {pid_file}; exec sleep 60'"
    spec = shell(f"{daemon} & while [ ! -s {pid_file} ]; do sleep 0.02; done; echo hi")
    async with running(RUNTIME, spec) as instance:
        assert (await collect(instance, request(RUNTIME, spec)))[-1] == Final(output="hi\n")
        await eventually(lambda: is_gone(int(written(pid_file))))
        assert instance.alive


@pytest.mark.parametrize("end", ["close", "kill"])
async def test_the_end_of_the_instance_is_the_end_of_its_programs(end, tmp_path, eventually):
    pid_file = tmp_path / "pid"
    spec = shell(f"echo $$ > {pid_file}; echo on; exec sleep 60")
    async with running(RUNTIME, spec) as instance:
        answers = instance.invoke(request(RUNTIME, spec))
        await anext(answers)
        if end == "close":
            await instance.close(0)
        else:
            os.kill(instance.pid, signal.SIGKILL)
        with pytest.raises(InstanceDied):
            await anext(answers)
    await eventually(lambda: is_gone(int(written(pid_file))))


AGENT = """
import asyncio, sys
from contextlib import aclosing
from node_agent.runtimes.base import RuntimeContext
from node_agent.runtimes.command import CommandRuntime
from support.calls import request, running, spec_of

async def main():
    runtime = CommandRuntime(RuntimeContext())
    script = "echo $$; exec sleep 60"
    spec = spec_of("command", options={"command": ["sh", "-c", script]})
    async with running(runtime, spec) as instance:
        async with aclosing(instance.invoke(request(runtime, spec))) as answers:
            print("PID", (await anext(answers)).data, flush=True)
            await asyncio.sleep(60)

asyncio.run(main())
"""


def _line(stream, start):
    """Return what follows in the first line that starts so; logs are in between."""
    return next(line.removeprefix(start) for line in stream if line.startswith(start))


async def test_the_death_of_the_agent_is_the_end_of_its_programs(eventually):
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with agent:
        assert agent.stdout is not None
        pid = int(await asyncio.to_thread(_line, agent.stdout, "PID "))
        assert not is_gone(pid)
        agent.kill()
    await eventually(lambda: is_gone(pid))


@pytest.mark.parametrize(
    ("code", "limits", "message"),
    [
        ("bytearray(500_000_000)", {"memory_bytes": 200_000_000}, "MemoryError"),
        ("\nwhile True: pass", {"cpu_s": 1}, r"SIGXCPU, .* limits\.cpu_s"),
        (
            "f = open('big', 'wb'); f.write(bytes(5000)); f.flush()",
            {"file_bytes": 1000},
            "File too large",
        ),
    ],
)
@pytest.mark.timeout(120)  # a second of processor time is long on a busy machine
async def test_the_limits_of_the_function_hold_for_its_programs(code, limits, message, tmp_path):
    spec = command(sys.executable, "-c", code, limits=limits, folder=str(tmp_path))
    with pytest.raises(ExecutionFailed, match=message):
        await answer_of(RUNTIME, spec)


async def test_it_has_a_network_only_when_granted():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port})); print('in')"
        granted = command(sys.executable, "-c", code, limits={"network": True})
        assert (await answer_of(RUNTIME, granted))[-1].output == "in\n"
        denied = command(sys.executable, "-c", code)
        async with running(RUNTIME, denied) as instance:
            if instance.info["isolation"]["network"] == "open":
                pytest.skip("this system cannot deny a network")
            with pytest.raises(ExecutionFailed, match="PermissionError"):
                await collect(instance, request(RUNTIME, denied))


async def test_calls_run_side_by_side(tmp_path):
    # Each waits for the other, so that one after the other would never end.
    spec = shell(
        'touch "call.$$"; while [ "$(ls | wc -l)" -lt 2 ]; do sleep 0.02; done; echo met',
        concurrency=2,
        folder=str(tmp_path),
    )
    async with running(RUNTIME, spec) as instance, asyncio.TaskGroup() as group:
        assert instance.slots == 2
        tasks = [
            group.create_task(collect(instance, request(RUNTIME, spec, request_id=name)))
            for name in ("a", "b")
        ]
        for task in tasks:
            assert (await task)[-1].output == "met\n"


async def test_a_program_that_went_away_is_named(tmp_path):
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\necho hi\n")
    program.chmod(0o700)
    spec = command(str(program))
    async with running(RUNTIME, spec) as instance:
        assert (await collect(instance, request(RUNTIME, spec)))[-1].output == "hi\n"
        program.unlink()
        with pytest.raises(ExecutionFailed, match=r"tool: .* does not exist"):
            await collect(instance, request(RUNTIME, spec))
        program.write_bytes(b"\x00\x01\x02")
        program.chmod(0o700)
        with pytest.raises(ExecutionFailed, match="Exec format error"):
            await collect(instance, request(RUNTIME, spec))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/gone/tool"], "does not exist"),
        ([str(Path(__file__))], "not executable: chmod"),
        (["no-such-program-here"], "not on the PATH"),
        (["echo", "{pump}"], r"\{pump\} is no property of the input schema, which has a"),
    ],
)
def test_what_cannot_run_is_found_before_it_should(words, message):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    with pytest.raises(ConfigurationError, match=message):
        RUNTIME.check(command(*words, schema=schema))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "options.command"),
        ({"command": []}, "options.command"),
        ({"command": "echo hi"}, "options.command"),
        ({"command": ["echo"], "output": "xml"}, "options.output"),
        ({"command": ["echo"], "env": {"A B": "1"}}, "options.env"),
        ({"command": ["echo"], "shell": True}, "options.shell"),
        ({"command": ["echo"], "folder": "/gone"}, "options.folder"),
    ],
)
def test_wrong_options_are_named(options, field):
    with pytest.raises(ConfigurationError, match=field):
        RUNTIME.check(spec_of("command", options=options))
