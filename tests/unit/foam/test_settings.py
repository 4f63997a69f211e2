from pathlib import Path

import pytest

from capability_schemas.errors import ConfigurationError
from foam.settings import load_settings


def test_command_line_wins_over_environment_over_default() -> None:
    environ = {"FOAM_DATA": "/srv/mesh", "FOAM_SITE": "hall-2", "FOAM_URL": "mqtt://a:1"}
    settings = load_settings(environ, site="hall-3", url=None)
    assert (settings.data, settings.site, settings.url) == (
        Path("/srv/mesh"),
        "hall-3",
        "mqtt://a:1",
    )
    assert settings.encoder_backend == "onnx"


def test_data_folder_is_absolute_and_home_is_expanded() -> None:
    assert load_settings({"FOAM_DATA": "~/mesh"}).data == Path.home() / "mesh"
    assert load_settings({}).data.is_absolute()


def test_misspelt_variable_is_refused_and_foreign_ones_are_not() -> None:
    with pytest.raises(ConfigurationError, match=r"FOAM_PASWORD.*did you mean FOAM_PASSWORD"):
        load_settings({"FOAM_PASWORD": "x"})
    assert load_settings({"FOAM_REQUIRE_BROKERS": "1"}).url is None


def test_wrong_value_names_the_setting_but_not_the_secret() -> None:
    with pytest.raises(ConfigurationError, match="setting site") as caught:
        load_settings({"FOAM_SITE": "hall/2", "FOAM_PASSWORD": "tell-nobody"})
    assert "tell-nobody" not in str(caught.value)
    assert "tell-nobody" not in repr(load_settings({"FOAM_PASSWORD": "tell-nobody"}))


def test_the_rules_are_in_the_data_folder_unless_a_file_is_named() -> None:
    assert load_settings({"FOAM_DATA": "/srv/mesh"}).rules_file == Path("/srv/mesh/rules.toml")
    named = load_settings({"FOAM_DATA": "/srv/mesh", "FOAM_RULES": "~/rules.toml"})
    assert named.rules_file == Path.home() / "rules.toml"
