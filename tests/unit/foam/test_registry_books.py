"""What the registry knows of its members while somebody edits the file of credentials."""

from typing import Any

from structlog.testing import capture_logs

from broker.access.policy import Role
from capability_schemas.signing import SigningKey
from foam.mesh import MeshFolder
from foam.wiring.registry import _Books

KEY = SigningKey.generate()


def test_a_damaged_file_leaves_what_was_known_and_is_told_once(tmp_path):
    folder = MeshFolder(tmp_path).prepare()
    store = folder.credentials()
    store.add("edge-1", Role.NODE, public_key=KEY.public)
    member: Any = None  # nobody asks for it here
    books = _Books(folder, member=member, key=KEY)
    assert books.nodes() == ["edge-1"]
    text = store.path.read_text()
    store.path.write_text(text[:-20])
    with capture_logs() as said:
        before = books.members()
        assert books.nodes() == ["edge-1"]
        enrolled = books.enrolled("edge-1")
        assert enrolled is not None
        assert enrolled.public_key == KEY.public
        assert books.members() is before  # or else everything would be said anew
    assert [line["event"] for line in said] == ["members.unread"]
    store.path.write_text(text)
    store.add("edge-2", Role.NODE)
    assert books.nodes() == ["edge-1", "edge-2"]
    store.path.write_text("{")
    with capture_logs() as said:
        books.members()
    assert len(said) == 1
