"""Settings of a session."""

import pytest
from pydantic import SecretStr, ValidationError

from broker.session.settings import BrokerUrl, SessionSettings
from broker.tls import TlsSettings
from capability_schemas.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "host", "port", "tls", "username", "password"),
    [
        ("mqtt://broker", "broker", 1883, False, None, None),
        ("mqtts://broker", "broker", 8883, True, None, None),
        ("mqtt://u:p%40ss@10.0.0.1:99", "10.0.0.1", 99, False, "u", "p@ss"),
        ("mqtt://[::1]:1884/", "::1", 1884, False, None, None),
        ("ws://u:p@broker", "broker", 80, False, "u", "p"),
        ("wss://broker:8443/mqtt", "broker", 8443, True, None, None),
    ],
)
def test_urls_are_taken_apart(text, host, port, tls, username, password):
    url = BrokerUrl.parse(text)
    found = url.password.get_secret_value() if url.password else None
    assert (url.host, url.port, url.tls, url.username, found) == (
        host, port, tls, username, password,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        *("", "broker:1883", "http://x", "mqtt://", "mqtt://h:port", "mqtt://h:1/x", "mqtt://h?a"),
        *("ws://", "ws://h/mqtt?token=x", "wss://h/mqtt#x", "ws://h/a b", "ws://h/\u00fc"),
    ],
)
def test_other_urls_are_refused(text):
    with pytest.raises(ConfigurationError):
        BrokerUrl.parse(text)
    with pytest.raises(ValidationError):
        SessionSettings(urls=(text,), client_id="a")


@pytest.mark.parametrize(
    ("text", "path", "shown"),
    [
        ("ws://h:1", "/mqtt", "ws://h:1/mqtt"),
        ("ws://h:1/", "/mqtt", "ws://h:1/mqtt"),
        ("wss://[::1]:1/a/b", "/a/b", "wss://[::1]:1/a/b"),
        ("mqtts://h:1", None, "mqtts://h:1"),
    ],
)
def test_websocket_urls_have_a_path(text, path, shown):
    url = BrokerUrl.parse(text)
    assert url.path == path
    assert str(url) == shown
    assert BrokerUrl.parse(str(url)) == url


def test_secrets_do_not_show():
    url = BrokerUrl.parse("mqtt://user:hush@h:1")
    settings = SessionSettings(
        urls=("mqtt://h",), client_id="a", username="u", password=SecretStr("hush")
    )
    assert "hush" not in f"{url} {url!r} {settings!r}"
    assert str(url) == "mqtt://h:1"
    with pytest.raises(ConfigurationError) as caught:
        BrokerUrl.parse("http://user:hush@h")
    assert "hush" not in caught.value.message


def test_what_is_no_url_is_shown_as_it_was_written():
    with pytest.raises(ConfigurationError, match="broker URL 'nonsense' is not usable"):
        BrokerUrl.parse("nonsense")


def test_unknown_settings_and_impossible_pairs_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="extra"):
        SessionSettings(urls=("mqtt://h",), client_id="a", colour="red")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="needs a username"):
        SessionSettings(urls=("mqtt://h",), client_id="a", password=SecretStr("x"))
    with pytest.raises(ValidationError, match="go together"):
        TlsSettings(cert_file=tmp_path)
    with pytest.raises(ValidationError):
        SessionSettings(urls=(), client_id="a")
    with pytest.raises(ValidationError):
        SessionSettings(urls=("mqtt://h",), client_id="a/b")


def test_the_brokers_of_a_cluster_stand_in_one_setting() -> None:
    urls = BrokerUrl.parse_all("mqtt://user:a,b@one:1, mqtts://two,mqtt://three:3")
    assert [str(url) for url in urls] == ["mqtt://one:1", "mqtts://two:8883", "mqtt://three:3"]
    assert urls[0].password is not None
    assert urls[0].password.get_secret_value() == "a,b"
    with pytest.raises(ConfigurationError, match="http"):
        BrokerUrl.parse_all("mqtt://one,http://two")
