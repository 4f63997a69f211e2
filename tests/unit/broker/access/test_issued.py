"""What was issued is known until it has run out, whoever writes and whatever was cut off."""

import pytest

from broker.access.authority import Authority, make_key_and_request, read_request
from broker.access.issued import IssuedLog
from broker.access.policy import Role
from capability_schemas.errors import ConfigurationError


def test_what_has_run_out_is_forgotten(tmp_path):
    log = IssuedLog(tmp_path / "issued")
    assert log.valid(0) == []
    log.note("aa", 1000, now=0)
    log.note("bb", 2000, now=0)
    assert log.valid(999) == ["aa", "bb"]
    assert log.valid(1000) == ["bb"]
    assert (tmp_path / "issued").stat().st_mode & 0o777 == 0o600


def test_the_file_does_not_grow_with_what_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr("broker.access.issued._TIDY_ABOVE_BYTES", 64)
    log = IssuedLog(tmp_path / "issued")
    for number in range(50):
        log.note(f"{number:x}", number * 10 + 10, now=number * 10)
    assert log.valid(490) == ["31"]
    assert (tmp_path / "issued").stat().st_size < 100


def test_a_line_that_was_cut_off_hides_no_other(tmp_path):
    (tmp_path / "issued").write_text("aa 1000\nbb\n\xff\n")
    log = IssuedLog(tmp_path / "issued")
    log.note("cc", 1000, now=0)
    assert log.valid(0) == ["aa", "cc"]


def test_a_certificate_that_cannot_be_written_down_is_not_issued(tmp_path):
    authority = Authority.create(tmp_path / "authority", site="local")
    (tmp_path / "authority" / "issued").mkdir()
    _, csr = make_key_and_request("edge-1")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        authority.issue_client(read_request(csr, "edge-1"), identity="edge-1", role=Role.NODE)


def test_the_authority_names_what_is_valid_and_nobodys(tmp_path):
    now = [1_700_000_000_000]
    authority = Authority.create(tmp_path / "authority", site="local", clock=lambda: now[0])
    serials = []
    for days in (1, 30, 30):
        _, csr = make_key_and_request("edge-1")
        key = read_request(csr, "edge-1")
        made = authority.issue_client(key, identity="edge-1", role=Role.NODE, days=days)
        serials.append(made.serial)
    assert authority.not_on_record([serials[2]]) == serials[:2]
    now[0] += 2 * 86_400_000
    again = Authority.create(tmp_path / "authority", site="local", clock=lambda: now[0])
    assert again.not_on_record([]) == serials[1:]
