"""A model with a context of several sequences, as the scheduler works it."""

import ctypes
import math
import re
from typing import Any, Final

from llama_cpp import llama_chat_format

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import EngineOptions, Prompt
from node_agent.worker.engines.chat import (
    ANSWER_FORM,
    PLAIN_TOOLS,
    Message,
    guarded_ids,
    harmless,
    native_messages,
    plain_messages,
    state_tools,
    with_system,
)
from node_agent.worker.engines.llama_cpp.sampling import Samplers
from node_agent.worker.engines.llama_cpp.weights import (
    Batch,
    NativeModel,
    context_parameters,
    forget,
    native,
    numpy,
    why,
)
from node_agent.worker.engines.scheduler import Sampler

_KNOWS_TOOLS: Final = re.compile(r"\btools\b")
"""What a chat template that states tools itself has in it."""


class LlamaBackend:
    """A model with a context of several sequences; see `scheduler.Backend`.

    Args:
        model: The weights.
        options: Context and adapters.

    Raises:
        InvocationError: The context does not fit, or an adapter does not belong to the model.
    """

    def __init__(self, model: NativeModel, options: EngineOptions) -> None:
        self._model = model
        self.n_ctx = options.n_ctx or native.llama_model_n_ctx_train(model.handle)
        self.n_batch = max(options.n_batch, options.parallel)
        self.context = model.context(
            context_parameters(
                n_ctx=self.n_ctx * options.parallel,
                n_batch=self.n_batch,
                n_threads=options.n_threads,
                sequences=options.parallel,
            )
        )
        self._memory = native.llama_get_memory(self.context)
        if not self._memory or native.llama_model_has_encoder(model.handle):
            raise InvocationError(
                "internal",
                f"model {options.model} does not continue text: for vectors use the runtime"
                " embeddings, for text take a decoder model",
            )
        self._set_adapters(options)
        self._batch = Batch(self.n_batch, options.parallel)
        self._rows: dict[int, tuple[int, list[Any]]] = {}
        self._work = numpy.empty(model.n_vocab, numpy.float32)
        self._samplers = Samplers(model, self.context)
        template = model.metadata("tokenizer.chat_template")
        self._knows_tools = bool(template and _KNOWS_TOOLS.search(template))
        self._formatter: Any = template and llama_chat_format.Jinja2ChatFormatter(
            template=template,
            eos_token=model.text_of(native.llama_vocab_eos(model.vocabulary)),
            bos_token=model.text_of(model.bos),
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt.

        The template of the GGUF is rendered as it stands; a missing beginning-of-sequence token is
        added where the model wants one.
        """
        messages, tools = self._stated(prompt)
        model = self._model
        ids = guarded_ids(messages, lambda given: self._render(given, tools), model.tokenize)
        if (
            ids[:1] != [model.bos]
            and model.bos >= 0
            and native.llama_vocab_get_add_bos(model.vocabulary)
        ):
            ids = [model.bos, *ids]
        return ids

    def tokenize(self, text: str) -> list[int]:
        """Cut a text into tokens, without marks around it and without special ones in it."""
        return self._model.tokenize(text, False)

    def sampler(self, prompt: Prompt) -> Sampler:
        """Make the sampler of an answer."""
        return self._samplers.make(prompt)

    def decode(
        self, tokens: list[int], positions: list[int], sequences: list[int], outputs: list[int]
    ) -> None:
        """Decode a batch; see `scheduler.Backend`."""
        code = native.llama_decode(
            self.context, self._batch.fill(tokens, positions, sequences, outputs)
        )
        if code != 0:
            raise InvocationError(
                "execution_failed", f"llama.cpp could not decode (code {code}): {why()}"
            )

    def certainties(self, tokens: list[int]) -> list[float]:
        """Return the log probability of one token for each output of the last batch."""
        work, found = self._work, []
        # Row by row: one row fits into the fastest cache, and a plain function call costs less than
        # the bookkeeping for two dimensions.
        for row, token in zip(self._logits(len(tokens)), tokens, strict=True):
            peak = numpy.maximum.reduce(row)
            numpy.subtract(row, peak, out=work)
            logarithm = float(work[token])
            numpy.exp(work, out=work)
            found.append(logarithm - math.log(numpy.add.reduce(work)))
        return found

    def piece(self, token: int) -> bytes | None:
        """Return the bytes of a token; None for one that ends an answer."""
        return self._model.piece(token)

    def copy(self, source: int, target: int) -> bool:
        """Make a sequence equal to another one; llama.cpp copies whole sequences only."""
        self.cut(target, 0)
        native.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        pos_max = native.llama_memory_seq_pos_max
        return bool(pos_max(self._memory, target) == pos_max(self._memory, source))

    def cut(self, sequence: int, length: int) -> bool:
        """Forget what follows the first tokens; recurrent models can only forget everything."""
        if native.llama_memory_seq_rm(self._memory, sequence, length, -1):
            return True
        native.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return False

    def close(self) -> None:
        """Free the context."""
        self._samplers.close()
        native.llama_free(self.context)

    def _logits(self, count: int) -> list[Any]:
        """Return the outputs of the last batch, each an array as long as the vocabulary."""
        address = ctypes.addressof(native.llama_get_logits(self.context).contents)
        known = self._rows.get(count)
        if known is None or known[0] != address:
            width = self._model.n_vocab
            kind = ctypes.c_float * (count * width)
            rows = numpy.frombuffer(kind.from_address(address), dtype=numpy.float32)
            known = self._rows[count] = (address, list(rows.reshape(count, width)))
        return known[1]

    def _stated(self, prompt: Prompt) -> tuple[list[Message], list[Any] | None]:
        """Return the messages for the template, and the tools where the template states them."""
        if self._knows_tools and prompt.tools_template is None:
            specials = self._model.specials
            messages = [
                {**harmless({**message, "content": None}, specials), "content": message["content"]}
                for message in native_messages(prompt.messages)
            ]
            if not prompt.tools:
                return messages, None
            given = [harmless(tool, specials) for tool in prompt.tools]
            tools = [{"type": "function", "function": tool} for tool in given]
            return with_system(messages, ANSWER_FORM), tools
        messages = plain_messages(prompt.messages)
        if prompt.tools:
            template = prompt.tools_template or PLAIN_TOOLS
            messages = state_tools(messages, prompt.tools, template)
        return messages, None

    def _render(self, messages: list[Message], tools: list[Any] | None) -> str:
        if not self._formatter:  # a base model: it continues text
            return "\n\n".join(str(message["content"]) for message in messages)
        try:
            return str(self._formatter(messages=messages, tools=tools).prompt)
        except Exception as exc:  # templates raise what they like, for example for a system message
            raise InvocationError("execution_failed", f"the chat template refuses: {exc}") from exc

    def _set_adapters(self, options: EngineOptions) -> None:
        if not options.lora:
            return
        handles = []
        for path, _ in options.lora:
            forget()
            handle = native.llama_adapter_lora_init(self._model.handle, path.encode())
            if not handle:
                raise InvocationError(
                    "internal", f"lora {path} cannot be loaded for {options.model}: {why()}"
                )
            handles.append(handle)
        adapters = (native.llama_adapter_lora_p_ctypes * len(handles))(*handles)
        scales = (ctypes.c_float * len(handles))(*(scale for _, scale in options.lora))
        native.llama_set_adapters_lora(self.context, adapters, len(handles), scales)
