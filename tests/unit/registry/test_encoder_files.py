import subprocess
import sys
from pathlib import Path

import pytest

from capability_schemas.errors import ConfigurationError
from registry.encoders import OnnxEncoder, load_encoder, read_manifest
from registry.encoders import export as export_module
from registry.encoders.manifest import (
    MANIFEST_NAME,
    ONNX_NAME,
    TOKENIZER_NAME,
    EncoderManifest,
    file_sha256,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose manifest fits its (meaningless) files."""
    tmp_path = tmp_path / "encoders" / "tiny"
    tmp_path.mkdir(parents=True)
    for name in (ONNX_NAME, TOKENIZER_NAME):
        (tmp_path / name).write_bytes(name.encode())
    manifest = EncoderManifest.build(
        model="tiny",
        revision="int8pc-0",
        dimension=4,
        max_tokens=8,
        files={name: file_sha256(tmp_path / name) for name in (ONNX_NAME, TOKENIZER_NAME)},
        source_sha256="0",
        tools={},
    )
    (tmp_path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return tmp_path


def test_a_sound_folder_is_read(folder: Path) -> None:
    assert read_manifest(folder, verify=True).space.dimension == 4


def test_a_missing_encoder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"python -m registry\.encoders\.export"):
        OnnxEncoder(tmp_path / "nothing")


def test_an_altered_file_is_noticed(folder: Path) -> None:
    (folder / ONNX_NAME).write_bytes(b"other")
    with pytest.raises(ConfigurationError, match="does not match its manifest"):
        OnnxEncoder(folder)


def test_a_lost_file_is_noticed(folder: Path) -> None:
    (folder / TOKENIZER_NAME).unlink()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_manifest(folder, verify=True)


def test_a_broken_manifest_is_noticed(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text("{}")
    with pytest.raises(ConfigurationError, match="manifest"):
        read_manifest(folder, verify=False)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="onnx or sentence_transformers"):
        load_encoder("word2vec")


def test_missing_libraries_are_all_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_module, "_NEEDED", ("json", "no_torch", "no_onnx"))
    assert export_module.main(["--out", str(tmp_path / "out")]) == 2
    assert "no_torch, no_onnx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing_and_keeps_the_old_one(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> tuple[int, int]:
        raise OSError("No space left on device")

    monkeypatch.setattr(export_module, "_write_graph", fail)
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(ConfigurationError, match="No space left"):
        export_module.export(folder, source=tmp_path_factory.mktemp("source"))
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    assert read_manifest(folder, verify=True).space.model == "tiny"


def test_an_export_that_is_there_is_not_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_module, "export", lambda *_, **__: pytest.fail("exported again"))
    assert export_module.main(["--out", str(folder)]) == 0
    assert "already there" in capsys.readouterr().out


def test_serving_never_imports_torch() -> None:
    program = (
        "import sys, registry.encoders, registry.search, registry.service;"
        "sys.exit(any(name in sys.modules for name in"
        " ('torch', 'transformers', 'sentence_transformers', 'onnx')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
