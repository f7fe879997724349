"""Train exit adapters under different targets and losses, run the engine with each, and write a table and a picture.

A cell is one training run: what the answers are (`corpus`: as they stand, `greedy` or `sampled`: written by the model
itself, `greedy+sampled`: both) and the settings of train_finetune, so `greedy:topk=5,seed=1` or
`greedy+sampled:topk=20,optimizer=muon,steps=900`. All cells read the same stored states of the same prompts; rows, order and the start
from the base's own attention are the same unless a cell says otherwise. Accepted length is measured by decoding held-out
prompts: the part `selection` for the cells, the part `test`, which no cell sees, for the adapters of --adapters.

    python -m scripts.compare_training --corpus sharegpt_mix.json.gz --held-out heldout.json.gz --work-dir runs/compare \\
        --cells corpus:topk=20 greedy:topk=20 --adapters before=data/tiny/adapters

Everything that is finished is kept, so the same command, or one with more cells, goes on where it stopped.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cats import CatsError, Generation, GenerationConfig
from cats.adapter import AdapterModel
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.records import sha256
from evaluation.options import Adapters
from evaluation.presets import PRESETS
from evaluation.record_file import check_settings
from evaluation.subject import load_subject, load_text
from evaluation.timing import environment
from scripts.training_data import ANSWERS, CORPUS, DataPlan, TrainingData, prompt_of
from scripts.training_figures import write_results
from training import train_finetune
from training.agreement import measure
from training.conversations import read_sharegpt
from training.dataset import RowSource
from training.frozen_head import FrozenHead
from training.objective import Objective
from training.provenance import read_json, write_json
from training.stored_states import StoredSource

CHAIN = "cascade_chain"
METHODS = ("kangaroo", CHAIN, "cascade_tree")
KINDS = (CORPUS, *ANSWERS)
VALIDATION_KINDS = (CORPUS, "greedy")
TOPK = (5, 20, 100, 0)
VALIDATION_BATCH = 32


@dataclass(frozen=True)
class Cell:
    """One training run: `targets` and the settings that differ from the command line's."""

    targets: str
    changes: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """`greedy:topk=5,seed=1`; an unknown kind of target or a setting without a value raises `CatsError`."""
        targets, _, changes = text.partition(":")
        if not set(targets.split("+")) <= set(KINDS):
            raise CatsError(f"the cell {text!r} has unknown targets; known are {', '.join(KINDS)}, or several of them joined by +.")
        pairs = [change.split("=", 1) for change in changes.split(",") if change]
        if any(len(pair) != 2 for pair in pairs):
            raise CatsError(f"the cell {text!r} has a setting without a value; write it as setting=value.")
        return cls(targets, tuple(sorted((name.replace("_", "-"), value) for name, value in pairs)))

    @property
    def name(self) -> str:
        """Its folder and its row."""
        settings = ((name, "+".join(Path(part).name for part in value.split("+"))) for name, value in self.changes)
        return ".".join([self.targets, *(f"{name}={value}" for name, value in settings)])

    def flags(self, defaults: dict[str, Any]) -> list[str]:
        """The settings as flags of train_finetune; a change takes the place of a default."""
        settings = {name: str(value) for name, value in defaults.items()} | dict(self.changes)
        return [word for name, value in settings.items() for word in (f"--{name}", *value.split("+"))]


class Comparison:
    """The cells of one command and what they share."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.model, self.root = arguments, Path(arguments.model_path), Path(arguments.work_dir)
        names = ("prompts", "train_on", "prompt_tokens", "new_tokens", "selection", "test", "validation", "seed", "answer_rows")
        sizes = {name: getattr(arguments, name) for name in names}
        self.plan = DataPlan(self.model, Path(arguments.corpus), Path(arguments.held_out), **sizes)
        self.data = TrainingData(self.plan, self.root / "data")
        self.exits = tuple(arguments.exits)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a result beside the data and what a cell changes by its name."""
        return {name: getattr(self.arguments, name) for name in ("exits", "steps", "rows", "decode_tokens")}

    def check(self) -> None:
        """Refuse, by `CatsError`, a folder whose results were made with other settings; else say there what they are made with."""
        path = self.root / "settings.json"
        check_settings(path, self.settings, self.data.root)
        if not path.exists():
            write_json(path, {"settings": self.settings})

    def prepare(self) -> None:
        """Prompts, answers and states, for training and validation."""
        self.data.choose()
        for part, kinds in (("train", KINDS), ("validation", VALIDATION_KINDS)):
            for kind, path in self.data.targets(part, kinds).items():
                self.data.states(part, kind, path, self.arguments.stored_exits)

    def run(self, cell: Cell) -> None:
        """Train and measure a cell, unless that is done."""
        result = self.root / "cells" / f"{cell.name}.json"
        if result.exists():
            return
        outdir = self.root / "trained" / cell.name
        defaults = {"steps": self.arguments.steps, "rows": self.arguments.rows, "length": self.plan.length, "seed": self.plan.seed}
        flags = ["--model-path", str(self.model), "--exit-layers", *map(str, self.exits), "--outdir", str(outdir), "--cpu"]
        flags += ["--data-home", str(self.data.home("train", cell.targets)), *cell.flags(defaults)]
        flags += ["--validation-home", str(self.data.home("validation", "greedy"))]
        train_finetune.main(flags)
        log = read_json(outdir / "training_log.json", "training/train_finetune.py")
        training = {name: value for name, value in log.items() if name not in ("steps", "what")}
        training["loss"] = [entry["loss"] for entry in log["steps"]]
        adapters = {exit_layer: outdir / f"exit{exit_layer}" for exit_layer in self.exits}
        write_json(result, {"cell": cell.name, "targets": cell.targets, "training": training} | self.figures(adapters, "selection"))

    def compare(self, label: str, folder: Path) -> None:
        """Measure the adapters of a folder on the part `test`; one file per label, made again where the adapters are others."""
        found = [
            (int(AdapterModel.from_pretrained(path.parent).exit_layer or 0), path.parent) for path in sorted(folder.glob("*/config.json"))
        ]
        adapters = {exit_layer: path for exit_layer, path in found if exit_layer in self.arguments.stored_exits}
        result = self.root / "adapters" / f"{label}.json"
        hashes = adapter_hashes(adapters)
        if not (result.exists() and read_json(result, "this command")["adapters_sha256"] == hashes):
            write_json(result, {"label": label} | self.figures(adapters, "test"))

    def publish(self) -> None:
        """Write the results of everything that is finished, where an output was named."""
        if self.arguments.output:
            write_results(self.root, self.arguments.output, {"data": self.plan.description(), "settings": self.settings})

    def figures(self, adapters: dict[int, Path], part: str) -> dict[str, Any]:
        """Agreement on validation states; accepted length on the prompts of `part` for the first exit with each of the others.

        All methods run with the first pair of exits, the chain alone with the others.
        """
        draft, *shallows = sorted(adapters)
        lengths = {}
        for shallow in shallows:
            methods = METHODS if shallow == shallows[0] else (CHAIN,)
            lengths[f"exits {draft}, {shallow}"] = self.accepted(adapters[draft], adapters[shallow], part, methods)
        facts = {"adapters_sha256": adapter_hashes(adapters), "part": part, "environment": environment()}
        return {"validation": self.agreement(adapters), "accepted": lengths} | facts

    def agreement(self, adapters: dict[int, Path]) -> dict[str, dict[int, dict[str, float]]]:
        """Figures of `training.agreement` on held-out rows; the loss is the full KL loss, whatever was trained, so cells compare."""
        objective = Objective(FrozenHead.read(self.model, torch.float32, "cpu"), 0, "fp32")
        loaded = {exit_layer: AdapterModel.from_pretrained(path, dtype="float32") for exit_layer, path in adapters.items()}
        return {kind: measure(objective, loaded, batches(source), 5) for kind, source in self.validation.items()}

    @cached_property
    def validation(self) -> dict[str, RowSource]:
        """Held-out rows by kind of answer."""
        exits, device = tuple(self.arguments.stored_exits), torch.device("cpu")
        homes = {kind: self.data.home("validation", kind) for kind in VALIDATION_KINDS}
        return {kind: StoredSource(home, exits, self.plan.length, device) for kind, home in homes.items()}

    def accepted(self, draft: Path, shallow: Path, part: str, methods: Sequence[str]) -> dict[str, Any]:
        """Per method, the tokens and target passes of every prompt, prefill excluded, and whether all methods say the same."""
        adapters: Adapters = {"draft": (draft, None), "shallow": (shallow, None)}
        subject = load_subject(str(self.model), adapters, load_text(str(self.model), None), "float32", torch.device("cpu"))
        config = GenerationConfig(max_new_tokens=self.arguments.decode_tokens)
        questions = [prompt_of(chat).turns[0].text for chat in read_sharegpt(self.data.prompts(part))]
        prompts = [subject.text.prompt_ids(question) for question in questions]
        found: dict[str, Any] = {}
        texts = []
        for method in methods:
            bar = live_bar(prompts, desc=f"{part} {method}", unit="prompt")
            answers = [subject.answer(prompt, PRESETS[method], config) for prompt in bar]
            found[method] = accepted_lengths(answers)
            texts.append([answer.ids for answer in answers])
        return found | {"same_text": sum(len({*map(tuple, ids)}) == 1 for ids in zip(*texts, strict=True))}


def accepted_lengths(answers: Sequence[Generation]) -> dict[str, Any]:
    """Tokens committed by target passes, prefill excluded: over all prompts, and per prompt."""
    tokens = [sum(trace.committed for trace in answer.traces[1:]) for answer in answers]
    passes = [len(answer.traces) - 1 for answer in answers]
    return {"accepted_length": sum(tokens) / max(1, sum(passes)), "tokens": tokens, "passes": passes}


def batches(source: RowSource) -> Any:
    """All rows of a source, some at a time."""
    rows = torch.arange(len(source)).numpy()
    return (source.batch(rows[start : start + VALIDATION_BATCH]) for start in range(0, len(rows), VALIDATION_BATCH))


def adapter_hashes(adapters: dict[int, Path]) -> dict[str, str]:
    """Which weights were measured."""
    return {str(exit_layer): sha256(path / "model.safetensors") for exit_layer, path in adapters.items()}


def arguments_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=str(Path("data") / "tiny"))
    parser.add_argument("--corpus", required=True, help="ShareGPT conversations to train on")
    parser.add_argument("--held-out", required=True, help="conversations for selection, test and validation")
    parser.add_argument("--work-dir", required=True, help="prompts, answers, states, trained cells")
    parser.add_argument("--output", type=Path, help="result file (.json); the table (.md) and the picture (.png) lie beside it")
    every = [f"{kind}:topk={topk}" for topk in TOPK for kind in KINDS]
    parser.add_argument("--cells", nargs="*", default=every, metavar="TARGETS:SETTING=VALUE,...", help=f"default: {' '.join(every)}")
    parser.add_argument("--adapters", nargs="*", default=[], metavar="LABEL=FOLDER", help="folders of adapters to measure on the part test")
    parser.add_argument("--exits", type=int, nargs="+", default=[2, 6], help="exits that the cells train (default: 2 6)")
    parser.add_argument("--stored-exits", type=int, nargs="+", default=[2, 6, 8], help="exits whose states are stored (default: 2 6 8)")
    sizes = {"steps": 150, "rows": 24, "prompts": 4000, "train-on": 2000, "prompt-tokens": 128, "new-tokens": 128, "decode-tokens": 64}
    sizes |= {"selection": 32, "test": 64, "validation": 256, "seed": 0, "answer-rows": 128}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--merge", action="store_true", help="only write the results of what is finished")
    return parser


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the data, run the cells, measure the adapters, write the results."""
    arguments = arguments_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    comparison, cells = Comparison(arguments), [Cell.parse(text) for text in arguments.cells]
    folders = [text.partition("=") for text in arguments.adapters]
    if any(not path for _, _, path in folders):
        raise CatsError("--adapters wants LABEL=FOLDER, for example before=data/tiny/adapters.")
    comparison.check()
    if arguments.merge:
        comparison.publish()
        return
    comparison.prepare()
    for cell in cells:
        comparison.run(cell)
        comparison.publish()
    for label, _, path in folders:
        comparison.compare(label, Path(path))
        comparison.publish()


if __name__ == "__main__":
    main()
