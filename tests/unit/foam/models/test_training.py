"""The trainer and the export of the demo model, on models small enough for a test."""

import random
import re
from typing import Any

import pytest
import torch
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from foam.models.training import tokenizer as tokens
from foam.models.training import train
from foam.models.training.corpus import Corpus, Example
from foam.models.training.evaluate import evaluate, open_model, set_of
from foam.models.training.export import export
from foam.models.training.network import LanguageModel, Shape
from foam.models.training.train import Plan, Trainer, load_model

CONVERSATION = Example(
    "report",
    (
        ("system", "Tools:\nread_sensor(device, metric)"),
        ("user", "What is the temperature of pump-3 (°C)?"),
        ("assistant", '{"tool": "read_sensor", "arguments": {"device": "pump-3"}}'),
        ("tool", '{"value": 71.5}'),
    ),
    "71.5 C",
)

PLAIN = r"Classify the severity: \S+ [a-z0-9]+ [\d.]+ \S+, warning at [\d.]+, critical at [\d.]+\."


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    """Draw few examples at a time, on one thread: several wait for each other on a busy machine."""
    monkeypatch.setattr(train, "_POOL", 400)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vocabulary():
    return tokens.learn(size=400, examples=300)


def tiny(vocabulary):
    size = vocabulary.get_vocab_size()
    return Shape(size, width=64, layers=2, heads=4, kv_heads=2, feed_forward=96, context=512)


def trainer(folder, vocabulary, *, steps):
    plan = Plan(steps=steps, decay=0.5, batch_tokens=512)
    return Trainer(folder, plan, shape=tiny(vocabulary), tokenizer=vocabulary)


def test_an_example_becomes_ids_with_weights(vocabulary):
    ids, weights = tokens.encode(vocabulary, CONVERSATION)
    assert len(ids) == len(weights)
    assert (ids[0], weights[0]) == (tokens.BOS, 0.0)
    roles = [n for n in ids if n in tokens.ROLES.values()]
    assert roles == [tokens.ROLES[r] for r in ("system", "user", "assistant", "tool", "assistant")]
    spoken = [n for n, weight in zip(ids, weights, strict=True) if weight >= 1]
    text = vocabulary.decode(spoken, skip_special_tokens=False)
    assert text == f"{CONVERSATION.turns[2][1]}<|end|>71.5 C<|end|>"


def test_a_call_without_its_tools_is_not_learned(vocabulary):
    bare = Example("report", CONVERSATION.turns[1:], CONVERSATION.answer)
    ids, weights = tokens.encode(vocabulary, bare)
    spoken = [n for n, weight in zip(ids, weights, strict=True) if weight >= 1]
    assert vocabulary.decode(spoken, skip_special_tokens=False) == "71.5 C<|end|>"


def test_any_text_survives_the_tokens(vocabulary):
    text = "Größe 12.5 µm, 温度 → ok\n\t<b>"
    assert vocabulary.decode(vocabulary.encode(text).ids) == text


def test_the_loss_falls(tmp_path, vocabulary):
    run = trainer(tmp_path, vocabulary, steps=30)
    losses = [run.take_step() for _ in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, vocabulary):
    whole = trainer(tmp_path / "whole", vocabulary, steps=6)
    whole.run()
    first = trainer(tmp_path / "broken", vocabulary, steps=6)
    for _ in range(3):
        first.take_step()
    first.save()
    first.take_step()  # lost
    lines: list[dict[str, Any]] = []
    second = trainer(tmp_path / "broken", vocabulary, steps=6)
    assert second.step == 3
    second.run(report=lines.append)
    assert [line["step"] for line in lines] == [6]
    for (name, a), (_, b) in zip(
        load_model(tmp_path / "whole").state_dict().items(),
        load_model(tmp_path / "broken").state_dict().items(),
        strict=True,
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("other", [{"weights": {"tool": 9.0}}, {"plain": 0.5}])
def test_another_mix_is_a_stream_of_its_own(tmp_path, vocabulary, other):
    trainer(tmp_path, vocabulary, steps=2).run()
    same = Trainer(tmp_path, Plan(steps=4, batch_tokens=512))
    mixed = Trainer(tmp_path, Plan(steps=4, batch_tokens=512, **other))
    assert (same.step, mixed.step) == (2, 2)
    kept, new = next(same._batches)[0], next(mixed._batches)[0]
    assert kept.shape != new.shape or not torch.equal(kept, new)


def test_a_run_keeps_its_seed(tmp_path, vocabulary):
    trainer(tmp_path, vocabulary, steps=1).run()
    with pytest.raises(ValueError, match="has seed 0, not 5"):
        Trainer(tmp_path, Plan(steps=2, seed=5))


def test_the_rate_rises_stays_and_falls():
    plan = Plan(steps=1000, decay=0.5)
    rates = [plan.rate(step) for step in (0, 59, 300, 500, 750, 999)]
    assert rates == pytest.approx([1 / 60, 1, 1, 1, 0.5, 0.01])


def lively(vocabulary):
    """Return a random model whose scores differ: at its first weights they are nearly flat."""
    model = LanguageModel(tiny(vocabulary), seed=3).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8.0)
            else:
                weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(weight.numel()))
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory, vocabulary):
    model, path = lively(vocabulary), tmp_path_factory.mktemp("model") / "tiny.gguf"
    export(model, vocabulary, path, weights="f32")
    return model, path


@pytest.mark.llm
def test_llama_cpp_computes_what_torch_does(exported, vocabulary):
    model, path = exported
    f32 = 0  # llama.cpp keeps keys and values in 16 bits by default
    engine = open_model(path, context=512, logits_all=True, type_k=f32, type_v=f32)
    ids = tokens.encode(vocabulary, CONVERSATION)[0]
    engine.eval(ids)
    theirs = torch.tensor(engine.scores[: len(ids)])
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0]
    assert ours.std() > 0.5
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=2e-3 * float(ours.std()))
    engine.reset()
    said = []
    for token in engine.generate(ids, temp=0.0, repeat_penalty=1.0):
        said.append(token)
        if len(said) == 24:
            break
    wanted = list(ids)
    with torch.no_grad():
        for _ in range(24):
            wanted.append(int(model(torch.tensor([wanted]))[0, -1].argmax()))
    assert said == wanted[len(ids) :]
    engine.close()


@pytest.mark.llm
@pytest.mark.parametrize("seed", range(3))
def test_prompts_in_llama_cpp_have_the_ids_of_the_training(exported, vocabulary, seed):
    _, path = exported
    engine = open_model(path, context=512)
    formatter = Jinja2ChatFormatter(
        template=engine.metadata["tokenizer.chat_template"],
        eos_token="<|end|>",
        bos_token="<|bos|>",
    )
    corpus = Corpus(random.Random(seed))
    for example in (CONVERSATION, *(corpus.draw() for _ in range(40))):
        ids, _ = tokens.encode(vocabulary, example)
        answer = vocabulary.encode(example.answer, add_special_tokens=False).ids
        messages: Any = [{"role": role, "content": text} for role, text in example.turns]
        prompt = formatter(messages=messages).prompt
        theirs = engine.tokenize(prompt.encode(), add_bos=False, special=True)
        assert theirs == ids[: len(ids) - len(answer) - 1]
    engine.close()


@pytest.mark.llm
@pytest.mark.parametrize("weights", ["f16", "q8_0"])
def test_smaller_files_answer_too(tmp_path, vocabulary, weights):
    model, path = lively(vocabulary), tmp_path / "tiny.gguf"
    export(model, vocabulary, path, weights=weights)
    scores = evaluate(path, ["trend"], count=3)
    assert [(score.which, score.asked) for score in scores] == [
        ("plain", 3),
        ("combinations", 3),
        ("wordings", 3),
    ]
    assert all(len(score.wrong) == score.asked - score.right for score in scores)


def test_a_foreign_tokenizer_is_refused(tmp_path, vocabulary):
    model = LanguageModel(Shape(vocabulary=32, width=32, layers=1, heads=2, kv_heads=1))
    with pytest.raises(ValueError, match="with the tokenizer it was trained with"):
        export(model, vocabulary, tmp_path / "x.gguf")


def test_the_plain_set_is_of_one_wording_and_of_tasks_about_readings():
    asked = [example.turns[0][1] for example in set_of("classify", "plain", 20)]
    assert all(re.fullmatch(PLAIN, text) for text in asked), asked
    assert set_of("split", "plain", 20) == []


def test_evaluation_asks_the_same_prompts_each_time():
    assert set_of("split", "wordings", 20) == set_of("split", "wordings", 20)
    prompts = [example.turns for example in set_of("chat", "combinations", 30)]
    assert len(prompts) == len(set(prompts))
