"""Command line of the training: ``python -m foam.models.training COMMAND``.

``show`` prints examples, ``train`` trains, ``export`` writes a GGUF file, ``evaluate`` asks one.
"""

import argparse
import random
import sys
from pathlib import Path

import torch

from foam.models.training.corpus import TASKS, Corpus
from foam.models.training.evaluate import SETS, Score, evaluate
from foam.models.training.export import export
from foam.models.training.tokenizer import load
from foam.models.training.train import Plan, Trainer, load_model


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m foam.models.training", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="print examples of the corpus")
    show.add_argument("--task", choices=TASKS)
    show.add_argument("--count", type=int, default=10)
    show.add_argument("--seed", type=int, default=0)
    show.add_argument("--unseen", action="store_true", help="wordings that training never sees")
    show.set_defaults(run=_show)
    train = commands.add_parser("train", help="train, or continue what is in the folder")
    train.add_argument("folder", type=Path)
    train.add_argument("--steps", type=int, default=Plan().steps, help="of the whole run")
    train.add_argument("--decay", type=float, default=Plan().decay, help="part with falling rate")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--weight", action="append", default=[], metavar="TASK=SHARE", help="another share"
    )
    train.add_argument(
        "--plain", type=float, default=0.0, help="part of the readings in one wording a task"
    )
    train.set_defaults(run=_train)
    write = commands.add_parser("export", help="write the GGUF file of a trained model")
    write.add_argument("folder", type=Path)
    write.add_argument("model", type=Path)
    write.add_argument("--weights", choices=("f32", "f16", "q8_0"), default="q8_0")
    write.set_defaults(run=_export)
    ask = commands.add_parser("evaluate", help="exact match per task of a GGUF file")
    ask.add_argument("model", type=Path)
    ask.add_argument("--task", action="append", choices=TASKS)
    ask.add_argument("--set", action="append", choices=SETS, help="which sets (default all)")
    ask.add_argument("--count", type=int, default=100, help="prompts of each task in each set")
    ask.add_argument("--wrong", type=int, default=0, help="wrong answers to print of each")
    ask.set_defaults(run=_evaluate)
    return parser


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _show(args: argparse.Namespace) -> int:
    corpus = Corpus(random.Random(args.seed))
    for _ in range(args.count):
        example = corpus.draw(args.task, unseen=args.unseen)
        for role, text in (*example.turns, ("assistant", example.answer)):
            _say(f"{role}: {text}")
        _say("")
    return 0


def _train(args: argparse.Namespace) -> int:
    weights = {}
    for given in args.weight:
        task, _, share = given.partition("=")
        weights[task] = float(share)
    plan = Plan(
        steps=args.steps, decay=args.decay, seed=args.seed, weights=weights, plain=args.plain
    )
    Trainer(args.folder, plan).run(report=lambda line: _say(str(line)))
    return 0


def _export(args: argparse.Namespace) -> int:
    tokenizer = load(args.folder / "tokenizer.json")
    export(load_model(args.folder), tokenizer, args.model, weights=args.weights)
    _say(f"{args.model}: {args.model.stat().st_size} bytes")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    def tell(score: Score) -> None:
        rate = score.tokens / score.cpu_s
        _say(f"{score.task:10} {score.which:13} {score.exact:.2f} of {score.asked} {rate:6.0f} t/s")
        for example, said in score.wrong[: args.wrong]:
            _say(f"    {example.turns[-1][1]!r}")
            _say(f"      said  {said!r}\n      right {example.answer!r}")

    evaluate(
        args.model,
        args.task or TASKS,
        count=args.count,
        which=args.set or SETS,
        report=tell,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
