"""Frames: cutting, limits, and what counts as JSON."""

import array
import datetime
import socket
from typing import Any

import pytest

from node_agent.worker.frames import (
    FRAME_LIMIT_BYTES,
    HEADER,
    FrameBuffer,
    FrameError,
    FrameSocket,
    NotJsonError,
    pack,
    to_json,
)

FRAMES: list[dict[str, Any]] = [
    {"t": "a", "text": "größer 😀"},
    {"t": "b", "n": [1, None]},
    {"t": "c"},
]


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_frames_survive_any_cutting_of_the_stream(step):
    data = b"".join(pack(frame) for frame in FRAMES)
    buffer = FrameBuffer()
    got = []
    for at in range(0, len(data), step):
        got += buffer.feed(data[at : at + step])
    assert got == FRAMES


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(FRAME_LIMIT_BYTES + 1),
        HEADER.pack(3) + b"{{{",
        HEADER.pack(2) + b"[]",
        HEADER.pack(2) + b"{}",
    ],
)
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(FrameError):
        FrameBuffer().feed(data)


def test_values_of_libraries_become_plain_json():
    class Model:
        def model_dump(self, mode):
            return {"mode": mode}

    value = {
        "array": array.array("d", [1.0, 2.0]),
        "set": {2, 1},
        "model": Model(),
        "at": datetime.date(2026, 1, 2),
    }
    assert (
        to_json(value)
        == '{"array":[1.0,2.0],"set":[1,2],"model":{"mode":"json"},"at":"2026-01-02"}'
    )


@pytest.mark.parametrize("value", [object(), float("nan"), {"x": float("inf")}])
def test_what_json_has_no_word_for_is_refused(value):
    with pytest.raises(NotJsonError):
        to_json(value)


def test_a_socket_gives_frames_and_then_the_end():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender, receiver = FrameSocket(ours), FrameSocket(theirs)
        for frame in FRAMES:
            sender.send(frame)
        ours.close()
        assert [receiver.receive() for _ in range(4)] == [*FRAMES, None]
