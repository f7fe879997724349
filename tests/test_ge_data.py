"""Stored states and answers written by the model: what is on disk, resuming, refusing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cats
from cats.errors import CatsError
from tests.chats import write
from tests.tiny_models import EOS, TinyModel
from training import ge_data, train_finetune
from training.chat_tokens import encode_chats, training_text
from training.conversations import read_sharegpt
from training.regenerate import Answerer, Regeneration, appending, collect, regenerate
from training.stored_states import StoredSource, check_states


def arguments(tiny: TinyModel, data: Path, outdir: Path, *more: str) -> list[str]:
    fixed = ["--model-path", str(tiny.base), "--data-path", str(data), "--outdir", str(outdir), "--exit-layers", "1", "3"]
    return [*fixed, "--length", "300", "--shard-rows", "3", "--cpu", *more]


def sentence(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line with which a command line refuses."""
    with pytest.raises(SystemExit) as caught:
        ge_data.main(argv)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.json", 8)


def test_shards_hold_the_states_of_a_plain_forward(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    ge_data.main(arguments(speaking, data, tmp_path / "out", "--store-dtype", "float32", "--start", "1", "--index", "4"))
    shards = sorted((tmp_path / "out" / "4").glob("*.safetensors"))
    assert len(shards) == 3
    chats = encode_chats(training_text(speaking.base, None), read_sharegpt(data)[1:], 300)
    base = cats.load(speaking.base, dtype="float32").base
    shard, start = load_file(shards[1]), 0
    for chat, length in zip(chats[3:6], shard["lengths"].tolist(), strict=True):
        rows = slice(start, start := start + length)
        assert shard["ids"][rows].tolist() == chat.ids_N.tolist()
        assert shard["counted"][rows].bool().tolist() == chat.answer_N.tolist()
        states = base.hidden_states(torch.from_numpy(chat.ids_N).long()[None], (1, 3, base.layer_count))
        for name, state in (("hidden_1", states[1]), ("hidden_3", states[3]), ("final", states[base.layer_count])):
            torch.testing.assert_close(shard[name][rows], state[0].detach(), atol=1e-5, rtol=1e-5)


def test_only_missing_and_damaged_shards_are_made_again(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    argv = arguments(speaking, data, tmp_path / "out")
    ge_data.main(argv)
    shards = sorted((tmp_path / "out").rglob("*.safetensors"))
    before = [path.read_bytes() for path in shards]
    shards[0].unlink()
    shards[1].write_bytes(before[1][:-100])
    kept = shards[2].stat().st_mtime_ns
    with pytest.raises(CatsError, match=r"states_000001\.safetensors is damaged or cut short"):
        StoredSource(tmp_path / "out", (1, 3), 300, torch.device("cpu"))
    ge_data.main(argv)
    assert [path.read_bytes() for path in shards] == before
    assert shards[2].stat().st_mtime_ns == kept


def test_the_estimate_is_the_size_on_disk_and_a_full_disk_is_refused(
    speaking: TinyModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ge_data.main(arguments(speaking, data, tmp_path / "out", "--dry-run"))
    assert "8 rows in 3 shards (0 finished); still needed" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    ge_data.main(arguments(speaking, data, tmp_path / "out"))
    shards = list((tmp_path / "out").rglob("*.safetensors"))
    lengths = np.concatenate([load_file(path)["lengths"].numpy() for path in shards])
    payload = ge_data.bytes_of(int(lengths.sum()), len(lengths), 32, 2, torch.float16)
    headers = 1024 * len(shards)
    assert payload <= sum(path.stat().st_size for path in shards) <= payload + headers
    with pytest.raises(CatsError, match="free"):
        ge_data.check_disk(tmp_path, 10**18)


def test_best_tokens_teach_what_final_states_teach(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    """The same adapters, up to half precision, from a fraction of the bytes; the estimate knows them; more than is stored is refused."""
    last = {}
    for kind, flags in (("final", ()), ("best", ("--targets", "8"))):
        ge_data.main(arguments(speaking, data, tmp_path / kind, *flags))
        common = ["--model-path", str(speaking.base), "--data-home", str(tmp_path / kind), "--exit-layers", "1", "--topk", "5", "--cpu"]
        train_finetune.main([*common, "--rows", "4", "--epochs", "2", "--outdir", str(tmp_path / f"run_{kind}")])
        last[kind] = json.loads((tmp_path / f"run_{kind}" / "training_log.json").read_text())
    losses = {kind: [step["loss"]["1"] for step in log["steps"]] for kind, log in last.items()}
    assert losses["best"] == pytest.approx(losses["final"], rel=2e-3)
    tops = {kind: log["reports"][-1]["validation"]["1"]["top1"] for kind, log in last.items()}
    assert tops["best"] == pytest.approx(tops["final"], abs=0.02)
    shards = list((tmp_path / "best").rglob("*.safetensors"))
    lengths = np.concatenate([load_file(path)["lengths"].numpy() for path in shards])
    payload = ge_data.bytes_of(int(lengths.sum()), len(lengths), 32, 2, torch.float16, 8)
    assert payload <= sum(path.stat().st_size for path in shards) <= payload + 1024 * len(shards)
    with pytest.raises(SystemExit) as refused:
        train_finetune.main([*common, "--rows", "4", "--epochs", "2", "--outdir", str(tmp_path / "more"), "--topk", "9"])
    assert refused.value.code == 2


def test_other_flags_in_the_same_folder_are_refused(
    speaking: TinyModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ge_data.main(arguments(speaking, data, tmp_path / "out", "--end", "3"))
    assert "was begun with length" in sentence(
        capsys, arguments(speaking, data, tmp_path / "out", "--end", "3", "--length", "290", "--exit-layers", "2")
    )


def test_states_of_other_exits_or_widths_are_refused(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    ge_data.main(arguments(speaking, data, tmp_path / "out", "--end", "3"))
    with pytest.raises(CatsError, match=r"not of \[2\]"):
        check_states(tmp_path / "out", (1, 2), 32)
    with pytest.raises(CatsError, match="width 32, but the model is 64 wide"):
        check_states(tmp_path / "out", (1, 3), 64)
    with pytest.raises(CatsError, match="no stored states"):
        StoredSource(tmp_path / "nothing", (1,), 300, torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--exit-layers", "6"], "between 1 and 5"),
        (["--exit-layers", "0"], "between 1 and 5"),
        (["--text-only"], "--regenerate"),
        (["--length", "5000"], "1024 positions"),
        (["--start", "100"], "no conversation"),
        (["--gpu_index", "7"], "does not exist"),
        (["--template", "nonsense"], "unknown chat template"),
        (["--model-path", "nowhere"], "nowhere"),
        (["--length", "20"], "no answer token"),
    ],
)
def test_bad_input_is_one_sentence(
    speaking: TinyModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert expected in sentence(capsys, arguments(speaking, data, tmp_path / "out", *flags))


def test_the_base_model_can_come_from_the_environment(
    speaking: TinyModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(speaking, data, tmp_path / "out", "--dry-run")[2:]
    monkeypatch.delenv("CATS_BASE_MODEL", raising=False)
    assert "CATS_BASE_MODEL" in sentence(capsys, argv)
    monkeypatch.setenv("CATS_BASE_MODEL", str(speaking.base))
    ge_data.main(argv)


def test_answers_are_the_models_own(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    argv = arguments(speaking, data, tmp_path / "out", "--regenerate", "--text-only", "--max-new-tokens", "20", "--end", "3")
    ge_data.main(argv)
    chats = read_sharegpt(tmp_path / "out" / "0" / "regenerated.json")
    model = cats.load(speaking.base, dtype="float32")
    tokenizer = model.text.tokenizer
    prompts = {chat.id: chat.turns[0].text for chat in read_sharegpt(data)}
    assert chats
    for chat in chats:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts[chat.id]}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(str(rendered).removeprefix("<s>"))["input_ids"]
        config = cats.GenerationConfig(max_new_tokens=20, eos_token_ids=(EOS,))
        generation = cats.generate(model, prompt, cats.build_method(cats.AutoregressiveConfig()), config)
        assert chat.turns[1].text == str(tokenizer.decode(generation.ids, skip_special_tokens=True)).strip()
        assert chat.turns[1].finished == (generation.finish == "eos")


def test_answering_goes_on_after_a_torn_line_and_with_other_processes(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    model = cats.load(speaking.base, dtype="float32")
    answerer = Answerer(model, model.text, Regeneration(max_new_tokens=6, temperature=1.0))
    chats = read_sharegpt(data)
    (tmp_path / "straight").mkdir()
    regenerate(answerer, chats, tmp_path / "straight")
    (tmp_path / "torn").mkdir()
    regenerate(answerer, chats, tmp_path / "torn", rank=0, processes=2)
    path = tmp_path / "torn" / "answers_0.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CatsError, match="3 of 8 conversations"):
        collect(tmp_path / "torn", len(chats))
    regenerate(answerer, chats, tmp_path / "torn")
    assert collect(tmp_path / "torn", len(chats)) == collect(tmp_path / "straight", len(chats))


def test_appending_drops_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n" + '{"b"')
    with appending(path) as file:
        file.write("x\n")
    assert path.read_text() == '{"a": 1}\nx\n'


def test_what_takes_long_says_what_it_does(speaking: TinyModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ge_data.main(arguments(speaking, data, tmp_path / "states"))
    said = capsys.readouterr().err
    for what in ("read conversations", "hash the data", "load the base model", "tokenize", "estimate", "store states"):
        assert what in said, what
    flags = ["--model-path", str(speaking.base), "--exit-layers", "1", "--data-home", str(tmp_path / "states"), "--cpu"]
    train_finetune.main([*flags, "--outdir", str(tmp_path / "out"), "--steps", "1"])
    said = capsys.readouterr().err
    for what in ("open stored states", "make the adapters", "read the head", "rows to fit norms", "fit norms", "validate"):
        assert what in said, what
