"""The step and the loop: propose, verify, accept, commit. Every method runs through here, and only here is there a loop over tokens.

Token ids in, token ids out: no tokenizer, no text.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from cats.acceptance import Acceptance, Verdict, build_acceptance
from cats.cats_model import MultiAdapterCATSModel
from cats.config import GenerationConfig, require
from cats.errors import CatsError, ContractError
from cats.kept import KeptCaches
from cats.methods.base import Method
from cats.state import Cycle, DecodeState, verify
from cats.trace import Confusion, StepTrace

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

Stop = Callable[[list[int], int], int | None]


@dataclass(frozen=True)
class Step:
    """One step of an answer.

    Attributes:
        tokens: what it committed.
        finish: why the answer ended with it ("eos", "length", "context", "stop"), or None.
        trace: its record.
        taken_back: tokens of earlier steps that `stop` cut off the answer's end with this step; it then has no tokens of its own.
    """

    tokens: list[int]
    finish: str | None
    trace: StepTrace
    taken_back: int = 0


@dataclass(frozen=True)
class Generation:
    """A whole answer: new token ids, the reason of its end, one trace a step (the first is the prefill)."""

    ids: list[int]
    finish: str
    traces: list[StepTrace]


class Limits:
    """When an answer ends: after an EOS token, at its length, at the end of the context, or where `stop` says."""

    def __init__(self, config: GenerationConfig, prompt: int, context: int, stop: Stop | None):
        self.eos, self.stop, self.prompt = set(config.eos_token_ids or ()), stop, prompt
        self.room = min(config.max_new_tokens, context - prompt)
        self.at_end = "length" if self.room == config.max_new_tokens else "context"

    def depth(self, tokens: int) -> int:
        """Deepest tree node of use: path and next token must fit into what is left."""
        return self.prompt + self.room - tokens - 1

    def cut(self, answer: list[int], new: list[int]) -> tuple[int, str | None]:
        """How many tokens of `answer` and `new` together to keep, and the reason if the answer ends there."""
        text, finish = (answer + new)[: self.room], None
        for place in range(len(answer), len(text)):
            if text[place] in self.eos:
                text, finish = text[: place + 1], "eos"
                break
        kept = self._stopped(text, len(text) - len(answer))
        if kept is not None and (finish is None or kept < len(text)):
            return kept, "stop"
        if finish is None and len(text) >= self.room:
            finish = self.at_end
        return len(text), finish

    def _stopped(self, text: list[int], new: int) -> int | None:
        """What `stop` says, checked."""
        kept = self.stop(list(text), new) if self.stop else None
        if kept is not None and (isinstance(kept, bool) or not 0 <= kept <= len(text)):
            raise CatsError(
                f"`stop` returned {kept} for an answer of {len(text)} tokens; let it return how many of them to keep, or None to go on."
            )
        return kept


def read_prompt(state: DecodeState, acceptance: Acceptance, limits: Limits) -> Step:
    """The first step: run the prompt; the target's own token after it becomes the root."""
    cycle, kept = Cycle(state, depth_limit=0), state.cache.length
    with cycle.stage("target"):
        logits_1V = state.read_prompt()
    with cycle.stage("accept"):
        verdict = acceptance.judge(cycle.tree, [0], logits_1V)
        keep, finish = limits.cut([], [verdict.next_token])
        state.tokens.append(verdict.next_token)
    seconds, streamed = cycle.reading()
    trace = StepTrace(
        prefill=True,
        nodes=1,
        accepted=0,
        committed=keep,
        layer_passes=state.prompt_passes,
        bytes_streamed=streamed,
        seconds=seconds,
        started=cycle.watch.started,
        spans=tuple(cycle.watch.spans),
        prompt_rows=limits.prompt - kept,
    )
    return Step([verdict.next_token][:keep], finish, trace)


def decode_step(state: DecodeState, method: Method, acceptance: Acceptance, limits: Limits) -> Step:
    """One cycle: propose, verify, accept, commit."""
    return decode_together([Sequenced(state, method, acceptance, limits)])[0]


class Sequenced(NamedTuple):
    """One answer in the making, and what drives it; a method object belongs to one answer at a time."""

    state: DecodeState
    method: Method
    acceptance: Acceptance
    limits: Limits


def decode_together(answers: Sequence[Sequenced]) -> list[Step]:
    """One cycle of several answers of one model: each proposes alone, in resident layers, and all verify in one target pass.

    The tokens are those of single cycles. Bytes streamed are shared, and stand in every trace.
    """
    cycles, chosen = [], []
    for answer in answers:
        cycle = Cycle(answer.state, answer.limits.depth(len(answer.state.tokens)))
        with naming(answer.method):
            nodes = list(answer.method.propose(cycle))
            cycle.tree.check_choice(nodes)
        cycles.append(cycle)
        chosen.append(nodes)
    with ExitStack() as clocks:
        for cycle in cycles:
            clocks.enter_context(cycle.stage("target"))
        logits = verify(cycles, chosen)
    return [accept(*parts) for parts in zip(answers, cycles, chosen, logits, strict=True)]


def accept(answer: Sequenced, cycle: Cycle, nodes: list[int], logits_TV: torch.Tensor) -> Step:
    """The end of a cycle: judge the nodes, commit the accepted path."""
    state, method, limits = answer.state, answer.method, answer.limits
    with cycle.stage("accept"):
        verdict = answer.acceptance.judge(cycle.tree, nodes, logits_TV)
        with naming(method):
            method.observe(cycle, nodes, logits_TV, verdict)
        tokens = [cycle.tree.tokens[node] for node in verdict.path[1:]] + [verdict.next_token]
        so_far = state.tokens[limits.prompt :]
        length, finish = limits.cut(so_far, tokens)
        keep = max(0, length - len(so_far))
        if keep:
            state.commit(cycle, verdict.path[:keep], tokens[keep - 1])
    return Step(tokens[:keep], finish, trace_of(cycle, nodes, verdict, keep), max(0, len(so_far) - length))


@contextmanager
def naming(method: Method) -> Iterator[None]:
    """Let a `ContractError` of the block say which method broke its contract."""
    try:
        yield
    except ContractError as error:
        raise ContractError(f"the method {type(method).__name__} broke its contract: {error}") from error


def trace_of(cycle: Cycle, nodes: Sequence[int], verdict: Verdict, keep: int) -> StepTrace:
    """The record of a finished cycle."""
    judged = [(says, verdict.accepted[node]) for node, says in cycle.shallow_verdicts.items() if node in verdict.accepted]
    counts = Confusion(
        tp=judged.count((True, True)), fp=judged.count((True, False)), fn=judged.count((False, True)), tn=judged.count((False, False))
    )
    seconds, streamed = cycle.reading()
    return StepTrace(
        prefill=False,
        nodes=len(nodes),
        accepted=len(verdict.path) - 1,
        committed=keep,
        accepted_kinds=tuple(cycle.tree.kinds[node] for node in verdict.path[1:]),
        shallow_accepted=cycle.shallow_accepted,
        confusion=None if cycle.shallow_accepted is None else counts,
        layer_passes=cycle.layer_passes,
        bytes_streamed=streamed,
        seconds=seconds,
        started=cycle.watch.started,
        spans=tuple(cycle.watch.spans),
        passes=tuple(cycle.passes),
    )


def with_end_tokens(config: GenerationConfig, model: MultiAdapterCATSModel) -> GenerationConfig:
    """`config` with the model's own end tokens where it names none."""
    if config.eos_token_ids is not None:
        return config
    if model.end_token_ids is None:
        raise CatsError("this model does not know what ends an answer; set eos_token_ids in the GenerationConfig, () for no end token.")
    return replace(config, eos_token_ids=model.end_token_ids)


@torch.inference_mode()
def stream(
    model: MultiAdapterCATSModel,
    prompt_ids: Sequence[int],
    method: Method,
    config: GenerationConfig,
    *,
    stop: Stop | None = None,
    acceptance: Acceptance | None = None,
    kept: KeptCaches | None = None,
) -> Generator[Step, None, None]:
    """Generate step by step. But for `kept`, nothing survives the call: an exception, or an abandoned iterator, leaves no state behind.

    Several threads may use one model: their steps take turns (cats/turns.py), and nothing is locked between two steps. Under a memory
    budget for the whole process, which grants caches for one answer, an answer of another thread waits until this one ends.

    Args:
        prompt_ids: at least one token, and fewer than the context holds.
        stop: called after each step with the answer so far and how many of its tokens are new; returns how many tokens of the whole
            answer to keep, which ends it there, or None to go on. It may cut into earlier steps (`Step.taken_back`).
        acceptance: a rule to use in place of the one that `config` names.
        kept: caches that outlive the answer; of the prompt, only what they lack is read.

    Raises:
        CatsError: the prompt is empty or does not fit, an adapter is missing, the method was built for another model, `stop` returned
            what is no length of the answer, or this thread has an unfinished answer where the memory budget grants one at a time.
        ContractError: the method broke the contract of `Method`.
    """
    method.check_model(model)
    if kept is not None:
        kept.check_model(model)
    context = model.base.context
    require(len(prompt_ids) > 0, "the prompt is empty; give at least one token.")
    require(
        len(prompt_ids) < context,
        f"the prompt has {len(prompt_ids)} tokens and the model's context holds {context}, the answer included; shorten the prompt.",
    )
    limits = Limits(with_end_tokens(config, model), len(prompt_ids), context, stop)
    acceptance = acceptance or build_acceptance(config, model.base.device)
    turns = model.base.turns
    with turns.answer() as place, ExitStack() as ending:
        with turns.step(place), model.base.stepping():
            positions = limits.prompt + limits.room
            if kept is None:
                state = DecodeState(model, prompt_ids, method.adapters, positions, method.max_nodes)
                ending.callback(state.close)
            else:
                state = ending.enter_context(kept.lent(method.adapters, method.max_nodes, prompt_ids, positions))
            step = read_prompt(state, acceptance, limits)
            method.start(state)
        yield step
        while step.finish is None:
            with turns.step(place), model.base.stepping():
                step = decode_step(state, method, acceptance, limits)
            yield step


def generate(
    model: MultiAdapterCATSModel,
    prompt_ids: Sequence[int],
    method: Method,
    config: GenerationConfig,
    *,
    streamer: "BaseStreamer | None" = None,
    stop: Stop | None = None,
    acceptance: Acceptance | None = None,
    on_step: Callable[[StepTrace], object] | None = None,
    kept: KeptCaches | None = None,
) -> Generation:
    """Generate one answer; see `stream`. A transformers `streamer` gets the prompt, then each step's tokens one by one.

    `on_step` is called with the trace of every step when it is done. What `stop` takes back of earlier steps has reached the streamer
    by then; the answer that is returned is without it.
    """
    ids: list[int] = []
    traces: list[StepTrace] = []
    finish: str | None = None
    if streamer is not None:
        streamer.put(torch.tensor([list(prompt_ids)]))
    for step in stream(model, prompt_ids, method, config, stop=stop, acceptance=acceptance, kept=kept):
        ids, traces, finish = ids[: len(ids) - step.taken_back] + step.tokens, [*traces, step.trace], step.finish
        if on_step is not None:
            on_step(step.trace)
        for token in step.tokens if streamer is not None else ():
            streamer.put(torch.tensor([token]))  # type: ignore[union-attr]
    if streamer is not None:
        streamer.end()
    return Generation(ids, str(finish), traces)
