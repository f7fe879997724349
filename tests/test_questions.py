"""Question files and prompts: which file a name means, what a malformed one is told, what the model is shown."""

import json
from pathlib import Path

import pytest

from cats.errors import CatsError
from evaluation.chat import TOKENIZER_TEMPLATE, Chat, default_template, load_tokenizer
from evaluation.questions import BENCH_FOLDER, BENCHES, question_file_name, read_questions, resolve_bench, select_questions
from tests.speaking_model import byte_tokenizer
from tests.tiny_models import TinyModel

VICUNA = "A chat between a curious user and an artificial intelligence assistant. "
VICUNA += "The assistant gives helpful, detailed, and polite answers to the user's questions. "


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def line(question_id: object, *turns: object) -> str:
    return json.dumps({"question_id": question_id, "category": "x", "turns": list(turns)})


@pytest.mark.parametrize("bench", BENCHES)
def test_samples_are_ten_marked_questions_in_the_format(bench: str) -> None:
    path = BENCH_FOLDER / question_file_name(bench)
    questions = read_questions(path)
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert len(questions) == 10
    assert all(row["sample"] is True for row in rows)
    assert all(len(question.turns) == 2 for question in questions) == (bench == "mtbench")
    if bench == "humaneval":
        assert all({"task_id", "entry_point", "reference"} <= row.keys() for row in rows)


def test_bench_name_means_the_official_set_where_there_is_one(tmp_path: Path) -> None:
    sample = resolve_bench("mt_bench", tmp_path)
    assert sample.path == tmp_path / "question_mtbench.jsonl"
    assert "sample" in sample.description
    (tmp_path / "official").mkdir()
    official = write(tmp_path / "official" / "question_mtbench.jsonl", line(81, "a", "b"))
    assert resolve_bench("mtbench", tmp_path).path == official
    assert "official" in resolve_bench("mtbench", tmp_path).description
    with pytest.raises(CatsError, match="unknown bench 'mmlu'"):
        resolve_bench("mmlu", tmp_path)


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        ("{", "line 2 of .* is not JSON"),
        ("[1]", "line 2 of .* is a JSON list"),
        (line(None, "x"), "line 2 of .* no 'question_id'"),
        (line(True, "x"), "line 2 of .* no 'question_id'"),
        (line(2), "line 2 of .* no 'turns'"),
        (line(2, " "), "line 2 of .* no 'turns'"),
        (line(2, 5), "line 2 of .* no 'turns'"),
        (line(1, "again"), "line 2 of .* repeats the question_id 1"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, second: str, complaint: str) -> None:
    with pytest.raises(CatsError, match=complaint):
        read_questions(write(tmp_path / "q.jsonl", line(1, "fine"), second))


def test_missing_empty_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CatsError, match="cannot read the question file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(CatsError, match="holds no question"):
        read_questions(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatsError, match="cannot read the question file"):
        read_questions(tmp_path / "binary.jsonl")


def test_a_slice_counts_from_zero_and_may_reach_past_the_end(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path / "q.jsonl", *(line(place, "x") for place in range(5))))
    assert [question.question_id for question in select_questions(questions, 1, 3)] == [1, 2]
    assert len(select_questions(questions, None, None)) == 5
    assert len(select_questions(questions, 0, 80)) == 5
    for begin, end in ((3, 3), (4, 2), (-1, 2), (5, 9)):
        with pytest.raises(CatsError):
            select_questions(questions, begin, end)


def test_answers_join_the_conversation_behind_one_bos() -> None:
    tokenizer = byte_tokenizer()
    chat = Chat(tokenizer, "vicuna_v1.1")
    first = chat.prompt_ids(["Hi."], [])
    second = chat.prompt_ids(["Hi.", "And?"], ["Yes."])
    assert tokenizer.decode(first) == f"<s>{VICUNA}USER: Hi. ASSISTANT:"
    assert tokenizer.decode(second) == f"<s>{VICUNA}USER: Hi. ASSISTANT: Yes.</s>USER: And? ASSISTANT:"
    assert second.count(tokenizer.bos_token_id) == 1
    assert second.count(tokenizer.eos_token_id) == 1
    assert chat.text([*tokenizer.encode(" So. ", add_special_tokens=False), 2]) == "So."


def test_the_tokenizers_own_template_gives_the_same_prompt() -> None:
    own, named = Chat(byte_tokenizer(), TOKENIZER_TEMPLATE), Chat(byte_tokenizer(), "vicuna_v1.1")
    for turns, answers in ((["Hi."], []), (["Hi.", "And?"], ["Yes."])):
        assert own.prompt_ids(turns, answers) == named.prompt_ids(turns, answers)


def test_a_template_that_writes_a_bos_does_not_double_it() -> None:
    doubled = byte_tokenizer("{{ bos_token }}{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}")
    ids = Chat(doubled, TOKENIZER_TEMPLATE).prompt_ids(["Hi."], [])
    assert ids.count(doubled.bos_token_id) == 1


def test_the_template_is_taken_from_the_model(speaking: TinyModel) -> None:
    assert default_template(load_tokenizer(speaking.base), speaking.base) == "vicuna_v1.1"
    assert (
        default_template(byte_tokenizer("{% for message in messages %}{{ message['content'] }}{% endfor %}"), "any") == TOKENIZER_TEMPLATE
    )
    silent = byte_tokenizer(None)
    assert default_template(silent, "models/vicuna-7b-v1.3") == "vicuna_v1.1"
    assert default_template(silent, "models/Llama-2-7b-chat-hf") == "llama-2"
    with pytest.raises(CatsError, match="name one by --template"):
        default_template(silent, "models/base")
    with pytest.raises(CatsError, match="no chat template of its own"):
        Chat(silent, TOKENIZER_TEMPLATE)
    with pytest.raises(CatsError, match="unknown chat template 'klingon'"):
        Chat(silent, "klingon")


def test_stop_strings_of_a_template_end_the_text() -> None:
    tokenizer = byte_tokenizer()
    chat = Chat(tokenizer, "zero_shot")
    assert chat.stop_strings == ("###",)
    assert chat.text(tokenizer.encode("Four.\n### Human: more", add_special_tokens=False)) == "Four."


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatsError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(CatsError, match="there is no directory"):
        load_tokenizer(tmp_path / "absent")
