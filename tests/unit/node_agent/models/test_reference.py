"""What users write to name a model."""

from pathlib import Path

import pytest

from capability_schemas.errors import ConfigurationError
from node_agent.models.download import Remote
from node_agent.models.reference import (
    FileReference,
    HubReference,
    WebReference,
    check_address,
    check_digest,
    check_name,
    name_for,
    parse_reference,
)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("https://host/a/b.gguf?key=1#x", WebReference("https://host/a/b.gguf?key=1")),
        (
            "https://me:s%40p@host:8443/b.gguf",
            WebReference("https://host:8443/b.gguf", ("me", "s@p")),
        ),
        ("owner/repo/sub/f.gguf", HubReference(repo="owner/repo", file="sub/f.gguf")),
        ("owner/repo/f.gguf@v1", HubReference(repo="owner/repo", file="f.gguf", revision="v1")),
        ("hf:owner/repo:Q4_K_M", HubReference(repo="owner/repo", quantisation="Q4_K_M")),
        (
            "hf:owner/repo:Q8_0@main",
            HubReference(repo="owner/repo", quantisation="Q8_0"),
        ),
        ("hf:owner/repo", HubReference(repo="owner/repo")),
        ("./x.gguf", FileReference(Path("x.gguf"))),
        ("file:///tmp/a%20b.gguf", FileReference(Path("/tmp/a b.gguf"))),
    ],
)
def test_forms(text: str, meant: object) -> None:
    assert parse_reference(text) == meant


@pytest.mark.parametrize(
    "text",
    [
        "",
        "qwen",
        "x.gguf",
        "ftp://host/x",
        "https://host",
        "https://host/",
        "hf:a",
        "a/../b/c.gguf",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_reference(text)


def test_secrets_are_not_shown() -> None:
    shown = parse_reference("https://me:secret@host/x.gguf?token=secret").shown
    assert shown == "https://host/x.gguf"
    with pytest.raises(ConfigurationError) as caught:
        parse_reference("ftp://me:secret@host/x")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "[::1]"])
def test_http_is_for_this_machine(host: str) -> None:
    check_address(f"http://{host}:8000/x", insecure=False)


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1", "localhost.evil.example"])
def test_http_elsewhere_needs_leave(host: str) -> None:
    with pytest.raises(ConfigurationError, match="not encrypted"):
        check_address(f"http://{host}/x", insecure=False)
    check_address(f"http://{host}/x", insecure=True)


@pytest.mark.parametrize("url", ["https://host:99999/x", "https:///x", "gopher://host/x"])
def test_no_addresses(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no (https )?address"):
        check_address(url, insecure=True)


def test_names() -> None:
    assert name_for("sub/Qwen2.5 0.5B-Q4_K_M.gguf") == "qwen2.5-0.5b-q4_k_m"
    assert name_for("...") == "model"
    assert check_name("a.b-c_1") == "a.b-c_1"
    for bad in ("", "-a", "A", "a/b", "../a", "a" * 97):
        with pytest.raises(ConfigurationError):
            check_name(bad)


def test_digests() -> None:
    assert check_digest("SHA256:" + "Ab" * 32) == "ab" * 32
    for bad in ("", "ab", "g" * 64, "ab" * 33):
        with pytest.raises(ConfigurationError):
            check_digest(bad)


def test_secrets_are_in_no_repr() -> None:
    reference = parse_reference("https://me:hidden@host.example/a.gguf?key=alsohidden")
    assert "hidden" not in repr(reference)
    remote = Remote(url="https://h/?key=hidden", shown="https://h/", authorization="Bearer hidden")
    assert "hidden" not in repr(remote)
