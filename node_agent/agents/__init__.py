"""Agents: functions that think with a model and act with tools.

An agent is a function of the runtime ``agent``. It puts the words of a task before a model (another
function of the node whose runtime chats), runs the tools that the model asks for, tells it the
results, and ends with the model's last words::

    task ── text ──▶ AgentLoop ── Ask(messages, tools) ──▶ model
                       ▲  │ ◀── content, tool calls ────────┘
                       │  ├── Calls(planned, refused) ─▶ tools: functions of the node, functions of
              results ─┘  │                               the mesh, MCP servers
                          └── Finish(text)

Modules: `loop` (the conversation and its limits, pure), `options` (what a declaration says),
`servers` (the ``[[mcp]]`` tables, and the processes behind them), `tools` (where tools come from
and how they are called). The runtimes on top are `node_agent.runtimes.agent` and
`node_agent.runtimes.mcp`.

What a tool returns is data: it goes into the conversation as the result of a call, and nothing in
it is ever read as a call, an approval or a limit.
"""
