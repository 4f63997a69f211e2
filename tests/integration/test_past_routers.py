"""What a router says of whether clients may ask nodes themselves when it is gone."""

from contextlib import AsyncExitStack

import pytest

from capability_schemas.node import RouterState
from capability_schemas.topics import TopicKind
from capability_schemas.wire import decode
from router.peers import router_will
from router.quota import QuotaFile
from router.rules import RuleFile
from router.service import lets_past
from support.scripted_mesh import Mesh

RULE = '[[rule]]\nname = "only"\nroute = "best"\n[rule.when]\nclient = "pump-7"\n'
QUOTA = "[default]\ntasks_per_s = 5\n"


def files(folder, *, rules="", quotas=""):
    (folder / "rules.toml").write_text(rules)
    (folder / "quotas.toml").write_text(quotas)
    made = RuleFile(folder / "rules.toml"), QuotaFile(folder / "quotas.toml")
    for file in made:
        file.load()
    return made


@pytest.mark.parametrize(
    ("texts", "past"),
    [({}, True), ({"rules": RULE}, False), ({"quotas": QUOTA}, False)],
    ids=["nothing", "rules", "quotas"],
)
async def test_nobody_gets_past_rules_or_quotas(tmp_path, topics, eventually, texts, past):
    rules, quotas = files(tmp_path, **texts)
    assert lets_past(rules, quotas) is past
    will = router_will(topics, "router-1", epoch=1, at=1, direct=lets_past(rules, quotas))
    assert decode(RouterState, will.payload).direct is past
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack, tmp_path, topics)
        await mesh.start_client()
        await mesh.start_router(rules=rules, quotas=quotas)
        topic = topics.build(TopicKind.ROUTER_STATE, router="router-1")

        def said():
            kept = mesh.broker.retained.get(topic)
            return decode(RouterState, kept.payload) if kept is not None else None

        await eventually(lambda: said() is not None)
        assert (said().state, said().direct) == ("birth", past)
        await mesh.stop_router()
        await eventually(lambda: said().state == "offline")
        assert said().direct is past


def test_without_files_nothing_is_in_the_way():
    assert lets_past(None, None)
