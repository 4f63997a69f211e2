from pathlib import Path

import pytest
from pydantic import SecretStr

from broker.access.policy import Role
from capability_schemas.errors import AccessDenied, ConfigurationError, NotFound
from capability_schemas.topics import TopicKind
from foam.cli.look import ask_admin
from foam.mesh import MeshFolder, MeshRecord, Person
from foam.sdk.address import find_mesh
from foam.sdk.client import MeshClient
from foam.settings import Settings, load_settings


@pytest.fixture
def data(tmp_path: Path) -> Path:
    MeshFolder(tmp_path).prepare().write_record(
        MeshRecord(
            broker="mqtt://127.0.0.1:1884",
            site="hall",
            device=Person(id="device-1", username="device-1", password=SecretStr("d")),
            admin=Person(id="admin-1", username="admin-1", password=SecretStr("a")),
        )
    )
    return tmp_path


def _settings(data: Path, **given: object) -> Settings:
    return load_settings({}, data=data, **given)


def test_the_mesh_of_the_folder(data: Path) -> None:
    found = find_mesh(_settings(data))
    assert (found.url, found.site, found.client) == ("mqtt://127.0.0.1:1884", "hall", "device-1")
    assert find_mesh(_settings(data), admin=True).client == "admin-1"


def test_credentials_of_the_folder_stay_with_their_mesh(data: Path) -> None:
    same = find_mesh(_settings(data, url="mqtt://127.0.0.1:1884"))
    other = find_mesh(_settings(data, url="mqtt://203.0.113.1"))
    assert same.username == "device-1"
    assert (other.username, other.password, other.site) == (None, None, "local")


def test_explicit_names_win(data: Path) -> None:
    url = "mqtt://bob:of-url@127.0.0.1:1884"
    in_url = find_mesh(_settings(data, url=url))
    assert (in_url.client, in_url.username, in_url.url) == ("bob", "bob", "mqtt://127.0.0.1:1884")
    option = find_mesh(_settings(data, url=url, username="ann", password="p"))
    assert option.username == "ann"
    assert option.password is not None
    assert option.password.get_secret_value() == "p"


def test_nothing_to_go_by(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="foam up"):
        find_mesh(_settings(tmp_path))
    with pytest.raises(ConfigurationError, match="topic level"):
        find_mesh(_settings(tmp_path, url="mqtt://a%2Fb:c@127.0.0.1"))


# ---- who signs


def _with_members(data: Path) -> MeshFolder:
    folder = MeshFolder(data)
    for name, role in (
        ("registry-1", Role.REGISTRY),
        ("device-1", Role.DEVICE),
        ("admin-1", Role.ADMIN),
    ):
        folder.ensure(name, role, site="hall")
    return folder


def test_people_of_the_folder_sign_and_check(data: Path) -> None:
    _with_members(data)
    admin = find_mesh(_settings(data), admin=True)
    assert admin.signer is not None
    assert admin.signer.identity == "admin-1"
    device = find_mesh(_settings(data))
    assert device.signer is None
    assert list(device.registries) == ["registry-1"]
    assert find_mesh(_settings(data, url="mqtt://203.0.113.1"), admin=True).signer is None
    named = find_mesh(_settings(data, username="admin-1", password="a"))
    assert named.signer is not None
    assert find_mesh(_settings(data, username="ann", password="a"), admin=True).signer is None


def test_at_a_broker_of_others_the_folder_signs_for_its_person(data: Path) -> None:
    folder = _with_members(data)
    guest = Person(id="guest", username="guest", password=SecretStr("g"))
    folder.write_record(
        folder.record().model_copy(update={"admin": guest, "device": guest, "own_broker": False})
    )
    found = find_mesh(_settings(data), admin=True)
    assert found.client == "guest"
    assert found.signer is not None
    assert found.signer.identity == "admin-1"


def test_a_damaged_key_leaves_the_request_unsigned(data: Path) -> None:
    folder = _with_members(data)
    folder.identity_path("admin-1").with_suffix(".key").write_text("no key")
    assert find_mesh(_settings(data), admin=True).signer is None


def test_an_identity_file_brings_everything(data: Path, tmp_path: Path) -> None:
    folder = _with_members(data)
    folder.create("admin-9", Role.ADMIN)
    path = folder.identity_path("admin-9")
    found = find_mesh(_settings(tmp_path / "elsewhere", identity_file=path), admin=True)
    assert (found.url, found.site, found.client, found.username) == (
        "mqtt://127.0.0.1:1884",
        "hall",
        "admin-9",
        "admin-9",
    )
    assert found.signer is not None
    assert found.signer.passport is not None
    with pytest.raises(ConfigurationError, match="there is no such file"):
        find_mesh(_settings(data, identity_file=tmp_path / "none.json"))
    made = folder.identity("admin-9").model_copy(update={"broker": None})
    path.write_text(made.model_dump_json())
    with pytest.raises(ConfigurationError, match="names no broker"):
        find_mesh(_settings(tmp_path / "elsewhere", identity_file=path))


def test_brokers_of_a_cluster_are_the_mesh_whichever_of_them_are_named(data: Path) -> None:
    folder = MeshFolder(data)
    one, two = "mqtt://127.0.0.1:18831", "mqtt://127.0.0.1:18832"
    own = folder.record().device
    folder.write_record(folder.record().model_copy(update={"broker": f"{one},{two}"}))
    assert tuple(map(str, find_mesh(Settings(data=data)).urls)) == (one, two)
    for named in (one, two, f"{two},{one}"):
        found = find_mesh(Settings(data=data, url=named))
        assert (found.url, found.username) == (named, own.username)
    elsewhere = find_mesh(Settings(data=data, url=f"{one},mqtt://203.0.113.5:1883"))
    assert elsewhere.username is None


# ---- what an identity may do is known before anybody is asked


async def test_a_device_is_told_at_once_that_it_administrates_nothing(
    data: Path, tmp_path: Path
) -> None:
    folder = _with_members(data)
    folder.create("valve-3", Role.DEVICE)
    paper = folder.identity_path("valve-3")
    address = find_mesh(_settings(tmp_path / "x", identity_file=paper), admin=True)
    with pytest.raises(AccessDenied, match=r"valve-3 is of the role device: .* administrates"):
        await MeshClient.at(address).admin("nodes")
    address.require(TopicKind.TASK)
    with pytest.raises(AccessDenied, match="needs an administrator or operator"):
        await ask_admin(_settings(tmp_path / "x", identity_file=paper), "nodes")


async def test_an_observer_is_told_at_once_that_it_orders_nothing(
    data: Path, tmp_path: Path
) -> None:
    folder = _with_members(data)
    folder.create("otto", Role.OBSERVER)
    paper = folder.identity_path("otto")
    address = find_mesh(_settings(tmp_path / "x", identity_file=paper))
    with pytest.raises(AccessDenied, match="it reads topics and orders nothing"):
        async with MeshClient.at(address):
            pass
    with pytest.raises(AccessDenied, match="it reads topics and orders nothing"):
        address.require(TopicKind.ADMIN)


def test_who_may_is_not_refused_here(data: Path) -> None:
    folder = _with_members(data)
    for name, role in (("olga", Role.OPERATOR), ("anna", Role.ADMIN)):
        folder.create(name, role)
        address = find_mesh(_settings(data, identity_file=folder.identity_path(name)))
        address.require(TopicKind.ADMIN)
        address.require(TopicKind.TASK)
    find_mesh(_settings(data), admin=True).require(TopicKind.ADMIN)
    elsewhere = find_mesh(_settings(data, url="mqtt://203.0.113.1", username="bob"))
    elsewhere.require(TopicKind.ADMIN)  # only that broker knows


def test_at_a_broker_of_others_the_role_of_its_person_is_not_ours_to_know(data: Path) -> None:
    folder = _with_members(data)
    guest = Person(id="guest", username="guest", password=SecretStr("g"))
    folder.write_record(
        folder.record().model_copy(update={"admin": guest, "device": guest, "own_broker": False})
    )
    assert find_mesh(_settings(data)).role is None


def test_each_broker_of_a_list_is_logged_on_to_with_its_own_credentials(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, url="mqtt://pump:hush1@a,mqtts://pump:hush2@b")
    found = find_mesh(settings)
    assert (found.url, found.client) == ("mqtt://a:1883,mqtts://b:8883", "pump")
    passwords = [url.password.get_secret_value() for url in found.urls if url.password]
    assert passwords == ["hush1", "hush2"]
    assert "hush" not in repr(found)
    given = settings.model_copy(update={"username": "mill", "password": SecretStr("three")})
    assert [url.username for url in find_mesh(given).urls] == [None, None]
