"""Pipes of our own: they end when we say so, and a flood waits."""

import asyncio
import os
import subprocess
from pathlib import Path

from broker.pipes import OutputPipe

BLOCK = 65_536


def open_descriptors():
    return {path.name for path in Path("/proc/self/fd").iterdir()}


async def test_everything_up_to_the_end_arrives():
    got: list[bytes] = []
    with OutputPipe(got.append) as pipe:
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", "printf one; printf two", stdout=pipe.write_end
        )
        pipe.started()
        assert await process.wait() == 0
        await pipe.drain(10)
    assert b"".join(got) == b"onetwo"


async def test_it_is_closed_while_somebody_else_still_holds_the_other_end():
    before = open_descriptors()
    with OutputPipe(lambda _: None) as pipe:
        holder = subprocess.Popen(["sleep", "60"], stdout=pipe.write_end)
        pipe.started()
        await pipe.drain(0.01)
    holder.kill()
    holder.wait()
    assert open_descriptors() == before


async def test_a_flood_is_left_alone_for_the_rest_of_the_second(eventually):
    got: list[bytes] = []
    with OutputPipe(got.append, limit_bytes_s=BLOCK) as pipe:
        os.set_blocking(pipe.write_end, False)
        os.write(pipe.write_end, bytes(BLOCK))
        await eventually(lambda: got)
        assert pipe.paused
        os.write(pipe.write_end, b"more")
        pipe.started()
        await pipe.drain(10)  # the writer has ended: what is left is read at once
    assert b"".join(got) == bytes(BLOCK) + b"more"


async def test_reading_goes_on_after_the_pause(eventually):
    got: list[bytes] = []
    with OutputPipe(got.append, limit_bytes_s=10) as pipe:
        os.write(pipe.write_end, b"first one, ")
        await eventually(lambda: got)
        os.write(pipe.write_end, b"second one")
        await eventually(lambda: b"".join(got) == b"first one, second one")
