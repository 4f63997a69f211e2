from pathlib import Path

import pytest
from pydantic import SecretStr

from capability_schemas.errors import ConfigurationError, NotFound
from foam.mesh import MeshFolder, MeshRecord, Person
from foam.sdk.address import find_mesh
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
