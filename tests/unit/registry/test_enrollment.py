"""The enrollment desk: who gets papers, who does not, and what is remembered."""

import fcntl
import stat

import pytest

from broker.access.authority import Authority, make_key_and_request
from broker.access.credentials import CredentialStore
from broker.access.policy import Role
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.enrollment import EnrollRequest, JoinToken, SealKey, check_proof, prove
from capability_schemas.errors import AccessDenied, ConfigurationError, NotFound, Unavailable
from capability_schemas.ids import new_uuid7
from capability_schemas.passport import CLOCK_SKEW_MS, PassportBook
from capability_schemas.signing import SigningKey, sign, verify
from capability_schemas.wire import encode
from registry.enrollment import EnrollmentDesk

NOW = 1_790_000_000_000
REGISTRY = SigningKey.generate()
ZONE = CapabilityPolicy(zones=("hall-3",), grants=("plc",))


class Site:
    """A desk with everything around it, and newcomers that ask it."""

    def __init__(self, folder):
        self.now = NOW
        self.folder = folder
        self.credentials = CredentialStore(folder / "credentials.json", clock=self.clock)
        self.authority = Authority.create(folder / "authority", site="site-1", clock=self.clock)
        self.desk = self.open()

    def clock(self):
        return self.now

    def open(self, *, tls=True):
        return EnrollmentDesk(
            path=self.folder / "enrollment.json",
            site="site-1",
            registry_id="registry-1",
            key=REGISTRY,
            credentials=self.credentials,
            authority=self.authority if tls else None,
            brokers=lambda: ["mqtts://broker.test:8883"],
            clock=self.clock,
        )

    def token(self, **changes):
        given = {"role": Role.NODE, "ttl_ms": 600_000, "by": "admin-1"}
        return self.desk.create_token(**given | changes)

    def members(self):
        self.credentials.refresh()
        return self.credentials.identities()


class Newcomer:
    """Keys and requests of one machine."""

    def __init__(self, site, name="edge-1", role="node"):
        self.site = site
        self.name, self.role = name, role
        self.key = SigningKey.generate()
        self.seal = SealKey()
        self.private, self.csr = make_key_and_request(name)

    def request(self, token=None, *, signer=None, **changes):

        fields = {
            "nonce": new_uuid7(),
            "id": self.name,
            "role": self.role,
            "site": "site-1",
            "at": self.site.now,
            "public_key": self.key.public,
            "csr": self.csr,
            "seal_key": self.seal.public,
        }
        made = EnrollRequest(**fields | changes)
        if token is not None:
            made = prove(made, token.proof_key)
        return encode(sign(made, signer or self.key))

    def join(self, token, **changes):
        return self.site.desk.consider(token.id, self.request(token, **changes))


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def refused(answer, complaint):
    assert answer.happened == "refused"
    assert answer.reply.status == "refused"
    assert complaint in answer.reply.reason
    return True


def test_a_newcomer_gets_papers_and_exactly_what_the_token_says(site):
    token = site.token(attested=ZONE)
    edge = Newcomer(site)
    answer = edge.join(token)
    reply = answer.reply
    assert (answer.happened, reply.status) == ("granted", "granted")
    check_proof(encode(reply), token.proof_key)
    verify(encode(reply), reply.registries["registry-1"])
    member = site.members()["edge-1"]
    assert (member.role, member.public_key, member.attested) == (Role.NODE, edge.key.public, ZONE)
    assert len(member.serials) == 1
    assert not member.argon2
    assert reply.certificate.startswith("-----BEGIN CERTIFICATE")
    assert reply.brokers == ("mqtts://broker.test:8883",)
    assert NOW < reply.renew_at < reply.passport.expires_at
    book = PassportBook(site="site-1", registries=reply.registries, clock=site.clock)
    book.admit(reply.passport)
    assert book.key("edge-1", "node") == edge.key.public
    assert reply.passport.attested == ZONE


def test_a_device_without_certificates_gets_a_password_only_it_can_read(site):
    token = site.token(role=Role.DEVICE)
    pump = Newcomer(site, "pump-7", "device")
    answer = site.desk.consider(
        token.id,
        encode(
            prove(
                EnrollRequest(
                    nonce="n1",
                    id="pump-7",
                    role="device",
                    site="site-1",
                    at=NOW,
                    seal_key=pump.seal.public,
                ),
                token.proof_key,
            )
        ),
    )
    password = pump.seal.open(answer.reply.sealed, nonce="n1")["password"]
    assert password not in encode(answer.reply).decode()
    assert site.credentials.verify("pump-7", password) is not None
    assert answer.reply.passport is None
    assert answer.reply.certificate is None


def test_the_token_logs_on_until_it_ends(site):
    token = site.token()
    password = token.password.get_secret_value()
    assert site.credentials.verify(token.id, password).role is Role.ENROLLEE
    site.now += 600_000
    assert site.credentials.verify(token.id, password) is None


def test_a_token_serves_as_often_as_it_says(site):
    token = site.token(uses=2)
    assert Newcomer(site, "edge-1").join(token).happened == "granted"
    assert Newcomer(site, "edge-2").join(token).happened == "granted"
    assert refused(Newcomer(site, "edge-3").join(token), "used up")
    assert not site.desk.tokens()


def test_a_refused_request_uses_nothing_up(site):
    token = site.token()
    assert refused(Newcomer(site, role="router").join(token), "for a node, not a router")
    assert Newcomer(site).join(token).happened == "granted"


def test_the_very_same_request_gets_the_very_same_answer(site):
    token = site.token()
    payload = Newcomer(site).request(token)
    first = site.desk.consider(token.id, payload)
    again = site.desk.consider(token.id, payload)
    assert again.reply == first.reply
    assert len(site.members()["edge-1"].serials) == 1


def test_a_nonce_serves_one_request(site):
    token = site.token(uses=2)
    edge = Newcomer(site)
    assert edge.join(token, nonce="n1").happened == "granted"
    other = Newcomer(site, "edge-2").join(token, nonce="n1")
    assert (other.happened, other.reply) == ("ignored", None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"site": "site-2"}, "this is site site-1"),
        ({"at": NOW - CLOCK_SKEW_MS - 1}, "clocks are 300 s apart"),
        ({"at": NOW + CLOCK_SKEW_MS + 1000}, "clocks are 301 s apart"),
        ({"role": "admin"}, "not a admin"),
        ({"csr": "nonsense"}, "cannot be read"),
        ({"csr": make_key_and_request("edge-2")[1]}, "edge-1"),
        ({"csr": None, "seal_key": None}, "seal_key is needed"),
        ({"csr": None, "seal_key": "x" * 44}, "no X25519 key"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(site, changes, complaint):
    token = site.token()
    assert refused(Newcomer(site).join(token, **changes), complaint)
    assert "edge-1" not in site.members()


def test_a_node_needs_a_signing_key(site):
    token = site.token()
    edge = Newcomer(site)
    payload = encode(
        prove(
            EnrollRequest(
                nonce="n1", id="edge-1", role="node", site="site-1", at=NOW, csr=edge.csr
            ),
            token.proof_key,
        )
    )
    assert refused(site.desk.consider(token.id, payload), "signing key")


def test_whoever_proves_nothing_learns_nothing(site):
    token = site.token()
    edge, stranger = Newcomer(site), JoinToken.make()
    known = site.desk.consider(token.id, edge.request(stranger))
    unknown = site.desk.consider(stranger.id, edge.request(stranger))
    rubbish = site.desk.consider(token.id, b"\x00{")
    for answer in (known, unknown, rubbish):
        assert (answer.happened, answer.reply) == ("ignored", None)


def test_a_key_that_is_not_its_own_is_refused(site):
    token = site.token()
    edge = Newcomer(site)
    answer = site.desk.consider(token.id, edge.request(token, signer=SigningKey.generate()))
    assert refused(answer, "signature does not fit")


def test_no_member_can_be_taken_over_by_name(site):
    token = site.token(uses=5)
    assert Newcomer(site).join(token).happened == "granted"
    before = site.members()["edge-1"]
    assert refused(Newcomer(site).join(token), "exists already")
    assert refused(Newcomer(site, token.id).join(token), "exists already")
    named = site.token(names=["edge-2"])
    assert refused(Newcomer(site, "edge-3").join(named), "not for edge-3")
    assert site.members()["edge-1"] == before


def test_a_token_that_says_so_enrolls_a_member_again(site):
    first = Newcomer(site)
    old = first.join(site.token()).reply
    site.now += 1000
    again = Newcomer(site)
    token = site.token(names=["edge-1"], replace=True)
    assert again.join(token).happened == "granted"
    assert site.members()["edge-1"].public_key == again.key.public
    assert site.desk.revoked["edge-1"] == site.now
    book = PassportBook(site="site-1", registries=old.registries, clock=site.clock)
    book.revoke("edge-1", before=site.desk.revoked["edge-1"])
    with pytest.raises(Exception, match="revoked"):
        book.admit(old.passport)


def test_replacing_is_for_named_members_of_the_same_role(site):
    with pytest.raises(ConfigurationError, match="name them"):
        site.token(replace=True)
    Newcomer(site, "router-2", "router").join(site.token(role=Role.ROUTER))
    token = site.token(names=["router-2"], replace=True)
    assert refused(Newcomer(site, "router-2").join(token), "exists already")


def test_an_operator_decides(site):
    token = site.token(approve=True, uses=3)
    edge, other = Newcomer(site), Newcomer(site, "edge-2")
    asked = edge.join(token)
    assert (asked.happened, asked.reply.status) == ("pending", "pending")
    assert other.join(token).happened == "pending"
    assert refused(Newcomer(site).join(token), "waits already")
    assert set(site.desk.waiting) == {"edge-1", "edge-2"}
    assert "edge-1" not in site.members()
    site.desk = site.open()  # the decision may come after a restart
    granted = site.desk.decide("edge-1", granted=True)
    assert (granted.level, granted.reply.status) == (token.id, "granted")
    check_proof(encode(granted.reply), token.proof_key)
    assert granted.reply.nonce == asked.reply.nonce
    assert refused(site.desk.decide("edge-2", granted=False, reason="not ours"), "not ours")
    assert not site.desk.waiting
    assert set(site.members()) == {token.id, "edge-1"}
    with pytest.raises(NotFound):
        site.desk.decide("edge-2", granted=True)


def test_a_member_renews_with_its_own_key(site):
    edge = Newcomer(site)
    first = edge.join(site.token(attested=ZONE)).reply
    serial = site.members()["edge-1"].serials[0]
    site.now += 20 * 86_400_000
    renewed = site.desk.consider("edge-1", edge.request())
    assert renewed.happened == "renewed"
    assert renewed.reply.passport.attested == ZONE
    assert renewed.reply.passport.issued_at > first.passport.issued_at
    serials = site.members()["edge-1"].serials
    assert len(serials) == 2
    assert serials[1] == serial  # the old one is good until the new one has arrived


def test_a_replayed_renewal_changes_nothing(site):
    edge = Newcomer(site)
    edge.join(site.token())
    payload = edge.request()
    assert site.desk.consider("edge-1", payload).happened == "renewed"
    serials = site.members()["edge-1"].serials
    site.desk = site.open()  # even when the registry has forgotten that it answered
    assert site.desk.consider("edge-1", payload).happened == "repeated"
    site.now += 3_700_000  # and when even its book has
    assert site.desk.consider("edge-1", edge.request()).happened == "renewed"
    serials = site.members()["edge-1"].serials
    site.desk = site.open()
    assert refused(site.desk.consider("edge-1", payload), "clocks")
    assert site.members()["edge-1"].serials == serials


def test_nobody_renews_for_another(site):
    edge, thief = Newcomer(site), Newcomer(site, "thief")
    token = site.token(uses=2)
    edge.join(token)
    thief.join(token)
    for level, payload in (
        ("edge-1", thief.request(id="edge-1", csr=edge.csr)),
        ("edge-1", thief.request()),
        ("thief", thief.request(id="edge-1", csr=edge.csr)),
        ("thief", thief.request(role="admin")),
        ("nobody", thief.request()),
    ):
        answer = site.desk.consider(level, payload)
        assert (answer.happened, answer.reply) == ("ignored", None)


def test_a_revoked_member_is_out_and_stays_out(site):
    edge = Newcomer(site)
    edge.join(site.token())
    site.desk.revoke("edge-1")
    assert "edge-1" not in site.members()
    assert site.open().revoked == {"edge-1": NOW}
    assert site.desk.consider("edge-1", edge.request()).happened == "ignored"
    with pytest.raises(NotFound):
        site.desk.revoke("edge-1")


def test_a_revocation_that_half_failed_is_completed_by_the_next(site, monkeypatch):
    Newcomer(site).join(site.token())

    def full(**_):
        raise ConfigurationError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(site.desk._book, "write", full)
        with pytest.raises(ConfigurationError):
            site.desk.revoke("edge-1")
    assert "edge-1" in site.members()  # who is not void yet can still be thrown out
    with monkeypatch.context() as patch:
        patch.setattr(site.credentials, "remove", lambda _: full())
        with pytest.raises(ConfigurationError):
            site.desk.revoke("edge-1")
    assert site.open().revoked == {"edge-1": NOW}
    site.desk.revoke("edge-1")
    assert "edge-1" not in site.members()


def test_who_vanishes_from_the_credentials_is_void(site):
    other = CredentialStore(site.credentials.path)  # of a command on this machine
    for name in ("edge-1", "edge-2", "edge-3"):
        other.add(name, Role.NODE)
    assert not site.desk.follow_members()
    other.remove("edge-1")
    site.now += 1
    assert site.desk.follow_members() == ["edge-1"]
    other.remove("edge-2")
    site.now += 1
    desk = site.open()  # it was removed while the registry was away
    assert desk.follow_members() == ["edge-2"]
    assert not desk.follow_members()
    assert site.open().revoked == {"edge-1": NOW + 1, "edge-2": NOW + 2}


def test_one_that_is_made_anew_is_not_void(site):
    other = CredentialStore(site.credentials.path)
    other.add("edge-1", Role.NODE)
    other.add("edge-2", Role.NODE)
    site.desk.follow_members()
    other.remove("edge-1")
    other.add("edge-1", Role.NODE)
    token = site.token(ttl_ms=1_000)
    site.desk.follow_members()
    site.desk.revoke_token(token.id)
    assert not site.desk.follow_members()
    assert not site.desk.revoked


def test_a_file_that_is_away_voids_nobody(site):
    site.credentials.add("edge-1", Role.NODE)
    site.desk.follow_members()
    text = site.credentials.path.read_text()
    site.credentials.path.unlink()
    assert not site.desk.follow_members()
    site.credentials.path.write_text(text)
    assert not site.desk.follow_members()
    assert not site.desk.revoked


def test_what_was_thrown_out_stays_void_after_a_new_enrollment(site):
    edge = Newcomer(site)
    stolen = edge.join(site.token()).reply.passport
    site.now += 1_000
    site.desk.revoke("edge-1")
    site.now += 1_000
    again = Newcomer(site)
    fresh = again.join(site.token()).reply.passport
    book = PassportBook(site="site-1", registries={"registry-1": REGISTRY.public}, clock=site.clock)
    book.revoke("edge-1", before=site.open().revoked["edge-1"])
    with pytest.raises(AccessDenied, match="revoked"):
        book.admit(stolen)
    book.admit(fresh)


def test_a_revoked_token_logs_on_no_more(site):
    token = site.token(approve=True)
    Newcomer(site).join(token)
    site.desk.revoke_token(token.id)
    assert token.id not in site.members()
    assert not site.desk.waiting
    assert Newcomer(site).join(token).happened == "ignored"
    with pytest.raises(NotFound):
        site.desk.revoke_token(token.id)


def test_old_tokens_are_cleared_away(site):
    old = site.token(ttl_ms=1000)
    site.now += 1000
    new = site.token()
    assert set(site.desk.tokens()) == {new.id}
    assert old.id not in site.members()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ttl_ms": 0}, "30 days"),
        ({"ttl_ms": 31 * 86_400_000}, "30 days"),
        ({"uses": 0}, "uses"),
        ({"uses": 10_001}, "uses"),
        ({"role": Role.REGISTRY}, "registry"),
        ({"role": Role.ENROLLEE}, "enrollee"),
    ],
)
def test_tokens_out_of_range_are_refused(site, changes, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        site.token(**changes)
    assert not site.members()


def test_no_secret_is_kept(site):
    token = site.token()
    file = site.folder / "enrollment.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    kept = file.read_text() + (site.folder / "credentials.json").read_text()
    assert token.secret.get_secret_value() not in kept
    assert token.password.get_secret_value() not in kept


def test_a_site_without_tls_gives_passwords(site):
    site.desk = site.open(tls=False)
    token = site.token()
    assert token.authority == b""
    edge = Newcomer(site)
    assert refused(edge.join(token), "signs no certificates")
    answer = edge.join(token, csr=None)
    password = edge.seal.open(answer.reply.sealed, nonce=answer.reply.nonce)["password"]
    assert site.credentials.verify("edge-1", password) is not None
    assert answer.reply.passport is not None


def test_a_damaged_file_is_named(site):
    (site.folder / "enrollment.json").write_text('{"v":1,"tokens":{"a b":{}}}')
    with pytest.raises(ConfigurationError, match="damaged"):
        site.open()


class KilledError(Exception):
    """The process ends here."""


def test_what_a_killed_registry_had_granted_is_repeated_by_the_next(site):
    edge = Newcomer(site)
    token = site.token()
    payload = edge.request(token)
    answer = site.desk.consider(token.id, payload)
    assert answer.happened == "granted"
    other = site.open()  # the answer was lost, and the newcomer asks again
    again = other.consider(token.id, payload)
    assert again.happened == "repeated"
    assert again.reply == answer.reply
    assert len(site.members()["edge-1"].serials) == 1


@pytest.mark.parametrize("step", ["remove", "add", "end"])
def test_a_grant_that_was_begun_is_undone_and_made_once(site, monkeypatch, step):
    edge = Newcomer(site)
    token = site.token(replace=step == "remove", names=("edge-1",))
    if step == "remove":
        edge.join(site.token())
        site.now += 1_000
    payload = edge.request(token)

    def die(*_args, **_more):
        raise KilledError

    with monkeypatch.context() as patch:
        if step == "end":
            patch.setattr("registry.enrollment.grants.GrantLog.end", die)
        else:
            patch.setattr("registry.enrollment.papers.PaperOffice.granted", die)
        with pytest.raises(KilledError):
            site.desk.consider(token.id, payload)
    assert site.desk.tokens()[token.id].uses == 1
    half_made = site.members()["edge-1"].serials
    other = site.open()
    answer = other.consider(token.id, payload)
    assert answer.happened == "granted"
    made = site.members()["edge-1"].serials
    assert len(made) == 1
    assert made != half_made  # what nobody was told of opens nothing
    assert other.tokens() == {}
    assert refused(other.consider(token.id, Newcomer(site, "edge-2").request(token)), "used up")


def test_two_registries_of_one_folder_use_a_token_once(site):
    token = site.token()
    other = site.open()  # it has read the files before anybody joined
    assert site.desk.consider(token.id, Newcomer(site).request(token)).happened == "granted"
    late = other.consider(token.id, Newcomer(site, "edge-2").request(token))
    assert refused(late, "used up")
    assert set(site.members()) == {token.id, "edge-1"}


def test_a_registry_that_was_stopped_at_work_keeps_the_others_waiting(site, monkeypatch):
    monkeypatch.setattr("registry.enrollment.book._LOCK_S", 0.05)
    token = site.token()
    other = site.open()
    path = site.folder / "enrollment.lock"
    with path.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="another registry works on"):
            other.consider(token.id, Newcomer(site).request(token))
    assert other.consider(token.id, Newcomer(site).request(token)).happened == "granted"
