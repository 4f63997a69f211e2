"""The demo: a small plant with three nodes, and devices that ask them for help over one shift.

`record` makes the recording of the shift (machines, planted faults, what is asked and what the
right answer is), `tasks` is its script. `device` replays it as an outsider that speaks only MQTT.
The nodes are declared in ``plant/``: ``edge-llm`` runs the shipped language model (`phrasing` puts
texts into its words), ``edge-numeric`` runs `numeric`, ``edge-manual`` runs `manual`. `run`
conducts: it starts the mesh and the devices, `view` shows every task as it happens, and
`recording.judge` compares each answer with the recording's truth.

Example::

    foam demo                  # starts a mesh, plays the shift, judges every answer
    foam demo --keep           # the same, and the mesh stays up until Ctrl-C
"""

from pathlib import Path
from typing import Final

__all__ = ["PLANT_NODES"]

PLANT_NODES: Final = tuple(
    Path(__file__).resolve().parent / "plant" / f"{node}.toml"
    for node in ("edge-llm", "edge-numeric", "edge-manual")
)
"""Declarations of the plant's nodes."""
