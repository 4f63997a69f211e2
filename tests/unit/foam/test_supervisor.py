"""The supervisor over small scripts that play the part of ``foam`` processes."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from capability_schemas.errors import AccessDenied, ConfigurationError, Unavailable
from foam.supervisor import ChildSpec, Facts, RestartPolicy, Supervisor

READY = 'import json,sys; print(json.dumps({"status": "ready", "run": %s}), flush=True)\n'
UNTIL_PARENT_ENDS = "sys.stdin.read()\n"
QUICK = RestartPolicy(base_s=0.01, cap_s=0.02, limit=3)


def _spec(folder: Path, code: str, *, name: str = "part", stop_s: float = 5.0) -> ChildSpec:
    def command(facts: Facts | None) -> Sequence[str]:
        run = 0 if facts is None else int(facts["run"]) + 1
        return (sys.executable, "-S", "-c", code.replace("%s", str(run)))

    return ChildSpec(
        name=name,
        command=command,
        log=folder / f"{name}.log",
        environment=dict(os.environ),
        stop_s=stop_s,
    )


async def test_ready_facts_and_orderly_stop(tmp_path: Path) -> None:
    async with Supervisor(notify=lambda _: None) as supervisor:
        child = supervisor.add(_spec(tmp_path, READY + UNTIL_PARENT_ENDS))
        assert await child.wait_ready() == {"run": 0}
        process = psutil.Process(supervisor.pids["part"])
    assert not process.is_running()


async def test_a_crashed_child_comes_back_with_what_it_learned(tmp_path: Path, eventually) -> None:
    told: list[str] = []
    async with Supervisor(policy=QUICK, notify=told.append) as supervisor:
        child = supervisor.add(_spec(tmp_path, READY + UNTIL_PARENT_ENDS))
        await child.wait_ready()
        os.kill(supervisor.pids["part"], signal.SIGKILL)
        await eventually(lambda: child.facts == {"run": 1})
    assert any("part ended (signal SIGKILL)" in sentence for sentence in told)


async def test_crash_after_crash_gives_up_with_a_reason(tmp_path: Path) -> None:
    async with Supervisor(policy=QUICK, notify=lambda _: None) as supervisor:
        supervisor.add(_spec(tmp_path, "raise SystemExit(7)"))
        with pytest.raises(Unavailable, match="part ended 3 times in a row, last with exit code 7"):
            await supervisor.wait()


@pytest.mark.parametrize(
    ("kind", "error"), [("ConfigurationError", ConfigurationError), ("AccessDenied", AccessDenied)]
)
async def test_what_no_restart_can_mend_is_not_restarted(
    tmp_path: Path, kind: str, error: type[Exception]
) -> None:
    code = (
        f'print(\'{{"status": "failed", "kind": "{kind}", "message": "no way"}}\', flush=True)\n'
        "raise SystemExit(20)"
    )
    told: list[str] = []
    async with Supervisor(policy=QUICK, notify=told.append) as supervisor:
        supervisor.add(_spec(tmp_path, code))
        with pytest.raises(error, match="part: no way"):
            await supervisor.wait()
    assert told == []


async def test_the_others_go_on_without_a_spare_one_that_finds_its_place_taken(
    tmp_path: Path, eventually
) -> None:
    once = tmp_path / "once"
    code = (
        f"from pathlib import Path\nonce = Path({str(once)!r})\n"
        "if once.exists():\n"
        '    print(\'{"status": "failed", "kind": "Conflict", "message": "taken"}\', flush=True)\n'
        "    raise SystemExit(21)\n"
        "once.touch()\n" + READY + "raise SystemExit(1)"
    )
    told: list[str] = []
    async with Supervisor(policy=QUICK, notify=told.append) as supervisor:
        supervisor.add(replace(_spec(tmp_path, code), spare=True))
        await eventually(lambda: told[-1:] == ["part: taken; it is not started again"])
        assert supervisor.running


async def test_another_one_of_its_group_stands_in_for_one_that_crashes_for_ever(
    tmp_path: Path, eventually
) -> None:
    left = tmp_path / "left"
    told: list[str] = []
    left.touch()
    last = f"import pathlib, time\n{READY}while pathlib.Path({str(left)!r}).exists():\n"
    async with Supervisor(policy=QUICK, notify=told.append) as supervisor:
        other = _spec(tmp_path, last + "    time.sleep(0.05)\nraise SystemExit(3)")
        await supervisor.add(replace(other, name="other", group="router")).wait_ready()
        supervisor.add(replace(_spec(tmp_path, READY + "raise SystemExit(7)"), group="router"))
        await eventually(lambda: any("the others go on without it" in said for said in told))
        assert supervisor.running
        left.unlink()
        with pytest.raises(Unavailable, match="times in a row"):
            await supervisor.wait()


async def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY
    told: list[str] = []
    async with Supervisor(notify=told.append) as supervisor:
        child = supervisor.add(_spec(tmp_path, deaf + "while True: time.sleep(60)", stop_s=0.2))
        await child.wait_ready()
        process = psutil.Process(supervisor.pids["part"])
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert any("is killed" in sentence for sentence in told)


async def test_waiting_is_passed_on_and_stderr_goes_to_the_log(tmp_path: Path, eventually) -> None:
    code = (
        'import sys\nprint(\'{"status": "waiting", "message": "no broker"}\', flush=True)\n'
        'print("detail", file=sys.stderr, flush=True)\nprint("noise", flush=True)\n'
    )
    told: list[str] = []
    async with Supervisor(notify=told.append) as supervisor:
        supervisor.add(_spec(tmp_path, code + UNTIL_PARENT_ENDS))
        await eventually(lambda: told == ["part: no broker"])
        await eventually(lambda: (tmp_path / "part.log").read_text() == "detail\n")


async def test_last_started_is_first_stopped(tmp_path: Path) -> None:
    order = tmp_path / "order"
    code = (
        "import signal, sys, pathlib\n"
        "def end(*_):\n"
        f"    with pathlib.Path({str(order)!r}).open('a') as f: f.write('NAME ')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
    )
    async with Supervisor(notify=lambda _: None) as supervisor:
        for name in ("first", "second"):
            part = code.replace("NAME", name) + READY + "signal.pause()"
            await supervisor.add(_spec(tmp_path, part, name=name)).wait_ready()
    assert order.read_text() == "second first "


async def test_those_of_a_group_are_stopped_together(tmp_path: Path) -> None:
    """Each ends when the other one was told to, so that one after the other would take for ever."""
    code = (
        "import signal, sys, pathlib, time\n"
        "def end(*_):\n"
        f"    folder = pathlib.Path({str(tmp_path)!r})\n"
        "    (folder / 'NAME.told').touch()\n"
        "    while not (folder / 'OTHER.told').exists(): time.sleep(0.01)\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
    )
    told: list[str] = []
    async with Supervisor(notify=told.append) as supervisor:
        for name, other in (("one", "two"), ("two", "one")):
            part = code.replace("NAME", name).replace("OTHER", other) + READY + "signal.pause()"
            spec = _spec(tmp_path, part, name=name, stop_s=60)
            await supervisor.add(replace(spec, group="pair")).wait_ready()
    assert not any("is killed" in sentence for sentence in told)


async def test_a_stop_says_whom_it_waits_for_and_can_be_cut_short(
    tmp_path: Path, eventually
) -> None:
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY
    told: list[str] = []
    supervisor = Supervisor(notify=told.append)
    await supervisor.start()
    for name in ("first", "second"):
        spec = _spec(tmp_path, deaf + "while True: time.sleep(60)", name=name, stop_s=600)
        await supervisor.add(spec).wait_ready()
    processes = [psutil.Process(pid) for pid in supervisor.pids.values()]
    stopping = asyncio.create_task(supervisor.stop())
    await eventually(lambda: "waiting for second to stop, 600 s at most" in told, timeout_s=30)
    supervisor.kill()
    await asyncio.wait_for(stopping, 30)
    assert not any(process.is_running() for process in processes)


def test_back_off_is_capped_and_jittered() -> None:
    policy = RestartPolicy(base_s=0.5, cap_s=15.0)
    assert [policy.delay_s(crashes, 1.0) for crashes in (1, 2, 3, 9)] == [0.5, 1.0, 2.0, 15.0]
    assert policy.delay_s(9, 0.0) == 0.0


async def test_nothing_runs_after_a_start_that_was_cancelled(tmp_path: Path) -> None:
    supervisor = Supervisor(notify=lambda _: None)
    await supervisor.start()
    supervisor.add(_spec(tmp_path, READY + UNTIL_PARENT_ENDS))
    await asyncio.wait_for(supervisor.stop(), 10)
    assert supervisor.pids == {}


async def test_a_grandchild_that_holds_the_pipes_hides_no_death(tmp_path: Path, eventually) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
    )
    told: list[str] = []
    policy = RestartPolicy(base_s=60, cap_s=60, limit=3)
    async with Supervisor(policy=policy, notify=told.append) as supervisor:
        supervisor.add(_spec(tmp_path, code + READY + "raise SystemExit(7)"))
        await eventually(lambda: any("part ended (exit code 7)" in sentence for sentence in told))
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
