"""A labelled set through the router's own path, and the command around it."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from foam.cli import app
from foam.evaluation import Figures, LabelledTask, Route, evaluate_routing, read_labelled
from foam.evaluation.labelled import LabelledSet
from registry.encoders import EncoderThread
from support.encoders import WordEncoder, exported_folder

HARBOUR = Path(__file__).resolve().parents[3] / "data" / "routing" / "harbour"
KEYS = [
    "recall_at_1",
    "recall_at_5",
    "ndcg_at_10",
    "mrr",
    "auroc",
    "in_scope_kept",
    "oos_rejected",
    "p50_ms",
    "p99_ms",
    "tasks",
]


def run(labelled: LabelledSet) -> tuple[Figures, dict[str, Route], dict[str, dict[str, Any]]]:
    routes: dict[str, Route] = {}
    explained: dict[str, dict[str, Any]] = {}

    def note(task: LabelledTask, route: Route, explanation: dict[str, Any]) -> None:
        routes[task.id], explained[task.id] = route, explanation

    async def main() -> Figures:
        async with EncoderThread(encoder=WordEncoder(), cache_texts=0) as encoder:
            return await evaluate_routing(labelled, encoder, note=note)

    return asyncio.run(main()), routes, explained


def test_requests_in_the_words_of_the_examples_find_their_capability() -> None:
    labelled = read_labelled(HARBOUR)
    found, routes, explained = run(labelled)
    assert found.tasks == 6
    assert {routes[task.id].rank(task.gold) for task in labelled.tasks} == {1}
    assert found.recall_at_1 == found.mrr == 1.0
    assert all(len(route.ranked) == 5 for route in routes.values())
    assert found.p50_ms > 0
    # The very gates of a router: its explanation is at hand, and idle nodes pass.
    verdicts = {one["verdict"] for one in explained["a"]["candidates"]}
    assert "candidate" in verdicts
    assert explained["a"]["chosen"][1] == "crane_status"


def test_what_the_router_refuses_is_still_ranked() -> None:
    labelled = read_labelled(HARBOUR)
    _, routes, _ = run(labelled)
    assert labelled.outside is not None
    for task in labelled.outside:
        assert len(routes[task.id].ranked) == 5
    refused = [routes[task.id] for task in labelled.outside if routes[task.id].chosen is None]
    assert refused, "words that no capability knows are refused"


def test_out_of_scope_texts_are_optional() -> None:
    found, _, _ = run(replace(read_labelled(HARBOUR), outside=None))
    assert found.auroc is None
    assert found.oos_rejected is None


def test_capabilities_of_one_and_the_same_text_are_all_ranked() -> None:
    labelled = read_labelled(HARBOUR)
    twin = replace(labelled.capabilities[2], id="tide-2", function="tide_table_2")
    found, routes, _ = run(
        replace(labelled, capabilities=(*labelled.capabilities, twin)).without_examples()
    )
    assert found.tasks == 6
    assert {"tide", "tide-2"} <= set(routes["c"].ranked)


def invoke(*arguments: str) -> Any:
    environment = {"FOAM_ENCODER": str(exported_folder())}
    return CliRunner().invoke(app, ["eval", "routing", *arguments], env=environment)


def test_json_is_one_object_with_exactly_these_keys(tmp_path: Path) -> None:
    notes = tmp_path / "notes.jsonl"
    done = invoke(str(HARBOUR), "--json", "--per-task", str(notes))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == KEYS
    assert found["tasks"] == 6
    assert found["recall_at_5"] == 1.0
    assert 0.5 <= found["auroc"] <= 1.0
    lines = [json.loads(line) for line in notes.read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c", "d", "line 6", "f", "x", "y"]
    assert lines[0]["ranked"][0] == "crane.status"
    assert lines[-1]["gold"] == []


def test_the_table_names_the_set_and_every_measure() -> None:
    done = invoke(str(HARBOUR), "--no-examples", "--limit", "3")
    assert done.exit_code == 0, done.output
    assert "harbour: 5 capabilities, 3 tasks, 2 out-of-scope texts" in done.stdout
    for name in ("R@1", "R@5", "nDCG@10", "MRR", "AUROC", "kept", "rejected", "p50 ms", "p99 ms"):
        assert name in done.stdout


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    done = invoke(str(tmp_path))
    assert done.exit_code != 0
    assert "capabilities.jsonl is missing" in str(done.exception)


def test_notes_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    done = invoke(str(HARBOUR), "--per-task", str(tmp_path))
    assert done.exit_code != 0
    assert "cannot be written" in str(done.exception)
