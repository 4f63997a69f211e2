"""The conversation with the plugin ends in a sentence, whatever the other side does."""

import asyncio
import json

import pytest

from broker import control
from broker.control import DynamicSecurity
from capability_schemas.errors import BrokerUnavailable

CONNACK, SUBACK = b"\x20\x02\x00\x00", b"\x90\x03\x00\x01\x00"


def packet(kind, body):
    assert len(body) < 128 * 128
    head = [len(body)] if len(body) < 128 else [len(body) & 0x7F | 0x80, len(body) >> 7]
    return bytes([kind, *head]) + body


def answer(*responses):
    topic = b"$CONTROL/dynamic-security/v1/response"
    body = json.dumps({"responses": list(responses)}).encode()
    return packet(0x30, len(topic).to_bytes(2, "big") + topic + body)


class Plugin:
    """A broker that says what it is told to, once for each packet it gets."""

    def __init__(self, *script):
        self.script = list(script)
        self.got = []
        self.called = False
        self.over = asyncio.Event()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        await self.server.wait_closed()
        if self.called:
            async with asyncio.timeout(20):
                await self.over.wait()

    async def serve(self, reader, writer):
        self.called = True
        try:
            await self.follow(reader, writer)
        except ConnectionError:
            pass  # the client is through with us
        finally:
            writer.close()
            self.over.set()

    async def follow(self, reader, writer):
        for said in self.script:
            first = await reader.read(1)
            length = shift = 0
            while first:
                digit = (await reader.readexactly(1))[0]
                length |= (digit & 0x7F) << shift
                shift += 7
                if not digit & 0x80:
                    break
            self.got.append(await reader.readexactly(length))
            if said is None:
                return
            writer.write(said)
        await reader.read()


def talk(plugin):
    return DynamicSecurity(host="127.0.0.1", port=plugin.port, password="secret")


async def test_many_commands_go_in_batches_and_their_answers_in_order(monkeypatch):
    monkeypatch.setattr(control, "_BATCH", 2)
    names = ["a", "b", "c"]
    said = [{"command": name} for name in names]
    async with Plugin(CONNACK, SUBACK, answer(*said[:2]), answer(said[2])) as plugin:
        async with talk(plugin) as broker:
            assert await broker.run(said) == said
        sent = [json.loads(body[body.index(b"{") :])["commands"] for body in plugin.got[2:]]
    assert sent == [said[:2], said[2:]]


async def test_long_lists_are_read_page_by_page(monkeypatch):
    monkeypatch.setattr(control, "_PAGE", 2)
    pages = [
        {"command": "listRoles", "data": {"roles": page}} for page in (["a", "b"], ["c", "d"], [])
    ]
    async with Plugin(CONNACK, SUBACK, *(answer(page) for page in pages)) as plugin:
        async with talk(plugin) as broker:
            assert await broker.roles() == ["a", "b", "c", "d"]
        sent = [json.loads(body[body.index(b"{") :])["commands"][0] for body in plugin.got[2:]]
    assert [(one["count"], one["offset"]) for one in sent] == [(2, 0), (2, 2), (2, 4)]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ([b"\x20\x02\x00\x05"], r"refuses the control client \(code 5\)"),
        ([None], "does not take commands"),
        ([CONNACK, SUBACK, None], "does not take commands"),
        ([CONNACK, SUBACK, packet(0x30, b"\x00\x01xnot json")], "does not take commands"),
        ([CONNACK, SUBACK, answer({"error": "Role not found"})], "refuses createClient pump-7: R"),
    ],
    ids=["refused", "hung up", "hung up later", "nonsense", "command refused"],
)
async def test_what_goes_wrong_is_said(script, said):
    async with Plugin(*script) as plugin:
        with pytest.raises(BrokerUnavailable, match=said):
            async with talk(plugin) as broker:
                await broker.run([{"command": "createClient", "username": "pump-7"}])


async def test_silence_has_an_end(monkeypatch):
    monkeypatch.setattr(control, "_TIMEOUT_S", 0.2)
    async with Plugin(CONNACK, b"") as plugin:
        with pytest.raises(BrokerUnavailable, match="TimeoutError"):
            async with talk(plugin):
                pass


async def test_nobody_listens():
    async with Plugin() as plugin:
        pass
    with pytest.raises(BrokerUnavailable, match="does not take commands"):
        async with talk(plugin):
            pass
