"""`python -m cats` in process: text, streaming to a transformers streamer, refusals."""

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import cats
from cats.cli.ask import main
from cats.methods import needs_of
from tests.methods import SHAPES, flags_of
from tests.tiny_models import DRAFT_EXIT, SHALLOW_EXIT, TinyModel, prompts


def command(model: TinyModel, *more: str, needed: Sequence[str] = ("draft", "shallow")) -> list[str]:
    adapters = [part for name in needed for part in (f"--{name}-adapter-path", str(getattr(model, name)))]
    return ["two words", "--model-path", str(model.base), *adapters, "--max-new-tokens", "12", *more]


def test_the_text_of_every_method_is_the_same(speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for config in SHAPES.values():
        main(command(speaking, *flags_of(config), needed=needs_of(config).adapters))
        text, _, summary = capsys.readouterr().out.rpartition("\n\n[")
        assert "token" in summary
        texts.add(text)
    assert len(texts) == 1


def test_it_ends_after_a_stop_string(speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    main(command(speaking, "--raw"))
    whole = capsys.readouterr().out.rpartition("\n\n[")[0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    main(command(speaking, "--raw", "--stop", stop))
    cut = capsys.readouterr().out.rpartition("\n\n[")[0]
    assert whole.startswith(cut)
    assert stop in cut


REFUSALS = {
    "a setting of another method": (
        ["--method", "prompt_lookup", "--threshold", "0.5"],
        "--threshold does nothing for the method prompt_lookup",
    ),
    "a contradiction": (["--total-tokens", "40"], "total-tokens 40 has nothing to choose from in a chain"),
    "another exit": (["--draft-layer", str(SHALLOW_EXIT)], f"trained at exit {DRAFT_EXIT}"),
    "a negative temperature": (["--temperature", "-1"], "temperature is -1.0"),
    "an adapter for nothing": (["--method", "autoregressive"], "--draft-adapter-path does nothing for the method autoregressive"),
    "a template for nothing": (["--raw", "--template", "llama-2"], "--raw leaves the chat template out"),
    "an unknown dtype": (["--dtype", "float7"], "unknown dtype 'float7'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_sentence(speaking: TinyModel, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, sentence = REFUSALS[name]
    with pytest.raises(SystemExit) as stopped:
        main(command(speaking, *flags))
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then tokens."""
        self.ids.append(value.flatten().tolist())

    def end(self) -> None:
        """After the last token."""
        self.ended = True


def test_streamers_get_the_prompt_and_every_token(tiny: Callable[[str], TinyModel]) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    prompt, streamer = prompts(1, 8, seed=2)[0], Recorder()
    answer = cats.generate(
        model, prompt, cats.build_method(cats.CascadeConfig()), cats.GenerationConfig(max_new_tokens=9), streamer=streamer
    )
    assert streamer.ids == [prompt, *([token] for token in answer.ids)]
    assert streamer.ended


def test_the_tokenizer_fixture_speaks(speaking: TinyModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(speaking.base)
    assert tokenizer.chat_template
