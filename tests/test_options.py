"""The evaluation command from outside: the README's command line, every flag, every refusal (one sentence, status 2, nothing written)."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from cats import (
    METHODS,
    AutoregressiveConfig,
    CascadeConfig,
    CatsError,
    EagleSelfConfig,
    Generation,
    KangarooConfig,
    PromptLookupConfig,
)
from cats.cli.method_flags import chosen_method, every_setting
from cats.methods import PRESETS
from evaluation import CATS_dynamic
from evaluation.presets import parse_presets
from evaluation.record_file import read_records
from evaluation.subject import Subject
from tests.tiny_models import TinyModel

FIXTURE = Path(__file__).resolve().parent.parent / "data" / "tiny"
README_FLAGS = shlex.split("""
    --model-id cats_chain_mtbench --bench-name mt_bench --question-begin 0 --question-end 80 --draft-layer 1 --shallow-layer 3 --steps 5
    --sv-passes 1 --threshold 0.0 --tree-topk 1 --total-tokens -1 --num-runs 1 --temperature 0.0 --typical-tau 0.0 --typical-alpha 0.0
    --dtype float16 --max-new-tokens 1024
""")


def paths(tiny: TinyModel, *adapters: str) -> list[str]:
    flags = ["--model-path", str(tiny.base)]
    for name in adapters:
        flags += [f"--{name}-adapter-path", str(getattr(tiny, name))]
    return flags


def questions(folder: Path, *turns: tuple[str, ...]) -> str:
    rows = [{"question_id": place, "category": "x", "turns": list(turn)} for place, turn in enumerate(turns, start=1)]
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], here: Path, flags: list[str]) -> str:
    """Run the command, which must end with status 2, one sentence and nothing written; the sentence."""
    with pytest.raises(SystemExit) as ended:
        CATS_dynamic.main(flags)
    shown = capsys.readouterr().err
    assert ended.value.code == 2, shown
    assert "Traceback" not in shown
    assert not list(here.iterdir()), "something was written"
    return shown.splitlines()[-1]


def test_the_readmes_command_line_is_accepted_as_it_stands() -> None:
    adapters = ["--model-path", "m", "--draft-adapter-path", "d", "--shallow-adapter-path", "s"]
    args = CATS_dynamic.parse([*adapters, *README_FLAGS])
    assert chosen_method(args.method, args) == CascadeConfig(5, 0.0, 1, -1, 1)
    tree = [*README_FLAGS, "--tree-topk", "10", "--total-tokens", "40"]
    args = CATS_dynamic.parse([*adapters, *tree])
    assert chosen_method(args.method, args) == CascadeConfig(5, 0.0, 10, 40, 1)


def test_the_readmes_run_writes_what_it_documents(here: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--question-file", questions(here, ("Hi.", "And?"), ("So?",))]
    flags = [*paths(speaking, "draft", "shallow"), *README_FLAGS, "--max-new-tokens", "12", "--dtype", "float32", "--device", "cpu", *asked]
    CATS_dynamic.main([*flags, "--baseline", "--num-runs", "2"])
    output = here / "data" / "mt_bench" / "cats_chain_mtbench"
    assert {path.name for path in output.iterdir()} == {
        *("0.jsonl", "0.baseline.jsonl", "0.settings.json", "1.jsonl", "1.baseline.jsonl", "1.settings.json"),
        "verification_metrics.json",
    }
    metrics = json.loads((output / "verification_metrics.json").read_text())
    found = metrics["all"]
    assert found["questions"] == 4
    assert found["confusion"]["TP"] + found["confusion"]["FP"] + found["confusion"]["FN"] + found["confusion"]["TN"] > 0
    assert found["baseline"]["identical"] == found["baseline"]["compared"] == 4
    assert found["baseline"]["speed_up"] > 0
    assert found["accepted_length"] >= 1
    assert metrics["runs"][0]["committed_per_step"]
    assert "identical to plain 4 of 4" in capsys.readouterr().out
    plain = read_records(output / "0.baseline.jsonl")[0]["choices"][0]["steps"][0]
    assert set(plain["committed"]) == {1}
    assert set(plain["layer_passes"]) == {6}


def drafted(committed: list[int], steps: int, most: int) -> int:
    """Tokens that a chain of `steps` drafts in a turn of at most `most` tokens, by the tokens that each of its cycles kept."""
    left = [most - 2 - sum(committed[:place]) for place in range(len(committed))]
    return sum(min(steps, room) for room in left)


def test_the_papers_command_line_fills_the_confusion_matrix(here: Path) -> None:
    """The paper's command line in half precision, on the small test model: the matrix adds up from the answers, turn by turn."""
    flags = shlex.split(" ".join(README_FLAGS).replace("--question-end 80 --draft-layer 1 --shallow-layer 3", "--question-end 2"))
    flags[-1] = "24"
    adapters = ["--adapters", str(FIXTURE / "adapters"), "--draft-layer", "2", "--shallow-layer", "6"]
    CATS_dynamic.main(["--model-path", str(FIXTURE), *adapters, *flags, "--device", "cpu"])
    output = here / "data" / "mt_bench" / "cats_chain_mtbench"
    metrics = json.loads((output / "verification_metrics.json").read_text())
    assert metrics["arithmetic"] == {"weights": "float16", "computed": "float32"}
    matrix = metrics["all"]["confusion"]
    turns = [steps for record in read_records(output / "0.jsonl") for steps in record["choices"][0]["steps"]]
    assert len(turns) == 4
    for name in ("TP", "FP", "FN", "TN"):
        assert matrix[name] == sum(steps["confusion"][name.lower()] for steps in turns) > 0
    assert sum(matrix[name] for name in ("TP", "FP", "FN", "TN")) == sum(drafted(steps["committed"], 5, 24) for steps in turns)
    assert matrix["TP"] + matrix["FN"] >= sum(steps["accepted_kinds"]["trunk"] for steps in turns)
    assert matrix["precision"] == matrix["TP"] / (matrix["TP"] + matrix["FP"])
    assert matrix["recall"] == matrix["TP"] / (matrix["TP"] + matrix["FN"])


def test_a_bug_in_a_question_ends_a_run_that_keeps_going_with_status_1(
    here: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Subject.answer

    def broken(subject: Subject, prompt_ids: list[int], *given: Any) -> Generation:
        if subject.text.decode(prompt_ids).count("So?"):
            raise IndexError("list index out of range")
        return answer(subject, prompt_ids, *given)

    monkeypatch.setattr(Subject, "answer", broken)
    asked = ["--question-file", questions(here, ("Hi.",), ("So?",)), "--max-new-tokens", "3", "--output-dir", "out"]
    with pytest.raises(SystemExit) as ended:
        CATS_dynamic.main([*paths(speaking), "--method", "prompt_lookup", "--model-id", "m", "--device", "cpu", *asked, "--keep-going"])
    assert ended.value.code == 1
    assert "question 2: IndexError: list index out of range" in capsys.readouterr().err
    assert json.loads(Path("out/verification_metrics.json").read_text())["all"]["questions"] == 1


def test_a_second_call_asks_nothing_again_and_more_questions_join(here: Path, speaking: TinyModel) -> None:
    asked = questions(here, ("Hi.",), ("So?",), ("No.",))
    common = [*paths(speaking), "--method", "prompt_lookup", "--model-id", "m", "--question-file", asked, "--max-new-tokens", "5"]
    common += ["--output-dir", "out", "--device", "cpu", "--dtype", "float16"]
    CATS_dynamic.main([*common, "--question-end", "2"])
    first = read_records(Path("out/0.jsonl"))
    CATS_dynamic.main(common)
    assert read_records(Path("out/0.jsonl"))[:2] == first
    assert [record["question_id"] for record in read_records(Path("out/0.jsonl"))] == [1, 2, 3]
    CATS_dynamic.main([*common, "--question-end", "1"])
    assert json.loads(Path("out/verification_metrics.json").read_text())["all"]["questions"] == 1


def test_a_resume_with_other_settings_is_refused(here: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    asked = questions(here, ("Hi.",), ("So?",))
    common = [*paths(speaking, "draft"), "--method", "kangaroo", "--model-id", "m", "--question-file", asked, "--device", "cpu"]
    CATS_dynamic.main([*common, "--max-new-tokens", "5", "--output-dir", "out"])
    before = Path("out/0.jsonl").read_bytes()
    dtypes = ((["--dtype", "float16"], "dtype 'auto'"), (["--compute-dtype", "float64"], "compute_dtype 'auto'"))
    others = ((["--steps", "3"], "method.steps 6"), (["--temperature", "0.5"], "temperature 0.0"), (["--seed", "4"], "seed 0"))
    for change, named in (*others, *dtypes):
        with pytest.raises(SystemExit) as ended:
            CATS_dynamic.main([*common, "--max-new-tokens", "5", "--output-dir", "out", *change])
        assert ended.value.code == 2
        assert named in capsys.readouterr().err
    assert Path("out/0.jsonl").read_bytes() == before


@pytest.mark.parametrize(("computed", "warned"), [("auto", False), ("float16", True)])
def test_half_precision_is_computed_only_where_asked_and_says_so(
    here: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str], computed: str, warned: bool
) -> None:
    flags = ["--dtype", "float16", "--compute-dtype", computed]
    asked = questions(here, ("Hi.",))
    common = [*paths(speaking), "--method", "prompt_lookup", "--model-id", "m", "--question-file", asked, "--max-new-tokens", "5"]
    CATS_dynamic.main([*common, "--output-dir", "out", "--device", "cpu", *flags])
    caveats = json.loads(Path("out/verification_metrics.json").read_text())["caveats"]
    assert bool(caveats) == warned
    assert ("near ties" in capsys.readouterr().out) == warned


def test_a_prompt_longer_than_the_context_is_named_or_recorded(
    here: Path, tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = questions(tmp_path, ("Hi.",), ("x" * 2000,))
    common = [*paths(speaking), "--method", "autoregressive", "--model-id", "m", "--question-file", asked, "--device", "cpu"]
    common += ["--max-new-tokens", "3", "--output-dir", "out"]
    assert "the prompt of question 2 has" in refused(capsys, here, common)
    with pytest.raises(SystemExit) as ended:
        CATS_dynamic.main([*common, "--keep-going"])
    assert ended.value.code == 2
    assert "1 answers are missing (question 2: the prompt" in capsys.readouterr().err
    records = read_records(Path("out/0.jsonl"))
    assert "failed" not in records[0]
    assert "2" in records[1]["failed"]
    found = json.loads(Path("out/verification_metrics.json").read_text())["all"]
    assert (found["questions"], found["failed"]) == (1, 1)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--no-such-flag 3", "unrecognized arguments: --no-such-flag 3"),
        ("--step 3", "unrecognized arguments: --step 3"),
        ("--method medusa9", "invalid choice: 'medusa9'"),
        ("--steps many", "invalid int value: 'many'"),
        ("--dtype float8", "invalid choice: 'float8'"),
        ("--steps 0", "steps is 0; it must be at least 1."),
        ("--threshold 1.5", "threshold is 1.5"),
        ("--total-tokens 40", "total-tokens 40 has nothing to choose from in a chain"),
        ("--typical-tau 0.09", "set both above 0"),
        ("--typical-tau 0.09 --typical-alpha 0.3", "give a temperature above 0"),
        ("--temperature -1", "temperature is -1.0"),
        ("--top-p 0.5", "give a temperature above 0"),
        ("--max-new-tokens 0", "max-new-tokens is 0"),
        ("--num-runs 0", "--num-runs is 0"),
        ("--draft-layer 3 --shallow-layer 2", "--draft-layer 3 is not before --shallow-layer 2"),
        ("--draft-layer 2", "exit 1, not 2"),
        ("--method kangaroo --tree-topk 10", "--tree-topk does nothing for the method kangaroo"),
        ("--method kangaroo", "--shallow-adapter-path does nothing for kangaroo"),
        ("--method prompt_lookup --threshold 0.5", "--threshold does nothing for the method prompt_lookup"),
        ("--method autoregressive --steps 5", "--steps does nothing for the method autoregressive"),
        ("--continuation 5", "--continuation does nothing for the method cascade"),
        ("--question-begin 4 --question-end 2", "questions 4 to 2 are none"),
        ("--question-begin 90000", "past the end"),
        ("--question-file absent.jsonl", "cannot read the question file absent.jsonl"),
        ("--bench-name mmlu", "unknown bench 'mmlu'"),
        ("--bench-name ../x", "must be a plain name"),
        ("--model-id a/b", "must be a plain name"),
        ("--bench-name tiny", "holds something else"),
        ("--device nowhere", "no device that torch knows"),
        ("--device cuda:77", "is not here"),
        ("--template klingon", "unknown chat template 'klingon'"),
        ("--model-path absent", "there is no directory absent"),
        ("--shallow-adapter-path absent", "there is no directory absent"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    here: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str], flags: str, complaint: str
) -> None:
    common = [*paths(speaking, "draft", "shallow"), "--model-id", "m", "--device", "cpu"]
    sentence = refused(capsys, here, [*common, *flags.split()])
    assert complaint in sentence
    assert sentence.split(" ", 1)[0] in ("error:", "CATS_dynamic.py:")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("", "the method cascade needs the draft adapter; give --draft-adapter-path"),
        ("--method kangaroo --shallow-layer 3", "--shallow-layer does nothing for kangaroo"),
        ("--method prompt_lookup --draft-layer 1", "--draft-layer does nothing for prompt_lookup"),
        ("--method autoregressive --baseline", "--baseline compares with plain decoding"),
    ],
)
def test_missing_and_needless_adapters_are_named(
    here: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str], flags: str, complaint: str
) -> None:
    assert complaint in refused(capsys, here, [*paths(speaking), "--model-id", "m", "--device", "cpu", *flags.split()])


def test_a_place_that_cannot_be_written_is_refused(here: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    inside_a_file = str(speaking.base / "config.json" / "out")
    flags = [*paths(speaking), "--method", "autoregressive", "--model-id", "m", "--device", "cpu", "--output-dir", inside_a_file]
    assert "cannot write answers" in refused(capsys, here, flags)


def test_exchanged_adapters_are_refused(here: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    exchanged = [*paths(speaking), "--draft-adapter-path", str(speaking.shallow), "--shallow-adapter-path", str(speaking.draft)]
    assert "exit 3 is not before the shallow adapter's 1" in refused(capsys, here, [*exchanged, "--model-id", "m", "--device", "cpu"])


def test_every_setting_of_every_method_is_explained() -> None:
    assert not [setting.name for setting in every_setting().values() if setting.help == setting.name]


def test_presets_can_be_changed_by_name() -> None:
    found = parse_presets(["kangaroo", "cascade_tree:sv-passes=2,steps=3", "prompt_lookup", "autoregressive", "eagle_self_tree"])
    assert list(found.values()) == [
        KangarooConfig(),
        CascadeConfig(3, 0.0, 10, 40, 2),
        PromptLookupConfig(),
        AutoregressiveConfig(),
        EagleSelfConfig(5, 10, 60),
    ]
    assert {config.name for config in PRESETS.values()} == set(METHODS)
    for text, complaint in (("nope", "unknown method 'nope'"), ("kangaroo:topk=2", "sets 'topk'"), ("kangaroo:steps=x", "must be a int")):
        with pytest.raises(CatsError, match=complaint):
            parse_presets([text])
