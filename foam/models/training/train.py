"""The trainer: steps over the corpus on one processor core, with checkpoints that resume exactly.

Hidden matrices are trained by Muon (Jordan et al. 2024), embeddings and norms by AdamW. The rate
rises for 60 steps, stays, and falls in a straight line over the last part of the run
(warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395). A stopped run may therefore be continued
with another number of steps: nothing before the decay depends on where the run ends.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from foam.models.training import tokenizer as tokens
from foam.models.training.corpus import Corpus
from foam.models.training.network import LanguageModel, Shape

__all__ = ["Batches", "Plan", "Trainer", "load_model"]

_WARM_UP: Final = 60
_POOL: Final = 6000
_LOWEST: Final = 0.01


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train, and for how long.

    Attributes:
        steps: Length of the whole run, counted from its start.
        decay: Part of the run, 0 to 1, over which the rate falls at its end.
        batch_tokens: Tokens of a step, padding included.
        matrix_rate: Highest rate of Muon.
        other_rate: Highest rate of AdamW.
        seed: Of weights and examples.
        weights: Shares of tasks that differ from the corpus's own.
        plain: Part of the requests about readings in one wording (`Corpus`).
    """

    steps: int = 4000
    decay: float = 0.5
    batch_tokens: int = 3072
    matrix_rate: float = 0.02
    other_rate: float = 4e-3
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)
    plain: float = 0.0

    def rate(self, step: int) -> float:
        """Return the part of the highest rate that a step uses, above 0 and at most 1."""
        left = (self.steps - step) / max(1, round(self.steps * self.decay))
        return max(_LOWEST, min(1.0, (step + 1) / _WARM_UP, left))


class Batches:
    """Batches of examples of like length, from a seeded corpus.

    Args:
        tokenizer: Writes the ids.
        plan: Batch size and task shares.
        seed: Of the examples.
    """

    def __init__(self, tokenizer: Tokenizer, plan: Plan, *, seed: int) -> None:
        self._tokenizer = tokenizer
        self._plan = plan
        self._rng = random.Random(seed)
        self._start = self._rng.getstate()
        self._used = 0
        self._pool: list[list[tuple[list[int], list[float]]]] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Return ids and weights, both of shape (examples, longest of them)."""
        if self._used == len(self._pool):
            self._start, self._used = self._rng.getstate(), 0
            self._pool = self._draw_pool()
        batch = self._pool[self._used]
        self._used += 1
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.full((len(batch), longest), tokens.PAD)
        weights = torch.zeros(len(batch), longest)
        for row, (row_ids, row_weights) in enumerate(batch):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            weights[row, : len(row_ids)] = torch.tensor(row_weights)
        return ids, weights

    def state(self) -> dict[str, Any]:
        """Return where the stream is, for `restore`."""
        return {"start": self._start, "used": self._used}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a place in the stream: what follows is what followed there."""
        self._start, self._used = state["start"], state["used"]
        self._rng.setstate(self._start)
        self._pool = self._draw_pool() if self._used else []

    def _draw_pool(self) -> list[list[tuple[list[int], list[float]]]]:
        corpus = Corpus(self._rng, self._plan.weights, plain=self._plan.plain)
        drawn = [tokens.encode(self._tokenizer, corpus.training()) for _ in range(_POOL)]
        drawn.sort(key=lambda pair: len(pair[0]))
        batches: list[list[tuple[list[int], list[float]]]] = [[]]
        for pair in drawn:
            if batches[-1] and (len(batches[-1]) + 1) * len(pair[0]) > self._plan.batch_tokens:
                batches.append([])
            batches[-1].append(pair)
        self._rng.shuffle(batches)
        return batches


class Trainer:
    """One run in one folder: ``tokenizer.json``, ``checkpoint.pt``, ``log.jsonl``.

    Args:
        folder: Where the run lives; made if missing.
        plan: What to do. The plan of a resumed run may differ in everything but the seed.
        shape: Sizes of a new model; None for the shipped one's. A resumed model keeps its own.
        tokenizer: Vocabulary of a new run; learned from the corpus when None.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        shape: Shape | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._plan = folder, plan
        self.step = 0
        if (folder / "checkpoint.pt").exists():
            self._tokenizer = tokens.load(folder / "tokenizer.json")
            saved = _read(folder / "checkpoint.pt")
            self.model = LanguageModel(Shape(**saved["shape"]))
        else:
            saved = None
            self._tokenizer = tokenizer or tokens.learn()
            self._tokenizer.save(str(folder / "tokenizer.json"))
            size = self._tokenizer.get_vocab_size()
            self.model = LanguageModel(shape or Shape(vocabulary=size), seed=plan.seed)
        matrices = self.model.hidden_matrices()
        known = {id(weight) for weight in matrices}
        others = [weight for weight in self.model.parameters() if id(weight) not in known]
        self._optimizers: dict[str, tuple[torch.optim.Optimizer, float]] = {
            "matrices": (
                torch.optim.Muon(matrices, plan.matrix_rate, momentum=0.95, weight_decay=0.01),
                plan.matrix_rate,
            ),
            "others": (
                torch.optim.AdamW(others, plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
                plan.other_rate,
            ),
        }
        self._batches = Batches(self._tokenizer, plan, seed=plan.seed)
        if saved is not None:
            self._restore(saved)

    def run(
        self, *, save_every: int = 200, report: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """Train to the last step of the plan, saving now and then and at the end.

        Args:
            save_every: Steps between checkpoints. An interrupted run loses what came after one.
            report: Called with a line of figures every 20 steps: step, mean answer loss since the
                last line (nats per token) and the rate.
        """
        losses: list[float] = []
        while self.step < self._plan.steps:
            losses.append(self.take_step())
            if self.step % 20 == 0 or self.step == self._plan.steps:
                mean = sum(losses) / len(losses)
                rate = self._plan.rate(self.step)
                line = {"step": self.step, "loss": round(mean, 4), "rate": round(rate, 4)}
                with (self._folder / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                if report is not None:
                    report(line)
                losses = []
            if self.step % save_every == 0 or self.step == self._plan.steps:
                self.save()

    def take_step(self) -> float:
        """Learn from one batch; return its mean loss per answer token, nats."""
        ids, weights = next(self._batches)
        counted = weights[:, 1:] > 0
        weight, wanted = weights[:, 1:][counted], ids[:, 1:][counted]
        with torch.autocast("cpu", torch.bfloat16):
            scores = self.model.logits(self.model.hidden(ids[:, :-1])[counted])
        losses = functional.cross_entropy(scores.float(), wanted, reduction="none")
        self.model.zero_grad(set_to_none=True)
        ((losses * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        part = self._plan.rate(self.step)
        for optimizer, highest in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = highest * part
            optimizer.step()
        self.step += 1
        return float(losses.detach()[weight >= 1].mean())

    def save(self) -> None:
        """Write the checkpoint; a crash while writing leaves the previous one."""
        content = {
            "shape": asdict(self.model.shape),
            "model": self.model.state_dict(),
            "step": self.step,
            "seed": self._plan.seed,
            "weights": dict(self._plan.weights),
            "plain": self._plan.plain,
            "batches": self._batches.state(),
            **{name: optimizer.state_dict() for name, (optimizer, _) in self._optimizers.items()},
        }
        partial = self._folder / "checkpoint.pt.partial"
        torch.save(content, partial)
        partial.replace(self._folder / "checkpoint.pt")

    def _restore(self, saved: Mapping[str, Any]) -> None:
        if saved["seed"] != self._plan.seed:
            raise ValueError(
                f"the run in {self._folder} has seed {saved['seed']}, not {self._plan.seed}: "
                "continue it with its own seed or start in another folder"
            )
        self.model.load_state_dict(saved["model"])
        self.step = saved["step"]
        for name, (optimizer, _) in self._optimizers.items():
            optimizer.load_state_dict(saved[name])
        mix = (saved["weights"], saved.get("plain", 0.0))
        if mix == (dict(self._plan.weights), self._plan.plain):
            self._batches.restore(saved["batches"])
        else:  # another mix: a stream of its own, which no earlier step has seen
            self._batches = Batches(self._tokenizer, self._plan, seed=self._plan.seed + self.step)


def load_model(folder: Path) -> LanguageModel:
    """Read the model of a run's checkpoint."""
    saved = _read(folder / "checkpoint.pt")
    model = LanguageModel(Shape(**saved["shape"]))
    model.load_state_dict(saved["model"])
    model.eval()
    return model


def _read(path: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    return saved
