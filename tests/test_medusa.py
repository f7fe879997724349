"""Medusa: the state that its heads read, the tree that they fill, what it needs, and what it refuses."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import cats
from cats import CatsError
from cats.config import MemoryOptions
from cats.medusa_heads import MedusaHeads, save_accuracy
from cats.methods import build_method, needs_of, with_needs
from cats.methods.medusa import Medusa, MedusaConfig, assumed_accuracy
from cats.planning.plan import BY_METHODS
from cats.state import Cycle
from cats.static_tree import best_tree
from tests.heads import HEADS, heads_of
from tests.tiny_models import EOS, LAYERS, VOCAB, TinyModel, prompts

Tiny = Callable[[str], TinyModel]
WIDTH = 32
ANSWER = cats.GenerationConfig(max_new_tokens=24, eos_token_ids=())


class Watched(Medusa):
    """Notes what each cycle saw."""

    seen: list[tuple[list[int], torch.Tensor, list[int], list[int]]]

    def propose(self, cycle: Cycle) -> Sequence[int]:
        nodes = super().propose(cycle)
        self.seen.append((list(cycle.state.tokens), cycle.state.final_hidden_1D.clone(), cycle.tree.tokens[:], cycle.tree.parents[:]))
        return nodes


def watched(model: cats.MultiAdapterCATSModel, config: MedusaConfig) -> tuple[Watched, cats.Generation]:
    method = Watched(config, Medusa.open(model, config))
    method.seen = []
    return method, cats.generate(model, prompts(1, 12, seed=3)[0], method, ANSWER)


def copied(source: Path, place: Path, accuracy: list[list[float]] | None) -> Path:
    """The heads with other accuracies, or none."""
    shutil.copytree(source, place)
    (place / "accuracy.json").unlink()
    if accuracy is not None:
        save_accuracy(place, accuracy, [1] * len(accuracy))
    return place


def test_heads_read_the_state_that_predicted_the_root_wherever_the_path_ended(tiny: Tiny, tmp_path: Path) -> None:
    """With every token among the guesses of head 1, paths are accepted, through siblings too."""
    every = copied(heads_of(WIDTH), tmp_path / "every", [[1 / VOCAB] * VOCAB, [0.01], [0.01]])
    model = cats.load(tiny("llama-grouped").base, dtype="float64")
    method, answer = watched(model, MedusaConfig(every, nodes=VOCAB, depth=HEADS))
    assert answer.ids == cats.generate(model, prompts(1, 12, seed=3)[0], cats.AutoregressiveConfig(), ANSWER).ids
    assert all(trace.accepted >= 1 for trace in answer.traces[1:-1])
    assert "sibling" in {kind for trace in answer.traces for kind in trace.accepted_kinds}
    for tokens, final_1D, *_ in method.seen:
        with torch.inference_mode():
            states = model.base.hidden_states(torch.tensor([tokens[:-1]]), [LAYERS])[LAYERS]
        torch.testing.assert_close(final_1D, states[:, -1])


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_the_tree_is_filled_with_each_heads_best_guesses(tiny: Tiny, own: bool) -> None:
    model = cats.load(tiny("llama").base, dtype="float64")
    directory = heads_of(WIDTH, VOCAB if own else None, own)
    method, _ = watched(model, MedusaConfig(directory, nodes=12, depth=HEADS))
    heads = MedusaHeads.from_pretrained(directory).double()
    tree = best_tree([[0.4, 0.2, 0.1, 0.05], [0.3, 0.1, 0.05], [0.2, 0.1]], 12)
    assert len({len(path) for path in tree}) == HEADS
    _, final_1D, tokens, parents = method.seen[0]
    with torch.inference_mode():
        x_1D = model.base.norm(final_1D)
        y = [x_1D + torch.nn.functional.silu(x_1D @ head.weight.T) for head in heads.heads]
        lm_heads: Any = heads.lm_heads if own else [model.base.lm_head] * HEADS
        guesses = [lm_head(state)[0].topk(4).indices.tolist() for lm_head, state in zip(lm_heads, y, strict=True)]
    places = {path: place for place, path in enumerate([(), *tree])}
    assert tokens[1:] == [guesses[len(path) - 1][path[-1]] for path in tree]
    assert parents[1:] == [places[path[:-1]] for path in tree]


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_text_is_that_of_plain_decoding(tiny: Tiny, own: bool) -> None:
    model, config = cats.load(tiny("llama-biases").base), MedusaConfig(heads_of(WIDTH, VOCAB, own), depth=HEADS)
    for prompt in prompts(2, 12, seed=5):
        ending = cats.GenerationConfig(max_new_tokens=20, eos_token_ids=(EOS,))
        assert cats.generate(model, prompt, config, ending).ids == cats.generate(model, prompt, cats.AutoregressiveConfig(), ending).ids


def test_measured_accuracies_make_the_tree(tiny: Tiny, tmp_path: Path) -> None:
    model, heads = cats.load(tiny("llama").base), heads_of(WIDTH)
    sure = copied(heads, tmp_path / "sure", [[1.0, 0.0], [1.0], [0.9, 0.1]])
    assert Medusa.open(model, MedusaConfig(sure, nodes=4, depth=3)).tree == [(0,), (0, 0), (0, 0, 0), (0, 0, 1)]
    unsure = copied(heads, tmp_path / "unsure", [[0.3, 0.3, 0.3], [0.1], [0.1]])
    assert Medusa.open(model, MedusaConfig(unsure, nodes=3, depth=3)).tree == [(0,), (1,), (2,)]
    unknown = copied(heads, tmp_path / "unknown", None)
    assert Medusa.open(model, MedusaConfig(unknown, nodes=20, depth=3)).tree == best_tree(assumed_accuracy(3), 20)


def test_the_default_tree_has_63_nodes_beside_the_root_and_depth_4() -> None:
    config = MedusaConfig()
    tree = best_tree(assumed_accuracy(config.depth), config.nodes)
    assert (len(tree), max(map(len, tree)), build_method(config).max_nodes) == (63, 4, 64)


def test_heads_are_loaded_once_and_charged_as_promised(tiny: Tiny) -> None:
    config = MedusaConfig(heads_of(WIDTH), nodes=6, depth=2)
    promised = needs_of(config).resident_bytes
    assert promised == HEADS * WIDTH * WIDTH * 4
    model = cats.load(tiny("llama").base, memory=with_needs(MemoryOptions(), config))
    taken = model.base.source.ledger.taken
    before = taken.get(BY_METHODS, 0)
    first, second = build_method(config, model), build_method(config, model)
    assert first.resources is second.resources
    assert taken[BY_METHODS] == before + promised
    model.close()
    assert taken[BY_METHODS] == before


def test_missing_and_foreign_heads_are_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cats.methods.medusa.SHIPPED", tmp_path / "none")
    model = cats.load(tiny("llama").base)
    for config, said in (
        (MedusaConfig(), "give --heads DIRECTORY"),
        (MedusaConfig(heads_of(16)), "have width 16 and the base model has 32"),
        (MedusaConfig(heads_of(WIDTH, 50)), "have vocabulary 50 and the base model has 48"),
        (MedusaConfig(heads_of(WIDTH), depth=4), "give --depth 3"),
        (MedusaConfig(tmp_path), "holds no weights"),
    ):
        with pytest.raises(CatsError, match=said):
            cats.generate(model, [5, 6], config, ANSWER)
