"""Search which attentions and MLPs a model can do without: the layer sets that CAS-Spec drafts with (docs/cas_spec.md).

    python -m training.search_layer_sets --model-path MODEL --data-path answers.json.gz --output layer_sets.json --evaluations 150

A set is worth what its view agrees with the whole model about the next token, on the model's own text, the text given (greedy, top-1,
answer tokens alone). First every sublayer is left out by itself. A set then grows greedily: of those that were missed least so far, each is
left out beside the set, on a quarter of the rows, and the best few join it. In the end random exchanges, of which those that do not agree
less are kept, improve it, or the set of every other layer if that is better. The sets nest: each share grows from the share before it.
What was evaluated lies in `<output>.evaluated.json`, so that a
run that was interrupted, or the same command with more evaluations, goes on where it stopped.
"""

import argparse
import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.earlyexit import EarlyExitLlamaForCausalLM
from cats.errors import CatsError
from cats.planning.plan import EXACT, View
from cats.planning.sparsity import Sublayer, by_turns, skippable, skipped_count, view_without
from cats.text import ModelText
from training.base_model import load_base, model_path_of
from training.chat_tokens import ChatTokens, encode_chats, training_text
from training.conversations import read_sharegpt
from training.provenance import agree, hash_of_data, read_json, write_json

WRITER = "training/search_layer_sets.py"
SAVED_EVERY = 10
"""Evaluations between two writings of the file of those that are done."""
EXCHANGED, IDLE = 3, 100
"""Sublayers that change at a time, at most; so many exchanges that lead to nothing unseen end the search of a share."""
CANDIDATES, JOINING, QUARTER = 16, 4, 4
"""Of the greedy search: sublayers tried in a round, and those that join; every so many-th row that it looks at."""
Measure = Callable[[Sequence[Sublayer], int], float]
"""Agreement without these sublayers, on every so many-th row."""


class Agreement:
    """How often a view's best next token is the whole model's, at the answer tokens of some rows."""

    def __init__(self, base: EarlyExitLlamaForCausalLM, rows: Sequence[ChatTokens]):
        self.base, self.rows = base, [torch.from_numpy(row.ids_N).long().to(base.device)[None] for row in rows]
        self.places = [torch.from_numpy(row.answer_N[1:]).nonzero()[:, 0].to(base.device) for row in rows]
        self.wanted = self._best(EXACT, 1)

    @torch.inference_mode()
    def _best(self, view: View, stride: int) -> list[torch.Tensor]:
        """Best tokens of the view at the counted positions of every so many-th row; one pass each, without a cache."""
        best = []
        with self.base.stepping():
            for ids_1N, places in zip(self.rows[::stride], self.places[::stride], strict=True):
                hidden_1ND = self.base.forward_draft_or_large_model(ids_1N, view=view)
                best.append(self.base.target_logits(hidden_1ND[0, places]).argmax(-1))
        return best

    def __call__(self, skipped: Sequence[Sublayer], stride: int) -> float:
        """Share of positions where the model without these sublayers says the same."""
        said = torch.cat(self._best(view_without(skipped), stride))
        return float((said == torch.cat(self.wanted[::stride])).double().mean())


class Evaluated:
    """A measure that remembers what it was asked, also across runs, and how much it may still be asked."""

    def __init__(self, measure: Measure, path: Path, total: int):
        self.path, self.total, self._measure, self._new = path, total, measure, 0
        self.known: dict[str, float] = read_json(path, WRITER) if path.exists() else {}
        self.asked: set[str] = set()
        self.bar = live_bar(total=total, desc="layer sets", unit="set")

    def __call__(self, skipped: Sequence[Sublayer], stride: int = 1) -> float:
        """The agreement without these sublayers."""
        name = " ".join([f"{layer}.{part}" for layer, part in sorted(skipped)] + [f"/{stride}"] * (stride > 1))
        if name not in self.known:
            self.known[name] = self._measure(skipped, stride)
            self._new += 1
            if self._new % SAVED_EVERY == 0:
                self.save()
        if name not in self.asked:
            self.asked.add(name)
            self.bar.update()
        return self.known[name]

    def save(self) -> None:
        """Write down what is known."""
        write_json(self.path, self.known)


def search(measure: Evaluated, layers: int, shares: Sequence[float], seed: int) -> dict[float, list[Sublayer]]:
    """The best set of each share; they nest. The same calls follow from the same answers, so that a run can be taken up."""
    chance, every = random.Random(seed), skippable(layers)
    worth = {sublayer: measure([sublayer], QUARTER) for sublayer in every}
    sets: dict[float, list[Sublayer]] = {}
    kept: list[Sublayer] = []
    left = measure.total - evaluations_of(layers, shares)
    for place, share in enumerate(shares, start=1):
        count, until = skipped_count(share, layers), evaluations_of(layers, shares[:place]) + left * place // len(shares)
        turns = [*kept, *[sublayer for sublayer in by_turns(layers) if sublayer not in kept]][:count]
        best = max(grown(kept, count, worth, measure), turns, key=measure)
        measure.bar.set_postfix_str(f"sparsity {share:g}: {measure(best):.3f}")
        known, idle = len(measure.asked), 0
        while known < until and idle < IDLE and count < len(every):
            best = max(best, exchanged(best, kept, every, chance), key=measure)
            idle = idle + 1 if len(measure.asked) == known else 0
            known = len(measure.asked)
            measure.bar.set_postfix_str(f"sparsity {share:g}: {measure(best):.3f}")
        sets[share] = kept = sorted(best)
    return sets


def evaluations_of(layers: int, shares: Sequence[float]) -> int:
    """Sets that the search measures for these shares before it exchanges anything, at most."""
    counts = [0, *(skipped_count(share, layers) for share in shares)]
    rounds = sum(math.ceil((count - before) / JOINING) for before, count in itertools.pairwise(counts))
    return len(skippable(layers)) + CANDIDATES * rounds + 2 * len(shares)


def grown(kept: Sequence[Sublayer], count: int, worth: dict[Sublayer, float], measure: Evaluated) -> list[Sublayer]:
    """The set with the sublayers that are missed least beside it; `worth` learns what was measured of each on the way."""
    chosen = list(kept)
    while len(chosen) < count:
        open_ones = sorted((one for one in worth if one not in chosen), key=lambda one: -worth[one])[:CANDIDATES]
        worth |= {one: measure([*chosen, one], QUARTER) for one in open_ones}
        chosen += sorted(open_ones, key=lambda one: -worth[one])[: min(JOINING, count - len(chosen))]
        measure.bar.set_postfix_str(f"{len(chosen)} of {count}: {max(worth[one] for one in open_ones):.3f}")
    return chosen


def exchanged(chosen: Sequence[Sublayer], kept: Sequence[Sublayer], every: Sequence[Sublayer], chance: random.Random) -> list[Sublayer]:
    """The set with a few of its own sublayers, those of the lower share left alone, exchanged for others."""
    own, others = [one for one in chosen if one not in kept], [one for one in every if one not in chosen]
    count = min(chance.randint(1, EXCHANGED), len(own), len(others))
    out = set(chance.sample(own, count))
    return [one for one in chosen if one not in out] + chance.sample(others, count)


def rows_of(text: ModelText, arguments: argparse.Namespace) -> list[ChatTokens]:
    """The rows to measure on: spread evenly over the file, those without an answer token left out."""
    chats = read_sharegpt(arguments.data_path)
    wanted = chats[:: max(1, len(chats) // arguments.sequences)][: arguments.sequences]
    rows = [row for row in encode_chats(text, wanted, arguments.tokens) if row.answer_N[1:].any()]
    if not rows:
        raise CatsError(f"{arguments.data_path} has no answer within the first {arguments.tokens} tokens of a chat; raise --tokens.")
    return rows


def result(skipped_sets: dict[float, list[Sublayer]], agreement: Evaluated, metadata: dict[str, Any]) -> dict[str, Any]:
    """The file of layer sets (cats/planning/sparsity.py)."""
    sets = {}
    for share, skipped in skipped_sets.items():
        view = view_without(skipped)
        sets[f"{share:g}"] = {
            "attention": sorted(view.attention),
            "mlp": sorted(view.mlp),
            "agreement": round(agreement(skipped), 4),
            "agreement_by_turns": round(agreement(by_turns(metadata["layers"])[: len(skipped)]), 4),
        }
    return {"what": "sublayers that drafts leave out, by sparsity; agreement: top-1 with the whole model", **metadata, "sets": sets}


def arguments_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="base checkpoint directory; default: the environment variable CATS_BASE_MODEL")
    parser.add_argument("--data-path", required=True, help="ShareGPT conversations, best the model's own answers")
    parser.add_argument("--output", type=Path, required=True, help="file of layer sets (.json)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.6], help="of sublayers left out (default: 0.4 0.6)")
    parser.add_argument("--sequences", type=int, default=12, help="conversations to measure on (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of each, at most (default: %(default)s)")
    parser.add_argument("--evaluations", type=int, default=400, help="sets to measure, single sublayers among them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--template", help="chat template, where the tokenizer has none")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be searched, before anything is loaded."""
    if not all(0 < share < 1 for share in arguments.shares) or sorted(set(arguments.shares)) != arguments.shares:
        raise CatsError(f"--shares {' '.join(map(str, arguments.shares))} must be above 0, below 1 and ascending.")
    for name in ("sequences", "tokens", "evaluations"):
        if getattr(arguments, name) < 1:
            raise CatsError(f"--{name} is {getattr(arguments, name)}; it must be at least 1.")


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    arguments = arguments_parser().parse_args(argv)
    check_arguments(arguments)
    model_path = model_path_of(arguments.model_path)
    rows = rows_of(training_text(model_path, arguments.template), arguments)
    base = load_base(model_path, None, torch.device("cpu"), arguments.tokens)
    layers = base.layer_count
    least = evaluations_of(layers, arguments.shares)
    if arguments.evaluations < least:
        raise CatsError(f"--evaluations is {arguments.evaluations}; the greedy search alone measures up to {least}.")
    metadata = {
        "model": model_path.resolve().name,
        "layers": layers,
        "hidden_size": base.config.hidden_size,
        "data": Path(arguments.data_path).name,
        "data_sha256": hash_of_data(arguments.data_path),
        "search": {name: getattr(arguments, name) for name in ("sequences", "tokens", "seed")},
        "positions": int(sum(row.answer_N[1:].sum() for row in rows)),
    }
    evaluated = arguments.output.with_suffix(".evaluated.json")
    agree(arguments.output.with_suffix(".settings.json"), metadata, write=True)
    with heartbeat("the whole model"):
        measure = Evaluated(Agreement(base, rows), evaluated, arguments.evaluations)
    try:
        sets = search(measure, layers, arguments.shares, arguments.seed)
        content = result(sets, measure, metadata | {"evaluations": arguments.evaluations})
    finally:
        measure.save()
        measure.bar.close()
    write_json(arguments.output, content)


if __name__ == "__main__":
    main()
