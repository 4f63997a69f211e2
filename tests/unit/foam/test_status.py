import io

from capability_schemas.errors import AccessDenied
from foam.status import ProcessStatus, StatusLine, parse_status


def test_a_person_reads_words() -> None:
    out, err = io.StringIO(), io.StringIO()
    status = ProcessStatus(title="broker", supervised=False, out=out, err=err)
    status.waiting("nobody there")
    status.ready(url="mqtt://127.0.0.1:1")
    status.failed(AccessDenied("wrong password"))
    assert out.getvalue() == 'FOAM BROKER READY {"url": "mqtt://127.0.0.1:1"}\n'
    assert err.getvalue() == "foam broker: nobody there\nfoam broker: wrong password\n"


def test_a_supervisor_reads_lines_and_skips_noise() -> None:
    out = io.StringIO()
    status = ProcessStatus(title="node", supervised=True, out=out, err=io.StringIO())
    status.ready(id="edge-1", functions=["a"])
    status.failed(AccessDenied("wrong password"))
    ready, failed = (parse_status(line.encode()) for line in out.getvalue().splitlines())
    assert ready == StatusLine("ready", {"id": "edge-1", "functions": ["a"]})
    assert failed == StatusLine("failed", {"message": "wrong password", "kind": "AccessDenied"})
    for noise in (b"hello\n", b"{}\n", b"[1]\n", b'{"status": "odd"}\n', b"\xff\n"):
        assert parse_status(noise) is None


def test_a_lost_reader_disturbs_nobody() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    ProcessStatus(title="node", supervised=True, out=Gone(), err=io.StringIO()).ready(id="x")
