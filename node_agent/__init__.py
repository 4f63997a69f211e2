"""The node agent: runs functions and local models for the mesh, each in a child process.

A node is one identity on the broker. Its agent publishes *claims* (what it offers), takes
*invocations* from routers, and streams the answers straight to the clients. It is thin: no array
library, no model and no user code live in its process, so it is ready in well under a second and
stays below 60 MB.

The way of an invocation through the modules::

    invoke/{node}                                   reply/{client}/{task}/{node}
        |                                                       ^
        v                                                       |
    agent.NodeAgent --> queue.AdmissionQueue --> invocation.Execution --> stream.ReplyStream
        |                (priority, deadline)        |   (numbers, coalescing, limits)
        v                                            v
    reporter.Reporter                           pool.InstancePool --> runtimes --> worker
    report/{router}/{node}                                            (a process of its own)

* `declaration` reads what a node offers: a TOML node file, a ``.py`` file or a module with
  functions declared by `function`. User code is imported by a child, never here.
* `announcer` publishes state (birth, draining, offline; the epoch is the start of the process),
  claims (signed, renewed before they expire, withdrawn on leaving) and load (every few seconds, and
  at once when the node becomes idle, busy or full).
* `queue` admits, refuses with ``retry_after_ms``, and orders by priority and deadline.
* `pool` starts instances on demand, restarts them after a crash with a growing pause.
* `runtimes` holds the contract of an instance and the ``python`` and ``llama_cpp`` runtimes;
  `worker` is the other side of the process boundary.

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
