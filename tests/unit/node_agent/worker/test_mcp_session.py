"""What a session with an MCP server says of its troubles."""

import pytest

from node_agent.worker.base import InvocationError

pytest.importorskip("mcp", reason="mcp is not installed")

from node_agent.worker.mcp_session import McpSession


def test_keys_of_the_address_and_the_headers_are_in_no_message():
    server = {
        "name": "shop",
        "timeout_s": 1,
        "start_s": 1,
        "url": "https://host.example/mcp?key=querysecret",
        "headers": {"Authorization": "Bearer headersecret", "X-Version": "2"},
    }
    session = McpSession(server)
    said = OSError("401 for https://host.example/mcp?key=querysecret (headersecret), try 2")
    error = session._failure("cannot be used", said, 1.0)
    assert isinstance(error, InvocationError)
    assert "secret" not in error.message
    assert "401 for https://host.example/mcp?[private] ([private]), try 2" in error.message
    with pytest.raises(InvocationError) as raised:
        session._connected()
    assert "secret" not in raised.value.message
