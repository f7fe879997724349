"""CATS beside plain decoding, Kangaroo and prompt lookup, with less memory than the weights need; then an answer of the model's.

SmolLM2-135M-Instruct has 269 MB of weights. Every method holds 184 MB of them, chosen as serves it best, and streams the others from
this machine's own disk in every pass of the whole model. The methods take turns prompt by prompt; each is loaded anew for its turn, so
that the memory measured is its own.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch

from cats import CatsError, Generation, GenerationConfig, MemoryOptions, MethodConfig, ModelText
from cats.adapter import read_adapter_config
from cats.checkpoint import locate_tensors, weight_files
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.default_model import SHIPPED, DefaultModel, default_model
from cats.cli.live_text import LiveText, drafts_in_green
from cats.cli.progress import heartbeat, live_bar
from cats.earlyexit import read_config
from cats.methods import PRESETS, needs_of, with_needs
from cats.planning.plan import parse_amount
from cats.runtime.link import measure_read_rate, rate_text
from evaluation import metrics
from evaluation.eval import Asking, Contender, ask
from evaluation.memory_run import peak_bytes, reset_peak
from evaluation.options import Adapters
from evaluation.questions import Question
from evaluation.record_file import Record
from evaluation.subject import Subject, load_subject, load_text
from evaluation.timing import cpu_model

WHOLE_BYTES, BUDGET_BYTES = 269_030_016, 184_000_000
"""Of SmolLM2-135M-Instruct; another model gets the same share."""
PLAIN, SHOWN = "plain", "CATS tree"
METHODS = {
    PLAIN: PRESETS["autoregressive"],
    "Kangaroo": PRESETS["kangaroo"],
    "CATS chain": PRESETS["cascade_chain"],
    SHOWN: PRESETS["cascade_tree"],
    "prompt lookup": PRESETS["prompt_lookup"],
}
PROMPTS = (
    "Give me two tips for sleeping well.",
    "In two sentences, why is the sky blue?",
    "How do plants make food? Answer in one sentence.",
)
SHOWN_PROMPT = 0
WARM_UP_TOKENS = 4
NOTE = """\
accepted length: tokens per pass of the whole model. tokens/s: reading the prompts included. speed-up, identical: against plain, which
holds as many weights. read a token: weights from the disk, behind the prompt. repeated 4-grams: loops in the text make drafting easy."""


@dataclass(frozen=True)
class Stage:
    """What every method is shown with.

    Attributes:
        budget_bytes: of weights in memory; None holds them all.
        shared: the model of all methods where everything is in memory, once it is loaded.
    """

    model: DefaultModel
    text: ModelText
    budget_bytes: int | None
    shared: list[Subject] = field(default_factory=list)

    def subject(self, method: MethodConfig) -> Subject:
        """The model under the best plan for this method, freshly loaded; without a budget the one model of all methods."""
        if self.shared:
            return self.shared[0]
        names = self.model.adapters if self.budget_bytes is None else needs_of(method).adapters
        adapters: Adapters = {name: (self.model.adapters[name], None) for name in names}
        memory = None
        if self.budget_bytes is not None:
            memory = with_needs(MemoryOptions(budget_bytes=self.budget_bytes, covers="weights"), method)
        subject = load_subject(str(self.model.path), adapters, self.text, "float32", torch.device("cpu"), memory)
        if self.budget_bytes is None:
            self.shared.append(subject)
        return subject


@dataclass
class Figures:
    """What one method did: a record an answer, and the most bytes that the process took meanwhile (None where that is not measured)."""

    records: list[Record] = field(default_factory=list)
    peak: int | None = None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="python -m evaluation.benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resident", action="store_true", help="hold all weights in memory instead")
    parser.add_argument("--memory-budget", help="of weights (default: 184MB of SmolLM2's 269, as large a share of another model)")
    parser.add_argument("--max-new-tokens", type=int, default=72, help="per answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.resident and arguments.memory_budget is not None:
        raise CatsError("--resident holds all weights, so --memory-budget does nothing; leave one of them out.")
    return arguments


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Show the table, then the answer; texts that differ are an error."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    stage = set_stage(arguments)
    sys.stdout.write(heading(stage))
    sys.stdout.flush()
    with heartbeat("warming up"):
        baseline = warm_up(stage)
    figures = answer_in_turns(stage, arguments.max_new_tokens)
    sys.stdout.write(f"{table(figures)}\n\n{NOTE}\n{memory_note(stage, baseline)}\n\n")
    show(stage.text, PROMPTS[SHOWN_PROMPT], figures[SHOWN].records[SHOWN_PROMPT])
    plain = figures[PLAIN].records
    different = [name for name, own in figures.items() if metrics.identical_answers(own.records, plain) < len(PROMPTS)]
    if different:
        raise CatsError(f"answers of {', '.join(different)} differ from plain decoding's; run evaluation.correctness to see where.")


def set_stage(arguments: argparse.Namespace) -> Stage:
    """The default model, fetched if need be, with the budget that was asked for."""
    model = default_model()
    if not model.adapters:
        raise CatsError(f"the adapters of {model.name} are missing from {SHIPPED.parent.name}/{SHIPPED.name}; restore the checkout's data.")
    budget = BUDGET_BYTES * weight_bytes(model.path) // WHOLE_BYTES
    if arguments.memory_budget is not None:
        budget = parse_amount(arguments.memory_budget, "--memory-budget")
    with heartbeat("loading"):
        text = load_text(str(model.path), None)
    return Stage(model, text, None if arguments.resident else budget)


def weight_bytes(directory: Path) -> int:
    """All weights of a checkpoint, as stored."""
    return sum(place.nbytes for place in locate_tensors(directory).values())


def heading(stage: Stage) -> str:
    """What runs, and on what."""
    whole = weight_bytes(stage.model.path)
    exits = ", ".join(f"{name} exit {read_adapter_config(place).exit_layer}" for name, place in stage.model.adapters.items())
    where = "all of them in memory"
    if stage.budget_bytes is not None:
        rate = rate_text(measure_read_rate(weight_files(stage.model.path)[0]))
        where = f"{megabytes(stage.budget_bytes)} of them in memory, the others streamed from this disk ({rate})"
    return (
        f"{stage.model.name}: {read_config(stage.model.path).num_hidden_layers} layers, {megabytes(whole)} of weights, {where}\n"
        f"{exits}; greedy, float32 arithmetic, threads: {torch.get_num_threads()}, {cpu_model()}\n\n"
    )


def warm_up(stage: Stage) -> int:
    """Pay first-call costs once; what the process holds afterwards, without a model where each turn loads its own."""
    method = METHODS[SHOWN]
    stage.subject(method).answer(stage.text.prompt_ids(PROMPTS[0]), method, GenerationConfig(max_new_tokens=WARM_UP_TOKENS))
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def answer_in_turns(stage: Stage, max_new_tokens: int) -> dict[str, Figures]:
    """Figures by method; each prompt goes to all methods before the next one comes, in an order that rotates."""
    asking = Asking(stage.text, GenerationConfig(max_new_tokens=max_new_tokens))
    figures = {name: Figures() for name in METHODS}
    names = list(METHODS)
    with live_bar(total=len(PROMPTS) * len(names), unit="answer", leave=False) as bar:
        for place, prompt in enumerate(PROMPTS):
            for name in names[place % len(names) :] + names[: place % len(names)]:
                bar.set_description(name)
                take_turn(stage, name, Question(place, "demo", (prompt,)), asking, figures[name])
                bar.update()
    return figures


def take_turn(stage: Stage, name: str, question: Question, asking: Asking, figures: Figures) -> None:
    """Load, answer, forget; adds to the method's figures."""
    gc.collect()
    measured = start_measuring()
    subject = stage.subject(METHODS[name])
    figures.records.append(ask(Contender(name, partial(forward, subject, METHODS[name]), Path()), question, asking))
    if measured:
        figures.peak = max(figures.peak or 0, peak_bytes())


def forward(subject: Subject, method: MethodConfig, prompt_ids: list[int], config: GenerationConfig) -> Generation:
    """One answer by one method."""
    return subject.answer(prompt_ids, method, config)


def start_measuring() -> bool:
    """Let the process's peak begin anew; False where the system does not offer that."""
    try:
        reset_peak()
    except OSError:
        return False
    return True


def table(figures: dict[str, Figures]) -> str:
    """One line a method."""
    rows = [("method", "accepted length", "tokens/s", "speed-up", "read a token", "peak memory", "identical", "repeated 4-grams")]
    plain = figures[PLAIN].records
    for name, own in figures.items():
        read = metrics.bytes_streamed_per_token(own.records)
        numbers = (
            figure(metrics.accepted_length(own.records), "{:.2f}"),
            figure(metrics.tokens_per_second(own.records), "{:.1f}"),
            figure(metrics.speed_up(own.records, plain), "{:.2f} x"),
            "-" if read is None else megabytes(read),
            "-" if own.peak is None else megabytes(own.peak),
            "yes" if metrics.identical_answers(own.records, plain) == len(own.records) else "NO",
            figure(metrics.repeated_ngram_share(metrics.turn_values(own.records, "ids")), "{:.0%}"),
        )
        rows.append((name, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def figure(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else form.format(value)


def megabytes(nbytes: float) -> str:
    """Whole megabytes, a decimal below a hundred."""
    return f"{nbytes / 1e6:.1f} MB" if 0 < nbytes < 1e8 else f"{nbytes / 1e6:.0f} MB"


def memory_note(stage: Stage, baseline: int) -> str:
    """What the column of peaks counts."""
    if stage.budget_bytes is None:
        return "peak memory: of the whole process, which holds one model, upcast to float32, with both adapters for all methods."
    return f"peak memory: of the whole process; Python, torch and the tokenizer take {megabytes(baseline)} of it without a model."


def show(text: ModelText, prompt: str, record: Record) -> None:
    """The text of one answer; in a terminal, tokens that were drafted and accepted are green."""
    choice = record["choices"][0]
    colours = "; green: drafted by the first layers and accepted by the whole model" if sys.stdout.isatty() else ""
    sys.stdout.write(f"{SHOWN} on {prompt!r}{colours}\n\n")
    steps = choice["steps"][0]
    writers = ["target"]
    for committed, accepted in zip(steps["committed"], steps["accepted"], strict=True):
        writers += ["draft" if place < accepted else "target" for place in range(committed)]
    live = LiveText(text, drafts_in_green())
    for token, writer in zip(choice["ids"][0], writers, strict=True):
        live.show(token, writer)
    live.end()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
