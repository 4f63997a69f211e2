"""The demo as a person starts it, and what it says when an answer is not right."""

import asyncio
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from foam.demo.recording import DEFAULT_RECORDING, load_recording
from foam.demo.run import DemoOptions, run_demo
from foam.demo.view import DemoView
from foam.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
# A whole mesh with three nodes, the model and scipy starts, plays a shift and stops.
pytestmark = pytest.mark.timeout(120)


def mesh_processes(data):
    return [p for p in psutil.process_iter(["cmdline"]) if str(data) in (p.info["cmdline"] or ())]


def test_demo_answers_everything_rightly_and_leaves_no_process(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "foam",
            "demo",
            "--broker",
            "embedded",
            "--speed",
            "6000",
            "--data",
            str(tmp_path / "mesh"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    asked = len(load_recording().texts)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{asked} of {asked} right, 0 wrong, 0 missing" in done.stdout
    assert "Stop the machine and inspect the bearings." in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    assert mesh_processes(tmp_path / "mesh") == []


def with_other_truth(path, task, checks):
    """Copy two tasks of the recording, one of them with another truth."""
    kept = {task, "panel-1-1"}
    lines = []
    for text in gzip.decompress(DEFAULT_RECORDING.read_bytes()).splitlines():
        line = json.loads(text)
        if line["kind"] == "task" and line["id"] not in kept:
            continue
        if line["kind"] == "truth":
            if line["task"] not in kept:
                continue
            if line["task"] == task:
                line["checks"] = checks
        lines.append(json.dumps(line))
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_a_wrong_answer_fails_the_demo_and_says_why(tmp_path):
    advised = next(
        task
        for task, truth in load_recording().truths.items()
        if truth.function == "advise" and task.startswith("fan-2")
    )
    checks = [{"path": "", "equals": "Let it run."}]
    recording = with_other_truth(tmp_path / "other.jsonl.gz", advised, checks)
    out = io.StringIO()
    options = DemoOptions(
        broker="embedded", speed=20_000, recording=recording, data=tmp_path / "mesh"
    )
    view = DemoView(Console(file=out, width=100))
    status = asyncio.run(run_demo(load_settings(), options, view=view))
    assert status == 1
    assert "1 of 2 right, 1 wrong, 0 missing" in out.getvalue()
    assert "not 'Let it run.'" in out.getvalue()
