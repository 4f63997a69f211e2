"""The client library: submit tasks, read their answers as they come, cancel them, administrate.

`client.MeshClient` is the asyncio client, `blocking.BlockingMesh` the thin façade for programs
without a loop.
"""

from foam.sdk.address import MeshAddress, find_mesh
from foam.sdk.client import MeshClient, TaskHandle

__all__ = ["MeshAddress", "MeshClient", "TaskHandle", "find_mesh"]
