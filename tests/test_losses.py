"""The reduced KL loss against hand-made numbers, its alignment with inference, and the figures of validation."""

import math
from collections.abc import Callable

import pytest
import torch

import cats
from cats.adapter import AdapterModel
from cats.text import load_tokenizer
from tests.tiny_models import DRAFT_EXIT, TinyModel
from training.adapter_start import fresh_adapter
from training.agreement import Agreement, chain_steps, counted_spans
from training.dataset import Batch
from training.frozen_head import FrozenHead
from training.losses import Columns, HeadLoss, Target, predicting_positions, reduced_kl, reduced_target, sampled_columns
from training.objective import Objective


def test_top_tokens_are_renormalised_over_themselves() -> None:
    target = reduced_target(torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log(), 2)
    assert target.indices is not None
    assert target.indices[0, 0] == 0
    assert target.probabilities[0].tolist() == pytest.approx([5 / 7, 2 / 7])


def test_the_loss_is_the_cross_entropy_over_the_support() -> None:
    target = reduced_target(torch.tensor([[0.6, 0.3, 0.1]]).log(), 2)
    loss = reduced_kl(torch.tensor([[0.25, 0.5, 0.25]]).log(), target)
    assert float(loss) == pytest.approx(-(2 / 3) * math.log(0.25) - (1 / 3) * math.log(0.5))


@pytest.mark.parametrize("topk", [0, 7, 100])
def test_the_whole_vocabulary_gives_the_full_cross_entropy(topk: int) -> None:
    torch.manual_seed(0)
    target_PV, logits_PV = torch.randn(5, 7), torch.randn(5, 7, requires_grad=True)
    full = torch.nn.functional.cross_entropy(logits_PV, target_PV.softmax(-1), reduction="sum")
    reduced = reduced_kl(logits_PV, reduced_target(target_PV, topk))
    torch.testing.assert_close(reduced, full)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits_PV)[0] for loss in (reduced, full)))


def test_one_token_gives_the_likelihood_of_the_argmax() -> None:
    torch.manual_seed(0)
    target_PV, logits_PV = torch.randn(5, 7), torch.randn(5, 7)
    expected = torch.nn.functional.cross_entropy(logits_PV, target_PV.argmax(-1), reduction="sum")
    torch.testing.assert_close(reduced_kl(logits_PV, reduced_target(target_PV, 1)), expected)


@pytest.mark.parametrize("topk", [0, 1, 3])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_the_loss_in_blocks_has_the_value_and_the_gradient_of_the_whole(topk: int, block: int) -> None:
    torch.manual_seed(0)
    head, target = torch.randn(11, 6), reduced_target(3 * torch.randn(9, 11), topk)
    losses, gradients = [], []
    for blocks in (True, False):
        y = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        loss = HeadLoss.apply(y, Columns(head), target, block) if blocks else reduced_kl(y @ head.T, target)
        (2 * loss).backward()
        losses.append(loss.detach())
        gradients.append(y.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_a_sampled_normaliser_gives_the_exact_loss_and_gradient_on_average() -> None:
    torch.manual_seed(0)
    head, y, target = torch.randn(400, 6), 0.5 * torch.randn(9, 6), reduced_target(2 * torch.randn(9, 400), 3)
    exact, slope = loss_and_gradient(y, Columns(head), target)
    draws = [sampled_columns(head, target, 100, seed) for seed in range(300)]
    assert {len(columns.head_CD) for columns, _ in draws} == {len(torch.unique(reduced_indices(target))) + 100}
    assert len({float(columns.head_CD.sum()) for columns, _ in draws}) == len(draws)
    losses, slopes = zip(*(loss_and_gradient(y, columns, moved) for columns, moved in draws), strict=True)
    assert float(torch.stack(losses).mean()) == pytest.approx(float(exact), rel=0.01)
    assert float((torch.stack(slopes).mean(0) - slope).norm() / slope.norm()) < 0.05


def test_sampling_that_saves_nothing_is_not_done() -> None:
    head = torch.randn(40, 6)
    for target, samples in ((reduced_target(torch.randn(9, 40), 0), 10), (reduced_target(torch.randn(9, 40), 3), 0)):
        columns, same = sampled_columns(head, target, samples, 0)
        assert columns.head_CD is head
        assert columns.log_weight_C is None
        assert same is target
    assert sampled_columns(head, reduced_target(torch.randn(9, 40), 3), 20, 0)[0].head_CD is head


def loss_and_gradient(y: torch.Tensor, columns: Columns, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    y = y.clone().requires_grad_(True)
    loss = HeadLoss.apply(y, columns, target, 4)
    (gradient,) = torch.autograd.grad(loss, y)
    return loss.detach(), gradient


def reduced_indices(target: Target) -> torch.Tensor:
    assert target.indices is not None
    return target.indices


def test_no_position_gives_no_loss_and_no_gradient() -> None:
    y = torch.zeros(0, 6, requires_grad=True)
    loss = HeadLoss.apply(y, Columns(torch.randn(11, 6)), reduced_target(torch.zeros(0, 11), 3), 4)
    loss.backward()
    assert float(loss.detach()) == 0
    assert y.grad is not None
    assert y.grad.shape == (0, 6)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05), ("fp16", 0.01)])
@pytest.mark.parametrize("topk", [0, 5])
def test_training_and_validation_have_one_loss(speaking: TinyModel, precision: str, tolerance: float, topk: int) -> None:
    """The path in blocks that trains against the plain one that validates, through a real adapter, with its gradients."""
    torch.manual_seed(0)
    head = FrozenHead.read(speaking.base, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32), "cpu")
    adapter = AdapterModel.from_pretrained(speaking.draft).requires_grad_(True)
    objective = Objective(head, topk, precision)
    objective.block = 7
    batch = Batch({1: torch.randn(2, 40, 32)}, torch.randn(2, 40, 32), torch.rand(2, 40) < 0.6)
    counted_BN, logits_PV = objective.target(batch)
    lesson = objective.learning_target(batch)
    assert torch.equal(counted_BN, lesson.counted_BN)
    losses = (
        objective.loss(adapter, batch.hidden[1], counted_BN, objective.reduced(logits_PV))[0],
        objective.learning_loss(adapter, batch.hidden[1], lesson),
    )
    gradients = [torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(adapter.parameters()))]) for loss in losses]
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=tolerance)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < tolerance


def test_the_position_before_an_answer_token_predicts_it() -> None:
    counted = torch.tensor([[False, False, True, True, False], [True, False, False, False, True]])
    assert predicting_positions(counted).tolist() == [[False, True, True, False, False], [False, False, False, True, False]]


def test_states_and_targets_share_the_position_and_only_the_mask_is_shifted(speaking: TinyModel) -> None:
    """Tokens p p A A p: the loss reads states 1 and 2 and the base's distributions at 1 and 2, and nothing else."""
    torch.manual_seed(0)
    head = FrozenHead.read(speaking.base, torch.float32, "cpu")
    adapter = fresh_adapter(AdapterModel.config_for(cats.load(speaking.base).base.config), 1, seed=0)  # y = norm(h): no attention yet
    counted = torch.tensor([[False, False, True, True, False]])
    hidden, final = torch.randn(1, 5, 32, requires_grad=True), torch.randn(1, 5, 32)
    objective = Objective(head, 0, "fp32")
    counted_BN, target_PV = objective.target(Batch({1: hidden}, final, counted))
    torch.testing.assert_close(target_PV, head.target_logits(final[0, 1:3]))
    loss, _ = objective.loss(adapter, hidden, counted_BN, objective.reduced(target_PV))
    loss.backward()
    assert hidden.grad is not None
    assert (hidden.grad[0].abs().sum(-1) > 0).tolist() == [False, True, True, False, False]
    expected = torch.nn.functional.cross_entropy(head.logits(adapter(hidden)[0, 1:3]), target_PV.softmax(-1), reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "mistral"])
def test_the_head_read_from_its_shard_gives_the_bases_logits(tiny: Callable[[str], TinyModel], family: str) -> None:
    base = cats.load(tiny(family).base, dtype="float32").base
    hidden = torch.randn(3, base.config.hidden_size)
    logits = FrozenHead.read(tiny(family).base, torch.float32, "cpu").target_logits(hidden)
    torch.testing.assert_close(logits, base.target_logits(hidden).detach())


def test_chain_steps_by_hand() -> None:
    yes, no = True, False
    assert chain_steps([yes, yes, no, no, yes, yes, yes, yes], 3) == [3, 1, 4]
    assert chain_steps([yes, yes, yes, yes, yes, yes, yes, yes], 3) == [4, 4]
    assert chain_steps([no, no, no], 3) == [1, 1, 1]
    assert chain_steps([yes, yes], 3) == []
    assert counted_spans([yes, no, yes, yes], [True, True, False, True]) == [[yes, no], [yes]]


def test_a_perfect_adapter_is_always_accepted() -> None:
    torch.manual_seed(0)
    logits_PV, counted_BN = torch.randn(12, 9), torch.ones(1, 12, dtype=torch.bool)
    agreement = Agreement(drafts=2)
    agreement.add(0.0, logits_PV, logits_PV, counted_BN)
    figures = agreement.summary()
    assert figures["acceptance"] == pytest.approx(1)
    assert figures["top1"] == figures["top3"] == 1
    assert figures["accepted_length"] == 3


@torch.no_grad()
def test_the_simulated_accepted_length_is_the_engines_on_the_models_own_text(speaking: TinyModel) -> None:
    model = cats.load(speaking.base, {"draft": (speaking.draft, DRAFT_EXIT)}, dtype="float64")
    prompt = load_tokenizer(speaking.base)("USER: hello ASSISTANT:")["input_ids"]
    config = cats.GenerationConfig(max_new_tokens=120, eos_token_ids=())
    generation = cats.generate(model, prompt, cats.build_method(cats.EagleSelfConfig(steps=4)), config)
    ids = torch.tensor([[*prompt, *generation.ids]])
    states = model.base.hidden_states(ids, (DRAFT_EXIT, model.base.layer_count))
    drafted = model.base.lm_head(model.adapters["draft"](states[DRAFT_EXIT])).argmax(-1)
    agrees = (drafted == model.base.target_logits(states[model.base.layer_count]).argmax(-1))[0].tolist()
    committed = [trace.committed for trace in generation.traces[1:]]
    simulated = chain_steps(agrees[len(prompt) : -1], 4)
    assert len(simulated) > 10
    assert simulated[:-1] == committed[: len(simulated) - 1]
    assert max(simulated) > 1
