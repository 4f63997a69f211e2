"""Runtimes: how the agent runs functions, one child process per instance.

`base` states the contract, `child` is the process and its socket, `python` and `llama_cpp` say
which process to start for a function and what to ask of it. A further runtime is a class with the
methods of `base.Runtime`, given to the agent by whoever wires it.
"""

from node_agent.runtimes.base import Final, Instance, InstanceDied, Piece, Request, Runtime

__all__ = ["Final", "Instance", "InstanceDied", "Piece", "Request", "Runtime"]
