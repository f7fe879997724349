"""Does the coarse draft of nested weights grow worse as a text grows? Agreement with the exact model by position, on texts of thousands.

    python -m evaluation.drift --model-path NESTED --prompts mtbench --text heldout.json.gz --documents 4 --output drift.json
    python -m evaluation.drift --output drift.json --merge

With --prompts the model writes on and on: one long answer a prompt, end tokens ignored. Long answers of small models loop, and loops are
easy to draft, so the share of repeated 4-grams stands beside each figure. With --text the text is given, real conversations one after
another: every cycle drafts and verifies as always, and commits the text's tokens instead of the model's, so nothing loops and thousands
of positions are committed through the tree all the same. Either way a cycle counts the drafted tokens up to the first with which the exact
model disagrees. Committed text has exact keys and values, so no figure should fall with the position. An interrupted run goes on behind
the last whole document.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cats import CatsError, GenerationConfig, NestedConfig, build_method, stream
from cats.acceptance import Greedy, Verdict
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.config import require
from cats.files import write_atomically
from cats.records import sha256
from cats.settings import as_record
from cats.text import ModelText
from cats.tree import TokenTree
from evaluation.chosen_model import chosen_model
from evaluation.correctness import prompts_file, read_prompts
from evaluation.metrics import ratio, ratio_interval
from evaluation.options import add_model_flags, chosen_memory
from evaluation.processes import choose_device
from evaluation.questions import spread_questions
from evaluation.record_file import Record, append_record, check_settings, read_records, write_json
from evaluation.subject import Subject, load_subject, load_text, subject_settings
from evaluation.timing import environment
from training.conversations import read_sharegpt

WRITTEN, GIVEN = "written", "given"
SOURCES = {WRITTEN: "answers of the model", GIVEN: "a given text"}
BIN, STRETCH = 500, 100
"""Positions of a figure, and of what is drawn with replacement for its interval."""
BEGINNING = 32
"""Tokens of a given text that are its prompt."""


class Forced:
    """An acceptance rule that commits a given text: drafted tokens as far as the text has them, then the text's own next token.

    Attributes:
        agreed: drafted tokens of the last cycle up to the first that is not the exact model's best.
    """

    def __init__(self, text: Sequence[int], start: int):
        self.text, self.place, self.agreed = text, start, 0

    def judge(self, tree: TokenTree, nodes: Sequence[int], logits_TV: torch.Tensor) -> Verdict:
        """See cats/acceptance.py."""
        greedy = Greedy().judge(tree, nodes, logits_TV)
        self.agreed = len(greedy.path) - 1
        path, chosen = [0], set(nodes)
        while (child := tree.child(path[-1], self.text[self.place])) is not None and child in chosen:
            path.append(child)
            self.place += 1
        self.place += 1
        return Verdict(tuple(path), self.text[self.place - 1], greedy.accepted)


@dataclass(frozen=True)
class Document:
    """What is to be written, or given."""

    source: str
    number: int
    prompt: list[int]
    text: list[int] | None = None


def documents_of(args: argparse.Namespace, text: ModelText) -> list[Document]:
    """The prompts, and the given texts, each `args.positions` long; `CatsError` where there are too few."""
    documents: list[Document] = []
    if args.prompts is not None:
        prompts = spread_questions(read_prompts(args.prompts), args.documents)
        documents += [Document(WRITTEN, number, text.prompt_ids(prompt.turns[0])) for number, prompt in enumerate(prompts)]
    if args.text is not None:
        needed, ids = args.positions + args.steps + 2, list[int]()
        number = 0
        for talk in read_sharegpt(args.text):
            ids += text.prompt_ids(talk.messages)
            if len(ids) >= needed and number < args.documents:
                documents.append(Document(GIVEN, number, ids[:BEGINNING], ids[:needed]))
                ids, number = [], number + 1
        require(number == args.documents, f"{args.text} holds {number} texts of {needed} tokens; give fewer --documents, or a longer file.")
    return documents


def run(subject: Subject, document: Document, method: NestedConfig, positions: int, bar: Any) -> Record:
    """One document: per cycle, the committed tokens before it, how many were drafted, and how many of them agreed."""
    rule = None if document.text is None else Forced(document.text, len(document.prompt))
    config = GenerationConfig(max_new_tokens=positions - len(document.prompt), eos_token_ids=())
    ids, cycles = list(document.prompt), list[list[int]]()
    for step in stream(subject.model, document.prompt, build_method(method, subject.model), config, acceptance=rule):
        trace = step.trace
        if not trace.prefill and trace.nodes - 1 == method.steps:  # others were cut by the end
            cycles.append([len(ids), trace.nodes - 1, trace.accepted if rule is None else rule.agreed])
        ids += step.tokens
        bar.update(len(step.tokens))
    return {"source": document.source, "document": document.number, "prompt": len(document.prompt), "ids": ids, "cycles": cycles}


def repeated(ids: Sequence[int], size: int = 4) -> list[bool]:
    """For every token from the fourth on, whether the four that end with it stood together before."""
    seen: set[tuple[int, ...]] = set()
    repeats = []
    for end in range(size, len(ids) + 1):
        ngram = tuple(ids[end - size : end])
        repeats.append(ngram in seen)
        seen.add(ngram)
    return repeats


def stretches(records: Sequence[Record], begin: int) -> Iterator[list[Record]]:
    """The cycles of one bin by document and stretch."""
    for record in records:
        for start in range(begin, begin + BIN, STRETCH):
            cycles = [
                {"judged": agreed + (agreed < drafted), "agreed": agreed}
                for position, drafted, agreed in record["cycles"]
                if start <= position < start + STRETCH
            ]
            if cycles:
                yield cycles


def bins_of(records: Sequence[Record], positions: int) -> list[dict[str, Any]]:
    """Figures by position: share of drafted tokens that agree, tokens a pass, repeated 4-grams; intervals of 90 %, by stretches."""
    bins = []
    for begin in range(0, positions, BIN):
        parts = list(stretches(records, begin))
        agreed = [(sum(cycle["agreed"] for cycle in part), sum(cycle["judged"] for cycle in part)) for part in parts]
        lengths = [(sum(cycle["agreed"] + 1 for cycle in part), len(part)) for part in parts]
        again = [flag for record in records for flag in repeated(record["ids"])[max(begin - 3, 0) : max(begin + BIN - 3, 0)]]
        bins.append(
            {
                "begin": begin,
                "cycles": sum(len(part) for part in parts),
                "agreement": ratio(sum(right for right, _ in agreed), sum(judged for _, judged in agreed)),
                "agreement_interval": ratio_interval([agreed]),
                "accepted_length": ratio(sum(tokens for tokens, _ in lengths), sum(passes for _, passes in lengths)),
                "accepted_length_interval": ratio_interval([lengths]),
                "repeated_4gram_share": ratio(sum(again), len(again)),
            }
        )
    return bins


def figures(records: Sequence[Record], positions: int) -> dict[str, dict[str, Any]]:
    """By source."""
    sources = {source: [record for record in records if record["source"] == source] for source in SOURCES}
    return {source: {"documents": len(own), "bins": bins_of(own, positions)} for source, own in sources.items() if own}


def markdown(result: dict[str, Any]) -> str:
    """The table, by source and position."""
    text = "# Agreement of the coarse draft by position\n\nChains of " + str(result["settings"]["method"]["steps"])
    text += " drafted tokens. Agreement: share of the drafted tokens, up to the first that is not the exact model's, that are its own. "
    text += f"In brackets 90 % intervals, by bootstrap over stretches of {STRETCH} positions.\n"
    for source, group in result["sources"].items():
        title, length = SOURCES[source], result["settings"]["positions"]
        text += f"\n## {title[0].upper()}{title[1:]}, {group['documents']} of {length} positions\n\n"
        text += "| positions | cycles | agreement | tokens a pass | repeated 4-grams |\n|---|---|---|---|---|\n"
        for row in group["bins"]:
            agreement = with_bounds(row["agreement"], row["agreement_interval"], ".3f")
            tokens = with_bounds(row["accepted_length"], row["accepted_length_interval"], ".2f")
            share = "-" if row["repeated_4gram_share"] is None else f"{row['repeated_4gram_share']:.0%}"
            text += f"| {row['begin']}-{row['begin'] + BIN - 1} | {row['cycles']} | {agreement} | {tokens} | {share} |\n"
    return text


def with_bounds(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    """A figure and its interval."""
    if value is None:
        return "-"
    return f"{value:{form}}" + ("" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})")


def draw(result: dict[str, Any], path: Path) -> None:
    """Agreement above tokens a pass, each with repeated 4-grams behind it."""
    from matplotlib.figure import Figure  # only this picture needs it, and it takes a second to load

    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    colours = {WRITTEN: "#4878d0", GIVEN: "#ee854a"}
    for axes, name, label in zip(panels, ("agreement", "accepted_length"), ("agreement of a drafted token", "tokens a pass"), strict=True):
        for source, group in result["sources"].items():
            rows = [row for row in group["bins"] if row[f"{name}_interval"] is not None]
            middles, values = [row["begin"] + BIN / 2 for row in rows], [row[name] for row in rows]
            below = [row[name] - row[f"{name}_interval"][0] for row in rows]
            above = [row[f"{name}_interval"][1] - row[name] for row in rows]
            bars = [[max(0.0, length) for length in side] for side in (below, above)]
            axes.errorbar(middles, values, yerr=bars, marker="o", capsize=3, color=colours[source], label=SOURCES[source])
            if name == "agreement":
                shares = [row["repeated_4gram_share"] for row in rows]
                axes.plot(middles, shares, linestyle=":", color=colours[source], label=f"repeated 4-grams, {SOURCES[source]}")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    panels[-1].set_xlabel("position in the text")
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=150))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.drift", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--prompts", help="the model writes on behind these: a bench name, a question file or a ShareGPT file")
    parser.add_argument("--text", metavar="SHAREGPT", help="conversations that are given, one after another (.json, .json.gz)")
    parser.add_argument("--documents", type=int, default=4, help="texts of each kind (default: %(default)s)")
    parser.add_argument("--positions", type=int, default=4000, help="tokens of each, prompt included (default: %(default)s)")
    steps = "drafted tokens of a cycle; a given text commits few of them, so fewer take less time (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=NestedConfig().steps, help=steps)
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); .md and .png lie beside it")
    parser.add_argument("--merge", action="store_true", help="only report what is recorded; takes no other flag than --output")
    return parser.parse_args(argv)


def record_all(args: argparse.Namespace, records: Path, kept: Path) -> None:
    """Whatever documents are missing."""
    require(args.prompts is not None or args.text is not None, "there is nothing to write on; give --prompts, --text, or both.")
    for name in ("documents", "positions"):
        require(getattr(args, name) >= 1, f"--{name} is {getattr(args, name)}; it must be at least 1.")
    method = NestedConfig(steps=args.steps, adaptive=False)
    model = chosen_model([method], args)
    text, memory = load_text(model.directory, args.template), chosen_memory([method], args.positions, args)
    documents = documents_of(args, text)
    files = {name: getattr(args, name) and sha256(prompts_file(getattr(args, name))) for name in ("prompts", "text")}
    settings = subject_settings(args, model, memory, text) | files | {"documents": args.documents, "positions": args.positions}
    settings["method"] = as_record(method)
    check_settings(kept, settings, records)
    with heartbeat(f"loading {model.name}"):
        device = choose_device(args.device)
        subject = load_subject(model.directory, model.adapters, text, args.dtype, device, memory, args.compute_dtype)
    longest = max(args.positions, *(len(document.prompt) + 1 for document in documents))
    require(longest <= subject.model.base.context, f"the model's context holds {subject.model.base.context} tokens, not {longest}.")
    write_json(kept, {"settings": settings, "environment": environment(), "arithmetic": subject.arithmetic})
    done = {(record["source"], record["document"]) for record in read_records(records)}
    waiting = [document for document in documents if (document.source, document.number) not in done]
    for place, document in enumerate(waiting, start=1):
        tokens = args.positions - len(document.prompt)
        require(tokens > method.steps, f"prompt {document.number} has {len(document.prompt)} tokens; give more --positions.")
        title = f"{SOURCES[document.source]}, {place} of {len(waiting)}"
        with live_bar(total=tokens, desc=title, unit="token") as bar:
            append_record(records, run(subject, document, method, args.positions, bar))


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Record what is missing, report."""
    args = parse(argv)
    records, kept = args.output.with_suffix(".records.jsonl"), args.output.with_suffix(".settings.json")
    if not args.merge:
        record_all(args, records, kept)
    documents = read_records(records)
    if not documents:
        raise CatsError(f"{records} holds no document yet; run the command without --merge first.")
    about = json.loads(kept.read_text(encoding="utf-8"))
    result = {"sources": figures(documents, about["settings"]["positions"]), **about}
    write_json(args.output, result)
    text = markdown(result)
    write_atomically(args.output.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))
    draw(result, args.output.with_suffix(".png"))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
