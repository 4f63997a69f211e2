"""The broker learns of every change, also when telling it went wrong the first time."""

import asyncio
from typing import TYPE_CHECKING, cast

import pytest

from broker.access.credentials import CredentialStore
from broker.access.policy import Role
from capability_schemas.errors import BrokerUnavailable
from foam.mesh import MeshFolder
from foam.wiring import broker

if TYPE_CHECKING:
    from broker.engine import BrokerEngine


class Engine:
    """A broker that does not take the first reloads: all of a BrokerEngine that is asked here."""

    def __init__(self, *, fails):
        self.fails = fails
        self.reloads = 0
        self.told = asyncio.Event()

    async def reload_access(self):
        self.reloads += 1
        if self.reloads <= self.fails:
            raise BrokerUnavailable("mosquitto does not take commands")
        self.told.set()


@pytest.mark.parametrize("fails", [0, 2])
async def test_a_reload_that_went_wrong_is_repeated(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(broker, "ACCESS_POLL_S", 0.01)
    folder = MeshFolder(tmp_path).prepare()
    store, engine = CredentialStore(folder.credentials_file), Engine(fails=fails)
    following = asyncio.get_running_loop().create_task(
        broker._follow_access(store, cast("BrokerEngine", engine), {}, folder, None)
    )
    try:
        await asyncio.to_thread(folder.credentials().add, "pump-7", Role.DEVICE)
        async with asyncio.timeout(20):
            await engine.told.wait()
        assert engine.reloads == fails + 1
        assert set(store.identities()) == {"pump-7"}
    finally:
        following.cancel()
