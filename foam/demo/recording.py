"""Reads the recording of the plant, and judges answers by the truth it holds."""

import gzip
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from capability_schemas.errors import ConfigurationError

__all__ = ["DEFAULT_RECORDING", "Recording", "Truth", "Verdict", "judge", "load_recording"]

DEFAULT_RECORDING: Final = Path(__file__).resolve().parent / "data" / "plant.jsonl.gz"


@dataclass(frozen=True, slots=True)
class Truth:
    """The right answer of one task.

    Attributes:
        task: Task id.
        node: Node it should be given to.
        function: Function it should be given to.
        why: Where the truth comes from, in words.
        checks: Conditions on the output: ``path`` (dotted, empty for the whole output) and one of
            ``equals``, ``contains``, ``near`` with ``within`` (absolute).
    """

    task: str
    node: str
    function: str
    why: str
    checks: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer was right, and what was wrong with it otherwise."""

    right: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Recording:
    """What the conductor of the demo needs of a recording; the devices read the file themselves.

    Attributes:
        path: The file.
        seconds: Length of the shift.
        starts: Time of day it starts, ``HH:MM``.
        texts: Task id to its words.
        at_s: Task id to the second of the shift at which it is asked.
        device_of: Task id to the device that asks.
        faults: What was planted.
        truths: Task id to its truth.
    """

    path: Path
    seconds: int
    starts: str
    texts: Mapping[str, str]
    at_s: Mapping[str, int]
    device_of: Mapping[str, str]
    faults: tuple[Mapping[str, Any], ...]
    truths: Mapping[str, Truth]

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices, in the order of their first task."""
        return tuple(dict.fromkeys(self.device_of.values()))

    def clock(self, task: str) -> str:
        """Return the time of day in the shift at which a task is asked, ``HH:MM``."""
        hours, minutes = (int(part) for part in self.starts.split(":"))
        minutes += hours * 60 + self.at_s[task] // 60
        return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def load_recording(path: Path = DEFAULT_RECORDING) -> Recording:
    """Read a recording.

    Args:
        path: ``.jsonl.gz`` file made by `foam.demo.record`.

    Raises:
        ConfigurationError: The file is missing or is no such recording.
    """
    try:
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        shift = lines[0]
        tasks = [line for line in lines if line["kind"] == "task"]
        return Recording(
            path=path,
            seconds=shift["seconds"],
            starts=shift["starts"],
            texts={task["id"]: task["text"] for task in tasks},
            at_s={task["id"]: task["at_s"] for task in tasks},
            device_of={task["id"]: task["device"] for task in tasks},
            faults=tuple(line for line in lines if line["kind"] == "fault"),
            truths={
                line["task"]: Truth(
                    task=line["task"],
                    node=line["node"],
                    function=line["function"],
                    why=line["why"],
                    checks=tuple(line["checks"]),
                )
                for line in lines
                if line["kind"] == "truth"
            },
        )
    except (OSError, ValueError, KeyError, IndexError, EOFError) as exc:
        raise ConfigurationError(f"{path} is no recording of a plant: {exc}") from exc


def judge(truth: Truth, *, node: str | None, function: str | None, output: Any) -> Verdict:
    """Compare an answer with the truth: it must be right, and come from the right place.

    Args:
        truth: What is right.
        node: Node that answered.
        function: Function that answered.
        output: Its output.
    """
    if (node, function) != (truth.node, truth.function):
        return Verdict(False, f"came from {node}/{function}, not {truth.node}/{truth.function}")
    for check in truth.checks:
        problem = _problem(check, _at(output, check.get("path", "")))
        if problem:
            where = check.get("path") or "answer"
            return Verdict(False, f"{where} {problem}")
    return Verdict(True)


def _at(output: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        if not isinstance(output, dict) or part not in output:
            return None
        output = output[part]
    return output


def _problem(check: Mapping[str, Any], found: Any) -> str:
    """Return what is wrong with a value; empty when nothing is."""
    shown = textwrap.shorten(repr(found), 80, placeholder=" …")
    if "equals" in check:
        return "" if found == check["equals"] else f"is {shown}, not {check['equals']!r}"
    if "contains" in check:
        inside = isinstance(found, str) and check["contains"].lower() in found.lower()
        return "" if inside else f"is {shown}, without {check['contains']!r}"
    if "near" in check:
        number = (
            isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
        )
        good = number and abs(found - check["near"]) <= check["within"]
        return "" if good else f"is {shown}, not {check['near']} ± {check['within']}"
    return "has a check without a condition"
