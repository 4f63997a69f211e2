"""Evidence, trust and rights, from the node's files to the catalogue, over a broker in memory."""

import asyncio
import contextlib
import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from broker.access.orders import Requester
from broker.access.policy import Role
from broker.audit import Budget
from broker.session.base import Message
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.capability import CapabilityPolicy, CatalogRecord
from capability_schemas.errors import ConfigurationError, InvalidTask, NotFound, TooLarge
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.signing import SigningKey, sign, verify
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import (
    EVIDENCE_LIMIT_BYTES,
    MAX_MEASUREMENTS,
    Evidence,
    Standing,
    TrustState,
    read_trust,
)
from capability_schemas.wire import decode, encode
from node_agent.attestation import Attester, Findings, Offer, TpmSource, evidence_sources
from node_agent.attestation.catalogue import _plugins
from node_agent.attestation.service import folded
from node_agent.attestation.software import SoftwareSource, tree_digest
from registry.admission import Identity
from registry.attestation import AttestationFile, AttestationService
from registry.attestation.judgement import read_evidence
from registry.attestation.tpm import DEFAULT_REGISTERS
from registry.encoders import EncoderThread
from registry.service import RegistryService
from registry.settings import RegistrySettings
from registry.store import SqliteStore
from registry.trust import VOID_KEPT_MS, Description, TrustBoard
from support.capabilities import make_claim, signed
from support.encoders import WordEncoder
from support.tpm import SoftTpm

pytestmark = pytest.mark.timeout(120)

TOPICS = Topics(site="hall-3")
NODE_KEY = SigningKey.generate()
REGISTRY_KEY = SigningKey.generate()
REGISTRIES = {"registry-1": REGISTRY_KEY.public}
ATTESTED = CapabilityPolicy(zones=("hall-3",), grants=("actuate",))
WISH = CapabilityPolicy(zones=("hall-3",), grants=("actuate",))
GATED = """
valid_for = "1h"
[[rules]]
{references}
gates = {{ data = ["private"], grants = ["actuate"] }}
"""
ADMIN = Requester(name="anna", role=Role.ADMIN)
BARE = CapabilityPolicy(zones=("hall-3",), data=("public", "internal"))


class Clock:
    """The time of the registry."""

    def __init__(self):
        self.ahead = 0

    def __call__(self):
        return now_ms() + self.ahead

    def pass_s(self, seconds):
        self.ahead += round(seconds * 1000)


class Scanner:
    """A source of evidence of somebody else."""

    name = "scanner"

    def __init__(self):
        self.found = {"disk": "sha256:" + "d" * 64}
        self.broken = False

    def collect(self, challenge):
        if self.broken:
            raise ConfigurationError("the scanner is broken")
        return Findings(measurements=self.found, statement={"asked": challenge})


class World:
    def __init__(self, folder):
        self.broker = MemoryBroker()
        self.clock = Clock()
        self.file = AttestationFile(folder / "attestation.toml")
        self.database = folder / "registry.sqlite"
        self.known = {"edge-1": Identity(NODE_KEY.public, ATTESTED)}
        self.voided = {}
        self.events = []
        self.offer = Offer((FunctionSpec(name="echo", description="Echo", code="c1"),), {})
        self.scanner = Scanner()
        self.settle_s = 0.3

    @contextlib.asynccontextmanager
    async def registry(self):
        async with contextlib.AsyncExitStack() as stack:
            session = await stack.enter_async_context(
                MemorySession(broker=self.broker, client_id="registry-1")
            )
            board = TrustBoard(
                session=session,
                topics=TOPICS,
                key=REGISTRY_KEY,
                registry_id="registry-1",
                voided=lambda: self.voided,
                members=lambda: self.known,
                clock=self.clock,
            )
            self.file.load()
            self.store = await stack.enter_async_context(SqliteStore(path=self.database))
            attestation = AttestationService(
                session=session,
                topics=TOPICS,
                file=self.file,
                key=REGISTRY_KEY,
                identities=self.known.get,
                nodes=lambda: list(self.known),
                board=board,
                emit=lambda kind, data: self.events.append((kind, data)),
                changed=lambda node: service.readmit(node),  # noqa: PLW0108 - it is made below
                settle_s=self.settle_s,
                clock=self.clock,
            )
            service = RegistryService(
                session=session,
                topics=TOPICS,
                store=self.store,
                encoder=await stack.enter_async_context(
                    EncoderThread(encoder=WordEncoder(), cache_texts=0)
                ),
                key=REGISTRY_KEY,
                identities=attestation.narrowed,
                registry_id="registry-1",
                settings=RegistrySettings(sweep_interval_s=0.01),
                clock=self.clock,
            )
            for part in (board, attestation, service):
                await stack.enter_async_context(part)
            self.board, self.attestation = board, attestation
            yield self

    @contextlib.asynccontextmanager
    async def node(self, **changes):
        async with MemorySession(broker=self.broker, client_id="edge-1") as session:
            claim = make_claim(
                policy=WISH, epoch=1, revision=1, expires_at=now_ms() + 10 * 86_400_000
            )
            session.announce(
                TOPICS.build(TopicKind.CAPABILITY, node="edge-1", function="echo"),
                lambda: signed(claim, NODE_KEY),
            )
            given: dict[str, Any] = {
                "session": session,
                "topics": TOPICS,
                "node": "edge-1",
                "epoch": 1,
                "key": NODE_KEY,
                "offer": lambda: self.offer,
                "sources": [SoftwareSource(("capability_schemas",)), self.scanner],
                "registries": lambda: REGISTRIES,
            }
            async with Attester(**given | changes) as attester:
                yield session, attester

    def kept(self, kind, **levels):
        found = self.broker.retained.get(TOPICS.build(kind, **levels))
        return found.payload if found is not None and found.payload else None

    def policy(self):
        payload = self.kept(TopicKind.CATALOG, node="edge-1", function="echo")
        return decode(CatalogRecord, payload).policy if payload else None

    def trust(self, member="edge-1"):
        payload = self.kept(TopicKind.TRUST, member=member)
        if payload is None:
            return None
        return read_trust(payload, member=member, registries=REGISTRIES)

    def says(self, words):
        state = self.trust()
        return state is not None and words in state.reason

    def evidence(self):
        payload = self.kept(TopicKind.EVIDENCE, node="edge-1")
        if payload is None:
            return None
        verify(payload, NODE_KEY.public)
        return decode(Evidence, payload)

    def ask(self, references=""):
        self.file.path.write_text(GATED.format(references=references))

    async def reference(self):
        answer = await self.attestation.verbs["attestation_reference"]({"node": "edge-1"}, ADMIN)
        return answer["toml"]

    async def row(self):
        answer = await self.attestation.verbs["attestation"]({"node": "edge-1"}, ADMIN)
        return answer["nodes"][0]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


async def test_without_a_file_nothing_is_asked_and_nothing_changes(world, eventually):
    async with world.registry(), world.node():
        await eventually(lambda: world.policy() is not None and world.evidence() is not None)
        assert world.policy() == CapabilityPolicy(zones=("hall-3",), grants=("actuate",))
        assert world.trust() is None
        assert world.evidence().challenge is None
        assert (await world.row())["state"] == "not asked"


async def test_gated_rights_come_with_evidence_and_go_with_it(world, eventually):
    async with world.registry(), world.node():
        await eventually(lambda: world.evidence() is not None and world.policy() is not None)
        toml = await world.reference()
        world.ask('references = ["edge-1"]')
        world.file.path.write_text(world.file.path.read_text() + toml)
        await eventually(lambda: world.trust() is not None and world.trust().state == "trusted")
        assert world.policy() == ATTESTED.model_copy(update={"grants": ("actuate",)})
        assert world.evidence().challenge is not None
        assert world.trust().until > world.clock()
        # The code of a function is edited: its digest is another one.
        before = world.offer
        world.offer = Offer((FunctionSpec(name="echo", description="Echo", code="c2"),), {})
        await eventually(lambda: world.policy() == BARE, timeout_s=30.0)
        state = world.trust()
        assert (state.state, "function/echo is sha256:" in state.reason) == ("lapsed", True)
        world.offer = before
        await eventually(lambda: world.policy() == ATTESTED, timeout_s=30.0)
        assert world.trust().state == "trusted"
        assert [data["trusted"] for kind, data in world.events if kind == "attestation"] == [
            False,  # asked, and not answered yet
            True,
            False,
            True,
        ]


async def test_evidence_runs_out_when_the_node_goes_and_counts_again_when_it_answers(
    world, eventually
):
    world.ask()
    async with world.registry():
        async with world.node():
            await eventually(lambda: world.policy() == ATTESTED, timeout_s=30.0)
            first = world.trust().challenge
            world.clock.pass_s(1_800)  # the next window: a new challenge, answered at once
            await eventually(
                lambda: first not in {world.trust().challenge, world.evidence().challenge},
                timeout_s=30.0,
            )
            assert world.policy() == ATTESTED
        world.clock.pass_s(1_800)  # nobody answers, but the last answer still counts
        await eventually(
            lambda: world.trust().challenge != world.evidence().challenge, timeout_s=30.0
        )
        assert world.policy() == ATTESTED
        world.clock.pass_s(1_800)
        await eventually(lambda: world.policy() == BARE, timeout_s=30.0)
        assert "ran out" in world.trust().reason
        async with world.node():
            await eventually(lambda: world.policy() == ATTESTED, timeout_s=30.0)


async def test_a_restart_of_the_registry_takes_nothing_from_who_has_shown_it(world, eventually):
    world.settle_s = 3.0  # long enough for what the broker kept to arrive on a busy machine
    world.ask()
    async with world.node():
        async with world.registry():
            await eventually(lambda: world.policy() == ATTESTED, timeout_s=30.0)
            # Rights are published before they are stored, in their turn: behind this they are.
            (stored,) = await world.store.load()
            assert stored.record.policy == ATTESTED
        topic = TOPICS.build(TopicKind.CATALOG, node="edge-1", function="echo")
        before = len(world.broker.published(topic))
        async with world.registry():
            await eventually(lambda: "edge-1" in world.attestation._judged, timeout_s=30.0)
            seen = world.broker.published(topic)[before:]
        assert {decode(CatalogRecord, one.payload).policy for one in seen if one.payload} <= {
            ATTESTED
        } or not seen


async def test_a_registry_that_starts_anew_takes_rights_that_nothing_carries_any_more(
    world, eventually
):
    async with world.node(), world.registry():
        await eventually(lambda: world.policy() == ATTESTED and world.evidence() is not None)
    world.ask('references = ["none"]\n')
    world.file.path.write_text(
        world.file.path.read_text() + '[references.none]\n"code/*" = "any"\n'
    )
    async with world.registry():
        await eventually(lambda: world.policy() == BARE, timeout_s=30.0)


@pytest.mark.parametrize("kind", ["another node", "replayed", "flipped", "old challenge", "large"])
async def test_bad_evidence_earns_nothing(world, eventually, kind):
    world.ask()
    async with world.registry():
        async with world.node() as (session, _):
            await eventually(lambda: world.policy() == ATTESTED, timeout_s=30.0)
            good = world.evidence()
        topic = TOPICS.build(TopicKind.EVIDENCE, node="edge-1")
        if kind == "another node":
            payload = encode(sign(good.model_copy(update={"node": "edge-2"}), NODE_KEY))
        elif kind == "replayed":
            payload = encode(sign(good.model_copy(update={"at": good.at - 1}), NODE_KEY))
        elif kind == "flipped":
            payload = encode(sign(good, NODE_KEY)).replace(b'"epoch":1', b'"epoch":2')
        elif kind == "large":
            payload = b" " * 300_000 + encode(sign(good, NODE_KEY))
        else:
            payload = encode(
                sign(good.model_copy(update={"at": good.at + 1, "challenge": "00" * 32}), NODE_KEY)
            )
        world.clock.pass_s(3_600)  # what it had has run out
        await eventually(lambda: world.policy() == BARE, timeout_s=30.0)
        async with MemorySession(broker=world.broker, client_id="edge-1") as session:
            heard = world.attestation.counts.total()
            session.post(topic, payload, retain=True)
            await eventually(lambda: world.attestation.counts.total() > heard)
        row = await world.row()
        assert (row["state"], row["last_refusal"] != "") == ("lapsed", True)
        assert world.policy() == BARE


async def test_another_key_inherits_nothing_of_what_was_shown_before(world, eventually):
    world.ask()
    async with world.registry():
        async with world.node():
            await eventually(lambda: world.policy() == ATTESTED, timeout_s=30.0)
            good = world.evidence()
        other = SigningKey.generate()
        world.known["edge-1"] = Identity(other.public, ATTESTED)
        assert world.attestation.narrowed("edge-1").attested == BARE  # at once
        await eventually(lambda: world.policy() == BARE, timeout_s=30.0)
        assert world.says("shown no evidence")
        assert "evidence" not in await world.row()
        async with MemorySession(broker=world.broker, client_id="edge-1") as session:
            # Its clock may be behind that of the machine before: nothing of that one counts.
            shown = good.model_copy(update={"at": good.at - 5})
            topic = TOPICS.build(TopicKind.EVIDENCE, node="edge-1")
            session.post(topic, encode(sign(shown, other)), retain=True)
            await eventually(lambda: world.policy() == ATTESTED, timeout_s=30.0)


async def test_other_rights_on_record_are_judged_anew_and_written(world, eventually):
    world.file.path.write_text('[[rules]]\nzones = ["hall-3"]\ngates = { grants = ["actuate"] }\n')
    elsewhere = CapabilityPolicy(zones=("hall-4",), grants=("actuate",))
    world.known["edge-1"] = Identity(NODE_KEY.public, elsewhere)
    strangers = {"registry-9": SigningKey.generate().public}
    # It answers no challenge.
    async with world.registry(), world.node(registries=lambda: strangers):
        await eventually(lambda: world.policy() == elsewhere.model_copy(update={"zones": ()}))
        await eventually(lambda: "edge-1" in world.attestation._judged, timeout_s=30.0)
        assert world.trust() is None
        world.known["edge-1"] = Identity(NODE_KEY.public, ATTESTED)
        assert world.attestation.narrowed("edge-1").attested.grants == ()  # at once
        await eventually(
            lambda: world.policy() == CapabilityPolicy(zones=("hall-3",)), timeout_s=30.0
        )
        await eventually(lambda: world.trust() is not None and world.trust().state == "lapsed")
        # Rights that no rule is about are written too.
        for rights in (CapabilityPolicy(data=("public",)), CapabilityPolicy(data=("internal",))):
            world.known["edge-1"] = Identity(NODE_KEY.public, rights)
            await eventually(lambda now=rights: world.policy() == now, timeout_s=30.0)
            assert world.trust() is None


async def test_what_a_node_claimed_goes_with_it(world, eventually):
    async with world.registry(), world.node():
        await eventually(lambda: world.policy() == ATTESTED and world.evidence() is not None)
        await eventually(lambda: "edge-1" in world.attestation._judged, timeout_s=30.0)
        del world.known["edge-1"]
        await eventually(lambda: world.policy() is None, timeout_s=30.0)
        assert world.attestation._shown == {}


class TestFloods:
    def message(self, node="edge-1", key=NODE_KEY, **changes):
        given: dict[str, Any] = {"node": node, "epoch": 1, "at": now_ms()}
        payload = encode(sign(Evidence(**given | changes), key))
        return Message(TOPICS.build(TopicKind.EVIDENCE, node=node), payload)

    async def test_of_each_node_the_newest_piece_waits(self, world, eventually):
        async with world.registry():
            service, now = world.attestation, now_ms()
            for number in range(200):
                await service._on_evidence(self.message(at=now + number))
            await eventually(lambda: service._shown)
            assert service._shown["edge-1"].evidence.at == now + 199
            assert service.counts == {"superseded": 199, "taken": 1}

    async def test_who_floods_delays_only_itself(self, world, eventually):
        calm = SigningKey.generate()
        world.known["edge-2"] = Identity(calm.public, ATTESTED)
        async with world.registry():
            service, now = world.attestation, now_ms()
            time = [0.0]
            service._pace = Budget(lambda: time[0], burst=2, per_second=1, remembered=10)
            for number in range(4):
                await service._on_evidence(self.message(at=now + number))
                await eventually(lambda: number > 1 or not service._waiting)  # noqa: B023
            await service._on_evidence(self.message("edge-2", calm))
            await eventually(lambda: "edge-2" in service._shown)
            assert service._shown["edge-1"].evidence.at == now + 1
            assert set(service._waiting) == {"edge-1"}
            time[0] = 1.0
            await eventually(lambda: service._shown["edge-1"].evidence.at == now + 3)

    async def test_what_is_too_long_does_not_even_wait(self, world, eventually):
        async with world.registry():
            service = world.attestation
            topic = TOPICS.build(TopicKind.EVIDENCE, node="edge-1")
            await service._on_evidence(Message(topic, b" " * (EVIDENCE_LIMIT_BYTES + 1)))
            assert isinstance(service._waiting["edge-1"], TooLarge)
            await eventually(lambda: service.counts["refused"] == 1)
            assert str(EVIDENCE_LIMIT_BYTES + 1) in service._shown["edge-1"].problem

    async def test_strangers_do_not_wait(self, world):
        async with world.registry():
            service = world.attestation
            for number in range(50):
                await service._on_evidence(self.message(f"edge-{number + 10}"))
            assert service._waiting == {}
            assert service.counts == {"refused": 50}

    async def test_what_was_dropped_is_asked_for_again(self, world, eventually):
        async with world.registry(), world.node():
            service = world.attestation
            await eventually(lambda: service._shown)
            service._shown.clear()
            service._overflowed(self.message())
            await eventually(lambda: service._shown, timeout_s=30.0)
            assert service._shown["edge-1"].evidence == world.evidence()
            assert not service._missed

    async def test_one_odd_node_does_not_end_the_registry(self, world, eventually, monkeypatch):
        real = read_evidence

        def odd(payload, *, node, **more):
            if node == "edge-2":
                raise RuntimeError("nobody thought of this")
            return real(payload, node=node, **more)

        monkeypatch.setattr("registry.attestation.service.read_evidence", odd)
        world.known["edge-2"] = world.known["edge-1"]
        async with world.registry():
            service = world.attestation
            await service._on_evidence(self.message("edge-2"))
            await service._on_evidence(self.message())
            await eventually(lambda: "edge-1" in service._shown)
            assert service.counts["failed"] == 1


async def test_a_hostile_challenge_is_not_answered(world, eventually):
    async with world.node() as (_, attester):
        await eventually(lambda: attester.made == 1)
        topic = TOPICS.build(TopicKind.TRUST, member="edge-1")
        forged = TrustState(
            member="edge-1", state="trusted", at=1, challenge="ab" * 32, registry="registry-1"
        )
        async with MemorySession(broker=world.broker, client_id="broker") as hostile:
            hostile.post(topic, encode(sign(forged, SigningKey.generate())), retain=True)
            real = forged.model_copy(update={"challenge": "cd" * 32})
            hostile.post(topic, encode(sign(real, REGISTRY_KEY)), retain=True)
            await eventually(lambda: world.evidence().challenge == "cd" * 32)
        assert attester.made == 2


async def test_other_sources_are_shown_and_a_broken_one_is_left_out(world, eventually):
    async with world.node():
        await eventually(lambda: world.evidence() is not None)
        shown = world.evidence()
        assert shown.measurements["scanner/disk"] == "sha256:" + "d" * 64
        assert shown.statements[0].source == "scanner"
        assert shown.boot is not None or not Path("/proc/sys/kernel/random/boot_id").exists()
        world.scanner.broken = True
        world.offer = Offer((), {"models/tiny.gguf": "sha256:" + "e" * 64})
        await eventually(lambda: "model/tiny.gguf" in world.evidence().measurements)
        assert set(world.evidence().measurements) == {"code/capability_schemas", "model/tiny.gguf"}


async def test_more_findings_than_fit_leave_what_the_node_measured_itself(world, eventually):
    world.scanner.found = {f"file-{number}": "no digest" for number in range(10)}
    async with world.node():
        await eventually(lambda: world.evidence() is not None)
        assert set(world.evidence().measurements) == {"function/echo"}
    many = {f"function/{number}": "sha256:" + "a" * 64 for number in range(5_000)}
    made = folded({**many, "code/foam": "sha256:" + "b" * 64})
    assert set(made) == {"function/all", "code/foam"}
    assert len(folded({f"{n}/x": "sha256:" + "a" * 64 for n in range(3_000)})) <= MAX_MEASUREMENTS


def test_the_digest_of_a_package_sees_every_file_but_caches(tmp_path):
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "a.py").write_text("1")
    before = tree_digest(tmp_path)
    (tmp_path / "__pycache__" / "a.pyc").write_text("x")
    assert tree_digest(tmp_path) == before
    (tmp_path / "data.bin").write_text("x")
    with_data = tree_digest(tmp_path)
    assert with_data != before
    (tmp_path / "data.bin").rename(tmp_path / "other.bin")
    assert tree_digest(tmp_path) not in {before, with_data}


def test_sources_of_other_distributions_are_taken_unless_they_cannot_be_made():
    def point(name, value):
        return EntryPoint(name=name, value=value, group="foam.evidence")

    made = list(
        _plugins(
            [
                point("scanner", f"{__name__}:Scanner"),
                point("broken", f"{__name__}:nothing"),
                point("ours", "node_agent.attestation.software:SoftwareSource"),
            ]
        )
    )
    assert [source.name for source in made] == ["scanner"]
    assert [source.name for source in evidence_sources(tpm_key="0x81010002")][:2] == [
        "code",
        "tpm2",
    ]


def test_the_registers_that_the_tpm_quotes_may_be_others():
    def registers(**given):
        (source,) = [one for one in evidence_sources(tpm_key="x", **given) if one.name == "tpm2"]
        assert isinstance(source, TpmSource)
        return source._registers

    assert registers() == DEFAULT_REGISTERS
    assert registers(tpm_registers="sha384:0,7") == "sha384:0,7"


SCRIPT = """#!{python}
import sys
sys.path.insert(0, {tests!r})
from support.tpm import SoftTpm
said = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert said["--key-context"] == "0x81010002" and said["--hash-algorithm"] == "sha256", said
if said["--pcr-list"] == "broken":
    sys.exit("ERROR: Esys_Quote(0x18B)")
tpm = SoftTpm("rsa", private=open({key!r}).read())
quoted = tpm.attest(said["--qualification"])
open(said["--message"], "wb").write(quoted)
open(said["--signature"], "wb").write(tpm.signature(quoted))
"""


@pytest.fixture
def quoting(tmp_path):
    """An executable that behaves as tpm2_quote does, with keys of software."""
    tpm = SoftTpm("rsa")
    key, program = tmp_path / "ak.pem", tmp_path / "tpm2_quote"
    key.write_text(tpm.private)
    tests = str(Path(__file__).resolve().parents[1])
    program.write_text(SCRIPT.format(python=sys.executable, tests=tests, key=str(key)))
    program.chmod(0o755)
    return tpm, str(program)


async def test_a_rule_may_ask_for_a_quote_of_the_tpm(world, eventually, quoting):
    tpm, program = quoting
    world.ask(f'pcrs = ["{tpm.registers}"]')
    keys = f'[tpm2]\nedge-1 = """{tpm.public}"""\n'
    world.file.path.write_text(world.file.path.read_text() + keys)
    source = TpmSource("0x81010002", program=program)
    async with world.registry():
        async with world.node(sources=[]):
            await eventually(lambda: world.policy() == BARE, timeout_s=30.0)
            await eventually(lambda: world.says("shows no quote"), timeout_s=30.0)
        async with world.node(sources=[source]):
            await eventually(lambda: world.policy() == ATTESTED, timeout_s=30.0)


def test_what_the_program_of_the_tpm_says_is_passed_on(quoting, tmp_path):
    _, program = quoting
    assert TpmSource("x", program=program).collect(None) == Findings()
    with pytest.raises(ConfigurationError, match=r"failed \(1\): ERROR: Esys_Quote"):
        TpmSource("0x81010002", registers="broken", program=program).collect("ab" * 32)
    with pytest.raises(ConfigurationError, match="install tpm2-tools"):
        TpmSource("0x81010002", program=str(tmp_path / "none")).collect("ab" * 32)


class TestTrustBoard:
    async def test_a_revocation_is_said_and_said_again_until_every_passport_has_run_out(
        self, world, eventually
    ):
        del world.known["edge-1"]
        world.voided = {"edge-1": world.clock()}
        async with world.registry():
            await eventually(lambda: world.trust() is not None)
            state = world.trust()
            assert (state.state, state.void_before) == ("revoked", world.voided["edge-1"])
        world.broker.retained.clear()  # a broker that keeps nothing
        async with world.registry():
            await eventually(lambda: world.trust() is not None and world.trust().state == "revoked")
        world.clock.ahead += VOID_KEPT_MS + 1_000
        world.broker.retained.clear()
        async with world.registry():
            await asyncio.wait_for(world.attestation._session.wait_connected(), 20)
            assert world.board.state("edge-1") is None

    async def test_a_new_enrollment_is_trusted_and_the_old_passport_stays_void(
        self, world, eventually
    ):
        known = world.known.pop("edge-1")
        world.voided = {"edge-1": 1_790_000_000_000}
        async with world.registry():
            await eventually(lambda: world.trust() is not None)
            world.known = {"edge-1": known}
            world.board.refresh()
            await eventually(lambda: world.trust().state == "trusted")
            assert world.trust().void_before == 1_790_000_000_000
            world.board.describe("edge-1", Description(role="node"))
            await eventually(lambda: world.trust().role == "node")

    async def test_what_an_earlier_life_left_is_cleared_but_no_revocation(
        self, world, eventually, monkeypatch
    ):
        monkeypatch.setattr("registry.trust._GHOSTS_AFTER_S", 0.2)
        async with MemorySession(broker=world.broker, client_id="registry-1") as session:
            left: dict[str, Standing] = {"old": "trusted", "thief": "revoked"}
            for member, said in left.items():
                state = TrustState(member=member, state=said, at=1, registry="registry-1")
                topic = TOPICS.build(TopicKind.TRUST, member=member)
                session.post(topic, encode(sign(state, REGISTRY_KEY)), retain=True)
            await eventually(lambda: world.trust("thief") is not None)
        async with world.registry():
            await eventually(lambda: world.trust("old") is None)
            assert world.trust("thief").state == "revoked"


async def test_the_verbs_say_what_is_wrong_with_a_question(world):
    async with world.registry():
        verbs = world.attestation.verbs
        with pytest.raises(NotFound, match="no evidence"):
            await verbs["attestation_reference"]({"node": "edge-1"}, ADMIN)
        with pytest.raises(NotFound, match="no node"):
            await verbs["attestation"]({"node": "nobody"}, ADMIN)
        with pytest.raises(InvalidTask, match=r"args\.node"):
            await verbs["attestation"]({"node": 3}, ADMIN)
        with pytest.raises(InvalidTask, match="unknown argument"):
            await verbs["attestation"]({"nod": "x"}, ADMIN)
        assert json.dumps(await verbs["attestation"]({}, ADMIN))
