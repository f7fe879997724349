"""Fall-back with scripted costs: when it gives up, when it tries again, and that no token depends on it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

import cats
from cats.cli.ask import main
from cats.methods.fallback import Fallback, Gain, Patience, with_fallback
from cats.state import Cycle
from tests.methods import shapes_for
from tests.scripted_model import follow, random_script, scripted_model
from tests.tiny_models import TinyModel

SHAPES = shapes_for(width=6 * 8)

SHORT = Patience(stretch=4, plain=2, plain_kept=4, fresh=10, pause=5, longest_pause=20, trial=2)
CONFIG = cats.GenerationConfig(max_new_tokens=100, eos_token_ids=())


def schedule(gain: Gain, costs: Iterator[tuple[int, float]]) -> str:
    """Which cycles are plain ("p") and which are the method's ("m"), for tokens and seconds of the method's cycles; plain ones take 1 s."""
    found = ""
    for tokens, seconds in costs:
        plain = gain.wants_plain
        gain.learn(plain, 1 if plain else tokens, 1.0 if plain else seconds)
        found += "mp"[plain]
    return found


def test_a_method_that_pays_is_measured_against_plain_cycles_now_and_then() -> None:
    """The first cycle is left out, a stretch of four follows, two plain ones to compare with, and another every ten."""
    gain = Gain(SHORT)
    assert schedule(gain, iter([(2, 1.0)] * 29)) == "mmmmm" + "pp" + "m" * 10 + "p" + "m" * 10 + "p"
    assert gain.value == pytest.approx(2)


def test_a_method_that_does_not_pay_gives_way_and_is_tried_after_longer_and_longer_pauses() -> None:
    gain = Gain(SHORT)
    trials = "".join("p" * pause + "mmm" for pause in (5, 10, 20, 20))
    assert schedule(gain, iter([(2, 3.0)] * len("mmmmmpp" + trials))) == "mmmmmpp" + trials
    assert gain.value == pytest.approx(2 / 3)


def test_a_trial_that_goes_well_ends_the_pauses() -> None:
    gain = Gain(SHORT)
    assert schedule(gain, iter([(2, 3.0)] * 7)) == "mmmmmpp"
    assert schedule(gain, iter([(2, 1.0)] * 17)) == "ppppp" + "m" * 10 + "pm"
    assert schedule(gain, iter([(2, 3.0)] * 14)) == "mmm" + "ppppp" + "mmm" + "ppp", "and the pauses begin with the shortest again"


def test_the_first_cycle_of_an_answer_is_not_held_against_the_method() -> None:
    gain = Gain(SHORT)
    for _ in range(6):
        gain.settle()
        gain.learn(False, 1, 1000.0)
        gain.learn(False, 2, 1.0)
    schedule(gain, iter([(2, 1.0)] * 4))
    assert gain.value == pytest.approx(2)


class Priced(Fallback):
    """Costs by script: what a plain cycle and what one of the method takes, the next of each every time."""

    def __init__(self, method: cats.methods.Method, gain: Gain, plain: Iterator[float], own: Iterator[float]):
        super().__init__(method, gain, lambda cycle: next(plain if self._plain else own))


def forever(seconds: float) -> Iterator[float]:
    while True:
        yield seconds


def noise(seed: int) -> Iterator[float]:
    generator = np.random.default_rng(seed)
    while True:
        yield float(generator.exponential())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_token_depends_on_it(shape: str, temperature: float) -> None:
    """Costs are noise, so that methods and plain cycles take turns; what a method left out must not show afterwards."""
    target = random_script(8, seed=3, spread=3.0)
    model = scripted_model(target, random_script(8, seed=4), target)
    config = replace(CONFIG, temperature=temperature)
    expected = cats.generate(model, [0, 1, 2], cats.AutoregressiveConfig(), config)
    gain = Gain(replace(SHORT, stretch=2, pause=2, longest_pause=4, fresh=4, trial=1))
    for seed in range(2):
        wrapped = Priced(cats.build_method(SHAPES[shape], model), gain, noise(seed), noise(seed + 100))
        found = cats.generate(model, [0, 1, 2], wrapped, config)
        assert found.ids == expected.ids
        assert 0 < wrapped.plain_cycles < wrapped.cycles == len(found.traces) - 1
        assert wrapped.plain_cycles <= sum(trace.nodes == 1 for trace in found.traces[1:])


def circle_model() -> cats.MultiAdapterCATSModel:
    circle = follow([(token + 1) % 8 for token in range(8)])
    return scripted_model(circle, circle, circle)


def test_costs_decide_through_the_engine() -> None:
    """Seven tokens a cycle: in six seconds they pay, in nine they do not."""
    shares = {}
    for seconds in (6.0, 9.0):
        model = circle_model()
        wrapped = Priced(cats.build_method(cats.CascadeConfig(steps=5), model), Gain(SHORT), forever(1.0), forever(seconds))
        cats.generate(model, [0], wrapped, CONFIG)
        shares[seconds] = wrapped.plain_cycles / wrapped.cycles
    assert shares[6.0] < 0.2
    assert shares[9.0] > 0.6


def test_what_was_learnt_is_kept_with_the_model() -> None:
    model, config = circle_model(), cats.PromptLookupConfig()
    first, second = (with_fallback(cats.build_method(config, model), model) for _ in range(2))
    other = with_fallback(cats.build_method(cats.PromptLookupConfig(continuation=3), model), model)
    assert isinstance(first, Fallback)
    assert isinstance(second, Fallback)
    assert isinstance(other, Fallback)
    assert first.gain is second.gain
    assert first.gain is not other.gain
    assert with_fallback(cats.build_method(config, circle_model()), circle_model()) is not first


def test_plain_decoding_has_nothing_to_fall_back_to() -> None:
    model = circle_model()
    method = cats.build_method(cats.AutoregressiveConfig(), model)
    assert with_fallback(method, model) is method


@pytest.mark.parametrize(("flags", "fell_back"), [([], True), (["--no-fallback"], False)])
def test_the_front_door_falls_back_unless_it_is_told_not_to(
    speaking: TinyModel, flags: Sequence[str], fell_back: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a clock by which a cycle of the method takes ever longer."""
    calls = iter(range(1, 10**6))
    scripted: Callable[[Cycle], float] = lambda cycle: 1.0 if len(cycle.tree) == 1 else 10.0 * next(calls)  # noqa: E731
    monkeypatch.setattr("cats.methods.fallback.measured_seconds", scripted)
    adapters = ["--draft-adapter-path", str(speaking.draft), "--method", "kangaroo", "--threshold", "0"]
    main(["two words", "--model-path", str(speaking.base), *adapters, "--max-new-tokens", "80", *flags])
    assert ("plain decoding" in capsys.readouterr().err) == fell_back
