"""Several answers at a time on one model: threads and interleaved generators give what one answer after the other gives."""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

import cats
from tests.methods import SHAPES
from tests.tiny_models import EOS, TinyModel, prompts

Tiny = Callable[[str], TinyModel]
CONFIG = cats.GenerationConfig(max_new_tokens=8, eos_token_ids=(EOS,))
MEMORY: dict[str, cats.MemoryOptions | None] = {
    "no plan": None,
    "resident": cats.MemoryOptions(10**9, "weights"),
    "streamed": cats.MemoryOptions(pinning=False, ring_buffers=2),
    "resident, process": cats.MemoryOptions(4 * 10**9, positions=64, nodes=64),
}
METHODS = ("cascade-tree", "kangaroo", "autoregressive")


@cache
def loaded(tiny: TinyModel, memory: str) -> cats.MultiAdapterCATSModel:
    """In float64 the weights, stored in float32, pass through the shared work space."""
    return cats.load(tiny.base, tiny.adapters, dtype="float64", memory=MEMORY[memory])


@cache
def expected(tiny: TinyModel, method: str, count: int) -> list[list[int]]:
    return [answer(cats.load(tiny.base, tiny.adapters, dtype="float64"), prompt, method) for prompt in prompts(count, 20, seed=7)]


def answer(model: cats.MultiAdapterCATSModel, prompt: Sequence[int], method: str) -> list[int]:
    return cats.generate(model, prompt, SHAPES[method], CONFIG).ids


def steps(model: cats.MultiAdapterCATSModel, place: int, method: str = "cascade-tree") -> Generator[cats.Step, None, None]:
    return cats.stream(model, prompts(3, 20, seed=7)[place], SHAPES[method], CONFIG)


def by_threads(model: cats.MultiAdapterCATSModel, threads: int, count: int) -> list[tuple[str, list[list[int]]]]:
    """Every thread answers all prompts; which method it uses goes round."""
    together = threading.Barrier(threads)

    def work(number: int) -> tuple[str, list[list[int]]]:
        torch.set_num_threads(1)
        together.wait()
        method = METHODS[number % len(METHODS)]
        return method, [answer(model, prompt, method) for prompt in prompts(count, 20, seed=7)]

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(threads)))


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", MEMORY)
def test_eight_threads_give_the_answers_of_one(tiny: Tiny, memory: str, count: int) -> None:
    for method, found in by_threads(loaded(tiny("llama"), memory), 8, count):
        assert found == expected(tiny("llama"), method, count)


@pytest.mark.parametrize("memory", ["no plan", "resident", "streamed"])
def test_interleaved_generators_are_right(tiny: Tiny, memory: str) -> None:
    model = loaded(tiny("llama"), memory)
    open_answers = {place: steps(model, place) for place in range(3)}
    found: dict[int, list[int]] = {place: [] for place in open_answers}
    while open_answers:
        for place in list(open_answers):
            step = next(open_answers[place], None)
            if step is None:
                del open_answers[place]
            else:
                found[place] += step.tokens
    assert list(found.values()) == expected(tiny("llama"), "cascade-tree", 3)


def test_a_second_answer_of_one_thread_is_refused_where_caches_are_granted_for_one(tiny: Tiny) -> None:
    model = loaded(tiny("llama"), "resident, process")
    first = steps(model, 0)
    next(first)
    with pytest.raises(cats.CatsError, match=r"another answer of this thread is not finished.*close its generator"):
        next(steps(model, 1))
    assert list(first)[-1].finish
    assert answer(model, prompts(3, 20, seed=7)[1], "cascade-tree") == expected(tiny("llama"), "cascade-tree", 3)[1]


def test_an_answer_of_another_thread_waits_for_the_first_to_end(tiny: Tiny) -> None:
    model = loaded(tiny("llama"), "resident, process")
    first = steps(model, 0)
    next(first)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(answer, model, prompts(3, 20, seed=7)[1], "cascade-tree")
        time.sleep(0.3)
        assert not second.done()
        next(first)  # the first goes on meanwhile
        first.close()
        assert second.result(timeout=60) == expected(tiny("llama"), "cascade-tree", 3)[1]


def test_an_answer_that_moved_to_another_thread_is_known_there(tiny: Tiny) -> None:
    model = loaded(tiny("llama"), "resident, process")
    first = steps(model, 0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(next, first).result()
        next(first)
        with pytest.raises(cats.CatsError, match="another answer of this thread"):
            next(steps(model, 1))
        pool.submit(first.close).result()
    assert answer(model, prompts(3, 20, seed=7)[1], "kangaroo")


@pytest.mark.parametrize("memory", MEMORY)
def test_a_failing_step_gives_its_turn_back(tiny: Tiny, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tiny("llama"), memory)
    with monkeypatch.context() as patched:
        patched.setattr(model.base.layers[2].mlp, "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(model, [5, 6, 7], "cascade-tree")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(answer, model, prompts(3, 20, seed=7)[0], "cascade-tree").result(timeout=60)
    assert found == expected(tiny("llama"), "cascade-tree", 3)[0]


def test_a_forgotten_generator_gives_its_turn_back(tiny: Tiny) -> None:
    model = loaded(tiny("llama"), "resident, process")
    next(steps(model, 0))
    assert answer(model, prompts(3, 20, seed=7)[1], "kangaroo")


def test_a_step_inside_a_step_is_refused(tiny: Tiny) -> None:
    model = loaded(tiny("llama"), "no plan")

    def stop(ids: list[int], new: int) -> None:
        answer(model, [5, 6], "autoregressive")

    with pytest.raises(cats.CatsError, match="begun inside another one"):
        cats.generate(model, [5, 6, 7], SHAPES["kangaroo"], CONFIG, stop=stop)
