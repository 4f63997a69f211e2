"""``foam ask``: streamed answers, and an exit code for every error."""

import json
import signal

import pytest

from support.foam_process import FoamProcess, FoamUp, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.encoder,
    pytest.mark.timeout(180),  # the first test waits for the mesh of all
]


def test_answers_by_meaning_on_every_broker(any_mesh: FoamUp) -> None:
    done = any_mesh.ask("please say back what I said")
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"please say back what I said\n"
    assert b"-> trial: echo 1.0.0, score" in done.stderr


def test_streams_chunks_in_order(any_mesh: FoamUp) -> None:
    done = any_mesh.ask("--function", "count", "--input", '{"n": 12}', "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events[:2]] == ["accepted", "routed"]
    numbered = events[2:]
    assert [event["seq"] for event in numbered] == list(range(len(numbered)))
    chunks = [event["data"] for event in numbered[:-1]]
    assert len(chunks) > 2
    assert numbered[-1]["event"] == "result"
    assert "".join(chunks) == numbered[-1]["output"] == "".join(f"{n} " for n in range(12))


def test_without_stream_there_is_one_result(mesh: FoamUp) -> None:
    done = mesh.ask("--function", "count", "--input", '{"n": 4}', "--json", "--no-stream")
    kinds = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert kinds == ["accepted", "routed", "result"]


def test_the_same_id_goes_on_with_what_another_run_of_the_command_began(mesh: FoamUp) -> None:
    counted = ("--function", "count", "--input", '{"n": 60, "pause_s": 0.1}')
    asked = (*counted, "--id", "job-of-two", "--data", str(mesh.data))
    whole = "".join(f"{n} " for n in range(60)).rstrip()
    first = FoamProcess("ask", *asked, "--json")
    first.wait_line('"event":"chunk"')
    first.end(signal.SIGKILL)
    for _ in range(2):  # while it runs, and when it has ended
        done = mesh.ask(*asked)
        assert (done.returncode, done.stdout.decode().strip()) == (0, whole), done.stderr


def test_text_comes_from_standard_input(mesh: FoamUp) -> None:
    words = "größer als 14 mm/s"
    done = mesh.ask("-", "--function", "echo", "--quiet", stdin=words.encode())
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, words + "\n", b"")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["translate this poem into ancient greek hexameter"], 11, "nobody offers this"),
        (["--function", "ecko"], 11, "did you mean echo"),
        (["--function", "count@>=2"], 11, "1.3.0 is not in >=2"),
        (["--function", "count@banana"], 10, "is not a version range"),
        (["--function", "count", "--input", '{"n": "many"}'], 10, "input.n"),
        (["--function", "count", "--input", '{"m": 1}'], 10, "'m' was unexpected"),
        (["--function", "count", "--input", "{"], 10, "input is not JSON"),
        (["--function", "count", "--input", "@no-such-file"], 10, "no-such-file"),
        (["--function", "broken"], 18, "the shaft is gone"),
        (["--function", "count", "--input", '{"n": 900}', "--timeout", "0.5"], 16, "deadline"),
        (["--timeout", "0", "say back what I said"], 16, "deadline"),
        ([""], 10, "text is empty"),
        ([], 10, "text is missing"),
        (["x", "--id", "not an id"], 10, "id"),
        (["x", "--policy", '{"zone": "hall"}'], 10, "policy.zone"),
        (["say back what I said", "--policy", '{"zones": ["mars"]}'], 12, "mars"),
        (["say back what I said", "--skills", "levitation"], 11, "levitation"),
    ],
)
def test_every_error_is_one_line_and_its_own_code(
    mesh: FoamUp, arguments: list[str], code: int, says: str
) -> None:
    done = mesh.ask(*arguments)
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("foam: ")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.stderr.decode()


def test_text_that_is_not_utf8_is_refused_here(mesh: FoamUp) -> None:
    done = mesh.ask("-", stdin=b"\xff\xfe pump")
    assert done.returncode == 10
    assert b"not UTF-8" in done.stderr


def test_a_task_that_is_too_large_is_refused_here(mesh: FoamUp) -> None:
    done = mesh.ask("-", "--function", "echo", stdin=b"x" * 10_000_000)
    assert done.returncode == 14
    assert b"the limit is 1048576" in done.stderr


def test_same_id_gives_same_outcome_and_runs_once(mesh: FoamUp) -> None:
    tally = mesh.data / "tally"
    arguments = ["--function", "runs", "--input", json.dumps({"path": str(tally)}), "--id", "once"]
    answers = [mesh.ask(*arguments, "-q").stdout.strip() for _ in range(3)]
    assert answers == [b"1", b"1", b"1"]
    assert tally.read_text() == "x"
    assert mesh.ask("--id", "once", "-q").stdout.strip() == b"1"


def test_what_became_of_an_id_nobody_knows_is_not_known(mesh: FoamUp) -> None:
    done = mesh.ask("--id", "never-asked", "--timeout", "2")
    assert done.returncode == 23
    assert b"nothing was heard of never-asked" in done.stderr


def test_ctrl_c_cancels_the_task(mesh: FoamUp) -> None:
    task = "to-cancel"
    asking = FoamProcess(
        *("ask", "--data", str(mesh.data), "--function", "count", "--json", "--id", task),
        *("--input", '{"n": 2000}'),
    )
    asking.wait_line('"chunk"')
    assert asking.end(signal.SIGINT) == 130
    assert json.loads(asking.out[-1])["code"] == "cancelled"
    known = json.loads(run_foam("admin", "task", task, "--data", str(mesh.data)).stdout)
    assert known["outcome"] == "cancelled"


def test_wrong_password_is_one_line(mesh: FoamUp) -> None:
    done = run_foam(
        *("ask", "hello", "--url", mesh.facts["broker"], "--username", "device-1"),
        FOAM_PASSWORD="wrong",
        FOAM_DATA=str(mesh.data),
    )
    assert done.returncode == 13
    assert b"refuses the connection" in done.stderr
    assert b"Traceback" not in done.stderr


def test_nobody_at_that_port(tmp_path) -> None:
    done = run_foam("ask", "hello", "--url", "mqtt://127.0.0.1:9", FOAM_DATA=str(tmp_path))
    assert done.returncode == 22
    assert b"does not answer" in done.stderr


def test_no_mesh_here(tmp_path) -> None:
    done = run_foam("ask", "hello", "--data", str(tmp_path / "nothing"))
    assert done.returncode == 23
    assert b"foam up" in done.stderr
