"""An MCP server with bad manners, written by hand: which ones is its first argument."""

import json
import sys
import time
from typing import Any


def main(kind: str, *more: str) -> None:
    if kind == "exit":
        sys.exit(int(more[0]))
    if kind == "silent":
        time.sleep(3600)
    if kind == "garbage":
        for number in range(1000):
            print(f"starting up {number} ...", flush=True)
        time.sleep(3600)
    if kind == "endless":
        while True:
            sys.stdout.write("x" * 65536)
    if kind == "many":
        offer(int(more[0]))


def offer(count: int) -> None:
    """Speak the protocol of 2025-06-18, with very many tools on pages of 100."""
    for line in sys.stdin:
        asked = json.loads(line)
        if "id" not in asked:
            continue
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": asked["id"]}
        if asked["method"] == "initialize":
            answer["result"] = {
                "protocolVersion": "2025-06-18",
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "rude", "version": "0"},
            }
        elif asked["method"] == "tools/list":
            start = int((asked.get("params") or {}).get("cursor") or 0)
            tools = [
                {"name": f"tool{n}", "inputSchema": {"type": "object"}}
                for n in range(start, min(start + 100, count))
            ]
            answer["result"] = {"tools": tools}
            if start + 100 < count:
                answer["result"]["nextCursor"] = str(start + 100)
        else:
            answer["error"] = {"code": -32601, "message": "unknown method"}
        print(json.dumps(answer), flush=True)


main(*sys.argv[1:])
