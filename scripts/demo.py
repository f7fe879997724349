"""CATS on the embedded model in under a minute: plain decoding, Kangaroo, CATS chain and CATS tree, side by side, then a text.

The methods take turns prompt by prompt. Greedy, float32, one thread: a model of this size gains nothing from a second one.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from cats import CatsError, Generation, GenerationConfig, MethodConfig
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.default_model import EMBEDDED, EMBEDDED_ADAPTERS
from cats.cli.live_text import LiveText
from evaluation import metrics
from evaluation.eval import Asking, Contender, ask, warm_up
from evaluation.options import Adapters
from evaluation.presets import PRESETS
from evaluation.questions import Question
from evaluation.record_file import Record
from evaluation.subject import Subject, load_subject, load_text
from evaluation.timing import cpu_model

ADAPTERS: Adapters = {name: (path, None) for name, path in EMBEDDED_ADAPTERS.items()}
PLAIN, SHOWN = "plain", "CATS tree"
METHODS = {
    PLAIN: PRESETS["autoregressive"],
    "Kangaroo": PRESETS["kangaroo"],
    "CATS chain": PRESETS["cascade_chain"],
    SHOWN: PRESETS["cascade_tree"],
}
PROMPTS = (
    "Tell me how bread is made, step by step.",
    "Write a Python function that returns the largest number in a list.",
    "A box holds 6 eggs. How many eggs are in 7 boxes?",
    "Describe a quiet harbour at night in a few sentences.",
)
NOTE = """\
accepted length: tokens per pass of the whole model, prefill left out. repeated 4-grams: loops in the text make drafting easy.
All weights of this small model are in memory, where a pass costs next to nothing, so the speed-ups above are not the paper's
setting: there the layers behind the shallow exit are streamed from flash on every pass, and the accepted length decides."""


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="python -m scripts.demo", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--max-new-tokens", type=int, default=96, help="per answer (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    subject = load_subject(str(EMBEDDED), ADAPTERS, load_text(str(EMBEDDED), None), "float32", torch.device("cpu"))
    sys.stdout.write(heading(subject))
    records = answer_in_turns(subject, arguments.max_new_tokens)
    sys.stdout.write(table(records) + "\n\n" + NOTE + "\n\n")
    show(subject, PROMPTS[1], records[SHOWN][1])
    different = [name for name in METHODS if metrics.identical_answers(records[name], records[PLAIN]) < len(PROMPTS)]
    if different:
        raise CatsError(f"answers of {', '.join(different)} differ from plain decoding's; run evaluation.correctness to see where.")


def heading(subject: Subject) -> str:
    """What runs, and on what."""
    base = subject.model.base
    exits = ", ".join(f"{name} exit {adapter.exit_layer}" for name, adapter in subject.model.adapters.items())
    size = sum(weight.numel() for weight in base.parameters()) / 1e6
    return f"embedded model: {base.layer_count} layers, {size:.1f} M parameters, {exits}; greedy, float32, 1 thread of {cpu_model()}\n\n"


def answer_in_turns(subject: Subject, max_new_tokens: int) -> dict[str, list[Record]]:
    """Answer records by method; each prompt goes to all methods before the next one comes, in an order that rotates."""
    asking = Asking(subject.text, GenerationConfig(max_new_tokens=max_new_tokens))
    contenders = [Contender(name, partial(forward, subject, method), Path()) for name, method in METHODS.items()]
    questions = [Question(number, "demo", (prompt,)) for number, prompt in enumerate(PROMPTS)]
    warm_up(contenders, questions[0], asking)
    records: dict[str, list[Record]] = {name: [] for name in METHODS}
    for place, question in enumerate(questions):
        turn = place % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            records[contender.model_id].append(ask(contender, question, asking))
    return records


def forward(subject: Subject, method: MethodConfig, prompt_ids: list[int], config: GenerationConfig) -> Generation:
    """One answer by one method."""
    return subject.answer(prompt_ids, method, config)


def table(records: dict[str, list[Record]]) -> str:
    """One line a method."""
    rows = [("method", "accepted length", "tokens/s", "speed-up", "identical to plain", "repeated 4-grams")]
    for name, own in records.items():
        figures = (
            figure(metrics.accepted_length(own), "{:.2f}"),
            figure(metrics.tokens_per_second(own), "{:.1f}"),
            figure(metrics.speed_up(own, records[PLAIN]), "{:.2f} x"),
            "yes" if metrics.identical_answers(own, records[PLAIN]) == len(own) else "NO",
            figure(metrics.repeated_ngram_share(metrics.turn_values(own, "ids")), "{:.0%}"),
        )
        rows.append((name, *figures))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def figure(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else form.format(value)


def show(subject: Subject, prompt: str, record: Record) -> None:
    """The text of one answer; in a terminal, tokens that were drafted and accepted are green."""
    choice = record["choices"][0]
    colours = "; green: drafted by the first layers and accepted by the whole model" if sys.stdout.isatty() else ""
    sys.stdout.write(f"{SHOWN} on {prompt!r}{colours}\n\n")
    steps = choice["steps"][0]
    drafted = [False]
    for committed, accepted in zip(steps["committed"], steps["accepted"], strict=True):
        drafted += [place < accepted for place in range(committed)]
    live = LiveText(subject.text)
    for token, was_drafted in zip(choice["ids"][0], drafted, strict=True):
        live.show(token, was_drafted)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
