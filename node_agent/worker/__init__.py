"""The child-process side of a runtime: ``python -m node_agent.worker FD PARENT_PID``.

An instance of a function runs in a process of its own, so that a native crash, a memory limit or
a kill takes one instance and never the agent. Agent and child talk in frames (`worker.frames`)
over an inherited socket pair; stdout and stderr stay free for whatever user code prints, and end
up, bounded, in the log of the agent.

::

    agent                                  child
      | -- load {runtime, entry/model} ---> |   put the limits on, import the code or load the model
      | <-- ready {info} / failed --------- |
      | -- invoke {id, input, text} ------> |
      | <-- piece {id, d} ... ------------- |   one per yield, or per few tokens
      | <-- final / error {id} ------------ |
      | -- cancel {id}, close ------------> |   end of file means: the agent is gone, die at once

Modules: `frames` (wire format), `python_host` (user functions), `engine_host` with `engines`
(language models), `describe` (what functions a module declares), `__main__` (the process).
Nothing in here imports pydantic, structlog or the broker: a child must start in some tens of
milliseconds and stay small.
"""
