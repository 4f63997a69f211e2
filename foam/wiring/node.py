"""The process of a node."""

import asyncio
import os
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from broker.access.policy import Role
from broker.tenure import Tenant, Tenure
from capability_schemas.errors import Conflict
from capability_schemas.topics import Topics
from foam.identity_lock import IdentityLock
from foam.member import Member
from foam.mesh import MeshFolder, load_key
from foam.nodefile import NodeHead, place_problems, placed
from foam.process import STDIN, Process, run_process
from foam.settings import Settings
from foam.status import ProcessStatus
from foam.wiring.member import connect, keep_papers, member_session, wait_for_access

if TYPE_CHECKING:
    from broker.session.base import Session
    from capability_schemas.functions import FunctionSpec
    from capability_schemas.problem import Problem
    from node_agent.agent import NodeAgent
    from node_agent.attestation import Attester
    from node_agent.declaration import Declaration
    from node_agent.declaration.watch import SourceWatch

_WATCH_S: Final = 1.0
"""How often a node looks for edits of its declaration, seconds."""

_WARM_S: Final = 60.0
"""How long a node's readiness waits for its warm instances, seconds (a large model is slow)."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


async def run_node(
    settings: Settings,
    *,
    source: str,
    node_id: str | None,
    identity_file: Path | None,
    status: ProcessStatus,
) -> int:
    """Run a node agent until told to end; it drains before it goes.

    Args:
        settings: Data folder, broker, site; ``model`` replaces the model of its language functions.
        source: Node file, Python file or module with its functions.
        node_id: Its id; that of the declaration when None.
        identity_file: Its identity; that of the data folder when None.
        status: Where readiness is reported.

    Raises:
        ConfigurationError: The declaration, a function or the identity is not usable.
        FoamError: It cannot go on.
    """
    from node_agent.agent import NodeAgent
    from node_agent.declaration import load_declaration, read_declaration
    from node_agent.declaration.watch import SourceWatch
    from node_agent.mesh_client import MeshClient
    from node_agent.models import ModelStore
    from node_agent.runtimes.base import RuntimeContext

    declaration = load_declaration(source)
    head = NodeHead.of(declaration.head, source)
    member = Member.resolve(
        settings,
        role=Role.NODE,
        default_id=None if identity_file is not None else node_id or head.id,
        identity_file=identity_file,
        attested=head.attested,
    )
    if identity_file is not None and node_id not in {None, member.identity.id}:
        raise Conflict(
            f"--id {node_id} is not the identity {member.identity.id} of {identity_file}"
        )

    def offered(declared: "Declaration", place: NodeHead) -> "list[FunctionSpec]":
        return placed(
            (_with_model(spec, settings.model) for spec in declared.functions),
            place.attested or member.identity.attested,
        )

    functions = offered(declaration, head)
    lock = IdentityLock(member.folder, member.identity.id).take()
    agents: list[NodeAgent] = []
    session = member_session(member, will=lambda: agents[0].last_will() if agents else None)
    topics = Topics(site=member.site)
    models = ModelStore(settings.models, budget_bytes=settings.models_budget)
    mesh = MeshClient(session=session, topics=topics, node=member.identity.id)
    agents.append(
        NodeAgent(
            session=session,
            topics=topics,
            settings=head.tuned(member.identity.id),
            functions=functions,
            key=load_key(member.identity, member.folder),
            signer=member.signer,
            book=member.book,
            context=RuntimeContext(
                model_path=models.resolve, mesh=mesh, mcp_servers=declaration.mcp
            ),
            model_digest=models.digest,
            epoch=lock.tenant.epoch,
            place=lock.tenant.place,
        )
    )

    async def take_up(edited: "Declaration") -> None:
        place = NodeHead.of(edited.head, source)
        if place.id != head.id:
            _log.warning("node.id_kept", node=member.identity.id, wanted=place.id, do="restart it")
        if identity_file is None and place.attested is not None:
            await asyncio.to_thread(
                MeshFolder(settings.data).ensure,
                member.identity.id,
                Role.NODE,
                attested=place.attested,
            )
        await agents[0].replace(offered(edited, place), mcp_servers=edited.mcp)

    async def assemble(process: Process) -> Mapping[str, Any]:
        if member.is_new:
            await wait_for_access(member)
        await connect(process, session, member.url)
        keep_papers(process, member, session, shown=agents[0].show_passport)
        for part in (
            _tenure(agents[0], session, topics, lock.tenant),
            *(mesh, agents[0]),
            _attester(settings, member, agents[0], session),
        ):
            await process.enter(part)
        if not await agents[0].wait_warm(_WARM_S):
            _log.warning("node.still_warming", node=member.identity.id)
        watch = await process.enter(
            SourceWatch(
                node=member.identity.id,
                files=declaration.files,
                read=partial(read_declaration, source),
                apply=take_up,
                told=agents[0].remark,
                poll_s=_WATCH_S if settings.watch else None,
            )
        )
        _reload_on_hangup(watch)
        return {"id": member.identity.id, "functions": [spec.name for spec in functions]}

    process = Process(
        name=member.identity.id,
        assemble=assemble,
        status=status,
        stop_s=agents[0].stop_timeout_s + 5.0,
    )
    with lock, models:
        return await run_process(process)


def _tenure(agent: "NodeAgent", session: "Session", topics: Topics, tenant: Tenant) -> Tenure:
    """Make what keeps two processes from being this node at once."""
    return Tenure(
        session=session,
        topics=topics,
        tenant=tenant,
        show=agent.show_passport,
        give_up=agent.give_up,
    )


def _attester(
    settings: Settings, member: Member, agent: "NodeAgent", session: "Session"
) -> "Attester":
    """Make what shows evidence of this node."""
    from node_agent.attestation import Attester, evidence_sources

    return Attester(
        session=session,
        topics=Topics(site=member.site),
        node=member.identity.id,
        epoch=agent.epoch,
        key=load_key(member.identity, member.folder),
        offer=agent.offer,
        sources=evidence_sources(tpm_key=settings.tpm_key, tpm_registers=settings.tpm_registers),
        registries=lambda: member.book.registries if member.book is not None else {},
    )


def _reload_on_hangup(watch: "SourceWatch") -> None:
    """Take SIGHUP as the wish to read the declaration again.

    A node started in a terminal that is closed gets it too, and shall end with the terminal.
    """
    in_terminal = os.isatty(STDIN)

    def reload() -> None:
        if not in_terminal or os.isatty(STDIN):
            watch.reload()
            return
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):  # a log line to a terminal that is gone is an error
            os.dup2(nowhere, stream)
        os.close(nowhere)
        os.kill(os.getpid(), signal.SIGTERM)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def check_node(settings: Settings, source: str) -> "tuple[Declaration, list[Problem]]":
    """Look a declaration over as a node on this machine would; blocks.

    Args:
        settings: Data folder, with its models.
        source: Node file, Python file or module with functions.

    Returns:
        What was read, and all that is wrong with it or could be better.
    """
    from node_agent.declaration import read_declaration
    from node_agent.declaration.inspection import inspect_declaration
    from node_agent.models import ModelStore
    from node_agent.runtimes.base import RuntimeContext

    declaration = read_declaration(source, thorough=True)
    found = [*declaration.problems, *place_problems(declaration, source)]
    with ModelStore(settings.models) as models:
        context = RuntimeContext(model_path=models.resolve)
        found += inspect_declaration(declaration, source=source, context=context)
    return declaration, found


def _with_model(spec: "FunctionSpec", model: Path | None) -> "FunctionSpec":
    """Put another model under a language function, without the phrasing for the shipped one."""
    if model is None or spec.runtime != "llama_cpp":
        return spec
    options = {name: value for name, value in spec.options.items() if name != "prepare"}
    return spec.model_copy(update={"model": str(model.expanduser().absolute()), "options": options})
