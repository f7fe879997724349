"""The fast engine against the slow oracle: the same trees in every cycle, the same tokens, for chains, trees and rounds."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import cats
from cats import reference
from cats.methods.cascade import Cascade
from cats.state import Cycle
from tests import tiny_models

SETTINGS = [
    cats.CascadeConfig(steps=4),
    cats.CascadeConfig(steps=3, threshold=0.2),
    cats.CascadeConfig(steps=4, tree_topk=4, total_tokens=24),
    cats.CascadeConfig(steps=3, tree_topk=3),
    cats.CascadeConfig(steps=2, sv_passes=3),
    cats.CascadeConfig(steps=3, tree_topk=4, total_tokens=30, threshold=0.2),
    cats.CascadeConfig(steps=3, tree_topk=3, total_tokens=30, sv_passes=2),
]


class RecordingCascade(Cascade):
    """Keeps what it proposed, as paths."""

    def __init__(self, config: cats.CascadeConfig):
        super().__init__(config)
        self.trees: list[reference.Tree] = []

    def propose(self, cycle: Cycle) -> Sequence[int]:
        nodes = super().propose(cycle)
        self.trees.append({tuple(cycle.tree.tokens[step] for step in cycle.tree.path(node)[1:]): cycle.tree.kinds[node] for node in nodes})
        return nodes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> cats.MultiAdapterCATSModel:
    directory: Path = tmp_path_factory.mktemp("reference")
    tiny = tiny_models.build(directory, tiny_models.FAMILIES["llama-grouped"]())
    return cats.load(tiny.base, tiny.adapters, dtype="float64")


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_engine_proposes_what_the_oracle_proposes(model: cats.MultiAdapterCATSModel, config: cats.CascadeConfig) -> None:
    for prompt in tiny_models.prompts(3, 12, seed=5):
        method = RecordingCascade(config)
        answer = cats.generate(model, prompt, method, cats.GenerationConfig(max_new_tokens=24))
        ids, trees = reference.generate(model, prompt, config, 24, eos=(2,))
        assert answer.ids == ids
        assert method.trees == trees


def test_oracle_is_plain_greedy_decoding(model: cats.MultiAdapterCATSModel) -> None:
    prompt = tiny_models.prompts(1, 12, seed=7)[0]
    ids, _ = reference.generate(model, prompt, SETTINGS[2], 16)
    text = list(prompt)
    with torch.inference_mode():
        for _ in ids:
            text.append(int(reference.Exits(model).target(text).argmax()))
    assert ids == text[len(prompt) :]
