"""Tokens per processor second of 1, 2, 4 and 8 streams in one instance, against llama-cpp-python.

The baseline answers the same prompts one after another with `llama_cpp.Llama`, as a program without
FOAM would, in this process too; rounds are interleaved. Processor seconds, since wall time on a
shared machine says more about the neighbours. The larger model has random weights (its answers are
noise of full length): what counts there is only how much work a decode is.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
from gguf import GGUFReader, GGUFWriter, quants
from gguf.constants import GGMLQuantizationType, LlamaFileType
from llama_cpp import llama_cpp as native

from benchmarks.measure import ROOT, p50
from node_agent.worker.engines.base import Completion, EngineOptions, Job, Prompt
from node_agent.worker.engines.llama_cpp import LlamaCppEngine
from node_agent.worker.engines.llama_cpp.weights import numpy

MODEL = ROOT / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
STREAMS = (1, 2, 4, 8)
CALLS = 16
METRICS = ("humidity", "temperature", "pressure", "noise", "flow", "level")
WIDTH, LAYERS, INNER, HEADS, KV_HEADS = 768, 12, 2048, 12, 4


def questions(round_number: int) -> list[str]:
    return [
        f"Extract JSON: The {METRICS[n % len(METRICS)]} of tank-{16 * round_number + n} is {n + 30}"
        " %."
        for n in range(CALLS)
    ]


def write_random_model(path: Path) -> None:
    """Write a llama of 82 million random q8_0 weights with the vocabulary of the shipped model."""
    reader = GGUFReader(MODEL)
    writer = GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, field.contents(), *field.types[:2])
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(vocabulary)
    random = numpy.random.default_rng(0)

    def put(name: str, rows: Any) -> None:
        columns = INNER if name.endswith("ffn_down.weight") else WIDTH
        values = random.standard_normal((rows, columns), dtype=numpy.float32) / columns**0.5
        data = quants.quantize(values, GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.Q8_0)

    put("token_embd.weight", vocabulary)
    put("output.weight", vocabulary)
    ones = numpy.ones(WIDTH, numpy.float32)
    writer.add_tensor("output_norm.weight", ones)
    inner = WIDTH // HEADS * KV_HEADS
    shapes = {
        "attn_q": WIDTH,
        "attn_k": inner,
        "attn_v": inner,
        "attn_output": WIDTH,
        "ffn_gate": INNER,
        "ffn_up": INNER,
        "ffn_down": WIDTH,
    }
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
        for name, rows in shapes.items():
            put(f"blk.{layer}.{name}.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Baseline:
    """`llama_cpp.Llama` with the options of the engine."""

    def __init__(self, model: Path) -> None:
        original = native.llama_model_default_params

        def portable() -> Any:  # as the engine loads it: AMX kernels of some builds fault
            parameters = original()
            parameters.use_extra_bufts = False
            return parameters

        native.llama_model_default_params = portable
        try:
            self.llm = llama_cpp.Llama(
                str(model), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False
            )
        finally:
            native.llama_model_default_params = original

    def rate(self, texts: Sequence[str], max_tokens: int) -> float:
        def answer(text: str) -> int:
            made: Any = self.llm.create_chat_completion(
                [{"role": "user", "content": text}], temperature=0, max_tokens=max_tokens
            )
            return int(made["usage"]["completion_tokens"])

        return per_processor_second(lambda: sum(map(answer, texts)))


def per_processor_second(work: Callable[[], int]) -> float:
    started = time.process_time()
    tokens = work()
    return tokens / (time.process_time() - started)


def batched_rate(engine: LlamaCppEngine, texts: Sequence[str], max_tokens: int) -> float:
    ends: list[Completion | Exception] = []

    def prompt(text: str) -> Callable[[], Prompt]:
        return lambda: Prompt(messages=[{"role": "user", "content": text}], max_tokens=max_tokens)

    def work() -> int:
        for text in texts:
            engine.submit(Job(prompt=prompt(text), on_text=lambda _: None, on_end=ends.append))
        while engine.scheduler.step():
            pass
        return sum(end.output_tokens for end in ends if isinstance(end, Completion))

    return per_processor_second(work)


def compare(name: str, model: Path, *, rounds: int, max_tokens: int) -> list[dict[str, Any]]:
    baseline = Baseline(model)
    engines = {
        count: LlamaCppEngine(EngineOptions(model=str(model), n_ctx=512, parallel=count))
        for count in STREAMS
    }
    rates: dict[int, list[float]] = {count: [] for count in (0, *STREAMS)}
    for number in range(rounds + 1):
        texts = questions(number)
        found = {0: baseline.rate(texts, max_tokens)}
        for count, engine in engines.items():
            found[count] = batched_rate(engine, texts, max_tokens)
        if number:  # the first round warms up
            for count, rate in found.items():
                rates[count].append(rate)
    for engine in engines.values():
        engine.close()
    baseline.llm.close()
    middle = {count: p50(values) for count, values in rates.items()}
    return [
        {
            "model": name,
            "streams": count or "llama_cpp.Llama, one after another",
            "tokens per processor second": round(middle[count]),
            "against llama_cpp.Llama": f"{middle[count] / middle[0]:.2f}x",
            "against one stream": f"{middle[count] / middle[1]:.2f}x",
        }
        for count in (0, *STREAMS)
    ]


def measure(*, rounds: int = 7) -> list[dict[str, Any]]:
    rows = compare("shipped, 2.6 M", MODEL, rounds=rounds, max_tokens=64)
    with tempfile.TemporaryDirectory(prefix="foam-bench-") as folder:
        path = Path(folder) / "random.gguf"
        write_random_model(path)
        rows += compare("random, 82 M", path, rounds=2, max_tokens=32)
    return rows
