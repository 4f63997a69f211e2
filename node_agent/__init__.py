"""The node agent: runs functions and local models for the mesh, each in a child process.

A node is one identity on the broker. Its agent publishes *claims* (what it offers), takes
*invocations* from routers, and streams the answers straight to the clients. It is thin: no array
library, no model and no user code live in its process, so it is ready in well under a second and
stays near 60 MB.

The way of an invocation through the modules::

    invoke/{node}                                   reply/{client}/{task}/{node}
        |                                                       ^
        v                                                       |
    agent.NodeAgent --> admission.control --------> invocation.Execution --> stream.ReplyStream
        |              (predicted finish, order)     |   (numbers, coalescing, limits)
        v                                            v
    reporter.Reporter                           pool.InstancePool --> runtimes --> worker
    report/{router}/{node}                                            (a process of its own)

* `declaration` reads what a node offers: a TOML node file, a ``.py`` file or a module with
  functions declared by `function`. User code is imported by a child, never here. It is looked over
  before (``foam node check``) and followed while it runs: an edit that is right replaces the
  functions (`agent.NodeAgent.replace`), and what runs ends as it began.
* `announcer` publishes state (birth, draining, sleeping, offline; the epoch is the start of the
  process), claims (signed, renewed before they expire, withdrawn on leaving) and load (every few
  seconds, and at once when the node becomes idle, busy or full).
* `sleeper` sends a node that saves energy to sleep, and wakes it.
* `direct` takes tasks from clients themselves while no router lives; `showing` tells what instances
  and model files show of functions.
* `admission` takes in what will end before its deadline, as far as it can tell, refuses the rest
  with ``retry_after_ms`` and a neighbour with room, and drops what can no longer end in time.
* `pool` starts instances on demand and ahead of it, restarts them after a crash with a growing
  pause, and ends them when idle for too long or memory runs short.
* `models` is the store of model files, shared by the nodes of a user.
* `runtimes` holds the contract of an instance and the runtimes; `worker` is the other side of the
  process boundary; `agents` is the loop of a model that calls tools, `mesh_client` its way to the
  functions of other nodes.
* `isolation` keeps an instance from hurting the agent and its neighbours: limits, no network, a
  sure end of everything it started.

An attempt of a task runs at most once: the agent remembers how attempts ended and answers for them
again. A crash of an instance, overload, or the leaving of the node hands the task back to the
router (`failed`); an error of the function itself is the task's terminal event.

Life cycle::

    declaration = load_declaration("node.toml")  # before the loop runs: a child imports the code
    agent = NodeAgent(session=session, topics=topics, settings=NodeSettings(node="edge-1"),
                      functions=declaration.functions, key=key)
    async with session, agent:         # the session's last will is agent.last_will
        await run_until_signal(agent)  # leaving drains, withdraws the claims and says offline

The package imports nothing on its own, so that a worker stays light; import from its modules:
``node_agent.agent``, ``node_agent.declaration``, ``node_agent.functions``, ``node_agent.settings``.
"""
