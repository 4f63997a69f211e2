"""Choosing tokens natively: chains of samplers, grammars, and how sure the model was."""

import ctypes
import json
import re
from collections import OrderedDict
from typing import Any, Final

from llama_cpp import llama_grammar

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import Prompt
from node_agent.worker.engines.llama_cpp.weights import NativeModel, forget, native, why
from node_agent.worker.engines.scheduler import Sampler

_GRAMMARS: Final = 64
"""Grammars that are kept; making one again takes some tenths of a millisecond."""


_REPEATS: Final = 1024
"""Most repetitions that a grammar counts: it spells each one out, nested, and llama.cpp reads nests
by recursion, which overflows its stack at some 20 000."""

_GRAMMAR_BYTES: Final = 1 << 20
"""Longest grammar; those of useful schemas have a few thousand bytes."""

_COUNTS: Final = re.compile(r"\{(\d*),?(\d*)\}")
"""Counts in a regular expression."""


class ChainSampler:
    """A native chain of samplers."""

    def __init__(self, context: Any, *links: Any) -> None:
        self._context = context
        self.chain = native.llama_sampler_chain_init(native.llama_sampler_chain_default_params())
        for link in links:
            native.llama_sampler_chain_add(self.chain, link)

    def sample(self, output: int) -> int:
        """Choose and accept a token."""
        return int(native.llama_sampler_sample(self.chain, self._context, output))

    def free(self) -> None:
        """Free the chain and its links."""
        native.llama_sampler_free(self.chain)


class GrammarSampler:
    """A chain under a grammar, which is applied to the chosen token first and rarely to all.

    When the grammar refuses the token, all tokens are filtered and the choice is made again, as in
    ``common_sampler_sample`` of llama.cpp.

    Args:
        free: The chain without the grammar.
        bound: The chain whose first link is the grammar.
    """

    def __init__(self, free: ChainSampler, bound: ChainSampler) -> None:
        self._free = free
        self._bound = bound
        self._grammar = native.llama_sampler_chain_get(bound.chain, 0)
        self._one: Any = native.llama_token_data()
        self._array = native.llama_token_data_array(ctypes.pointer(self._one), 1, -1, False)
        self._pointer = ctypes.byref(self._array)

    def sample(self, output: int) -> int:
        """Choose and accept a token."""
        token = self._free.sample(output)
        self._one.id, self._one.logit, self._one.p = token, 1.0, 0.0
        self._array.size, self._array.selected = 1, -1
        native.llama_sampler_apply(self._grammar, self._pointer)
        if self._one.logit == float("-inf"):
            return self._bound.sample(output)
        native.llama_sampler_accept(self._grammar, token)
        return token

    def free(self) -> None:
        """Free both chains."""
        self._free.free()
        self._bound.free()


class Samplers:
    """Makes the samplers of one context, and keeps their grammars.

    Args:
        model: The vocabulary.
        context: The context whose outputs are chosen from.
    """

    def __init__(self, model: NativeModel, context: Any) -> None:
        self._model = model
        self._context = context
        self._grammars: OrderedDict[str, Any] = OrderedDict()

    def make(self, prompt: Prompt) -> Sampler:
        """Make the sampler of an answer.

        Raises:
            InvocationError: Its schema makes no grammar.
        """
        if prompt.schema is None:
            return ChainSampler(self._context, *_links(prompt))
        grammar = native.llama_sampler_clone(self._grammar(prompt.schema))
        return GrammarSampler(
            ChainSampler(self._context, *_links(prompt)),
            ChainSampler(self._context, grammar, *_links(prompt)),
        )

    def close(self) -> None:
        """Free the grammars."""
        for grammar in self._grammars.values():
            native.llama_sampler_free(grammar)
        self._grammars.clear()

    def _grammar(self, schema: Any) -> Any:
        # The order of the properties is the order in which the model writes them: never sort it.
        key = json.dumps(schema)
        if key not in self._grammars:
            self._grammars[key] = self._made_grammar(key)
            if len(self._grammars) > _GRAMMARS:
                native.llama_sampler_free(self._grammars.popitem(last=False)[1])
        self._grammars.move_to_end(key)
        return self._grammars[key]

    def _made_grammar(self, schema: str) -> Any:
        forget()
        try:
            text = llama_grammar.json_schema_to_gbnf(json.dumps(bounded(json.loads(schema))))
        except InvocationError:
            raise
        except Exception as exc:  # it raises what it likes on schemas that it does not know
            said = f"{type(exc).__name__}: {exc}"[:500]
            raise InvocationError(
                "execution_failed", f"the output schema makes no grammar: {said}"
            ) from exc
        if len(text) > _GRAMMAR_BYTES:
            raise _too_much(f"its grammar has {len(text)} bytes, {_GRAMMAR_BYTES} may be")
        made = native.llama_sampler_init_grammar(self._model.vocabulary, text.encode(), b"root")
        if not made:
            raise InvocationError(
                "execution_failed", f"the output schema makes no grammar: {why()}"
            )
        return made


def bounded(schema: Any) -> Any:
    """Return a JSON Schema whose grammar has a bearable size.

    An upper limit of more than `_REPEATS` repetitions is left out: the grammar is then wider, and
    whoever checks the answer against the schema still sees it.

    Raises:
        InvocationError: It demands more repetitions than that.
    """
    if isinstance(schema, list):
        return [bounded(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for name, value in schema.items():
        if name in ("maxLength", "maxItems") and _is_many(value):
            continue
        if name in ("minLength", "minItems") and _is_many(value):
            raise _too_much(f"{name} is {value}, {_REPEATS} may be")
        if name == "pattern" and isinstance(value, str):
            for count in (count for found in _COUNTS.findall(value) for count in found if count):
                if len(count) > len(str(_REPEATS)) or int(count) > _REPEATS:
                    raise _too_much(f"pattern counts to {count[:20]}, {_REPEATS} may be")
        made[name] = bounded(value)
    return made


def _is_many(value: Any) -> bool:
    return isinstance(value, int | float) and value > _REPEATS


def _too_much(why: str) -> InvocationError:
    return InvocationError("execution_failed", f"the output schema makes no grammar: {why}")


def _links(prompt: Prompt) -> list[Any]:
    if prompt.temperature <= 0:
        return [native.llama_sampler_init_greedy()]
    return [
        native.llama_sampler_init_top_k(prompt.top_k),
        native.llama_sampler_init_top_p(prompt.top_p, 1),
        native.llama_sampler_init_min_p(prompt.min_p, 1),
        native.llama_sampler_init_temp(prompt.temperature),
        native.llama_sampler_init_dist(prompt.seed),
    ]
