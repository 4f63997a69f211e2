"""Engines that run a language model inside a worker: one contract, `base.Engine`.

``llama_cpp`` (llama-cpp-python) is the engine of the mesh; ``xllamacpp`` comes as a wheel and
serves where no compiler was at hand. `load_engine` picks.
"""

from node_agent.worker.engines.loading import ENGINES, load_engine

__all__ = ["ENGINES", "load_engine"]
