import pytest
from typer.testing import CliRunner

from capability_schemas.errors import ConfigurationError
from foam.cli.app import app

RUNNER = CliRunner()


@pytest.mark.parametrize("ttl", ["31d", "0s", "soon"])
def test_a_token_that_would_last_too_long_is_refused_here(ttl, tmp_path):
    done = RUNNER.invoke(app, ["token", "create", "--ttl", ttl, "--data", str(tmp_path)])
    assert isinstance(done.exception, ConfigurationError)
    assert "--ttl" in done.exception.message


def test_who_has_no_papers_needs_a_token(tmp_path):
    asked = (
        "enroll",
        "--broker",
        "mqtts://127.0.0.1:1",
        "--id",
        "press-7",
        "--data",
        str(tmp_path),
    )
    done = RUNNER.invoke(app, list(asked))
    assert isinstance(done.exception, ConfigurationError)
    assert "press-7 has not joined yet: give a join token" in done.exception.message
