import json
import stat
from pathlib import Path

import pytest
from pydantic import SecretStr

from broker.access.policy import Role
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError, Conflict, NotFound
from foam.mesh import Identity, MeshFolder, MeshRecord, Person, load_signer, make_book


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


def test_a_key_that_was_left_behind_blocks_nothing(folder: MeshFolder) -> None:
    first = folder.ensure("edge-1", Role.NODE)
    was = folder.signing_key(first).public
    folder.credentials().remove("edge-1")  # as a revocation by a registry on another machine does
    again = folder.ensure("edge-1", Role.NODE)
    assert folder.signing_key(again).public != was
    known = folder.credentials().identities()["edge-1"]
    assert known.public_key == folder.signing_key(again).public
    folder.credentials().remove("edge-1")
    assert folder.create("edge-1", Role.NODE).signing_key == "edge-1.key"


def test_files_of_a_member_go_though_it_is_known_no_more(folder: MeshFolder) -> None:
    made = folder.ensure("edge-1", Role.NODE)
    files = folder.identity_path("edge-1").parent
    for name in ("edge-1.tls.pem", "edge-1.tls.ca"):
        (files / name).write_text("of an enrollment")
    assert folder.runs(made.id)
    folder.credentials().remove("edge-1")
    folder.remove("edge-1")
    assert list(files.iterdir()) == []
    assert not folder.runs("edge-1")
    with pytest.raises(NotFound):
        folder.remove("edge-1")
    folder.ensure("pump-7", Role.DEVICE)
    assert not folder.runs("pump-7")


def test_what_is_given_as_an_identity_file_is_not_said_to_be_deleted(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.json: there is no such file"):
        Identity.read(tmp_path / "gone.json")
    for content in ("my notes", '{"colour": "red"}', "[]"):
        (tmp_path / "notes").write_text(content)
        with pytest.raises(ConfigurationError, match="notes is no identity file") as refused:
            Identity.read(tmp_path / "notes")
        assert "delete" not in refused.value.message


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


# ---- passports


NOW = 1_790_000_000_000
DAY_MS = 86_400_000


def _site(folder: MeshFolder) -> dict[str, Identity]:
    roles = {
        "registry-1": Role.REGISTRY,
        "router-1": Role.ROUTER,
        "edge-1": Role.NODE,
        "admin-1": Role.ADMIN,
        "device-1": Role.DEVICE,
    }
    return {name: folder.ensure(name, role, site="hall") for name, role in roles.items()}


def test_members_of_the_folder_can_sign_and_check(folder: MeshFolder) -> None:
    made = _site(folder)
    public = folder.signing_key(made["registry-1"]).public
    for name in ("router-1", "edge-1", "admin-1"):
        signer = load_signer(made[name], folder.identity_path(name).parent)
        assert signer is not None
        assert signer.passport is not None
        assert (signer.passport.role, signer.passport.site) == (made[name].role.value, "hall")
        book = make_book(made["device-1"], site="hall")
        assert book is not None
        book.admit(signer.passport)
        assert book.key(name, made[name].role.value) == signer.key.public
    assert made["device-1"].registries == {"registry-1": public}
    assert made["device-1"].passport is made["registry-1"].passport is None
    assert folder.identity("router-1") == made["router-1"]


def test_passports_are_kept_until_it_is_time(folder: MeshFolder) -> None:
    _site(folder)
    first = folder.vouch(folder.identity("edge-1"), site="hall", clock=lambda: NOW)
    assert first.renew_at is not None
    issued = first.passport.issued_at if first.passport is not None else 0
    clock = lambda: issued + 19 * DAY_MS  # noqa: E731 - a clock
    assert folder.vouch(first, site="hall", clock=clock) == first
    clock = lambda: issued + 21 * DAY_MS  # noqa: E731
    later = folder.vouch(first, site="hall", clock=clock)
    assert later.passport is not None
    assert later.passport.issued_at == clock()
    assert later.renew_at == clock() + 20 * DAY_MS
    assert folder.identity("edge-1") == later


def test_another_site_other_rights_or_another_registry_need_another_passport(
    folder: MeshFolder,
) -> None:
    first = _site(folder)["edge-1"]
    moved = folder.vouch(first, site="yard")
    assert moved.passport is not None
    assert moved.passport.site == "yard"
    given = CapabilityPolicy(zones=("hall-3",))
    placed = folder.ensure("edge-1", Role.NODE, site="yard", attested=given)
    assert placed.passport is not None
    assert placed.passport.attested == given
    folder.remove("registry-1")
    registry = folder.ensure("registry-1", Role.REGISTRY, site="yard")
    anew = folder.ensure("edge-1", Role.NODE, site="yard")
    book = make_book(anew, site="yard")
    assert book is not None
    assert anew.passport is not None
    book.admit(anew.passport)
    assert anew.registries == {"registry-1": folder.signing_key(registry).public}


def test_an_old_folder_is_mended(folder: MeshFolder) -> None:
    """As a release made it that signed claims only: administrators had no key."""
    _site(folder)
    for name in ("admin-1", "router-1"):
        path = folder.identity_path(name)
        old = json.loads(path.read_text())
        for field in ("passport", "registries", "renew_at"):
            del old[field]
        if name == "admin-1":
            old["signing_key"] = None
            path.with_suffix(".key").unlink()
        path.write_text(json.dumps(old))
    mended = _site(folder)
    admin = load_signer(mended["admin-1"], folder.identity_path("admin-1").parent)
    assert admin is not None
    assert admin.passport is not None
    assert folder.credentials().identities()["admin-1"].public_key == admin.key.public
    assert mended["router-1"].passport is not None
    key = folder.identity_path("admin-1").with_suffix(".key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_without_a_registry_nobody_vouches(folder: MeshFolder) -> None:
    made = folder.ensure("edge-1", Role.NODE, site="hall")
    assert made.passport is None
    assert make_book(made, site="hall") is None


def test_what_is_carried_away_takes_its_passport_along(folder: MeshFolder) -> None:
    _site(folder)
    made = folder.create("edge-9", Role.NODE)
    assert made.passport is not None
    assert made.passport.site == "local"
    assert list(made.registries) == ["registry-1"]
    assert made.renew_at is not None
