"""The scripted model really follows its scripts, all three of them, at every position of its context."""

import numpy as np
import pytest
import torch

from tests.scripted_model import DRAFT_EXIT, LAYERS, SHALLOW_EXIT, follow, random_script, scripted_model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_logits_are_the_tables(dtype: torch.dtype, tolerance: float) -> None:
    target, draft, shallow = (random_script(7, seed) for seed in range(3))
    model = scripted_model(target, draft, shallow, context=64, dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, 7, 64).tolist()
    with torch.inference_mode():
        states = model.base.hidden_states(torch.tensor([tokens]), (DRAFT_EXIT, SHALLOW_EXIT, LAYERS))
        seen = {
            "target": model.base.target_logits(states[LAYERS]),
            "draft": model.base.lm_head(model.adapters["draft"](states[DRAFT_EXIT])),
            "shallow": model.base.lm_head(model.adapters["shallow"](states[SHALLOW_EXIT])),
        }
    for name, script in (("target", target), ("draft", draft), ("shallow", shallow)):
        expected = np.stack([script.logits(tokens[: end + 1]) for end in range(len(tokens))])
        assert np.abs(seen[name][0].numpy() - expected).max() < tolerance, name


def test_follow_names_the_successor() -> None:
    assert [int(follow([2, 0, 1]).logits([token]).argmax()) for token in range(3)] == [2, 0, 1]
