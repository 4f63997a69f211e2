"""The llama-cpp-python engine, on its low-level interface: its only door.

Traps, each with its remedy: processors with AMX crash in "extra" weight buffers of native builds
(`weights.NativeModel`); chat templates without a beginning-of-sequence token give a prompt the
model was never trained on (`backend.LlamaBackend.encode`); applying a grammar to a whole vocabulary
can cost more than the model (`sampling.GrammarSampler`).
"""

from node_agent.worker.engines.llama_cpp.embeddings import EmbeddingModel
from node_agent.worker.engines.llama_cpp.engine import LlamaCppEngine

__all__ = ["EmbeddingModel", "LlamaCppEngine"]
