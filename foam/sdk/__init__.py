"""The client library: submit tasks, read their answers as they come, cancel them, administrate.

`client.MeshClient` is the asyncio client, `blocking.BlockingMesh` the thin façade for programs
without a loop. ``direct`` and ``fleet`` are the way past routers, while none of them lives.
"""

from foam.sdk.address import MeshAddress, find_mesh
from foam.sdk.client import MeshClient, TaskHandle
from foam.sdk.direct import Direct

__all__ = ["Direct", "MeshAddress", "MeshClient", "TaskHandle", "find_mesh"]
