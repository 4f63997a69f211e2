"""Models on a node's machine: where they lie, what they are, how they get there.

A function names its model by a path or by a name in the store::

    store = ModelStore(folder, budget_bytes=20_000_000_000)
    path = store.resolve("qwen2.5-0.5b-instruct-q4_k_m")  # held until store.close()
    store.digest(path)  # "sha256:…", for the advertisement
    info = read_gguf(path)
    memory_need_bytes(info, n_ctx=4096)

Modules: `store` (names, blobs, leases, disk budget), `gguf` (the head of a model file), `reference`
(what a user may write), `disk` (locks, whole files). `pull`, `download` and `hub` fetch models;
they load the HTTP library, so only ``foam model`` imports them. Every call blocks: an agent makes
them in a thread, `ModelStore.resolve` (a few milliseconds) apart.
"""

from node_agent.models.gguf import (
    BrokenModel,
    GgufInfo,
    Items,
    Tensor,
    memory_need_bytes,
    quantisation_name,
    read_gguf,
)
from node_agent.models.store import ModelRecord, ModelStore, StoredModel

__all__ = [
    "BrokenModel",
    "GgufInfo",
    "Items",
    "ModelRecord",
    "ModelStore",
    "StoredModel",
    "Tensor",
    "memory_need_bytes",
    "quantisation_name",
    "read_gguf",
]
