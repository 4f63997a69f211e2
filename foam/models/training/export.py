"""From a trained network to a GGUF file that llama.cpp runs.

What llama.cpp wants otherwise than torch has it: rotary pairs are neighbours, so the rows of
queries and keys change places; tokens stay in their byte-level spelling; special tokens are marked
as control tokens; a missing output matrix means that the embeddings serve twice.
"""

import json
from pathlib import Path
from typing import Any, Final, Literal

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from foam.models.training.network import LanguageModel
from foam.models.training.tokenizer import BOS, END, PAD, PRE_TOKENIZER, SPECIAL

__all__ = ["CHAT_TEMPLATE", "Weights", "export"]

Weights = Literal["f32", "f16", "q8_0"]

CHAT_TEMPLATE: Final = (
    # llama-cpp-python takes a rendered template as complete: without the first token in it, the
    # model gets prompts that it was never trained on.
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Writes a conversation as `foam.models.training.tokenizer.encode` does: roles system, user,
assistant and tool."""

_TYPES: Final = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_PARTS: Final = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "feed_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
"""Parts of a block, in llama.cpp's names."""


def export(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: Path,
    *,
    weights: Weights = "q8_0",
    name: str = "foam-tiny",
) -> None:
    """Write a model and its tokenizer into one GGUF file.

    Args:
        model: The network.
        tokenizer: With as many entries as the model has embeddings.
        path: File to write; replaced if there.
        weights: How matrices are stored; norms stay f32. ``q8_0`` needs widths of whole 32s.
        name: Of the model, in the file.

    Raises:
        ValueError: Tokenizer and model do not fit.
    """
    shape = model.shape
    if tokenizer.get_vocab_size() != shape.vocabulary:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} entries, the model "
            f"{shape.vocabulary}: export a model with the tokenizer it was trained with"
        )
    kind, file_type = _TYPES[weights]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(name)
    writer.add_license("apache-2.0")
    writer.add_file_type(file_type)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(shape.theta)
    writer.add_vocab_size(shape.vocabulary)
    _add_tokenizer(writer, tokenizer)
    for label, weight in model.state_dict().items():
        array = weight.float().numpy()
        target = _target(label)
        if target.endswith(("attn_q.weight", "attn_k.weight")):
            array = _as_neighbours(array, head=shape.width // shape.heads)
        array = np.ascontiguousarray(array, dtype=np.float32)
        if array.ndim == 1:
            writer.add_tensor(target, array)
        else:
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _target(label: str) -> str:
    if label == "embedding.weight":
        return "token_embd.weight"
    if label == "norm.weight":
        return "output_norm.weight"
    _, number, part, kind = label.split(".")
    return f"blk.{number}.{_PARTS[part]}.{kind}"


def _as_neighbours(rows: NDArray[np.float32], *, head: int) -> NDArray[np.float32]:
    """Bring row i and row i + head/2 of each head next to each other."""
    heads = rows.shape[0] // head
    pairs = rows.reshape(heads, 2, head // 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    size = tokenizer.get_vocab_size()
    spelling = [str(tokenizer.id_to_token(number)) for number in range(size)]
    special = set(SPECIAL)
    kinds = [gguf.TokenType.CONTROL if s in special else gguf.TokenType.NORMAL for s in spelling]
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(spelling)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)
