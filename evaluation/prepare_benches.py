"""Bring the official question sets to data/test_benches/official/, checked, beside the samples that ship with the repository.

    python -m evaluation.prepare_benches                from the Hugging Face hub (and Spec-Bench's repository), by `datasets`
    python -m evaluation.prepare_benches --from FOLDER  from a folder that holds question_<bench>.jsonl

A folder's files must be byte for byte those of the public CATS code (ElizaFuLan/CATS, commit 83ef019f74b2). What the hub
holds are the same questions in other formats; they are put into the same form, and counts and structure are checked
instead of bytes. Knows formats of question sets; knows no model.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats.cli.command import CommandParser, exit_with_sentence
from cats.errors import CatsError
from cats.files import write_atomically
from evaluation.questions import BENCH_FOLDER, BENCHES, question_file_name, read_questions

Row = dict[str, Any]

GSM8K_PROMPT = (
    "Below are example math problems solved step by step. Always end your answer with '#### <number>'.\n\n"
    "Example 1:\nQ: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether?\nA: She sold 48/2=24 clips in May. 48+24=72 clips total. #### 72\n\n"
    "Example 2:\nQ: Weng earns $12 an hour for babysitting. Yesterday she did 50 minutes. How much did she earn?\n"
    "A: 12/60=0.2 per minute. 0.2*50=10. #### 10\n\nNow solve the following problem:\nQ: {question}\nA:"
)


def mtbench_row(place: int, row: Mapping[str, Any]) -> Row:
    """lighteval/mt-bench holds FastChat's own fields."""
    reference = {"reference": list(row["reference"])} if row.get("reference") else {}
    return {"question_id": int(row["question_id"]), "category": row["category"], "turns": list(row["turns"]), **reference}


def alpacaeval_row(place: int, row: Mapping[str, Any]) -> Row:
    """AlpacaEval's instructions, numbered from 1."""
    return {"question_id": place + 1, "category": row["dataset"], "turns": [row["instruction"]]}


def gsm8k_row(place: int, row: Mapping[str, Any]) -> Row:
    """GSM8K's questions in the prompt of the public CATS code, numbered from 10000."""
    return {"question_id": 10000 + place, "category": "math", "turns": [GSM8K_PROMPT.format(question=row["question"])]}


def humaneval_row(place: int, row: Mapping[str, Any]) -> Row:
    """HumanEval's prompts behind the public CATS code's first line, numbered from 1."""
    return {
        "question_id": place + 1,
        "category": "code",
        "task_id": row["task_id"],
        "entry_point": row["entry_point"],
        "turns": ["Complete the code I provided.\n\n" + row["prompt"]],
        "reference": [row["canonical_solution"]],
    }


@dataclass(frozen=True)
class Bench:
    """An official set: its size, the hash of its file, and where `datasets` finds its questions.

    Attributes:
        turns: allowed numbers of turns of a question.
        load: arguments of `datasets.load_dataset`.
    """

    questions: int
    turns: tuple[int, ...]
    sha256: str
    load: Mapping[str, Any]
    row: Callable[[int, Mapping[str, Any]], Row]


OFFICIAL: dict[str, Bench] = {
    "mtbench": Bench(
        80,
        (2,),
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        {"path": "lighteval/mt-bench", "split": "train"},
        mtbench_row,
    ),
    "alpacaeval": Bench(
        805,
        (1,),
        "d10131f68cb95d1b793d8900806936206e5b4fafbf8ace68e03e7b4602c91ab5",
        {"path": "json", "data_files": "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json", "split": "train"},
        alpacaeval_row,
    ),
    "gsm8k": Bench(
        1319,
        (1,),
        "14444459a460229cd557fc44ef5ab8bfe8a4275fbaa50e29357e9ed2ca0b527b",
        {"path": "openai/gsm8k", "name": "main", "split": "test"},
        gsm8k_row,
    ),
    "humaneval": Bench(
        164,
        (1,),
        "eb273f851d11a4f8a47dbf093d347992843b02548ec48baf67cfe5b7193c8872",
        {"path": "openai/openai_humaneval", "split": "test"},
        humaneval_row,
    ),
    "spec": Bench(
        480,
        (1, 2),
        "d48d15394d6e9533d1f2bc9f8299a48acb091e155553b0dbb47b58756caaa673",
        {
            "path": "json",
            "data_files": "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl",
            "split": "train",
        },
        mtbench_row,
    ),
}


def check_structure(name: str, path: Path, bench: Bench) -> None:
    """Count of questions and numbers of turns; what differs raises `CatsError`."""
    questions = read_questions(path)
    if len(questions) != bench.questions:
        raise CatsError(f"{path} holds {len(questions)} questions, the official {name} has {bench.questions}; it is another or a cut set.")
    for question in questions:
        if len(question.turns) not in bench.turns:
            raise CatsError(
                f"question {question.question_id} of {path} has {len(question.turns)} turns; the official {name} has {bench.turns}."
            )


def read_from_folder(name: str, bench: Bench, folder: Path) -> str:
    """The text of one set's file, after its count, structure and hash were checked."""
    source = folder / question_file_name(name)
    check_structure(name, source, bench)
    content = source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != bench.sha256:
        raise CatsError(f"{source} has the sha256 {digest}, the official file {bench.sha256}; fetch it again.")
    return content.decode("utf-8")


def read_from_hub(name: str, bench: Bench, rows: Callable[..., Iterable[Mapping[str, Any]]]) -> str:
    """The text of one set's file in the common form, fetched through `datasets` (`rows` is its `load_dataset`)."""
    try:
        questions = [bench.row(place, row) for place, row in enumerate(rows(**bench.load))]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CatsError(f"cannot fetch {name} from {bench.load}: {cause}; check the connection, or give a folder by --from.") from error
    return "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)


def write_set(name: str, bench: Bench, text: str, official: Path) -> None:
    """Write one set's file, unless its count or structure is wrong."""

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")
        check_structure(name, part, bench)

    write_atomically(official / question_file_name(name), write)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Read and check the chosen sets, then write them; sets that are there are replaced."""
    parser = CommandParser(prog="python -m evaluation.prepare_benches", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--from", dest="folder", type=Path, help="folder with question_<bench>.jsonl; without it, the hub")
    parser.add_argument("--benches", nargs="+", choices=BENCHES, default=list(BENCHES), help="default: all")
    parser.add_argument(
        "--to", type=Path, default=BENCH_FOLDER / "official", help="folder to write to (default: where the evaluation looks)"
    )
    args = parser.parse_args(argv)
    if args.folder is not None and not args.folder.is_dir():
        raise CatsError(f"there is no folder {args.folder}; --from takes a folder that holds question_<bench>.jsonl.")
    if args.folder is not None:
        texts = {name: read_from_folder(name, OFFICIAL[name], args.folder) for name in args.benches}
        checked = "count, structure and sha256 checked"
    else:
        from datasets import load_dataset  # slow to import, and needless for a folder

        texts = {name: read_from_hub(name, OFFICIAL[name], load_dataset) for name in args.benches}
        checked = "count and structure checked; the bytes differ from the public CATS file, so its hash says nothing"
    for name, text in texts.items():
        write_set(name, OFFICIAL[name], text, args.to)
        sys.stdout.write(f"{args.to / question_file_name(name)}: {OFFICIAL[name].questions} questions, {checked}\n")


if __name__ == "__main__":
    main()
