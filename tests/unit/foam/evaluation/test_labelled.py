"""Reading labelled requests: what is made of a folder, and what is said of a bad line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capability_schemas.errors import ConfigurationError
from capability_schemas.ids import is_identifier
from foam.evaluation.labelled import function_names, read_labelled

HARBOUR = Path(__file__).resolve().parents[3] / "data" / "routing" / "harbour"
CAPABILITY = '{"id": "lamp", "description": "Switches a lamp."}'
TASK = '{"id": "t", "text": "light, please", "gold": ["lamp"]}'


def folder(path: Path, *, capabilities: str = CAPABILITY, tasks: str = TASK) -> Path:
    (path / "capabilities.jsonl").write_text(capabilities, encoding="utf-8")
    (path / "tasks.jsonl").write_text(tasks, encoding="utf-8")
    return path


def test_a_folder_is_read_as_it_stands() -> None:
    found = read_labelled(HARBOUR)
    assert found.name == "harbour"
    assert [one.id for one in found.capabilities] == [
        "crane.status",
        "crane-status",
        "tide",
        "wx",
        "5",
    ]
    assert [one.function for one in found.capabilities] == [
        "crane_status",
        "crane-status",
        "tide_table",
        "wind_forecast",
        "reefer_alarm",
    ]
    booking, wind, reefer = (found.capabilities[at] for at in (1, 3, 4))
    assert booking.skills == ("booking",)
    assert wind.input_schema == {
        "type": "object",
        "properties": {"hour": {"description": "Hour of the day the forecast is for."}},
    }
    assert reefer.examples == ()
    assert [task.id for task in found.tasks] == ["a", "b", "c", "d", "line 6", "f"]
    assert [sorted(task.gold) for task in found.tasks[2:]] == [
        ["tide"],
        ["wx"],
        ["5"],
        ["tide", "wx"],
    ]
    assert found.outside is not None
    assert [task.gold for task in found.outside] == [frozenset()] * 2
    assert found.cut == 0


def test_examples_can_be_left_out_and_tasks_sampled() -> None:
    found = read_labelled(HARBOUR)
    assert all(one.examples == () for one in found.without_examples().capabilities)
    some = found.sampled(2, seed=7)
    assert some == found.sampled(2, seed=7)
    assert len(some.tasks) == 2
    assert set(some.tasks) <= set(found.tasks)
    assert found.sampled(100, seed=7) == found


def test_out_of_scope_texts_may_be_absent_or_none(tmp_path: Path) -> None:
    assert read_labelled(folder(tmp_path)).outside is None
    (tmp_path / "oos.jsonl").write_text("\n", encoding="utf-8")
    assert read_labelled(tmp_path).outside is None


def test_a_capability_without_words_is_described_by_its_name(tmp_path: Path) -> None:
    found = read_labelled(folder(tmp_path, capabilities='\ufeff{"id": "lamp", "description": ""}'))
    assert found.capabilities[0].description == "lamp"


def test_what_a_claim_could_not_hold_is_cut_and_counted(tmp_path: Path) -> None:
    long = '{"id": "lamp", "description": "' + "x" * 2_001 + '", "examples": ["on", " "]}'
    found = read_labelled(folder(tmp_path, capabilities=f'{long}\n{{"id": "b"}}'))
    assert len(found.capabilities[0].description) == 2_000
    assert found.capabilities[0].examples == ("on",)
    assert found.cut == 1


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ('{"type": "dict", "properties": {"a": {"type": "any"}, "b": 3}}', ["a", "b"]),
        ('{"a": {"description": "x"}, "type": {"description": "kind"}}', ["a", "type"]),
        ('["a", {"name": "b", "description": "y"}, 7]', ["a", "b"]),
        ('{"type": "object"}', None),
        ("[]", None),
    ],
)
def test_signatures_of_any_dialect_give_their_parameters(
    tmp_path: Path, parameters: str, names: list[str] | None
) -> None:
    line = f'{{"id": "lamp", "parameters": {parameters}}}'
    schema = read_labelled(folder(tmp_path, capabilities=line)).capabilities[0].input_schema
    assert (None if schema is None else list(schema["properties"])) == names


@pytest.mark.parametrize(
    ("capabilities", "complaint"),
    [
        ("{", "capabilities.jsonl, line 1: not JSON"),
        ('\n["lamp"]', "capabilities.jsonl, line 2: an object is needed"),
        ('{"description": "x"}', "capabilities.jsonl, line 1: id: is missing"),
        ('{"id": ""}', "capabilities.jsonl, line 1: id: is empty"),
        ('{"id": true}', "capabilities.jsonl, line 1: id: is a string, not true or false"),
        (f'{CAPABILITY}\n{{"id": "lamp"}}', "line 2: id: 'lamp' stands in line 1 already"),
        ('{"id": "lamp", "description": 4}', "line 1: description: is a string, not a number"),
        ('{"id": "lamp", "examples": "on"}', "examples: is a list of strings, not a string"),
        ('{"id": "lamp", "examples": ["on", null]}', r"examples\[1\]: is a string, not null"),
        ('{"id": "lamp", "parameters": "x"}', "parameters: is an object or a list, not a string"),
        ("", "capabilities.jsonl is empty"),
    ],
)
def test_a_bad_capability_is_named_by_file_line_and_field(
    tmp_path: Path, capabilities: str, complaint: str
) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        read_labelled(folder(tmp_path, capabilities=capabilities))


@pytest.mark.parametrize(
    ("tasks", "complaint"),
    [
        ('{"id": "t", "gold": ["lamp"]}', "tasks.jsonl, line 1: text: is missing"),
        ('{"text": " ", "gold": ["lamp"]}', "tasks.jsonl, line 1: text: is empty"),
        (f'{TASK}\n{{"text": "on"}}', "line 2: gold: is a list of ids"),
        ('{"text": "on", "gold": []}', "gold: is empty: a request that nobody serves belongs in"),
        ('{"text": "on", "gold": ["lamp", "fan"]}', "gold: 'fan' is no id of capabilities.jsonl"),
        ("\n", "tasks.jsonl is empty"),
    ],
)
def test_a_bad_task_is_named_by_file_line_and_field(
    tmp_path: Path, tasks: str, complaint: str
) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        read_labelled(folder(tmp_path, tasks=tasks))


def test_missing_files_and_foreign_encodings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no folder: it should hold capabilities\.jsonl"):
        read_labelled(tmp_path / "none")
    with pytest.raises(ConfigurationError, match=r"capabilities\.jsonl is missing"):
        read_labelled(tmp_path)
    folder(tmp_path)
    (tmp_path / "tasks.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ConfigurationError, match=r"tasks\.jsonl is not UTF-8"):
        read_labelled(tmp_path)


@given(st.lists(st.text(alphabet=st.sampled_from("ab._ -é漢2"), max_size=80), max_size=30))
def test_every_name_becomes_an_identifier_of_its_own(names: list[str]) -> None:
    made = function_names(names)
    assert all(is_identifier(name) for name in made)
    assert len(set(made)) == len(names)


def test_names_that_are_identifiers_stay(tmp_path: Path) -> None:
    assert function_names(["a-b", "a_b", "a b", "a.b"]) == ["a-b", "a_b", "a_b_2", "a_b_3"]
