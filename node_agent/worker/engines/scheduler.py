"""Continuous batching: several answers from one model, a token of each in every decode.

One thread owns the model: two inside one are an uncatchable abort in native code. Each step decodes
the newest token of every running answer together with a piece of the prompts that wait, sized by
the measured speed so that a decode stays below `PIECE_S`. A cancelled call is dropped between two
decodes, so that bound is also how long a cancel takes inside a prompt; the abort callback of
llama.cpp would end the others' decode as well, and is not needed.

An answer that was begun elsewhere is said again first (`repetition`): its tokens are drafted from
the text that was shown, many for one decode, and the model confirms them.

As in every batched engine, a floating-point sum may come out differently in another batch: answers
of a well-trained model do not change with their company, near ties could.
"""

import bisect
import codecs
import math
import queue
import time
import traceback
from collections import deque
from typing import Final, Protocol

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import Completion, Job, Prompt, StopScanner, overflow
from node_agent.worker.engines.prefixes import Sequence, place
from node_agent.worker.engines.repetition import ANOTHER, DRAFTED, Repetition

PIECE_S: Final = 0.100
"""Longest piece of prompts when nobody else decodes, seconds."""

SHARED_PIECE_S: Final = 0.040
"""The same beside running answers, which wait for it."""

LEAST_PIECE: Final = 8
"""Smallest piece, tokens; smaller ones waste more than they save."""

_WEIGHT: Final = 0.3
"""Weight of the newest piece in the smoothed prompt speed."""


class Sampler(Protocol):
    """Chooses the tokens of one answer."""

    def sample(self, output: int) -> int:
        """Choose the token that follows the output at this place of the last batch."""
        ...

    def free(self) -> None:
        """Give its memory back."""
        ...


class Backend(Protocol):
    """A model with a context of several sequences; one thread at a time."""

    @property
    def n_ctx(self) -> int:
        """Longest sequence, tokens."""
        ...

    @property
    def n_batch(self) -> int:
        """Most tokens of one decode."""
        ...

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Cut a text into tokens, without marks around it and without special ones in it."""
        ...

    def sampler(self, prompt: Prompt) -> Sampler:
        """Make the sampler of an answer."""
        ...

    def decode(
        self, tokens: list[int], positions: list[int], sequences: list[int], outputs: list[int]
    ) -> None:
        """Decode a batch.

        Args:
            tokens: Token ids.
            positions: Where each stands in its sequence.
            sequences: The sequence of each.
            outputs: Places in the batch after which a token will be chosen, ascending.

        Raises:
            InvocationError: The engine could not.
        """
        ...

    def certainties(self, tokens: list[int]) -> list[float]:
        """Return the log probability of one token for each output of the last batch."""
        ...

    def piece(self, token: int) -> bytes | None:
        """Return the bytes of a token; None for one that ends an answer."""
        ...

    def copy(self, source: int, target: int) -> bool:
        """Make a sequence equal to another one; False when it could not."""
        ...

    def cut(self, sequence: int, length: int) -> bool:
        """Forget what follows the first tokens of a sequence; False: all had to be forgotten."""
        ...


class _Run:
    """One answer under way."""

    __slots__ = (
        "cached",
        "count",
        "decoder",
        "first_at",
        "ids",
        "job",
        "limit",
        "lowest",
        "pending",
        "repetition",
        "sampler",
        "scanner",
        "sequence",
        "started",
        "strict",
        "token",
    )

    def __init__(
        self, job: Job, ids: list[int], sequence: Sequence, sampler: Sampler, started: float
    ) -> None:
        self.job = job
        self.ids = ids
        self.sequence = sequence
        self.sampler = sampler
        self.started = started
        self.cached = len(sequence.tokens)
        self.limit = 0
        self.count = 0
        self.token = -1
        self.lowest = 0.0
        self.first_at = 0.0
        self.scanner: StopScanner | None = None
        self.repetition: Repetition | None = None
        self.strict = False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.pending = False


class Scheduler:
    """Runs jobs on a backend.

    Args:
        backend: The model.
        sequences: Answers at a time.
        prefill_token_s: Time of one prompt token in a piece, seconds, as first measured.
        copy_s: Time of copying one sequence into another, seconds.
        worth_batching: Fewest answers that are decoded faster together than one by one. The kernels
            for several rows can be slower per row than the one for a single row.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        sequences: int,
        prefill_token_s: float,
        copy_s: float = 0.0,
        worth_batching: int = 2,
    ) -> None:
        self._backend = backend
        self._prefill_token_s = prefill_token_s
        self._copy_s = copy_s
        self._worth_batching = worth_batching
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._sequences = [Sequence(number) for number in range(sequences)]
        self._runs: list[_Run] = []
        self._texts: dict[int, str | None] = {}
        self._uses = 0
        self._stopping = False

    @property
    def running(self) -> int:
        """Answers under way."""
        return len(self._runs)

    @property
    def held(self) -> list[list[int]]:
        """Tokens that each sequence holds, for whoever wants to look."""
        return [list(sequence.tokens) for sequence in self._sequences]

    def submit(self, job: Job) -> None:
        """Take a job; any thread may call it."""
        self._inbox.put(job)

    def stop(self) -> None:
        """Make ``run`` return once nothing is under way; any thread may call it."""
        self._inbox.put(None)

    def run(self) -> None:
        """Work until ``stop``."""
        while not self._stopping or self._runs or self._waiting:
            if not self.step() and not self._stopping:
                self._take(self._inbox.get())

    def step(self) -> bool:
        """Admit, decode once and hand out what came; returns whether anything is under way."""
        while not self._inbox.empty():
            self._take(self._inbox.get())
        self._drop_cancelled()
        self._admit()
        for runs in self._together():
            self._decode(runs)
        return bool(self._runs or self._waiting)

    def _together(self) -> list[list[_Run]]:
        """Return the answers under way as they are decoded: all at once where that pays."""
        saying = [run for run in self._runs if run.count]
        if not 1 < len(saying) < self._worth_batching:
            return [list(self._runs)] if self._runs else []
        prompts = [run for run in self._runs if not run.count]
        return [[run] for run in saying] + ([prompts] if prompts else [])

    def _take(self, job: Job | None) -> None:
        if job is None:
            self._stopping = True
        else:
            self._waiting.append(job)

    def _drop_cancelled(self) -> None:
        for run in [one for one in self._runs if one.job.cancelled.is_set()]:
            self._end(run, "cancelled")
        for job in [one for one in self._waiting if one.cancelled.is_set()]:
            self._waiting.remove(job)
            job.on_end(Completion(finish="cancelled"))

    def _admit(self) -> None:
        while self._waiting and len(self._runs) < len(self._sequences):
            job = self._waiting.popleft()
            try:
                self._start(job)
            except InvocationError as exc:
                job.on_end(exc)
            except Exception as exc:  # noqa: BLE001 - supervision boundary: `prepare` is user code
                traceback.print_exception(exc)
                job.on_end(exc)

    def _start(self, job: Job) -> None:
        started = time.monotonic()
        prompt = job.prompt()
        ids = self._backend.encode(prompt)
        room = self._backend.n_ctx - len(ids)
        if room <= 0 or not ids:
            raise overflow(len(ids), self._backend.n_ctx)
        sampler = self._backend.sampler(prompt)
        sequence = self._occupy(ids, prompt.session)
        run = _Run(job, ids, sequence, sampler, started)
        run.limit = room if prompt.max_tokens is None else min(prompt.max_tokens, room)
        run.scanner = StopScanner(prompt.stop) if prompt.stop else None
        if prompt.shown:
            backend, run.strict = self._backend, prompt.schema is not None
            run.repetition = Repetition(
                prompt.shown, tokenize=backend.tokenize, piece=backend.piece
            )
        # In the order of their sequences: llama.cpp computes neighbours in one go.
        bisect.insort(self._runs, run, key=lambda one: one.sequence.number)

    def _occupy(self, ids: list[int], session: str | None) -> Sequence:
        """Put a prompt into a sequence that holds as much of it as can be."""
        least_copied = math.ceil(self._copy_s / max(self._prefill_token_s, 1e-9))
        placed = place(self._sequences, ids, session, least_copied=least_copied)
        if placed is None:
            raise InvocationError("internal", "no sequence is free")
        target, shared = placed.target, placed.shared
        if placed.source is None or placed.source is target:
            kept = self._backend.cut(target.number, shared)
        else:
            kept = self._backend.copy(placed.source.number, target.number)
            kept = self._backend.cut(target.number, shared) and kept
        target.tokens = ids[:shared] if kept else []
        target.session = session
        target.busy = True
        return target

    def _decode(self, runs: list[_Run]) -> None:
        pieces = self._pieces(runs)
        drafts = self._drafts(runs, self._backend.n_batch - sum(pieces.values()))
        tokens: list[int] = []
        positions: list[int] = []
        numbers: list[int] = []
        outputs: list[int] = []
        ready: list[tuple[_Run, list[int]]] = []
        for run in runs:
            held = len(run.sequence.tokens)
            piece = pieces.get(run, 0)
            new = [run.token, *drafts[run]] if run.count else run.ids[held : held + piece]
            tokens += new
            positions += range(held, held + len(new))
            numbers += [run.sequence.number] * len(new)
            if run.count or (new and held + len(new) == len(run.ids)):
                last = len(tokens)
                places = list(range(last - len(new) if run.count else last - 1, last))
                outputs += places
                ready.append((run, places))
        started = time.monotonic()
        try:
            self._backend.decode(tokens, positions, numbers, outputs)
        except InvocationError as exc:
            self._apart(runs, exc)
            return
        now = time.monotonic()
        self._keep(runs, pieces, drafts)
        if len(pieces) == len(runs) and len(tokens) >= LEAST_PIECE:
            measured = (now - started) / len(tokens)
            self._prefill_token_s += _WEIGHT * (measured - self._prefill_token_s)
        if ready:
            self._choose(ready, drafts, now)

    def _apart(self, runs: list[_Run], error: InvocationError) -> None:
        """Decode answers one by one after a failure together: the one behind it fails alone."""
        for run in runs:
            held = len(run.sequence.tokens)
            if len(runs) > 1 and self._backend.cut(run.sequence.number, held):
                self._decode([run])
            else:
                self._end(run, error)

    def _pieces(self, runs: list[_Run]) -> dict[_Run, int]:
        """Share one decode among the prompts, first come first served; tokens for each."""
        prompts = [run for run in runs if not run.count]
        decoding = len(runs) - len(prompts)
        seconds = PIECE_S if len(prompts) == len(self._runs) else SHARED_PIECE_S
        room = max(LEAST_PIECE, int(seconds / max(self._prefill_token_s, 1e-9)))
        room = min(room, self._backend.n_batch - decoding)
        pieces: dict[_Run, int] = {}
        for run in sorted(prompts, key=lambda one: one.started):
            length = min(room, len(run.ids) - len(run.sequence.tokens))
            if length > 0:
                pieces[run] = length
                room -= length
        return pieces

    def _drafts(self, runs: list[_Run], room: int) -> dict[_Run, list[int]]:
        """Return the tokens to be confirmed of each answer that is said again; none of others."""
        saying = [run for run in runs if run.count]
        room -= len(saying)
        drafts: dict[_Run, list[int]] = {}
        for run in saying:
            most = min(DRAFTED, room, run.limit - run.count)
            again = run.repetition is not None and not run.repetition.over and most > 0
            drafts[run] = run.repetition.draft(most) if again and run.repetition else []
            room -= len(drafts[run])
        return drafts

    def _keep(
        self, runs: list[_Run], pieces: dict[_Run, int], drafts: dict[_Run, list[int]]
    ) -> None:
        """Note what the sequences hold now."""
        for run in runs:
            held = run.sequence.tokens
            if run.count:
                held += [run.token, *drafts[run]]
            else:
                held += run.ids[len(held) : len(held) + pieces.get(run, 0)]

    def _choose(
        self, ready: list[tuple[_Run, list[int]]], drafts: dict[_Run, list[int]], now: float
    ) -> None:
        chosen = [self._sample(run, places, drafts.get(run, [])) for run, places in ready]
        rows = [
            token
            for (_, places), tokens in zip(ready, chosen, strict=True)
            for token in tokens + [0] * (len(places) - len(tokens))
        ]
        certain = iter(self._backend.certainties(rows))
        for (run, places), tokens in zip(ready, chosen, strict=True):
            known = [next(certain) for _ in places]
            if not run.count:
                run.first_at = now
            if not tokens or not self._cut_back(run, len(places) - len(tokens)):
                self._end(run, InvocationError("execution_failed", ANOTHER))
                continue
            for token, logarithm in zip(tokens, known, strict=False):
                run.count += 1
                run.token = token
                run.lowest = min(run.lowest, logarithm)
                finish = self._say(run, token)
                if finish:
                    self._end(run, finish)
                    break

    def _sample(self, run: _Run, places: list[int], draft: list[int]) -> list[int]:
        """Choose tokens as far as the draft is confirmed; none when it cannot be said again."""
        tokens: list[int] = []
        for at, place_ in enumerate(places):
            token: int | None = run.sampler.sample(place_)
            if run.repetition is not None and token is not None:
                token = run.repetition.take(token)
                # A grammar has gone on with what was chosen, and cannot be told otherwise.
                if token is None or (run.strict and run.repetition.forced):
                    return []
            tokens.append(token if token is not None else 0)
            if at < len(draft) and token != draft[at]:
                break
        return tokens

    def _cut_back(self, run: _Run, excess: int) -> bool:
        """Forget the tokens of a draft that were not confirmed; tell whether that was possible."""
        if not excess:
            return True
        held = run.sequence.tokens
        del held[len(held) - excess :]
        return self._backend.cut(run.sequence.number, len(held))

    def _say(self, run: _Run, token: int) -> str:
        """Hand out the text of a token; returns why the answer ends with it, or nothing."""
        text = self._text(run, token)
        if text is None:
            return "stop"
        if run.scanner is not None:
            text = run.scanner.feed(text)
        self._hand_out(run, text)
        if run.scanner is not None and run.scanner.stopped:
            return "stopped"
        return "length" if run.count >= run.limit else ""

    def _hand_out(self, run: _Run, text: str) -> None:
        if run.repetition is not None:
            text = run.repetition.fresh(text)
        if text:
            run.job.on_text(text)

    def _text(self, run: _Run, token: int) -> str | None:
        """Return what a token adds to the text, whole characters only; None at the end."""
        if token not in self._texts:
            piece = self._backend.piece(token)
            try:
                self._texts[token] = None if piece is None else piece.decode()
            except UnicodeDecodeError:  # a part of a character
                self._texts[token] = ""
        text = self._texts[token]
        if text is None or (text and not run.pending):
            return text
        text = run.decoder.decode(self._backend.piece(token) or b"")
        run.pending = bool(run.decoder.getstate()[0])
        return text

    def _end(self, run: _Run, how: str | InvocationError) -> None:
        self._runs.remove(run)
        run.sampler.free()
        sequence = run.sequence
        sequence.busy = False
        self._uses += 1
        sequence.used = self._uses
        if not isinstance(how, str):  # nobody knows what the sequence holds now
            self._backend.cut(sequence.number, 0)
            sequence.tokens = []
            run.job.on_end(how)
            return
        if how in ("stop", "length"):
            rest = run.decoder.decode(b"", final=True)
            if run.scanner is not None:
                rest = run.scanner.feed(rest) + run.scanner.flush()
            self._hand_out(run, rest)
        ended = time.monotonic()
        first_at = run.first_at or ended
        run.job.on_end(
            Completion(
                input_tokens=len(run.ids),
                output_tokens=run.count,
                finish="stop" if how == "stopped" else how,
                cached_tokens=run.cached,
                confidence=math.exp(run.lowest) if run.count else None,
                prefill_ms=round((first_at - run.started) * 1000, 3),
                decode_ms=round((ended - first_at) * 1000, 3),
            )
        )
