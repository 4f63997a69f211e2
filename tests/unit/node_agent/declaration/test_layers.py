"""Paths in what is declared."""

import pytest

from node_agent.declaration.layers import code_files, located


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("m.gguf", "m.gguf"),
        ("models/m.gguf", "models/m.gguf"),
        ("./a/b/m.gguf", "a/b/m.gguf"),
        ("there/deep/m.gguf", "there/deep/m.gguf"),
        ("there/deep", "there/deep"),
        ("qwen2.5-0.5b", None),
        ("owner/name", None),
        ("owner/name/m.gguf", None),
        ("hf:owner/name:Q4_K_M", None),
        ("https://host/m.gguf", None),
    ],
)
def test_models_are_paths_or_names(tmp_path, written, path):
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "there" / "deep" / "m.gguf").touch()
    placed = located({"model": written}, tmp_path)["model"]
    assert placed == (written if path is None else str(tmp_path / path))


@pytest.mark.parametrize(
    ("options", "placed"),
    [
        ({"lora": ["a.gguf"]}, {"lora": ["{}/a.gguf"]}),
        (
            {"lora": [{"path": "a.gguf", "scale": 0.5}]},
            {"lora": [{"path": "{}/a.gguf", "scale": 0.5}]},
        ),
        ({"folders": {"/data": "d"}}, {"folders": {"/data": "{}/d"}}),
        ({"prepare": "p.py:f"}, {"prepare": "{}/p.py:f"}),
        ({"prepare": "p.q:f"}, {"prepare": "p.q:f"}),
        ({"command": ["sh", "./x"]}, {"command": ["sh", "./x"]}),
        ({"command": "./x"}, {"command": "{}/x"}),
        ({"stop": ["./", "../"], "max_tokens": 3}, {"stop": ["./", "../"], "max_tokens": 3}),
    ],
)
def test_options_that_hold_paths_are_placed(tmp_path, options, placed):
    found = located({"options": options}, tmp_path)["options"]
    assert str(found) == str(placed).replace("{}", str(tmp_path))


def test_a_program_keeps_the_name_it_is_called_by(tmp_path):
    (tmp_path / "box").touch()
    (tmp_path / "ls").symlink_to("box")
    made = located({"options": {"command": ["./ls", "-l"]}}, tmp_path)
    assert made["options"]["command"] == [str(tmp_path / "ls"), "-l"]
    assert code_files(made) == [tmp_path / "ls"]
