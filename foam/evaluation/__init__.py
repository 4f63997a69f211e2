"""How well a fleet routes by meaning, measured on labelled requests.

`labelled` reads a folder of capabilities, requests and the capability that should serve each;
`routing` puts the capabilities into a router of one's own and asks it; `metrics` counts. What is
asked is the code that a router runs, from the texts the registry embeds to the gates, with its
calibration; nothing is sent, and no function runs.
"""

from foam.evaluation.labelled import LabelledCapability, LabelledSet, LabelledTask, read_labelled
from foam.evaluation.metrics import Figures, Route, area_under_roc, figures, ndcg
from foam.evaluation.routing import evaluate_routing

__all__ = [
    "Figures",
    "LabelledCapability",
    "LabelledSet",
    "LabelledTask",
    "Route",
    "area_under_roc",
    "evaluate_routing",
    "figures",
    "ndcg",
    "read_labelled",
]
