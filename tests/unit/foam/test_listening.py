"""Where a broker listens, and what it is told about certificates that count no more."""

import ssl
from dataclasses import replace

import pytest
from cryptography import x509

from broker.access.authority import Authority, make_key_and_request, read_request
from broker.access.policy import Role
from foam.listening import BrokerPapers, Listeners
from foam.mesh import MeshFolder

DAY_MS = 86_400_000


class TestPorts:
    @pytest.mark.parametrize(
        ("tls_port", "members_port", "wanted"),
        [(8883, None, 8884), (0, None, 0), (65535, None, 0), (8883, 9000, 9000), (8883, 0, 0)],
    )
    def test_members_have_the_port_after_the_one_for_passwords(
        self, tls_port, members_port, wanted
    ):
        listeners = Listeners.of("0.0.0.0", 1883, tls_port=tls_port, members_port=members_port)
        assert listeners.port_of_members() == wanted
        said = listeners.arguments()
        assert said[said.index("--members-port") + 1] == str(wanted)


class TestWebSocket:
    def test_it_listens_where_others_come_from(self):
        for given, wanted in (
            (Listeners.of("127.0.0.1", 1883), ("127.0.0.1", False)),
            (Listeners.of("127.0.0.1", 1883, tls=True), ("127.0.0.1", True)),
            (Listeners.of("0.0.0.0", 1883), ("0.0.0.0", True)),
            (Listeners.of("0.0.0.0", 1883, plain=True), ("0.0.0.0", False)),
        ):
            assert given.websocket() is None
            found = replace(given, websocket_port=8080, websocket_origins=("*",)).websocket()
            assert found is not None
            assert (found.host, found.secure) == wanted
            assert (found.port, found.origins) == (8080, ("*",))

    def test_the_broker_alone_is_told_the_same(self):
        listeners = replace(
            Listeners.of("127.0.0.1", 1883),
            websocket_port=0,
            websocket_origins=("https://a", "https://b"),
        )
        said = listeners.arguments()
        assert said[-6:] == (
            "--ws-port",
            "0",
            "--ws-origin",
            "https://a",
            "--ws-origin",
            "https://b",
        )

    def test_a_broker_that_starts_again_is_where_it_was(self):
        given = replace(Listeners.of("0.0.0.0", 0, tls_port=0), websocket_port=0)
        facts = {
            "url": "mqtt://127.0.0.1:1001",
            "public": ["mqtts://a:1002", "mqtts://b:1002"],
            "members": ["mqtts://a:1003"],
            "websocket": ["wss://a:1004/mqtt"],
        }
        again = given.where_it_was(facts)
        assert (again.port, again.tls_port, again.members_port, again.websocket_port) == (
            *(1001, 1002, 1003, 1004),
        )
        one_port = given.where_it_was({"url": "mqtts://a:1002", "public": ["mqtts://a:1002"]})
        assert (one_port.port, one_port.tls_port) == (0, 1002)


class TestRevocationList:
    @pytest.fixture
    def now(self):
        return [1_800_000_000_000]

    @pytest.fixture
    def folder(self, tmp_path):
        return MeshFolder(tmp_path).prepare()

    @pytest.fixture
    def papers(self, folder, now):
        return BrokerPapers(folder, site="local", names=["127.0.0.1"], clock=lambda: now[0])

    def issue(self, folder, now):
        authority = Authority.create(folder.authority, site="local", clock=lambda: now[0])
        _, csr = make_key_and_request("edge-1")
        return authority.issue_client(
            read_request(csr, "edge-1"), identity="edge-1", role=Role.NODE
        ).serial

    def read(self, papers):
        crl_file = papers.listener("127.0.0.1", 0).crl_file
        found = x509.load_pem_x509_crl(crl_file.read_bytes())
        return {f"{entry.serial_number:x}" for entry in found}, found

    def test_it_holds_what_was_issued_and_is_not_on_record(self, folder, papers, now):
        serials = [self.issue(folder, now) for _ in range(3)]
        assert papers.list_revoked({serials[0]})
        assert self.read(papers)[0] == set(serials[1:])

    def test_it_is_written_when_it_changes_or_is_a_day_old(self, folder, papers, now):
        serial = self.issue(folder, now)
        assert papers.list_revoked({serial})
        assert not papers.list_revoked({serial})
        assert papers.list_revoked(set())
        assert not papers.list_revoked(set())
        now[0] += DAY_MS + 5000  # the times of lists may be ahead by seconds
        assert papers.list_revoked(set())
        listed, found = self.read(papers)
        assert listed == {serial}
        left = found.next_update_utc.timestamp() * 1000 - now[0]
        assert left > 5 * DAY_MS  # brokers refuse everybody once it has run out

    def test_each_list_is_later_than_the_one_before(self, folder, papers, now):
        """A broker that holds both goes by the later one; the clock may stand still meanwhile."""
        serial, at = self.issue(folder, now), []
        for on_record in ({serial}, set(), {serial}):
            papers.list_revoked(on_record)
            at.append(self.read(papers)[1].last_update_utc)
        assert at == sorted(set(at))

    def test_a_context_takes_it(self, folder, papers, now):
        papers.refresh()
        papers.list_revoked(set())
        listener = papers.listener("127.0.0.1", 0)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        context.load_verify_locations(listener.ca_file)
        context.load_verify_locations(listener.crl_file)
        assert context.cert_store_stats()["crl"] == 1


def test_a_further_server_listens_on_the_ports_that_follow() -> None:
    asked = Listeners(host="127.0.0.1", port=1883, tls_port=8883, websocket_port=0)
    moved = asked.shifted(2)
    assert (moved.port, moved.tls_port, moved.websocket_port) == (1885, 8885, 0)
    assert asked.shifted(0) == asked
