"""The tokens of the demo model: byte-level BPE with single digits, and the form of a conversation.

A conversation is ``<|bos|>``, then each message as its role's token and its text, an assistant's
closed by ``<|end|>``: ``<|bos|><|user|>TEXT<|assistant|>ANSWER<|end|>``. The chat template in the
model file (`foam.models.training.export`) writes the same, so that llama.cpp sees the ids of the
training.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from foam.models.training.corpus import Corpus, Example

__all__ = ["BOS", "END", "PAD", "PRE_TOKENIZER", "ROLES", "SPECIAL", "encode", "learn", "load"]

SPECIAL: Final = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|tool|>",
)
"""Tokens with a meaning of their own; the place in this list is the id."""
PAD, BOS, END = 0, 1, 2
ROLES: Final = {"user": 3, "assistant": 4, "system": 5, "tool": 6}
PRE_TOKENIZER: Final = "qwen2"
"""llama.cpp's name for `_WORDS`."""
_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PROMPT_WEIGHT: Final = 0.05
_SHORT: Final = 10


def learn(*, size: int = 1024, examples: int = 20_000, seed: int = 1) -> Tokenizer:
    """Learn a vocabulary from the corpus.

    Args:
        size: Entries, at least the 256 bytes and `SPECIAL`.
        examples: How many examples to read.
        seed: Of the corpus.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        # Every byte, so that any input can be written.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        corpus = Corpus(random.Random(seed))
        for _ in range(examples):
            example = corpus.training()
            yield from (text for _, text in example.turns)
            yield example.answer

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def load(path: Path) -> Tokenizer:
    """Read a vocabulary that was saved with its ``save`` method."""
    return Tokenizer.from_file(str(path))


def encode(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[float]]:
    """Turn an example into ids and the weight of each id in the loss.

    Each token that the assistant says counts 1, everything else a little: the model is to answer,
    yet learns from the questions how texts go on. The tokens of a short answer count more, as much
    together as ten, or one word would drown among the long answers of other tasks. An earlier call
    counts where its tools are on a list.

    Returns:
        Ids and weights, of equal length; the first weight, of ``<|bos|>``, is 0.
    """
    ids, weights = [BOS], [0.0]
    with_tools = example.turns[0][0] == "system"
    for place, (role, text) in enumerate((*example.turns, ("assistant", example.answer))):
        own = role == "assistant"
        counts = own and (with_tools or place == len(example.turns))
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        ids += [ROLES[role], *tokens, *([END] if own else [])]
        weights += [_PROMPT_WEIGHT]
        weights += [max(1.0, _SHORT / (len(tokens) + 1)) if counts else _PROMPT_WEIGHT] * (
            len(tokens) + own
        )
    return ids, weights
