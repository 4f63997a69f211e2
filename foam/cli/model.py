"""``foam model``: the models on this machine."""

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import typer

from capability_schemas.errors import ConfigurationError, TaskCancelled
from capability_schemas.ids import now_ms
from foam.cli.app import app, drop_output
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import client_settings
from foam.cli.look import JsonOption, new_table, print_rich
from foam.settings import Settings

if TYPE_CHECKING:
    from node_agent.models import ModelStore, StoredModel
    from node_agent.models.download import Progress
    from node_agent.models.pull import Puller

__all__ = ["model"]

_TOKEN_LIMIT_BYTES: Final = 4096
_SHOWN_ITEMS: Final = 16
_AGO: Final = ((86_400, "d"), (3600, "h"), (60, "min"), (0, "s"))

model = typer.Typer(
    help="Fetch, list and remove the models that functions name.",
    no_args_is_help=True,
    epilog=CODES_EPILOG,
)
app.add_typer(model, name="model")

ModelsOption = Annotated[
    Path | None,
    typer.Option(
        "--models", help="Folder of the store (FOAM_MODELS; default: the user's data folder)."
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(help="Name, digest (six digits are enough) or reference.")
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name in the store; the file's otherwise.")
]
DigestOption = Annotated[
    str | None, typer.Option("--sha256", help="Digest that the file must have.")
]
AnyOption = Annotated[bool, typer.Option("--any", help="Take a file that is no GGUF, too.")]
PinOption = Annotated[bool, typer.Option("--pin", help="Never evict it for the disk budget.")]


@model.command(epilog=CODES_EPILOG)
def pull(
    reference: Annotated[
        str,
        typer.Argument(
            help="https://host/model.gguf, owner/repo/file.gguf[@revision], "
            "hf:owner/repo:Q4_K_M or a file."
        ),
    ],
    *,
    name: NameOption = None,
    sha256: DigestOption = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Accept http, which anybody on the way can change.")
    ] = False,
    any_format: AnyOption = False,
    pin: PinOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write progress and result as JSON lines.")
    ] = False,
    models: ModelsOption = None,
) -> None:
    """Fetch a model; an interrupted download goes on where it stopped."""
    settings = client_settings(models=models)
    try:
        with _progress(as_json=as_json) as report, _puller(settings, report, insecure) as puller:
            got = puller.pull(
                reference, name=name, sha256=sha256, any_format=any_format, pinned=pin
            )
    except KeyboardInterrupt as exc:
        raise TaskCancelled("cancelled: run the same command again to go on") from exc
    _say(got, as_json=as_json)


@model.command("import", epilog=CODES_EPILOG)
def import_(
    file: Annotated[Path, typer.Argument(help="A model file.")],
    *,
    name: NameOption = None,
    sha256: DigestOption = None,
    any_format: AnyOption = False,
    pin: PinOption = False,
    move: Annotated[
        bool, typer.Option("--move", help="Take the file away from its place.")
    ] = False,
    as_json: JsonOption = False,
    models: ModelsOption = None,
) -> None:
    """Put a file of this machine into the store."""
    settings = client_settings(models=models)
    with _progress(as_json=as_json) as report, _puller(settings, report) as puller:
        got = puller.take(
            file, name=name, sha256=sha256, any_format=any_format, pinned=pin, move=move
        )
    _say(got, as_json=as_json)


@model.command("list", epilog=CODES_EPILOG)
def list_(*, as_json: JsonOption = False, models: ModelsOption = None) -> None:
    """List the models, the last used first."""
    found = _store(client_settings(models=models)).list()
    if as_json:
        sys.stdout.write(json.dumps([_facts(one) for one in found], indent=2) + "\n")
        return
    if not found:
        sys.stdout.write("no models yet: get one with `foam model pull`\n")
        return
    drawn = new_table("name", "size", "weights", "params", "context", "used")
    drawn.columns[0].no_wrap = True  # for copying
    now = now_ms()
    for one in found:
        record = one.record
        used = _ago(now - one.used_at_ms) if one.used_at_ms else "file is gone"
        state = ("in use" if one.in_use else used, "pinned" if record.pinned else "")
        drawn.add_row(
            record.name,
            _bytes(record.size_bytes),
            record.quantisation or "",
            _count(record.parameters),
            str(record.context_length or ""),
            ", ".join(filter(None, state)),
        )
    print_rich(drawn)


@model.command(epilog=CODES_EPILOG)
def show(name: ModelArgument, *, as_json: JsonOption = False, models: ModelsOption = None) -> None:
    """Show everything that is known of a model, the head of its file included."""
    from node_agent.models import memory_need_bytes, read_gguf

    found = _store(client_settings(models=models)).show(name)
    facts = _facts(found)
    if found.record.architecture is not None:
        info = read_gguf(found.path)
        facts |= {
            "tokenizer": info.tokenizer,
            "chat_template": info.has_chat_template,
            "layers": info.block_count,
            "tensors": len(info.tensors),
            "weight_bytes": info.weight_bytes,
            "memory_need_bytes": memory_need_bytes(info),
            "metadata": {key: _plain(value) for key, value in info.metadata.items()},
        }
    if as_json:
        sys.stdout.write(json.dumps(facts, ensure_ascii=False, indent=2) + "\n")
        return
    metadata = facts.pop("metadata", {})
    drawn = new_table("", "")
    drawn.show_header = False
    for key, value in [*facts.items(), *metadata.items()]:
        if value is not None:
            drawn.add_row(key, _line(value))
    print_rich(drawn)


@model.command(epilog=CODES_EPILOG)
def remove(
    name: ModelArgument,
    *,
    force: Annotated[bool, typer.Option("--force", help="Even when a node uses it.")] = False,
    models: ModelsOption = None,
) -> None:
    """Remove a model, and its file when no other name stands for it."""
    gone = _store(client_settings(models=models)).remove(name, force=force)
    sys.stdout.write(f"removed {gone.record.name} ({_bytes(gone.record.size_bytes)})\n")


@model.command(epilog=CODES_EPILOG)
def pin(
    name: ModelArgument,
    *,
    off: Annotated[bool, typer.Option("--off", help="Let it be evicted again.")] = False,
    models: ModelsOption = None,
) -> None:
    """Keep a model whatever the disk budget says."""
    kept = _store(client_settings(models=models)).pin(name, pinned=not off)
    word = "may be evicted" if off else "is pinned"
    sys.stdout.write(f"{kept.record.name} {word}\n")


def _store(settings: Settings) -> "ModelStore":
    from node_agent.models import ModelStore

    return ModelStore(settings.models, budget_bytes=settings.models_budget)


def _puller(
    settings: Settings, report: "Callable[[Progress], None]", insecure: bool = False
) -> "Puller":
    try:
        from node_agent.models.download import Web
        from node_agent.models.pull import Puller
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"{exc.name} is not installed: pip install 'foam-mesh[node]'"
        ) from exc
    return Puller(
        store=_store(settings),
        web=Web(insecure=insecure),
        hub=settings.hub,
        token=_token(settings.hub_token),
        offline=settings.offline,
        report=report,
    )


def _token(path: Path | None) -> str | None:
    """Read the hub's token; only its owner may be able to."""
    if path is None:
        return None
    try:
        with path.expanduser().open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(_TOKEN_LIMIT_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"FOAM_HUB_TOKEN: {path} cannot be read as a token") from exc
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigurationError(f"FOAM_HUB_TOKEN: others can read {path}: chmod 600 it")
    if not token or not token.isprintable() or " " in token:
        raise ConfigurationError(f"FOAM_HUB_TOKEN: {path} holds no token")
    return token


@contextmanager
def _progress(*, as_json: bool) -> "Iterator[Callable[[Progress], None]]":
    """Report on a terminal by a bar, on request by JSON lines, else not at all."""
    if as_json:
        yield _JsonLines()
    elif sys.stderr.isatty():
        with _Bar() as bar:
            yield bar
    else:
        yield lambda _: None


class _JsonLines:
    """Writes a line per state and per hundredth."""

    def __init__(self) -> None:
        self._last: tuple[str, int] = ("", -1)

    def __call__(self, progress: "Progress") -> None:
        total = progress.total_bytes
        step = progress.done_bytes * 100 // total if total else progress.done_bytes >> 24
        if self._last != (progress.state, step):
            self._last = (progress.state, step)
            try:
                sys.stdout.write(json.dumps(asdict(progress)) + "\n")
                sys.stdout.flush()
            except OSError as exc:  # its reader left; not to be taken for a full disk
                drop_output()
                why = f"the output cannot be written: {exc.strerror}"
                raise TaskCancelled(f"cancelled: {why}") from exc


class _Bar:
    """Draws a bar with speed and time left."""

    def __init__(self) -> None:
        from rich import progress as rich_progress
        from rich.console import Console

        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(binary_units=False),
            rich_progress.TransferSpeedColumn(),
            rich_progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("asking", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, progress: "Progress") -> None:
        words = f"{progress.state}: {progress.detail}" if progress.detail else progress.state
        self._bar.update(
            self._task,
            completed=progress.done_bytes,
            total=progress.total_bytes,
            description=words[:60],
        )


def _facts(found: "StoredModel") -> dict[str, Any]:
    record = found.record.model_dump(exclude={"source", "digest"})
    return record | {
        "digest": f"sha256:{found.record.digest}",
        "path": str(found.path),
        "used_at_ms": found.used_at_ms,
        "in_use": found.in_use,
    }


def _say(got: "StoredModel", *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"state": "stored", **_facts(got)}) + "\n")
        return
    record = got.record
    kind = f", {record.quantisation}" if record.quantisation else ""
    sys.stdout.write(
        f"{record.name}: {_bytes(record.size_bytes)}{kind}, sha256:{record.digest[:12]}…\n"
        f'use it in a function with model = "{record.name}"\n'
    )


def _plain(value: Any) -> Any:
    from node_agent.models import Items

    return f"{value.count} {value.kind}s" if isinstance(value, Items) else value


def _line(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > _SHOWN_ITEMS:
        return f"{len(value)} values"
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}…"  # noqa: PLR2004  # two lines or so


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:  # noqa: PLR2004  # decimal units
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _count(number: int | None) -> str:
    if number is None:
        return ""
    if number >= 10**9:
        return f"{number / 10**9:.2f} B"
    return f"{number / 10**6:.1f} M"


def _ago(ms: int) -> str:
    seconds = max(0, ms // 1000)
    size, unit = next((size, unit) for size, unit in _AGO if seconds >= size)
    return f"{seconds // size if size else seconds} {unit} ago"
