"""Checkpoints become nested and themselves again, whatever interrupts the work; what is damaged or unsuited is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cats
from cats.adapter import AdapterModel
from cats.checkpoint import locate_tensors
from cats.cli.nest import main
from cats.loading import checkpoint_of, sizes_of_checkpoint
from cats.nested import conversion
from cats.nested.growing import Making, part_directory
from tests.tiny_models import FAMILIES, TinyModel
from tests.weight_kinds import options_of, rewritten

Tiny = Callable[[str], TinyModel]


def stored_as(tiny: TinyModel, directory: Path, layout: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The tiny model's numbers in half precision, as one file, as shards or as pickles, with another file beside them."""
    base = rewritten(tiny.base, "plain", directory, dtype)
    tensors = load_file(base / "model.safetensors")
    (base / "LICENSE").write_text("free")
    if layout == "single":
        return base
    (base / "model.safetensors").unlink()
    suffix, stem = ("bin", "pytorch_model") if layout == "pickles" else ("safetensors", "model")
    names = sorted(tensors)
    shards = {f"{stem}-0000{place + 1}-of-00002.{suffix}": names[place::2] for place in range(2)}
    for file, inside in shards.items():
        chosen = {name: tensors[name] for name in inside}
        if suffix == "bin":
            torch.save(chosen, base / file)
        else:
            save_file(chosen, base / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (base / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return base


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Of all safetensors files, as the library reads them."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a matrix."""
    monkeypatch.setattr(conversion, "AT_ONCE", 100)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layout", "family"), [("single", "llama-tied"), ("shards", "qwen2"), ("pickles", "qwen3")])
def test_there_and_back(tiny: Tiny, tmp_path: Path, layout: str, family: str, dtype: torch.dtype) -> None:
    source = stored_as(tiny(family), tmp_path / "source", layout, dtype)
    expected = tensors_of(rewritten(tiny(family).base, "plain", tmp_path / "single", dtype))
    nested, back = tmp_path / "nested", tmp_path / "back"
    main([str(source), str(nested)])
    main(["--verify", str(nested), str(source)])
    main(["--verify", str(nested)])
    main(["--back", str(nested), str(back)])
    found = tensors_of(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    assert (back / "config.json").read_text() == (source / "config.json").read_text()
    assert (nested / "LICENSE").read_text() == (back / "LICENSE").read_text() == "free"
    assert sorted(path.name for path in back.glob("model*")) == sorted(
        conversion.restored_name(path.name).replace(".bin.", ".safetensors.") for path in source.iterdir() if "model" in path.name
    )


def test_every_tensor_begins_on_a_page_and_residuals_follow_the_pass(tiny: Tiny, tmp_path: Path) -> None:
    nested = tmp_path / "nested"
    conversion.convert(conversion.conversion_of(stored_as(tiny("llama"), tmp_path / "source", "single"), nested))
    places = {name: place for name, place in locate_tensors(nested).items() if not name.endswith(".filler")}
    assert not [name for name, place in places.items() if place.offset % 4096]
    residuals = [name for name in places if name.endswith(".residual")]
    assert [places[name].path.name for name in residuals] == ["nested-residual.safetensors"] * len(residuals)
    model = cats.load(nested, memory=options_of("nested", cats.MemoryOptions(pinning=False)))
    source = model.base.source
    assert [source.names[piece] for piece in source.plan.streamed] == sorted(residuals, key=lambda name: places[name].offset)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_answers_as_before(tiny: Tiny, tmp_path: Path, family: str) -> None:
    source, nested = stored_as(tiny(family), tmp_path / "source", "single"), tmp_path / "nested"
    conversion.convert(conversion.conversion_of(source, nested))
    config = cats.GenerationConfig(max_new_tokens=8, eos_token_ids=())
    expected = cats.generate(cats.load(source), [5, 6, 7], "autoregressive", config).ids
    for memory in (None, options_of("nested", cats.MemoryOptions(pinning=False))):
        assert cats.generate(cats.load(nested, memory=memory), [5, 6, 7], "autoregressive", config).ids == expected


def test_transformers_refuses_it(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It warns of the method by name; since it would go on with random numbers, it finds no file that it knows."""
    nested = tmp_path / "nested"
    conversion.convert(conversion.conversion_of(stored_as(tiny("llama"), tmp_path / "source", "single"), nested))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(nested)
    assert json.loads((nested / "config.json").read_text())["quantization_config"]["quant_method"] == "cats_nested"
    assert "cats_nested" in caplog.text


@pytest.mark.parametrize("ended", [1, 9, 30, 44])
def test_a_killed_run_goes_on_where_it_was(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: int) -> None:
    """Killed within a tensor, with bytes behind the last complete one; the result is that of one run."""
    source = stored_as(tiny("llama"), tmp_path / "source", "single")
    conversion.convert(conversion.conversion_of(source, tmp_path / "whole"))
    work = conversion.nested_matrix, conversion.copied_tensor
    done: list[str] = []

    def counting(original: Callable[..., str], dies: bool) -> Callable[..., str]:
        def nest(*arguments: object) -> str:
            found = original(*arguments)
            done.append(found)
            if dies and len(done) == ended:
                raise KeyboardInterrupt
            return found

        return nest

    with monkeypatch.context() as patched:
        for function in work:
            patched.setattr(conversion, function.__name__, counting(function, dies=True))
        with pytest.raises(KeyboardInterrupt):
            conversion.convert(conversion.conversion_of(source, tmp_path / "nested"))
        assert not (tmp_path / "nested").exists()
        with (part_directory(tmp_path / "nested") / "progress.jsonl").open("a") as journal:
            journal.write('{"name": "half a li')
        done.clear()
        for function in work:
            patched.setattr(conversion, function.__name__, counting(function, dies=False))
        conversion.convert(conversion.conversion_of(source, tmp_path / "nested"))
    assert len(done) == len(load_file(source / "model.safetensors")) - ended + 1
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "nested" / path.name).read_bytes() == path.read_bytes()
    assert not part_directory(tmp_path / "nested").exists()


def test_a_killed_restoration_goes_on_too(nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[str] = []

    def dying(*arguments: object) -> None:
        if len(restored) == 20:
            raise KeyboardInterrupt
        restored.append(str(arguments[1]))
        work(*arguments)

    work: Callable[..., None] = conversion.restore_tensor
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "restore_tensor", dying)
        with pytest.raises(KeyboardInterrupt):
            conversion.restore(conversion.opened(nested), tmp_path / "back")
    again: list[str] = []

    def counting(*arguments: object) -> None:
        again.append(str(arguments[1]))
        work(*arguments)

    monkeypatch.setattr(conversion, "restore_tensor", counting)
    conversion.restore(conversion.opened(nested), tmp_path / "back")
    expected, found = load_file(tmp_path / "source" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not set(again) & set(restored)
    assert len(again) + len(restored) == len(expected)


def test_another_source_begins_again(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "nested"
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "copied_tensor", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            conversion.convert(conversion.conversion_of(stored_as(tiny("llama"), tmp_path / "one", "single"), target))
    other = stored_as(tiny("llama-biases"), tmp_path / "other", "single")
    conversion.convert(conversion.conversion_of(other, target))
    conversion.verify(conversion.opened(target), conversion.Source(other))


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    first = Making(tmp_path / "nested", {}, {"a.safetensors": 4096}, pages=True)
    with pytest.raises(cats.CatsError, match="another run is writing"):
        Making(tmp_path / "nested", {}, {"a.safetensors": 4096}, pages=True)
    first.close()


def damaged(nested: Path, name: str, place: int) -> None:
    """Change one byte of a tensor."""
    where = locate_tensors(nested)[name]
    with where.path.open("r+b") as file:
        file.seek(where.offset + place)
        byte = file.read(1)[0]
        file.seek(where.offset + place)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def nested(tiny: Tiny, tmp_path: Path) -> Path:
    conversion.convert(conversion.conversion_of(stored_as(tiny("llama"), tmp_path / "source", "single"), tmp_path / "nested"))
    return tmp_path / "nested"


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight.codes", "model.layers.1.mlp.up_proj.weight.residual", "lm_head.weight"]
)
def test_one_wrong_bit_is_found(nested: Path, tmp_path: Path, name: str) -> None:
    damaged(nested, name, 17)
    with pytest.raises(cats.CatsError, match="is damaged: its SHA-256 has changed"):
        conversion.verify(conversion.opened(nested))
    with pytest.raises(cats.CatsError, match="is not the one in"):
        conversion.verify(conversion.opened(nested), conversion.Source(tmp_path / "source"))
    with pytest.raises(cats.CatsError, match="is damaged: its SHA-256 has changed"):
        conversion.restore(conversion.opened(nested), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_damaged_list_of_exceptions_is_not_loaded(nested: Path) -> None:
    damaged(nested, "model.layers.1.mlp.up_proj.weight.exceptions", 4)
    with pytest.raises(cats.CatsError, match=r"up_proj\.weight\.exceptions is no list of exceptions of a matrix of 48 rows"):
        cats.load(nested)


@pytest.mark.parametrize(("field", "value"), [("version", 2), ("dtype", "float32")])
def test_an_unknown_format_is_not_loaded(nested: Path, field: str, value: object) -> None:
    config = json.loads((nested / "config.json").read_text())
    config["quantization_config"][field] = value
    (nested / "config.json").write_text(json.dumps(config))
    with pytest.raises(cats.CatsError, match=r"this program knows version 1 of bfloat16 and float16"):
        cats.load(nested)


def test_what_cannot_be_nested_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: Path) -> None:
    def refused(source: Path, target: Path = tmp_path / "other") -> str:
        with pytest.raises(cats.CatsError) as caught:
            conversion.conversion_of(source, target)
        return str(caught.value)

    assert "32x32 tensor of torch.float32; nested weights are made of matrices that are all" in refused(tiny("llama").base)
    assert "quantised already" in refused(nested)
    assert "is there already" in refused(tmp_path / "source", nested)
    with pytest.raises(cats.CatsError, match="is no nested checkpoint"):
        conversion.opened(tmp_path / "source")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    assert "GB and the disk has 0.00 GB free" in refused(tmp_path / "source")


def test_work_space_is_granted_for_the_largest_matrix_that_is_decoded(nested: Path, tmp_path: Path) -> None:
    """Beside the blocks that every product takes: two bytes a weight, four of an int8 copy; not for head and table."""
    float32, cpu = ("float32", "float32"), torch.device("cpu")
    adapters: list[AdapterModel] = []
    plain = sizes_of_checkpoint(checkpoint_of(tmp_path / "source", float32, cpu), adapters).work_bytes
    for dtypes, nbytes in ((float32, 2), (("float64", "float64"), 2)):
        found = sizes_of_checkpoint(checkpoint_of(nested, dtypes, cpu), adapters).work_bytes
        expected = sizes_of_checkpoint(checkpoint_of(tmp_path / "source", dtypes, cpu), adapters).work_bytes
        assert found - expected == nbytes * 32 * 48
    copied = sizes_of_checkpoint(checkpoint_of(tmp_path / "source", float32, cpu, "int8"), adapters).work_bytes
    assert copied - plain == 4 * 32 * 48


def test_the_command_says_what_it_needs(tiny: Tiny, tmp_path: Path) -> None:
    source = stored_as(tiny("llama"), tmp_path / "source", "single")
    command = [sys.executable, "-m", "cats.cli.nest"]
    done = subprocess.run([*command, str(source), str(tmp_path / "nested")], capture_output=True, text=True, check=True)
    assert "GB  still to be written" in done.stderr
    assert done.stdout.strip() == str(tmp_path / "nested")
    missing = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert (missing.returncode, missing.stderr) == (2, "error: say where to write: python -m cats.cli.nest SRC DST.\n")
