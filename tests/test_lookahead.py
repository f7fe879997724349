"""Lookahead: the pool forgets the oldest, the window is the published one, its rows come back, and its n-grams are accepted.

The window's parity is against a slow account of the published algorithm below, which calls the target once a cell.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

import cats
from cats.acceptance import Verdict
from cats.methods.lookahead import JacobiWindow, Lookahead, LookaheadConfig, NgramPool
from cats.state import Cycle, DecodeState
from cats.tree import TokenTree
from tests.scripted_model import follow, random_script, scripted_model
from tests.tiny_models import LAYERS, TinyModel, prompts

CONFIG = cats.GenerationConfig(max_new_tokens=40, eos_token_ids=())
SMALL = LookaheadConfig(window=3, levels=4, guesses=2)
Pool = dict[int, list[tuple[int, ...]]]
Predict = Callable[[list[int]], int]


def plain(model: cats.MultiAdapterCATSModel, prompt: list[int]) -> list[int]:
    return cats.generate(model, prompt, cats.build_method(cats.AutoregressiveConfig()), CONFIG).ids


class Watched(Lookahead):
    """Keeps, of every step, the text before it and the pool after it, and all logits of probes with the text each of them saw."""

    def start(self, state: DecodeState) -> None:
        super().start(state)
        self.first_row = list(self.window.rows[0])
        self.texts: list[list[int]] = []
        self.pools: list[Pool] = []
        self.probes: list[tuple[list[int], torch.Tensor]] = []
        self.limits: list[int] = []
        self.deepest: list[int] = []

    def observe(self, cycle: Cycle, nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict) -> None:
        tree = cycle.tree
        super().observe(cycle, nodes, logits_TV, verdict)
        self.texts.append(list(cycle.state.tokens))
        self.pools.append({first: self.pool.after(first) for first in range(48) if self.pool.after(first)})
        self.limits.append(cycle.depth_limit)
        self.deepest.append(max(tree.depths))
        for row, node in enumerate(nodes):
            if tree.kinds[node] == "probe":
                self.probes.append((cycle.state.tokens + [tree.tokens[step] for step in tree.path(node)[1:]], logits_TV[row]))


def test_the_pool_keeps_what_was_entered_last() -> None:
    pool = NgramPool(2)
    for rest in ((1, 2), (3, 4), (1, 2), (5, 6)):
        pool.add(7, rest)
    pool.add(8, (1, 2))
    assert pool.after(7) == [(1, 2), (5, 6)]
    assert pool.after(8) == [(1, 2)]
    assert pool.after(9) == []


@pytest.mark.parametrize(("width", "levels"), [(7, 5), (1, 3), (2, 10), (15, 3), (3, 4)])
def test_the_window_never_has_more_cells_than_it_says(width: int, levels: int) -> None:
    window, most = JacobiWindow(width, levels, lambda: 0), 0
    for _ in range(levels + 2):
        tree = TokenTree(0, 1000)
        window.place(tree, 1000)
        most = max(most, len(tree) - 1)
        list(window.advance(0, [0] * len(window.last)))
    assert most == JacobiWindow.most_cells(width, levels)
    assert [len(row) for row in window.rows] == [width - 1] + [width] * (levels - 2)


def published(config: LookaheadConfig, predict: Predict, first_row: list[int], texts: list[list[int]]) -> list[Pool]:
    """The pool after each step, by the paper's section 3 and figure 2: one call of the target a cell, lists all the way.

    Args:
        predict: the target's token after a text.
        first_row: tokens that the window begins with.
        texts: what was committed before each step; the last token is the root.
    """
    pool: Pool = {}
    pools, rows = [], [list(first_row)]
    for text in texts:
        columns = len(rows[0]) + 1
        below = [[row[column] for row in rows[1:]] for column in range(columns)]
        new = [predict(text + rows[0][:column] + below[column]) for column in range(columns)]
        if len(rows) < config.levels - 1:
            rows = [row[1:] for row in [*rows, new]]
        else:
            for column, first in enumerate([text[-1], *rows[0]]):
                known = [rest for rest in pool.get(first, []) if rest != (*below[column], new[column])]
                pool[first] = [*known, (*below[column], new[column])][-config.guesses :]
            rows = [rows[1][1:], *rows[2:], new]
        pools.append({first: list(rests) for first, rests in pool.items()})
    return pools


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", [SMALL, LookaheadConfig(window=5, levels=3, guesses=3), LookaheadConfig(window=1, levels=5)])
def test_the_pool_is_the_published_algorithms(config: LookaheadConfig, seed: int) -> None:
    target = random_script(8, seed, spread=3.0)
    model, method = scripted_model(target, target, target), Watched(config)
    cats.generate(model, [0, 1, 2], method, replace(CONFIG, max_new_tokens=120))
    whole = sum(limit >= config.window + config.levels - 3 for limit in method.limits)
    assert whole > 2 * config.levels
    expected = published(config, lambda text: int(target.logits(text).argmax()), method.first_row, method.texts[:whole])
    assert method.pools[:whole] == expected


def test_probes_are_what_the_target_says_after_their_own_text(tiny: Callable[[str], TinyModel]) -> None:
    """Mask and positions: each row's logits against a plain pass over the text that it may see."""
    model, method = cats.load(tiny("llama-grouped").base, dtype="float64"), Watched(SMALL)
    for prompt in prompts(count=2, longest=10, seed=8):
        assert cats.generate(model, prompt, method, CONFIG).ids == plain(model, prompt)
        with torch.inference_mode():
            for text, logits_V in method.probes:
                states = model.base.hidden_states(torch.tensor([text]), [LAYERS])
                torch.testing.assert_close(model.base.target_logits(states[LAYERS])[0, -1], logits_V, atol=1e-5, rtol=1e-5)
        assert any(deepest == limit for deepest, limit in zip(method.deepest, method.limits, strict=True)), "it was never cut"
        assert method.probes


def test_its_own_ngrams_are_accepted() -> None:
    """On a circle of tokens the window soon holds true n-grams; all of one but the root then stand in a step."""
    circle = follow([(token + 1) % 8 for token in range(8)])
    model = scripted_model(circle, circle, circle)
    generation = cats.generate(model, [0, 1, 2], Lookahead(SMALL), CONFIG)
    assert generation.ids == plain(model, [0, 1, 2])
    assert {kind for trace in generation.traces for kind in trace.accepted_kinds} == {"lookup"}
    assert max(trace.accepted for trace in generation.traces) == SMALL.levels - 1


def test_the_text_enters_the_pool_where_that_is_asked_for() -> None:
    """With tokens of the prompt known, the first step can already accept; without, the pool is empty then."""
    circle = follow([(token + 1) % 8 for token in range(8)])
    model, prompt = scripted_model(circle, circle, circle), [*range(8), 0]
    without, entered = (
        cats.generate(model, prompt, Lookahead(replace(SMALL, pool_from_prompt=value)), CONFIG).traces[1] for value in (False, True)
    )
    assert (without.accepted, entered.accepted) == (0, SMALL.levels - 1)


def test_end_tokens_leave_the_window() -> None:
    circle = follow([(token + 1) % 8 for token in range(8)])
    model, method = scripted_model(circle, circle, circle), Watched(SMALL)
    model.end_token_ids = (5,)
    cats.generate(model, [0, 1, 2], method, CONFIG)
    assert 5 not in {text[-1] for text, _ in method.probes[40:]}


@pytest.mark.parametrize("changed", [{"window": 0}, {"levels": 2}, {"guesses": 0}])
def test_impossible_settings_are_refused(changed: dict[str, int]) -> None:
    with pytest.raises(cats.CatsError, match=f"{next(iter(changed))} is"):
        LookaheadConfig(**changed)  # type: ignore[arg-type]
