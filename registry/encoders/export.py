"""Export the packaged MiniLM once to the int8 file that the serving path reads.

Run ``python -m registry.encoders.export --out DIR`` at set-up. Only this step needs torch and
transformers; afterwards a router runs on onnxruntime and tokenizers alone, at about six times the
speed and a fifth of the memory (measured: 2.1 against 12.6 ms a text on one core, 105 against 491
MB).

The steps: pooled and normalised float32 graph, shape pre-processing, dynamic int8 quantisation with
one scale per output channel. Per channel matters: cosine to float32 is 0.995 on average against
0.967 with one scale per tensor.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from capability_schemas.errors import ConfigurationError
from registry.encoders.manifest import (
    MANIFEST_NAME,
    MODEL_NAME,
    ONNX_NAME,
    TOKENIZER_NAME,
    EncoderManifest,
    default_folder,
    file_sha256,
    packaged_model_folder,
    read_manifest,
)

_NEEDED: Final = ("torch", "transformers", "onnx", "onnxruntime")
_OPSET: Final = 17
_VARIANT: Final = "int8pc"

Progress = Callable[[str], None]


def export(
    out: Path, *, source: Path | None = None, progress: Progress | None = None
) -> EncoderManifest:
    """Write the quantised encoder into a folder, or nothing at all.

    Everything is written into a temporary sibling that is renamed at the end, so that an
    interrupted export leaves no half-written folder that a later start would trust.

    Args:
        out: folder to create; an existing one is replaced.
        source: folder of the sentence-transformers model; default the packaged MiniLM.
        progress: called with one line per step.

    Returns:
        The manifest written beside the model.

    Raises:
        ConfigurationError: a library or the packaged model is missing, or the folder cannot be
            written.
    """
    say = progress or (lambda _line: None)
    _check_libraries()
    folder = source or packaged_model_folder()
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as exc:
        raise ConfigurationError(f"cannot write the encoder to {out}: {exc}") from exc
    try:
        dimension, max_tokens = _write_graph(folder, work, say)
        shutil.copyfile(folder / TOKENIZER_NAME, work / TOKENIZER_NAME)
        manifest = _describe(work, folder, dimension=dimension, max_tokens=max_tokens)
        (work / MANIFEST_NAME).write_text(
            manifest.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
        work.chmod(0o755)
        _replace(work, out)
    except OSError as exc:
        raise ConfigurationError(f"cannot write the encoder to {out}: {exc}") from exc
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"encoder ready: {out} ({manifest.space.model} {manifest.space.revision})")
    return manifest


def _check_libraries() -> None:
    """Name every missing library at once instead of failing on the first import.

    Raises:
        ConfigurationError: at least one library that the export needs is not installed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            "exporting the encoder needs "
            + ", ".join(missing)
            + ": install foam-mesh[encoder] in this environment, "
            "or copy an exported encoder folder from another machine"
        )


def _write_graph(source: Path, work: Path, say: Progress) -> tuple[int, int]:
    """Trace the model, quantise it, and return its dimension and its token limit.

    The TorchScript exporter is used on purpose: onnxruntime refuses the dynamo graph ("Duplicate
    definition of name").
    """
    say("loading torch and the packaged MiniLM (a few seconds)")
    import torch  # noqa: PLC0415 - heavy, needed by the export only
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415 - as above
    from transformers.utils import logging as hub_logging  # noqa: PLC0415 - as above

    hub_logging.disable_progress_bar()

    class PooledUnit(torch.nn.Module):  # type: ignore[misc]  # torch is not analysed
        """Mean pooling over the tokens and normalisation inside the graph."""

        def __init__(self) -> None:
            super().__init__()
            self.base = AutoModel.from_pretrained(
                str(source), attn_implementation="eager", local_files_only=True
            ).eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return torch.nn.functional.normalize(
                (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), p=2, dim=1
            )

    model = PooledUnit().eval()
    tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    sample = tokenizer(
        ["turn the pump on", "how warm is the bearing of motor 3 today"],
        padding=True,
        return_tensors="pt",
    )
    say("tracing the float32 graph")
    plain, prepared = work / "fp32.onnx", work / "prepared.onnx"
    with _quiet():
        torch.onnx.export(
            model,
            (sample["input_ids"], sample["attention_mask"]),
            str(plain),
            dynamo=False,
            opset_version=_OPSET,
            input_names=["input_ids", "attention_mask"],
            output_names=["embedding"],
            dynamic_axes={
                "input_ids": {0: "batch", 1: "tokens"},
                "attention_mask": {0: "batch", 1: "tokens"},
                "embedding": {0: "batch"},
            },
        )
    say("quantising to int8, one scale per channel")
    _quantise(plain, prepared, work / ONNX_NAME)
    plain.unlink()
    prepared.unlink()
    limit = json.loads((source / "sentence_bert_config.json").read_text(encoding="utf-8")).get(
        "max_seq_length", 256
    )
    return int(model.base.config.hidden_size), int(limit)


def _quantise(plain: Path, prepared: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - needed by the export only
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415 - needed by the export only

    with _quiet():
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(str(prepared), str(target), weight_type=QuantType.QInt8, per_channel=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' deprecation notices and hints out of the progress lines."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _describe(work: Path, source: Path, *, dimension: int, max_tokens: int) -> EncoderManifest:
    files = {name: file_sha256(work / name) for name in (ONNX_NAME, TOKENIZER_NAME)}
    identity = hashlib.sha256("".join(files[name] for name in sorted(files)).encode()).hexdigest()
    return EncoderManifest.build(
        model=MODEL_NAME,
        revision=f"{_VARIANT}-{identity[:12]}",
        dimension=dimension,
        max_tokens=max_tokens,
        files=files,
        source_sha256=file_sha256(source / "model.safetensors"),
        tools={name: _version(name) for name in _NEEDED},
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _replace(work: Path, out: Path) -> None:
    """Put a finished folder in place of whatever stood there."""
    if not out.exists():
        work.rename(out)
        return
    aside = work.with_name(f"{work.name}-old")
    out.rename(aside)
    work.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line of the export.

    Returns:
        Exit status: 0 done or already there, 2 something is missing (said on stderr).
    """
    parser = argparse.ArgumentParser(
        prog="python -m registry.encoders.export",
        description="Export the packaged MiniLM to int8 ONNX.",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder to write (default: the user cache)"
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=None,
        help="sentence-transformers folder (default: the packaged MiniLM)",
    )
    parser.add_argument(
        "--force", action="store_true", help="export again even if a valid encoder is there"
    )
    options = parser.parse_args(arguments)
    out: Path = options.out or default_folder()
    started = time.monotonic()

    def say(line: str) -> None:
        sys.stdout.write(f"[encoder {time.monotonic() - started:5.1f} s] {line}\n")
        sys.stdout.flush()

    try:
        if not options.force and (out / MANIFEST_NAME).is_file():
            with contextlib.suppress(ConfigurationError):
                manifest = read_manifest(out, verify=True)
                say(f"already there: {out} ({manifest.space.model} {manifest.space.revision})")
                return 0
            say(f"the encoder in {out} is damaged: exporting it again")
        export(out, source=options.source, progress=say)
    except ConfigurationError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
