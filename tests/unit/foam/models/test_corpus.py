"""The generator of the demo model's training text: right answers, and nothing leaks."""

import json
import random
import re
from decimal import Decimal
from fractions import Fraction

import pytest

from foam.models.training import readings, steps, toolcalls, wishes, wordings
from foam.models.training.corpus import TASKS, Corpus, is_held_out
from foam.models.training.frames import Phrasings, write
from foam.models.training.words import ACTIONS, METRICS


def drawn(task, count=200, *, unseen=False, seed=11):
    corpus = Corpus(random.Random(seed))
    return [corpus.draw(task, unseen=unseen) for _ in range(count)]


def phrasings():
    """Return every pair of seen and unseen frames in the modules of the corpus."""
    found = [p for p, _ in readings.READING_TASKS.values()]
    found += [p for _, p in wordings.TALK]
    found += [wish.phrasings for wish in wishes.WISHES]
    for module in (wordings, steps, toolcalls, wishes):
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else (value,)
            found += [p for p in held if isinstance(p, Phrasings)]
    return found


def test_no_frame_is_both_seen_and_unseen():
    assert len(phrasings()) > 30
    for pair in phrasings():
        assert pair.seen
        assert pair.unseen
        assert not {f.lower() for f in pair.seen} & {f.lower() for f in pair.unseen}


def test_training_examples_are_never_held_out():
    corpus = Corpus(random.Random(1))
    assert not any(is_held_out(corpus.training()) for _ in range(2000))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_held_out_cases(task):
    corpus = Corpus(random.Random(2))
    examples = [corpus.held_out(task) for _ in range(5)]
    assert all(is_held_out(example) and example.task == task for example in examples)


def test_the_same_seed_gives_the_same_examples():
    assert drawn(None, 50) == drawn(None, 50)
    assert drawn(None, 50) != drawn(None, 50, seed=12)


def test_an_unknown_share_is_refused():
    with pytest.raises(ValueError, match=r"no such task: poems; there are classify"):
        Corpus(random.Random(0), {"poems": 1.0})


@pytest.mark.parametrize("unseen", [False, True])
def test_severities_follow_from_the_numbers_in_the_text(unseen):
    unit = "|".join(re.escape(metric.unit) for metric in METRICS)
    for example in drawn("classify", 400, unseen=unseen):
        text = re.sub(r"\b[a-z]+-\d+\b|co2", "", example.turns[0][1], flags=re.IGNORECASE)
        if "LIMIT OF" in text:  # shouted, "130 A CRITICAL" reads like amperes
            continue
        found = re.search(rf"(\d+(?:\.\d+)?) ?(?:{unit})(?![a-z])", text)
        assert found, text
        value = found.group(1)
        limits = [Decimal(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]
        limits.remove(Decimal(value))
        warning, critical = sorted(limits)
        number = Decimal(value)
        right = "ok" if number < warning else "warning" if number < critical else "critical"
        assert example.answer == right, text


def test_all_severities_come_up_and_a_reached_limit_counts():
    answers = [example.answer for example in drawn("classify", 600)]
    assert all(answers.count(severity) > 120 for severity in ("ok", "warning", "critical"))
    of = readings.severity_of
    numbers = [Decimal(n) for n in ("79.9", "80", "94.9", "95")]
    limits = Decimal(80), Decimal(95)
    assert [of(n, *limits) for n in numbers] == ["ok", "warning", "warning", "critical"]


@pytest.mark.parametrize("unseen", [False, True])
def test_extracted_fields_stand_in_the_text(unseen):
    units = {metric.name: metric.unit for metric in METRICS}
    for example in drawn("extract", unseen=unseen):
        text, record = example.turns[0][1], json.loads(example.answer)
        assert list(record) == ["device", "metric", "value", "unit"]
        assert record["device"] in text
        assert record["unit"] == units[record["metric"]]
        assert str(record["value"]) in text


def test_summaries_name_every_reading_in_order():
    for example in drawn("summarise"):
        text = example.turns[0][1]
        said = re.findall(r"(-?\d+) (\S+) on ([a-z]+-\d+)", example.answer)
        assert 2 <= len(said) <= 4
        places = [text.index(f"{device}") for _, _, device in said]
        assert places == sorted(places)
        for value, unit, device in said:
            assert re.search(rf"{device}:? [a-z0-9 ]+:? {value} {re.escape(unit)}", text)


def test_conversions_are_exact():
    size = {"W": 1, "kW": 1000, "V": 1000, "mV": 1, "A": 1000, "mA": 1, "s": 1000, "ms": 1}
    size |= {"bar": 100, "kPa": 1, "km": 10**6, "m": 1000, "cm": 10, "mm": 1}
    size |= {"kg": 1000, "g": 1, "l": 1000, "ml": 1, "GB": 1000, "MB": 1}
    for example in drawn("convert", 300):
        answer, wanted = example.answer.split()
        found = re.search(r"(-?\d+(?:\.\d+)?) ([A-Za-z]+)", example.turns[0][1])
        assert found, example
        value, unit = found.groups()
        if unit == "C":
            right = Fraction(value) * 9 / 5 + 32
        elif unit == "F":
            right = (Fraction(value) - 32) * 5 / 9
        else:
            right = Fraction(value) * size[unit] / size[wanted]
        assert Fraction(answer) == right, example


def test_trends_follow_from_the_numbers():
    for example in drawn("trend"):
        numbers = [int(n) for n in re.findall(r"\d+", example.turns[0][1])]
        change = numbers[-1] - numbers[0]
        right = "stable" if abs(change) <= 2 else "rising" if change > 0 else "falling"
        assert example.answer == right, example


def test_advice_is_one_of_the_remedies_and_topics_are_paths():
    assert {example.answer for example in drawn("advise", 900)} == set(ACTIONS.values())
    for example in drawn("topic"):
        site, device, metric = example.answer.split("/")
        words = example.turns[0][1].lower()
        assert site in words
        assert device in words
        assert metric.replace("-", " ") in words


@pytest.mark.parametrize("unseen", [False, True])
def test_calls_fit_the_list_and_the_request(unseen):
    none = 0
    for example in drawn("tool", 400, unseen=unseen):
        listed = {}
        for line in example.turns[0][1].split("\n")[1:]:
            found = re.match(r"(\w+)\(([\w, ]*)\)", line)
            assert found, line
            name, parameters = found.groups()
            listed[name] = parameters.split(", ")
        assert 1 <= len(listed) <= 5
        call = json.loads(example.answer)
        if call["tool"] == toolcalls.NO_TOOL:
            none += 1
            assert call["arguments"] == {}
            continue
        assert list(call["arguments"]) == listed[call["tool"]]
        for value in call["arguments"].values():
            if value not in {"on", "off"}:
                assert str(value) in example.turns[1][1], example
    assert 20 < none < 120


def test_results_become_words():
    for example in drawn("report", 300):
        *_, (role, result) = example.turns
        assert role in {"tool", "user"}
        has_tools = example.turns[0][0] == "system"
        answer = json.loads(example.answer)["answer"] if has_tools else example.answer
        if found := re.search(r'"error": "(.+)"', result):
            assert answer == f"That did not work: {found.group(1)}."
        else:
            whole = " ".join(text for _, text in example.turns)
            assert all(n in whole for n in re.findall(r"\d+(?:\.\d+)?", answer)), example


def test_tool_names_kept_for_evaluation_are_never_trained():
    rng = random.Random(3)
    for wish in wishes.WISHES:
        seen = {wish.name(rng, unseen=False) for _ in range(300)}
        unseen = {wish.name(rng, unseen=True) for _ in range(300)}
        assert not seen & unseen
    owners: dict[str, set[tuple[str, ...]]] = {}
    for wish in wishes.WISHES:
        for name in wish.names:
            owners.setdefault(name, set()).add(tuple(wish.parameters))
    assert all(len(kinds) == 1 for kinds in owners.values())


@pytest.mark.parametrize("unseen", [False, True])
def test_steps_are_the_clauses_of_the_request(unseen):
    orders = set()
    for example in drawn("split", 300, unseen=unseen):
        text, listed = example.turns[0][1].lower(), json.loads(example.answer)
        assert 2 <= len(listed) <= 4
        places = [text.index(step.lower()) for step in listed]
        orders.add(places == sorted(places))
    assert orders == ({True} if unseen else {True, False})


def test_writing_varies_words_but_never_values():
    rng = random.Random(4)
    texts = {write("Turn {d} [on|up].", {"d": "Pump-7 kW"}, rng) for _ in range(300)}
    assert len(texts) > 20
    assert all("Pump-7 kW" in text for text in texts)


def test_a_part_of_the_readings_may_come_in_one_wording():
    corpus = Corpus(random.Random(4), {"topic": 40.0}, plain=0.5)
    texts = [e.turns[0][1] for e in (corpus.training() for _ in range(400)) if e.task == "topic"]
    first = r"MQTT topic for the [a-z0-9 ]+ of \S+ at \S+\?"
    in_first = sum(bool(re.fullmatch(first, text)) for text in texts)
    assert len(texts) > 200
    assert 0.4 < in_first / len(texts) < 0.65
    assert not any(is_held_out(corpus.training()) for _ in range(200))
