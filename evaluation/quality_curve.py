"""Quality against speed, the paper's figure 5: what lossless and relaxed acceptance gain in accepted length, and what their text loses.

    python -m evaluation.quality_curve --output quality_curve.json
    python -m evaluation.quality_curve --methods kangaroo cascade_tree --typical 0.09:0.3 --prompts gsm8k --output quality_curve.json

Every method answers every question by greedy decoding and by sampling, both lossless, and by typical acceptance, which is not. The exact
model then reads each answer in one pass, in float32 or more, whatever wrote it: how likely it finds the tokens, and how many of them are
its own best. Plain decoding stands beside every rule: under the lossless ones a method must have written plain decoding's very tokens,
which is counted. No judge, no clock. First turns only; the default model, unless --model-path names another. An interrupted run goes on
behind the last whole answer.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cats import AutoregressiveConfig, CatsError, GenerationConfig, MemoryOptions, MethodConfig, ModelText
from cats.checkpoint import DTYPES
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.config import require
from cats.earlyexit import EarlyExitLlamaForCausalLM
from cats.files import write_atomically
from cats.records import sha256
from cats.settings import as_record
from evaluation.chosen_model import ChosenModel, chosen_model
from evaluation.correctness import prompts_file, read_prompts, refuse_half
from evaluation.eval import question_seed
from evaluation.metrics import ratio, ratio_interval
from evaluation.options import add_model_flags, chosen_memory
from evaluation.presets import PRESET_HELP, parse_presets, title_of
from evaluation.processes import choose_device
from evaluation.questions import Question, spread_questions
from evaluation.record_file import Record, append_record, check_settings, read_records, write_json
from evaluation.sheets import save_figure
from evaluation.subject import Subject, load_subject, load_text, subject_settings
from evaluation.timing import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN, GREEDY = "autoregressive", "greedy"
MARKS, LINES, GREYS = "osv^D<>P*X", ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1))), ("#000000", "#555555", "#888888", "#aaaaaa")
HEAD = ("method", "acceptance", "accepted length", "log-probability a token", "best tokens", "as greedy's text", "same as plain")
MEANINGS = (
    "Accepted length: tokens per pass of the whole model. Log-probability: nats, under the exact model, each token after the answer's own "
    "tokens before it. Best tokens: those that the exact model finds most likely there. As greedy's text: equal to plain greedy decoding's "
    "token at the same position. Same as plain: answers that are, token for token, plain decoding's by the same rule and seed. In brackets "
    "90 % intervals, by bootstrap over the questions."
)


@dataclass(frozen=True)
class Curve:
    """A comparison that was checked as far as it can be without loading the model.

    Attributes:
        methods: by label, plain decoding first.
        rules: ways of choosing tokens, by label, greedy first.
    """

    args: argparse.Namespace
    methods: dict[str, MethodConfig]
    rules: dict[str, GenerationConfig]
    questions: list[Question]
    model: ChosenModel
    memory: MemoryOptions | None
    text: ModelText

    @property
    def records(self) -> Path:
        """One line an answer."""
        return self.args.output.with_suffix(".records.jsonl")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an answer or its figures; a run that goes on must have the same."""
        return subject_settings(self.args, self.model, self.memory, self.text) | {
            "methods": {label: as_record(method) for label, method in self.methods.items()},
            "rules": {label: rule_record(rule) for label, rule in self.rules.items()},
            "max_new_tokens": self.args.max_new_tokens,
            "prompts": sha256(prompts_file(self.args.prompts)),
            "questions": len(self.questions),
            "seed": self.args.seed,
        }


def rule_record(rule: GenerationConfig) -> dict[str, float]:
    """What a rule is made of."""
    return {name: getattr(rule, name) for name in ("temperature", "typical_tau", "typical_alpha")}


def parse_typical(text: str) -> tuple[float, float]:
    """TAU:ALPHA as numbers."""
    tau, _, alpha = text.partition(":")
    try:
        return float(tau), float(alpha)
    except ValueError as error:
        raise CatsError(f"--typical {text!r} is no pair; write TAU:ALPHA, like 0.09:0.3.") from error


def rules_of(args: argparse.Namespace) -> dict[str, GenerationConfig]:
    """Greedy decoding, sampling, and typical acceptance as often as it was asked for; what no rule can be made of raises `CatsError`."""
    require(args.temperature > 0, f"--temperature is {args.temperature}; sampling and typical acceptance need one above 0.")
    length = args.max_new_tokens
    sampled = {f"sampling, T={args.temperature:g}": GenerationConfig(length, temperature=args.temperature)}
    typical = {}
    for text in args.typical:
        tau, alpha = parse_typical(text)
        require(tau > 0 and alpha > 0, f"--typical {text} is not relaxed; both numbers must be above 0.")
        rule = GenerationConfig(length, temperature=args.temperature, typical_tau=tau, typical_alpha=alpha)
        typical[f"typical {tau:g}:{alpha:g}, T={args.temperature:g}"] = rule
    return {GREEDY: GenerationConfig(length), **sampled, **typical}


def is_lossless(rule: Mapping[str, float]) -> bool:
    """Whether a rule leaves the text plain decoding's."""
    return rule["typical_tau"] == 0


@torch.inference_mode()
def read_answer(base: EarlyExitLlamaForCausalLM, prompt_ids: Sequence[int], ids: Sequence[int]) -> tuple[float, int]:
    """What the exact model finds in an answer, each token after the true ones before it.

    Returns:
        the sum of the tokens' log-probabilities (nats), and how many of them are the most likely ones.
    """
    if not ids:
        return 0.0, 0
    written_N = torch.tensor(ids, device=base.device)
    text_1N = torch.tensor([[*prompt_ids, *ids[:-1]]], device=base.device)
    with base.stepping():
        states_ND = base.hidden_states(text_1N, [base.layer_count])[base.layer_count][0, len(prompt_ids) - 1 :]
        logits_NV = base.target_logits(states_ND)
    chances_N = logits_NV.double().log_softmax(-1).gather(-1, written_N[:, None])[:, 0]
    return float(chances_N.sum()), int((logits_NV.argmax(-1) == written_N).sum())


def write_answer(subject: Subject, question: Question, method: MethodConfig, rule: GenerationConfig, seed: int) -> Record:
    """One answer: its ids, tokens and passes behind the prefill, and what the exact model finds in it."""
    prompt_ids = subject.text.prompt_ids(question.turns[0])
    seeded = dataclasses.replace(rule, seed=question_seed(seed, 0, question.question_id, 0))
    answer = subject.answer(prompt_ids, method, seeded)
    committed = [trace.committed for trace in answer.traces if not trace.prefill]
    log_probability, best = read_answer(subject.model.base, prompt_ids, answer.ids)
    figures = {"committed": sum(committed), "passes": len(committed), "log_probability": log_probability, "best": best}
    return {"ids": answer.ids, **figures}


def key_of(record: Record) -> tuple[Any, ...]:
    """What an answer is found by."""
    return record["method"], record["rule"], record["question_id"]


def write_all(curve: Curve) -> None:
    """Whatever answers are missing, question by question."""
    args, model = curve.args, curve.model
    kept = args.output.with_suffix(".settings.json")
    check_settings(kept, curve.settings, curve.records)
    done = {key_of(record) for record in read_records(curve.records)}
    total = len(curve.questions) * len(curve.methods) * len(curve.rules)
    if len(done) >= total:
        return
    with heartbeat(f"loading {model.name}"):
        device = choose_device(args.device)
        subject = load_subject(model.directory, model.adapters, curve.text, args.dtype, device, curve.memory, args.compute_dtype)
    refuse_half(subject.model.base.dtype)
    if args.ledger:
        sys.stderr.write("\n".join(subject.model.base.source.report()) + "\n")
    subject.check_prompts(curve.questions)
    write_json(kept, {"settings": curve.settings, "environment": environment(), "arithmetic": subject.arithmetic})
    with live_bar(total=total, desc=model.name, unit="answer") as bar:
        for question in curve.questions:
            for label, method in curve.methods.items():
                for name, rule in curve.rules.items():
                    record: Record = {"method": label, "rule": name, "question_id": question.question_id}
                    if key_of(record) not in done:
                        append_record(curve.records, record | write_answer(subject, question, method, rule, args.seed))
                    bar.update()


def points_of(records: Sequence[Record], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One point a method and rule: speed, quality and likeness, with 90 % intervals by bootstrap over the questions."""
    by_key = {key_of(record): record for record in records}
    points = []
    for label in settings["methods"]:
        for name, rule in settings["rules"].items():
            own = [record for record in records if (record["method"], record["rule"]) == (label, name)]
            plain = [by_key.get((PLAIN, name, record["question_id"])) for record in own]
            greedy = [by_key.get((PLAIN, GREEDY, record["question_id"])) for record in own]
            same = sum(other is not None and record["ids"] == other["ids"] for record, other in zip(own, plain, strict=True))
            about = {"method": label, "rule": name, "lossless": is_lossless(rule), "answers": len(own)}
            points.append(about | figures_of(own, greedy) | {"as_plain": same if is_lossless(rule) else None})
    return points


def figures_of(records: Sequence[Record], greedy: Sequence[Record | None]) -> dict[str, Any]:
    """Accepted length, mean log-probability of a token (nats), and shares of tokens that are the exact model's best, and greedy text's."""
    passes = [(record["committed"], record["passes"]) for record in records]
    chances = [(record["log_probability"], len(record["ids"])) for record in records]
    tokens = sum(len(record["ids"]) for record in records)
    alike = sum(mine == theirs for record, other in zip(records, greedy, strict=True) for mine, theirs in pairs(record, other))
    return {
        "tokens": tokens,
        "accepted_length": ratio(sum(committed for committed, _ in passes), sum(count for _, count in passes)),
        "accepted_length_interval": ratio_interval([passes]),
        "log_probability": ratio(sum(chance for chance, _ in chances), tokens),
        "log_probability_interval": ratio_interval([chances]),
        "best_share": ratio(sum(record["best"] for record in records), tokens),
        "greedy_share": ratio(alike, tokens),
    }


def pairs(record: Record, other: Record | None) -> list[tuple[int, int]]:
    """The tokens of two answers at the same positions."""
    return list(zip(record["ids"], other["ids"] if other is not None else [], strict=False))


def markdown(result: Mapping[str, Any]) -> str:
    """The table."""
    lines: list[Sequence[str]] = [HEAD]
    for point in result["points"]:
        cells = [
            bounded(point["accepted_length"], point["accepted_length_interval"], ".2f"),
            bounded(point["log_probability"], point["log_probability_interval"], ".3f"),
            *("-" if point[name] is None else f"{point[name]:.1%}" for name in ("best_share", "greedy_share")),
            "not lossless" if point["as_plain"] is None else f"{point['as_plain']} of {point['answers']}",
        ]
        lines.append([title_of(point["method"]), point["rule"], *cells])
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    settings = result["settings"]
    text = f"# Quality against speed: {settings['model']['name']}\n\n{settings['questions']} questions, at most "
    return (
        text + f"{settings['max_new_tokens']} tokens each. {MEANINGS}\n\n" + "\n".join([head, "|---" * len(lines[0]) + "|", *body]) + "\n"
    )


def bounded(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    """A figure and its interval."""
    if value is None:
        return "-"
    return f"{value:{form}}" + ("" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})")


def picture(result: Mapping[str, Any]) -> "Figure":
    """Log-probability over accepted length: a line a method through what is sampled, a mark a rule; told apart without colours."""
    from matplotlib.figure import Figure  # only this picture needs it, and it takes a second to load

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    rules, methods = list(result["settings"]["rules"]), list(result["settings"]["methods"])
    for place, label in enumerate(methods):
        points = [point for point in result["points"] if point["method"] == label and point["accepted_length"] is not None]
        grey, line = GREYS[place % len(GREYS)], LINES[place % len(LINES)]
        sampled = [point for point in points if point["rule"] != GREEDY]
        across, along = [[point[name] for point in sampled] for name in ("accepted_length", "log_probability")]
        axes.plot(across, along, linestyle=line, color=grey, linewidth=1, label=title_of(label))
        for point in points:
            spread: dict[str, Any] = {
                f"{axis}err": reach(point, name) for axis, name in (("x", "accepted_length"), ("y", "log_probability"))
            }
            mark, face = MARKS[rules.index(point["rule"]) % len(MARKS)], grey if point["lossless"] else "white"
            place_of = point["accepted_length"], point["log_probability"]
            axes.errorbar(*place_of, **spread, marker=mark, color=grey, markerfacecolor=face, markersize=7, elinewidth=0.6)
    for place, name in enumerate(rules):
        face = "black" if is_lossless(result["settings"]["rules"][name]) else "white"
        axes.plot([], [], marker=MARKS[place % len(MARKS)], color="black", markerfacecolor=face, linestyle="none", label=name)
    axes.set_xlabel("accepted length (tokens per pass of the whole model)")
    axes.set_ylabel("mean log-probability of a token under the exact model (nats)")
    axes.grid(color="#dddddd", linewidth=0.5)
    figure.legend(loc="outside right upper", fontsize=8, title="filled: lossless")
    return figure


def reach(point: Mapping[str, Any], name: str) -> list[list[float]] | None:
    """How far the interval of a figure reaches below and above it."""
    interval = point[f"{name}_interval"]
    return None if interval is None else [[max(0.0, point[name] - interval[0])], [max(0.0, interval[1] - point[name])]]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.quality_curve", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--methods", nargs="+", default=["kangaroo", "cascade_tree"], metavar="METHOD", help=PRESET_HELP)
    pairs_help = "settings of typical acceptance, relaxed the more the smaller they are (default: %(default)s)"
    parser.add_argument("--typical", nargs="+", default=["0.2:0.6", "0.09:0.3", "0.03:0.1"], metavar="TAU:ALPHA", help=pairs_help)
    parser.add_argument("--temperature", type=float, default=0.7, help="of sampling and of typical acceptance (default: %(default)s)")
    parser.add_argument("--prompts", default="mtbench", help="a bench name, a question file or a ShareGPT file (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=20, help="spread over the prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="per answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="from which every question's own seed is derived (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); .md, .png and .pdf lie beside it")
    return parser.parse_args(argv)


def make_curve(args: argparse.Namespace) -> Curve:
    """Check everything that needs no weights; the first fault raises `CatsError`."""
    methods = {PLAIN: AutoregressiveConfig(), **parse_presets(args.methods)}
    refuse_half(DTYPES.get(args.compute_dtype))
    rules = rules_of(args)
    questions = spread_questions(read_prompts(args.prompts), args.questions)
    model = chosen_model(list(methods.values()), args)
    memory = chosen_memory(methods.values(), args.max_new_tokens, args)
    return Curve(args, methods, rules, questions, model, memory, load_text(model.directory, args.template))


def make_result(curve: Curve) -> str:
    """Write what answers are missing, then the result file, its Markdown twin, which is returned, and its picture."""
    write_all(curve)
    kept = {"settings": curve.settings, "environment": environment()}
    result = {"points": points_of(read_records(curve.records), curve.settings), **kept}
    output: Path = curve.args.output
    write_json(output, result)
    text = markdown(result)
    write_atomically(output.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))
    save_figure(picture(result), output.with_suffix(".png"))
    return text


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Write what is missing, report."""
    sys.stdout.write(make_result(make_curve(parse(argv))))


if __name__ == "__main__":
    main()
