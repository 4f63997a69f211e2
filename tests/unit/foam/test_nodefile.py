"""The table [node] of a node file."""

from pathlib import Path
from typing import Final

import pytest

from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from capability_schemas.task import DataClass
from foam.nodefile import NodeHead, place_problems, placed
from node_agent.declaration import Declaration

ALL: Final[tuple[DataClass, ...]] = ("public", "internal", "private")


def _write(folder: Path, text: str, name: str = "press hall.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("source", "name"), [("/a/b c.d.py", "b-c-d"), ("plant.functions", "functions")]
)
def test_what_is_no_node_file_has_a_name_and_no_place(source: str, name: str) -> None:
    head = NodeHead.read(source)
    assert (head.id, head.attested) == (name, None)


def test_a_file_names_its_node_or_is_its_name(tmp_path: Path) -> None:
    assert NodeHead.read(_write(tmp_path, "")).id == "press-hall"
    assert NodeHead.read(_write(tmp_path, '[node]\nid = "press"')).id == "press"


def test_a_file_places_its_node(tmp_path: Path) -> None:
    head = NodeHead.read(_write(tmp_path, '[node]\nzones = ["hall-3"]\ngrants = ["controls"]'))
    assert head.attested == CapabilityPolicy(zones=("hall-3",), grants=("controls",), data=ALL)
    taken_back = NodeHead.read(_write(tmp_path, "[node]\nzones = []"))
    assert taken_back.attested == CapabilityPolicy()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[node", "end of a table declaration"),
        ('[node]\nzone = "hall-3"', r"\[node\]: zone: "),
        ('[node]\nid = "a b"\nzones = 3', r"\[node\]: id: .*\n.*\[node\]: zones: "),
        ('[node]\ndata = ["secret"]', r"\[node\]: data\[0\]: .*'public'"),
        ("node = 3", r"\[node\]: "),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"press hall\.toml.*{said}"):
        NodeHead.read(_write(tmp_path, text))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"node file /no\.toml: No such file"):
        NodeHead.read("/no.toml")


def test_functions_claim_the_place_of_their_node_unless_they_name_their_own() -> None:
    plain = FunctionSpec(name="a", description="a")
    own = FunctionSpec(name="b", description="b", policy=CapabilityPolicy(zones=("yard",)))
    place = CapabilityPolicy(zones=("hall-3",), grants=("controls",))
    first, second = placed([plain, own], place)
    assert (first.policy.zones, first.policy.grants) == (("hall-3",), ("controls",))
    assert (second.policy.zones, second.policy.grants) == (("yard",), ("controls",))
    assert placed([plain], None) == [plain]


def test_claims_beyond_the_place_of_the_node_are_warned_of() -> None:
    functions = (
        FunctionSpec(name="a", description="a", policy=CapabilityPolicy(zones=("hall-3",))),
        FunctionSpec(
            name="b", description="b", policy=CapabilityPolicy(zones=("yard",), grants=("fire",))
        ),
    )
    head = {"zones": ["hall-3"]}
    declaration = Declaration(functions=functions, head=head, lines={"a": 3, "b": 9})
    found = place_problems(declaration, "node.toml")
    assert [(one.line, one.field, one.warning) for one in found] == [
        (9, "policy.zones", True),
        (9, "policy.grants", True),
    ]
    assert "yard is not under [node]" in found[0].message


def test_every_mistake_in_the_place_of_a_node_is_found() -> None:
    head = {"zones": 3, "gants": [], "id": "a b"}
    found = place_problems(Declaration(head=head), "node.toml")
    assert [(one.what, one.field, one.warning) for one in found] == [
        ("[node]", "zones", False),
        ("[node]", "gants", False),
    ]


def test_the_table_of_the_node_may_tune_it():
    head = NodeHead.of({"id": "a", "settings": {"peers": ["b"], "queue_limit": 3}}, "x.toml")
    tuned = head.tuned("a")
    assert (tuned.node, tuned.peers, tuned.queue_limit) == ("a", ("b",), 3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"queue_limit": -1, "colour": "red"}, "queue_limit: .*; colour: "),
        ({"node": "b"}, "id"),
    ],
)
def test_wrong_settings_of_a_node_are_all_named(settings, says):
    with pytest.raises(ConfigurationError, match=says):
        NodeHead.of({"settings": settings}, "x.toml")
