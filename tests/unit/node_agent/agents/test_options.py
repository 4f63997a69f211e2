"""What the declaration of an agent may say, and what is wrong with it in words."""

import re

import pytest

from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionLimits, FunctionSpec
from node_agent.agents.options import agent_options, check_agent
from node_agent.agents.servers import check_servers, mcp_server
from node_agent.runtimes.agent import AgentRuntime
from node_agent.runtimes.base import RuntimeContext
from node_agent.runtimes.mcp import McpRuntime


def agent(name="helper", **options):
    options = {"model": "chat", **options}
    return FunctionSpec(name=name, description=name, runtime="agent", options=options)


def function(name, runtime="python"):
    return FunctionSpec(name=name, description=name, runtime=runtime, entry="m:f")


def check(spec, *others):
    functions = {one.name: one for one in (spec, *others)}
    check_agent(spec, functions, lambda name: functions[name].runtime == "llama_cpp")


CHAT = function("chat", "llama_cpp")


def test_a_plain_string_is_a_tool():
    options = agent_options(
        agent(tools=["add", "mesh:weather@>=1.2", "mesh:*", "mcp:shop/look.up", "mcp:shop/*"])
    )
    assert [tool.target for tool in options.tools[:3]] == [
        ("local", "", "add"),
        ("mesh", "", "weather@>=1.2"),
        ("mesh", "", "*"),
    ]
    assert [tool.model_name for tool in options.tools[:3]] == ["add", "weather", "ask_mesh"]


def test_names_of_tools_fit_what_models_take():
    options = agent_options(agent(tools=["mcp:shop/look.up", {"use": "mesh:f", "name": "g"}]))
    assert [tool.model_name for tool in options.tools] == ["shop_look_up", "g"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "a b"}, "options.model"),
        ({"modle": "x"}, "options.modle"),
        ({"tools": ["a tool"]}, "options.tools.0: "),
        ({"tools": ["add@1"]}, "a range is for mesh:"),
        ({"tools": ["mesh:f@what"]}, "is not a version range"),
        ({"tools": ["mcp:shop"]}, "write mcp:server/tool or mcp:server/\\*"),
        ({"tools": [{"use": "mcp:shop/*", "name": "x"}]}, "share no name"),
        ({"tools": [{"use": "add", "policy": {}}]}, "a policy is for mesh: only"),
        ({"tools": [{"use": "add", "parameters": {"type": "nothing"}}]}, "not a JSON Schema"),
        ({"tools": [{"use": "add", "approve": "maybe"}]}, "approve"),
        ({"tools": ["add", "mesh:add"]}, "are both called add: give one a name"),
        ({"tools": ["add", "add"]}, "are both called add"),
        ({"model": "helper"}, "an agent is no model"),
        ({"tools": ["helper"]}, "an agent is no tool of its own"),
        ({"tools": ["mesh:helper@>=1"]}, "an agent is no tool of its own"),
        ({"max_turns": 0}, "options.max_turns"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ConfigurationError, match=f"function helper: .*{words}"):
        agent_options(agent(**options))


def test_all_wrong_options_are_named_at_once():
    with pytest.raises(ConfigurationError) as caught:
        agent_options(agent(modle="x", max_turns=0, tools=[{"use": "add", "approve": "maybe"}]))
    assert re.findall(r"options\.[a-z_.0-9]+: ", caught.value.message) == [
        "options.tools.0.approve: ",
        "options.max_turns: ",
        "options.modle: ",
    ]
    with pytest.raises(ConfigurationError) as caught:
        agent_options(agent(model="helper", tools=["add", "mesh:helper"]))
    assert caught.value.message == (
        "function helper: options.model: an agent is no model; "
        "options.tools.1: an agent is no tool of its own"
    )
    with pytest.raises(ConfigurationError) as caught:
        check(agent(tools=["add", "subtract"]), function("chat"), function("add"))
    assert re.findall(r"options\.[a-z.0-9]+: ", caught.value.message) == [
        "options.model: ",
        "options.tools.1: ",
    ]


def test_what_an_agent_names_must_be_there():
    check(agent(tools=["add", "mesh:far"]), CHAT, function("add"))
    with pytest.raises(ConfigurationError, match="no function chat; those that chat: none"):
        check(agent())
    with pytest.raises(ConfigurationError, match="chat runs on python, which takes no conv"):
        check(agent(), function("chat"))
    with pytest.raises(ConfigurationError, match=r"no function add; .* write mesh:add"):
        check(agent(tools=["add"]), CHAT)


def test_agents_that_call_each_other_in_a_circle_are_found():
    one, two, three = (
        agent("one", tools=["two"]),
        agent("two", tools=["three", "add"]),
        agent("three", tools=["one"]),
    )
    with pytest.raises(ConfigurationError, match="call each other: one -> two -> three -> one"):
        check(one, CHAT, two, three, function("add"))
    check(agent("one", tools=["two"]), CHAT, agent("two", tools=["add"]), function("add"))
    check(agent("zero", tools=["two"]), CHAT, agent("two", tools=["three"]), agent("three"))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "write either command or url"),
        ({"command": "x", "url": "http://h/mcp"}, "write either command or url"),
        ({"url": "ftp://h"}, "mcp.shop.url"),
        ({"url": "http://h", "args": ["x"]}, "are for a command"),
        ({"command": "x", "headers_file": "h"}, "headers_file is for a url"),
        ({"command": "x", "cmd": "y"}, "mcp.shop.cmd"),
        ({"command": "x", "timeout_ms": 0}, "mcp.shop.timeout_ms"),
    ],
)
def test_a_wrong_table_of_a_server_is_named(table, words):
    with pytest.raises(ConfigurationError, match=words):
        check_servers({"shop": table})


def test_an_unknown_server_is_answered_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"no .* server 'shop'; the node file has: tools"):
        mcp_server({"tools": {"command": "x"}}, "shop", "function f")


def test_headers_come_from_a_private_file(tmp_path):
    path = tmp_path / "headers"
    path.write_text("Authorization: Bearer s3cret\n\nX-Site: hall 3\n")
    path.chmod(0o600)
    table = {"url": "https://h/mcp", "headers_file": str(path)}
    server = mcp_server({"shop": table}, "shop", "here")
    assert server.headers() == {"Authorization": "Bearer s3cret", "X-Site": "hall 3"}
    assert "s3cret" not in repr(server)
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="others may read it: chmod 600"):
        server.headers()
    path.chmod(0o600)
    path.write_text("nonsense")
    with pytest.raises(ConfigurationError, match="line 1: write Name: value"):
        server.headers()
    path.unlink()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        check_servers({"shop": table})


def test_a_server_elsewhere_needs_the_network():
    context = RuntimeContext(mcp_servers={"shop": {"url": "http://h/mcp"}})
    spec = agent(tools=["mcp:shop/*"])
    tool = FunctionSpec(
        name="f", description="f", runtime="mcp", options={"server": "shop", "tool": "t"}
    )
    for runtime, one in ((AgentRuntime(context), spec), (McpRuntime(context), tool)):
        with pytest.raises(ConfigurationError, match=r"set limits.network = true"):
            runtime.check(one)
        runtime.check(one.model_copy(update={"limits": FunctionLimits(network=True)}))


def test_a_server_outside_the_site_needs_the_policy_to_say_so():
    context = RuntimeContext(mcp_servers={"shop": {"url": "https://tools.example.com/mcp"}})
    spec = agent(tools=["mcp:shop/*"]).model_copy(update={"limits": FunctionLimits(network=True)})
    runtime = AgentRuntime(context)
    with pytest.raises(ConfigurationError, match=r"example\.com is outside .* policy.external"):
        runtime.check(spec)
    runtime.check(spec.model_copy(update={"policy": CapabilityPolicy(external=True)}))


def test_functions_of_one_server_share_its_processes():
    servers = {"shop": {"command": "x"}}
    runtime = McpRuntime(RuntimeContext(mcp_servers=servers))

    def spec(tool, **fields):
        options = {"server": "shop", "tool": tool}
        return FunctionSpec(name=tool, description="x", runtime="mcp", options=options, **fields)

    assert runtime.group(spec("a")) == runtime.group(spec("b"))
    limited = FunctionLimits(memory_bytes=10**9)
    assert runtime.group(spec("a")) != runtime.group(spec("b", limits=limited))
    assert runtime.call_options(spec("a")) == {"tool": "a"}
    before = runtime.group(spec("a"))
    servers["shop"] = {"command": "y"}
    assert runtime.group(spec("a")) != before
    with pytest.raises(ConfigurationError, match=r"function f: options.tool"):
        runtime.group(spec("f").model_copy(update={"options": {"server": "shop"}}))
