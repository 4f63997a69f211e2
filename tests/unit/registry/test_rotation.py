"""The rotation of the authority at the registry: who is asked to renew, whom it would lock out."""

import pytest

from broker.access.authority import SETTLE_MS, Authority, make_key_and_request, read_request
from broker.access.credentials import CredentialStore
from broker.access.policy import Role
from capability_schemas.errors import Conflict, NotFound
from registry.enrollment.book import Token
from registry.enrollment.rotation import Rotation

NOW = 1_790_000_000_000


class Site:
    def __init__(self, folder):
        self.now = NOW
        self.tokens: dict[str, Token] = {}
        self.credentials = CredentialStore(folder / "credentials.json", clock=lambda: self.now)
        self.authority = Authority.create(
            folder / "authority", site="hall-3", clock=lambda: self.now
        )
        self.rotation = Rotation(
            authority=self.authority,
            credentials=self.credentials,
            tokens=lambda: self.tokens,
            clock=lambda: self.now,
        )

    def certify(self, name):
        key = read_request(make_key_and_request(name)[1], name)
        return self.authority.issue_client(key, identity=name, role=Role.NODE).serial

    def join(self, name):
        self.credentials.add(name, Role.NODE, serial=self.certify(name))

    def renew(self, name):
        (before,) = self.credentials.identities()[name].serials
        self.credentials.update(name, serials=(self.certify(name), before))

    def token(self, name):
        self.tokens[name] = Token(
            role=Role.NODE,
            proof_key="",
            expires_at=NOW * 2,
            uses=1,
            created_at=self.now,
            created_by="admin-1",
        )


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_members_are_asked_to_renew_once_the_new_root_signs(site):
    site.join("edge-1")
    site.join("edge-2")
    site.credentials.add("pump-1", Role.DEVICE)  # has a password: no root concerns it
    assert site.rotation.due() == {}
    site.rotation.rotate()
    assert site.rotation.due() == {}
    site.now += SETTLE_MS
    due = site.rotation.due()
    assert due == dict.fromkeys(("edge-1", "edge-2"), NOW + SETTLE_MS)
    assert site.rotation.due() is due
    site.renew("edge-1")
    assert set(site.rotation.due()) == {"edge-2"}
    assert site.rotation.facts()["not_renewed"] == ["edge-2"]


def test_the_old_root_is_kept_until_everybody_has_renewed(site):
    site.join("edge-1")
    with pytest.raises(Conflict, match="only one root"):
        site.rotation.retire(force=True)
    site.rotation.rotate()
    with pytest.raises(Conflict, match="under way"):
        site.rotation.rotate()
    with pytest.raises(Conflict, match="just now"):
        site.rotation.retire(force=True)
    site.now += SETTLE_MS
    with pytest.raises(Conflict, match="1 have not renewed yet: edge-1; "):
        site.rotation.retire(force=False)
    site.renew("edge-1")
    retired = site.rotation.retire(force=False)
    assert (retired["locked_out"], retired["rotating"]) == ([], False)
    assert site.rotation.due() == {}


def test_force_says_whom_it_locks_out(site):
    for number in range(30):
        site.join(f"edge-{number}")
    site.rotation.rotate()
    site.now += SETTLE_MS
    with pytest.raises(Conflict, match="and 10 more"):
        site.rotation.retire(force=False)
    assert len(site.rotation.retire(force=True)["locked_out"]) == 30


def test_tokens_of_the_old_root_are_named(site):
    site.token("early")
    site.rotation.rotate()
    site.now += SETTLE_MS
    site.token("late")
    assert site.rotation.facts()["old_tokens"] == ["early"]


def test_a_site_without_tls_says_so(site):
    bare = Rotation(authority=None, credentials=site.credentials, tokens=dict)
    assert bare.due() == {}
    with pytest.raises(NotFound, match="listens without TLS"):
        bare.rotate()
