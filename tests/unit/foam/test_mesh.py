import json
import stat
from pathlib import Path

import pytest
from pydantic import SecretStr

from broker.access.policy import Role
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError, Conflict, NotFound
from foam.mesh import Identity, MeshFolder, MeshRecord, Person


@pytest.fixture
def folder(tmp_path: Path) -> MeshFolder:
    return MeshFolder(tmp_path / "mesh").prepare()


def test_members_are_made_once_and_kept(folder: MeshFolder) -> None:
    made = folder.ensure("edge-1", Role.NODE)
    again = folder.ensure("edge-1", Role.NODE)
    assert again == made
    assert made.password is not None
    assert folder.credentials().verify("edge-1", made.password.get_secret_value()) is not None
    known = folder.credentials().identities()["edge-1"]
    assert known.public_key == folder.signing_key(made).public


def test_devices_have_no_key(folder: MeshFolder) -> None:
    made = folder.ensure("pump-7", Role.DEVICE)
    assert made.signing_key is None
    with pytest.raises(ConfigurationError, match="no signing key"):
        folder.signing_key(made)


def test_another_role_is_a_conflict(folder: MeshFolder) -> None:
    folder.ensure("pump-7", Role.DEVICE)
    with pytest.raises(Conflict, match="already exists as device"):
        folder.ensure("pump-7", Role.NODE)
    with pytest.raises(Conflict, match="exists already"):
        folder.create("pump-7", Role.DEVICE)


def test_a_lost_identity_file_is_made_anew(folder: MeshFolder) -> None:
    first = folder.ensure("pump-7", Role.DEVICE)
    folder.identity_path("pump-7").unlink()
    second = folder.ensure("pump-7", Role.DEVICE)
    assert second.password != first.password


def test_external_credentials_replace_ours_but_are_not_stored(folder: MeshFolder) -> None:
    person = Person(id="guest", username="guest", password=SecretStr("theirs"))
    made = folder.ensure("edge-1", Role.NODE, external=person)
    assert (made.id, made.username) == ("edge-1", "guest")
    assert folder.identity("edge-1").username == "edge-1"


def test_files_are_private(folder: MeshFolder) -> None:
    folder.ensure("edge-1", Role.NODE)
    files = [folder.credentials_file, *folder.identity_path("edge-1").parent.iterdir()]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_removed_members_are_gone(folder: MeshFolder) -> None:
    folder.ensure("edge-1", Role.NODE)
    folder.remove("edge-1")
    assert "edge-1" not in folder.credentials().identities()
    assert list(folder.identity_path("edge-1").parent.iterdir()) == []
    with pytest.raises(NotFound):
        folder.remove("edge-1")


def test_record_round_trip_and_its_absence(folder: MeshFolder) -> None:
    with pytest.raises(NotFound, match="foam up"):
        folder.record()
    person = Person(id="device-1", username="device-1", password=SecretStr("secret"))
    record = MeshRecord(broker="mqtt://127.0.0.1:1", site="local", device=person, admin=person)
    folder.write_record(record)
    assert folder.record() == record
    assert "secret" not in repr(record)


def test_members_made_for_elsewhere_know_the_way(folder: MeshFolder) -> None:
    person = Person(id="device-1", username="device-1")
    folder.write_record(
        MeshRecord(broker="mqtt://10.0.0.5:1883", site="hall", device=person, admin=person)
    )
    made = folder.create("edge-9", Role.NODE)
    assert (made.broker, made.site) == ("mqtt://10.0.0.5:1883", "hall")
    assert Identity.read(folder.identity_path("edge-9")) == made


def test_one_mesh_a_folder(folder: MeshFolder) -> None:
    with folder.locked(), pytest.raises(Conflict, match="already runs"), folder.locked():
        pass
    with folder.locked():
        pass


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"id": "x", "colour": "red"})])
def test_damaged_files_are_named(folder: MeshFolder, content: str) -> None:
    folder.identity_path("x").write_text(content)
    with pytest.raises(ConfigurationError, match=r"x\.json is damaged"):
        folder.identity("x")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--data"):
        MeshFolder(tmp_path / "file" / "mesh").prepare()


def test_what_a_node_is_given_is_kept_until_something_else_is_said(folder: MeshFolder) -> None:
    def held() -> CapabilityPolicy | None:
        return MeshFolder(folder.path).credentials().identities()["press"].attested

    place = CapabilityPolicy(zones=("hall-3",), grants=("controls",))
    assert folder.create("press", Role.NODE, attested=place).attested == place
    assert folder.identity("press").attested == place
    assert held() == place
    folder.ensure("press", Role.NODE)
    assert held() == place
    folder.ensure("press", Role.NODE, attested=CapabilityPolicy())
    assert held() == CapabilityPolicy()


def test_a_damaged_identity_says_what_and_what_to_do(folder: MeshFolder) -> None:
    folder.ensure("press", Role.NODE)
    folder.identity_path("press").write_text('{"id": "press"}')
    with pytest.raises(ConfigurationError, match=r"damaged \(role: .*\); delete it and `foam up`"):
        folder.ensure("press", Role.NODE)
    with pytest.raises(ConfigurationError, match="does not exist; make one: foam device add gone"):
        folder.identity("gone")
