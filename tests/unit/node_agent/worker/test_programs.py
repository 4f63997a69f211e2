"""What programs write, as answers."""

from typing import Any

import pytest

from node_agent.worker.base import InvocationError, Request
from node_agent.worker.programs import ErrorLines, ProgramOutput, exit_error, input_document


class Taken:
    def __init__(self, kind, limit_bytes=1000):
        self.frames: list[dict[str, Any]] = []
        self.output = ProgramOutput(
            request_id="r", kind=kind, limit_bytes=limit_bytes, emit=self.frames.append
        )

    @property
    def pieces(self):
        return [frame["d"] for frame in self.frames]


def test_text_comes_in_whole_lines_and_is_kept_as_it_is():
    taken = Taken("text")
    for part in (b"on", b"e\ntwo\nth", b"ree"):
        taken.output.feed(part)
    assert taken.pieces == ["one\ntwo\n"]
    assert taken.output.output() == "one\ntwo\nthree"
    assert taken.pieces == ["one\ntwo\n", "three"]


def test_a_letter_cut_in_two_is_put_together_and_a_broken_one_replaced():
    taken = Taken("text")
    letter = "ü".encode()
    taken.output.feed(letter[:1])
    taken.output.feed(letter[1:] + b"\n\xff")
    assert taken.output.output() == "ü\n�"


def test_a_line_without_an_end_is_not_kept_back_for_ever():
    taken = Taken("text", limit_bytes=100_000)
    taken.output.feed(b"x" * 20_000)
    assert len(taken.pieces) == 1
    assert taken.output.output() == "x" * 20_000


def test_every_line_of_jsonl_is_a_piece():
    taken = Taken("jsonl")
    taken.output.feed(b'{"a":1}\n\n[2')
    assert taken.pieces == [{"a": 1}]
    taken.output.feed(b"]")
    assert taken.output.output() == [{"a": 1}, [2]]
    assert taken.pieces == [{"a": 1}, [2]]


def test_json_is_read_as_a_whole_and_has_no_pieces():
    taken = Taken("json")
    taken.output.feed(b'{"a":\n 1}\n')
    assert taken.output.output() == {"a": 1}
    assert taken.pieces == []


@pytest.mark.parametrize(
    ("kind", "data", "place"),
    [
        ("json", b"hello", "its output is not JSON"),
        ("json", b"", "its output is not JSON"),
        ("json", b"[NaN]", "NaN is no JSON"),
        ("json", b"[" * 100_000, "its output is not JSON"),
        ("jsonl", b"1\n2\n{\n", "value 3 of its output is not JSON"),
    ],
)
def test_what_should_be_json_and_is_not(kind, data, place):
    def read():
        taken = Taken(kind, limit_bytes=1_000_000)
        taken.output.feed(data)
        taken.output.output()

    with pytest.raises(InvocationError, match=place) as raised:
        read()
    assert raised.value.code == "execution_failed"


def test_too_much_of_it_ends_the_call():
    taken = Taken("json", limit_bytes=10)
    taken.output.feed(b"1234567890")
    with pytest.raises(InvocationError) as raised:
        taken.output.feed(b"1")
    assert raised.value.code == "too_large"
    assert raised.value.detail == {"size_bytes": 11, "limit_bytes": 10}


def test_the_last_lines_of_stderr_are_kept(capsys):
    errors = ErrorLines()
    for number in range(9):
        errors.feed(f"line {number}\n".encode())
    errors.feed(b"\n and the res")
    errors.feed(b"t")
    assert errors.last() == ["line 5", "line 6", "line 7", "line 8", " and the rest"]
    assert "line 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (3, "execution_failed", "prog ended with exit status 3: bad"),
        (65, "invalid_task", "prog ended with exit status 65: bad"),
        (-11, "execution_failed", "prog was ended by SIGSEGV: bad"),
        (-99, "execution_failed", "prog was ended by signal 99: bad"),
    ],
)
def test_the_end_of_a_program_says_how_it_failed(status, code, message):
    error = exit_error("prog", status, ["worse", "bad"])
    assert (error.code, error.message) == (code, message)
    assert error.detail["stderr"] == ["worse", "bad"]


def test_the_document_is_one_line_of_json():
    assert (
        input_document(Request(id="r", input={"a": "ü\n"}, text=None)) == b'{"a":"\xc3\xbc\\n"}\n'
    )
