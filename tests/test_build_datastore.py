"""The command that builds datastores: from chats and plain text, whole or not at all, and refused with a sentence."""

import gzip
import json
from pathlib import Path

import pytest

from cats.datastore import Datastore
from cats.text import ModelText
from tests import chats
from tests.tiny_models import TinyModel
from training.build_datastore import main


def built(speaking: TinyModel, output: Path, *files: Path) -> Datastore:
    main(["--model-path", str(speaking.base), "--output", str(output), "--data-path", *map(str, files)])
    return Datastore.open(output)


def test_chats_stand_in_the_models_template(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "chats.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(chats.items(4)).encode()))
    store = built(speaking, tmp_path / "store", packed)
    text = ModelText.from_pretrained(speaking.base)
    asked = [{"role": "user", "content": chats.items(4)[1]["conversations"][0]["value"]}]
    prompt = text.prompt_ids(asked)
    length, low, high = store.longest_match(prompt, 16, 2)
    assert (length, high - low) == (min(16, len(prompt)), 1)
    answer = text.decode([node.token for node in store.continuations((length, low, high), 3, 3, 10)])
    assert chats.items(4)[1]["conversations"][1]["value"].startswith(answer.strip()[:2])
    assert store.about["tokenizer"] == text.fingerprint
    assert store.about["sources"] == ["chats.json.gz"]
    said = capsys.readouterr().out
    assert f"{len(store.suffixes_M):,} tokens of 4 texts" in said
    assert f"{store.nbytes / 1e6:,.1f} MB" in said


def test_plain_text_is_cut_where_lines_end(speaking: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.build_datastore.PIECE", 20)
    lines = [f"the sum of two and three is {number}\n" for number in range(30)]
    (tmp_path / "notes.txt").write_text("".join(lines))
    store = built(speaking, tmp_path / "store", tmp_path / "notes.txt")
    tokenizer = ModelText.from_pretrained(speaking.base).tokenizer
    expected = [token for line in lines for token in tokenizer(line, add_special_tokens=False)["input_ids"]]
    assert store.tokens_N.tolist() == [*expected, -1]


REFUSED = {
    "no such file": (["--data-path", "nowhere.txt"], "cannot read nowhere.txt"),
    "no text": (["--data-path", "empty.txt"], "a datastore of no text"),
    "not text": (["--data-path", "bytes.txt"], "cannot read bytes.txt"),
    "not chats": (["--data-path", "wrong.json"], "expected a JSON list in ShareGPT format"),
    "a template for nothing": (["--data-path", "some.txt", "--template", "vicuna_v1.1"], "--template writes conversations"),
    "no model": (["--data-path", "some.txt", "--model-path", "nothing"], "there is no directory nothing"),
    "a directory": (["--data-path", "some.txt", "--output", "."], "is a directory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_faults_are_named_and_leave_nothing_behind(
    speaking: TinyModel, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("some.txt").write_text("two and three")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    Path("wrong.json").write_text("{")
    flags, sentence = REFUSED[case]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(["--model-path", str(speaking.base), "--output", "store", *flags])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
