"""Fit what the adapters' scores are worth to CATS's tree (cats/calibration.py), on held-out prompts.

    python -m evaluation.calibrate --prompts heldout.json.gz --limit 20 --max-new-tokens 64
    python -m evaluation.calibrate --prompts heldout.json.gz --draft-layer 3 --shallow-layer 10 ...

Per prompt the model answers greedily; then, at every token of its answer, each of the best tokens of both adapters either is what the
target said next or is not. A logistic regression on the adapters' log-odds gives the weights, which are written as `calibration.json`
into the shallow adapter's directory. Take prompts that are in no test set.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from cats import AutoregressiveConfig, CascadeConfig, CatsError, GenerationConfig, MultiAdapterCATSModel
from cats.calibration import Calibration, log_odds, save_calibration
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.records import sha256
from evaluation.chosen_model import chosen_model
from evaluation.correctness import prompts_file, read_prompts
from evaluation.options import add_model_flags, chosen_memory
from evaluation.processes import choose_device
from evaluation.questions import select_questions
from evaluation.subject import Subject, load_subject, load_text

TOPK = 10
"""Tokens of each adapter that are looked at after every token of an answer."""
ROUNDS, RIDGE = 50, 1e-3
"""Of the regression: Newton steps, and what keeps weights finite where the data do not."""


@torch.inference_mode()
def observed(model: MultiAdapterCATSModel, prompt_ids: list[int], answer_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-odds [N] of draft and shallow verifier, and whether the target said so [N], for both adapters' best tokens after each token.

    Of tokens that are not among the draft's best ones, its log-odds are taken to be those of the least of them, as while the tree grows.
    """
    names = ("draft", "shallow")
    exits = model.exits(names)
    ids = torch.tensor([[*prompt_ids, *answer_ids[:-1]]], device=model.base.device)
    states, first = model.base.hidden_states(ids, list(exits.values())), len(prompt_ids) - 1
    draft_TV, shallow_TV = (
        model.base.lm_head(model.adapters[name](states[exits[name]])[:, first:])[0].float().log_softmax(dim=-1) for name in names
    )
    told: list[tuple[float, float, bool]] = []
    for draft_V, shallow_V, said in zip(draft_TV, shallow_TV, answer_ids, strict=True):
        best = draft_V.topk(TOPK)
        tokens = torch.cat([best.indices, shallow_V.topk(TOPK).indices]).unique()
        draft = draft_V[tokens].clamp(min=best.values[-1])
        told += zip(draft.tolist(), shallow_V[tokens].tolist(), (tokens == said).tolist(), strict=True)
    draft_N, shallow_N, accepted_N = torch.tensor(told, dtype=torch.float64).T
    return log_odds(draft_N), log_odds(shallow_N), accepted_N


def fitted(columns_NF: torch.Tensor, accepted_N: torch.Tensor) -> tuple[float, ...]:
    """Weights [F] of a logistic regression, by Newton's method."""
    weights = columns_NF.new_zeros(columns_NF.shape[1])
    ridge = RIDGE * torch.eye(len(weights), dtype=weights.dtype)
    for _ in range(ROUNDS):
        chance_N = torch.sigmoid(columns_NF @ weights)
        slope = columns_NF.T @ (chance_N - accepted_N) + RIDGE * weights
        curve = (columns_NF * (chance_N * (1 - chance_N))[:, None]).T @ columns_NF + ridge
        weights = weights - torch.linalg.solve(curve, slope)
    return tuple(round(weight, 4) for weight in weights.tolist())


def calibration_of(subject: Subject, prompts: Sequence[list[int]], max_new_tokens: int) -> tuple[Calibration, int]:
    """The weights, and how many tokens of answers they are fitted to."""
    model, tokens, observations = subject.model, 0, []
    for prompt_ids in live_bar(prompts, desc=f"{len(prompts)} prompts", unit="prompt"):
        answer = subject.answer(prompt_ids, AutoregressiveConfig(), GenerationConfig(max_new_tokens=max_new_tokens)).ids
        observations.append(observed(model, prompt_ids, answer))
        tokens += len(answer)
    draft_N, shallow_N, accepted_N = (torch.cat(parts) for parts in zip(*observations, strict=True))
    ones_N = torch.ones_like(draft_N)
    drafted = fitted(torch.stack([ones_N, draft_N], dim=1), accepted_N)
    checked = fitted(torch.stack([ones_N, draft_N, shallow_N], dim=1), accepted_N)
    return Calibration(model.exits(("draft",))["draft"], drafted, checked), tokens  # type: ignore[arg-type]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.calibrate", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--prompts", required=True, metavar="BENCH_OR_FILE", help="a bench, a question file, or a ShareGPT file")
    parser.add_argument("--begin", type=int, help="first prompt to take (default: 0)")
    parser.add_argument("--limit", type=int, default=20, help="so many prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="per answer (default: %(default)s)")
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Answer, fit, write."""
    args, method = parse(argv), CascadeConfig()
    begin = args.begin or 0
    chosen = select_questions(read_prompts(args.prompts), begin, begin + args.limit)
    model = chosen_model([method], args)
    text, memory = load_text(model.directory, args.template), chosen_memory([method], args.max_new_tokens, args)
    subject = load_subject(model.directory, model.adapters, text, args.dtype, choose_device(args.device), memory, args.compute_dtype)
    subject.check_prompts(chosen)
    prompts = [text.prompt_ids(question.turns[0]) for question in chosen]
    calibration, tokens = calibration_of(subject, prompts, args.max_new_tokens)
    about: dict[str, Any] = {
        "prompts": len(prompts),
        "tokens": tokens,
        "fitted_on": f"{prompts_file(args.prompts).name} from {begin}",
        "prompts_sha256": sha256(prompts_file(args.prompts)),
    }
    directory = model.adapters["shallow"][0]
    try:
        path = save_calibration(calibration, directory, about)
    except OSError as error:
        raise CatsError(f"cannot write into {directory}: {error}; copy the adapter to where you may write.") from error
    sys.stdout.write(f"{path}: drafted {calibration.drafted}, checked {calibration.checked}, of {tokens} tokens\n")


if __name__ == "__main__":
    main()
