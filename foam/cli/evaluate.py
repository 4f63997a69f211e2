"""``foam eval``: how well something works, measured on labelled data of one's own."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from capability_schemas.errors import ConfigurationError
from foam.cli.app import app, run_async
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import client_settings
from foam.cli.look import new_table, print_rich

if TYPE_CHECKING:
    from foam.evaluation import Figures, LabelledSet, LabelledTask, Route
    from foam.evaluation.routing import Note, Progress
    from foam.settings import Settings

__all__ = ["evaluation"]

evaluation = typer.Typer(
    help="Measure on labelled data of your own; needs no mesh.",
    no_args_is_help=True,
    epilog=CODES_EPILOG,
)
app.add_typer(evaluation, name="eval")

_SHOWN: Final = 10
_MEANINGS: Final = {
    "recall_at_1": ("R@1", "a right capability comes first"),
    "recall_at_5": ("R@5", "a right one is among the first five"),
    "ndcg_at_10": ("nDCG@10", "right ones in front, of the first ten"),
    "mrr": ("MRR", "mean of 1 / place of the first right one"),
    "auroc": ("AUROC", "the best similarity tells tasks from out-of-scope texts"),
    "in_scope_kept": ("kept", "tasks that are given to somebody"),
    "oos_rejected": ("rejected", "out-of-scope texts that are refused"),
    "p50_ms": ("p50 ms", "embedding and decision, median"),
    "p99_ms": ("p99 ms", "embedding and decision, 99 of 100 tasks"),
    "tasks": ("tasks", "in scope"),
}


@evaluation.callback()
def _group() -> None:
    """Keep ``routing`` a command of its own while it is the only one."""


@evaluation.command(epilog=CODES_EPILOG)
def routing(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder with capabilities.jsonl, tasks.jsonl and maybe oos.jsonl."),
    ],
    *,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Take this many random tasks (and oos texts) only."),
    ] = None,
    no_examples: Annotated[
        bool, typer.Option("--no-examples", help="Leave out the capabilities' examples.")
    ] = False,
    per_task: Annotated[
        Path | None,
        typer.Option("--per-task", help="Write a JSON line for each request: what was ranked."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of --limit's random choice.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object and nothing else.")
    ] = False,
) -> None:
    """Measure how well a router would choose among the capabilities of a folder.

    Capabilities are embedded, calibrated and ranked by the code a router runs, as if each were
    offered by a live and idle node of its own.
    """
    from foam.evaluation import read_labelled

    settings = client_settings()
    labelled = read_labelled(folder)
    if no_examples:
        labelled = labelled.without_examples()
    if limit is not None:
        labelled = labelled.sampled(limit, seed)
    if labelled.cut:
        sys.stderr.write(f"foam: {labelled.cut} capabilities held more than a claim may: cut\n")

    async def main() -> None:
        with _notes(per_task) as note, _progress() as progress:
            found = await _measure(settings, labelled, progress, note)
        if as_json:
            sys.stdout.write(json.dumps(found.as_json()) + "\n")
        else:
            _draw(labelled, found)

    run_async(main())


async def _measure(
    settings: "Settings", labelled: "LabelledSet", progress: "Progress", note: "Note | None"
) -> "Figures":
    from foam.evaluation import evaluate_routing
    from registry.encoders import load_encoder
    from registry.encoders.thread import EncoderThread

    def load() -> Any:
        return load_encoder(settings.encoder_backend, settings.encoder)

    async with EncoderThread(encoder=load, cache_texts=0) as encoder:
        return await evaluate_routing(labelled, encoder, progress=progress, note=note)


def _draw(labelled: "LabelledSet", found: "Figures") -> None:
    outside = len(labelled.outside or ())
    print_rich(
        f"{labelled.name}: {len(labelled.capabilities)} capabilities, {len(labelled.tasks)} tasks, "
        + (f"{outside} out-of-scope texts" if outside else "no out-of-scope texts")
    )
    table = new_table("measure", "value", "what it says")
    for field, (name, meaning) in _MEANINGS.items():
        value = getattr(found, field)
        shown = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
        table.add_row(name, shown, meaning)
    print_rich(table)


@contextmanager
def _progress() -> "Iterator[Progress]":
    """Say on a terminal how far it is; nowhere else."""
    if not sys.stderr.isatty():
        yield lambda _what, _done, _of: None
        return
    shown = [""]

    def tell(what: str, done: int, of: int) -> None:
        line = f"{what}: {100 * done // of} %"
        if line != shown[0]:
            shown[0] = line
            sys.stderr.write(f"\r{line:<30}")

    try:
        yield tell
    finally:
        sys.stderr.write("\r" + " " * 30 + "\r")


@contextmanager
def _notes(path: Path | None) -> "Iterator[Note | None]":
    """Write what was made of each request, as JSON lines."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"--per-task: {path} cannot be written: {exc.strerror}") from exc
    with file:

        def note(task: "LabelledTask", route: "Route", explained: dict[str, Any]) -> None:
            line = {
                "id": task.id,
                "text": task.text,
                "gold": sorted(task.gold),
                "rank": route.rank(task.gold),
                "chosen": route.chosen,
                "score": round(route.score, 4),
                "ranked": route.ranked[:_SHOWN],
                "ms": round(route.ms, 3),
                **{name: explained.get(name) for name in ("threshold", "probability", "margin")},
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

        yield note
