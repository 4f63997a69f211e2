"""A router whose journal is damaged serves, and says what happened."""

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from capability_schemas.topics import Topics
from support.scripted_mesh import Mesh


async def test_a_router_with_a_damaged_journal_serves_and_tells(
    tmp_path: Path, topics: Topics, eventually: Any
) -> None:
    (tmp_path / "router-1.sqlite").write_text("no database at all" * 1_000)
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack, tmp_path, topics)
        await mesh.start_client()
        await mesh.start_router()
        await mesh.node("edge-1")
        mesh.submit(id="t", text="echo this text")
        await eventually(lambda: mesh.final("t"), timeout_s=30)
        told = "foam/v1/local/event/router-1/ledger_damaged"
        await eventually(lambda: mesh.broker.published(told), timeout_s=30)
        event = json.loads(mesh.broker.published(told)[0].payload)
        await mesh.stop_router()
    assert Path(event["data"]["aside"]).read_text().startswith("no database at all")
    final = mesh.final("t")
    assert final is not None
    assert final["event"] == "result"
