"""What `import cats` offers on top of the engine: a model that knows its text, loaded from a directory or the hub, and answers as text."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cats import engine
from cats.acceptance import Acceptance
from cats.cats_model import MultiAdapterCATSModel
from cats.config import GenerationConfig, MemoryOptions, MethodConfig
from cats.earlyexit import read_config
from cats.engine import Generation, Step, Stop
from cats.errors import CatsError
from cats.hub import locate
from cats.kept import KeptCaches
from cats.methods import METHODS, best_method, build_method, check_runnable, needs_of, with_needs
from cats.methods.base import Method
from cats.planned import Loading, LoadPlan, Planning, plan_load
from cats.text import Message, ModelText, has_tokenizer, listed_end_ids
from cats.trace import StepTrace

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

AdapterPlace = str | Path | tuple[str | Path, int | None]
Adapters = Mapping[str, AdapterPlace | list[AdapterPlace]]
MethodChoice = str | MethodConfig | Method | None


@dataclass(frozen=True)
class Answer(Generation):
    """A whole answer: its ids, why it ended, one trace a step, and its text."""

    decode: Callable[[Sequence[int]], str] = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """The new tokens as text; `CatsError` where the checkpoint has no tokenizer."""
        return self.decode(self.ids)

    @property
    def accepted_length(self) -> float | None:
        """Tokens per pass of the whole model, the prefill left out; None where the prefill gave the whole answer."""
        cycles = [trace.committed for trace in self.traces if not trace.prefill]
        return sum(cycles) / len(cycles) if cycles else None


class CatsModel(MultiAdapterCATSModel):
    """A model that can be spoken to; made by `load`.

    Attributes:
        plan: how it was settled what to hold and which method to use; None where that was not planned.
        method: that answers are made with where none is named; None: the plan's, or the best that the adapters allow.
    """

    _text: ModelText | None = None
    plan: LoadPlan | None = None
    method: MethodConfig | None = None

    @property
    def text(self) -> ModelText:
        """Tokenizer, chat template and end tokens; `CatsError` where the checkpoint has no tokenizer."""
        if self._text is None:
            raise CatsError("the checkpoint has no tokenizer, so text means nothing to it; give token ids, or add its tokenizer's files.")
        return self._text

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """See `MultiAdapterCATSModel`."""
        return None if self._text is None else self._text.fingerprint

    def chat(
        self,
        messages: str | Sequence[Message],
        method: MethodChoice = None,
        *,
        stop: Sequence[str] = (),
        on_step: Callable[[StepTrace], object] | None = None,
        kept: KeptCaches | None = None,
        **generation: int | float,
    ) -> Answer:
        """The answer to a question, or to a conversation of `{"role": ..., "content": ...}`, in the checkpoint's chat template.

        Args:
            method: a name, a configuration, a method, or None: the planned one, or else the best that the loaded adapters allow.
            stop: texts that end the answer, beyond those of the template.
            on_step: called with the trace of every step when it is done.
            kept: caches that outlive the answer; of the next turn's prompt, only what they lack is read.
            generation: fields of `GenerationConfig`.
        """
        text, config = self.text, GenerationConfig(**generation)  # type: ignore[arg-type]
        ids, chosen = text.prompt_ids(messages), chosen_method(self, method)
        generated = engine.generate(self, ids, chosen, config, stop=text.stop(stop), on_step=on_step, kept=kept)
        return Answer(generated.ids, generated.finish, generated.traces, text.answer)


def load(
    path_or_hub_id: str | Path,
    adapters: Adapters | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    memory: MemoryOptions | None = None,
    template: str | None = None,
    compute_dtype: str = "auto",
    *,
    plan: Planning | None = Planning(),  # noqa: B008 - frozen
    method: str | MethodConfig | None = None,
) -> CatsModel:
    """Load a checkpoint and its adapters from directories or from the hub.

    Args:
        adapters: `{"draft": place, "shallow": place}`; a place is a directory, a hub id, or one of them with its exit layer. Of a list of
            places the planner takes one; where nothing is planned, it is the first.
        dtype: of the weights in memory; "auto" is what config.json names. "float32" holds half precision upcast: twice the memory, the
            same text; on a CPU faster only where nothing is compiled (cats/kernels).
        memory: a budget for what is resident; what does not fit is streamed from the checkpoint. None holds everything.
        template: name of a chat template, or the path of a `.jinja` file; None: see `cats.text`.
        compute_dtype: of the arithmetic; "auto" is float32 on a CPU, elsewhere `dtype`. It must hold every value of `dtype`.
        plan: under a memory budget, choose the method, and with it adapters, ring and tree, by what is predicted to make most tokens per
            second (cats/planned.py); the choice is in `CatsModel.plan`. None, for callers that name their methods, attaches all adapters.
        method: that answers will be made with; nothing is chosen then, and the budget has room for what it grows, drafts with and holds.

    Raises:
        CatsError: something is missing, damaged, or does not fit together.
    """
    directory = locate(path_or_hub_id)
    candidates = {name: located(place) for name, place in (adapters or {}).items()}
    places = {name: offered[0] for name, offered in candidates.items()}
    planned = None
    if method is not None:
        method = configuration(method)
        check_runnable([method], read_config(directory), memory.coarse if memory else None)
        plan, memory = None, memory and with_needs(memory, method)
    one_memory = memory is not None and memory.device_bytes is None  # what the planner knows
    if plan is not None and memory is not None and memory.budget_bytes is not None and one_memory:
        planned = plan_load(Loading.read(directory, candidates, (dtype, compute_dtype), torch.device(device), memory), plan)
        places, memory = planned.adapters, planned.memory
    text = ModelText.from_pretrained(directory, template) if has_tokenizer(directory) else None
    if text is None and template is not None:
        raise CatsError(f"{directory} has no tokenizer, so a template does nothing; leave it out, or add the tokenizer's files.")
    model = CatsModel.from_pretrained(directory, places, dtype, device, memory, compute_dtype)
    model._text, model.plan, model.method = text, planned, method
    model.end_token_ids = (text.end_token_ids if text is not None else listed_end_ids(directory)) or None
    return model


def located(place: AdapterPlace | list[AdapterPlace]) -> list[tuple[Path, int | None]]:
    """Directory and exit of an adapter, or of each of several."""
    pairs = [one if isinstance(one, tuple) else (one, None) for one in (place if isinstance(place, list) else [place])]
    return [(locate(path), exit_layer) for path, exit_layer in pairs]


def chosen_method(model: MultiAdapterCATSModel, method: MethodChoice) -> Method:
    """The method that is meant by a name, a configuration, itself, or None: the planned one, or the best that the adapters allow."""
    if isinstance(method, Method):
        return method
    plan = model.plan if isinstance(model, CatsModel) else None
    if method is None and isinstance(model, CatsModel):
        method = model.method
    if method is None:
        method = best_method(model.adapters) if plan is None else plan.method
    method = configuration(method)
    needs = needs_of(method)
    lacks_copy = plan is not None and plan.without_copy and bool(needs.views)
    if plan is not None and (lacks_copy or not set(needs.adapters) <= model.adapters.keys()):
        raise CatsError(
            f"the memory plan chose {plan.method.name} and left out what {method.name} needs ({', '.join(needs.words)}); "
            "load the model with plan=None and the adapters that it needs."
        )
    return build_method(method, model)


def configuration(method: str | MethodConfig) -> MethodConfig:
    """The configuration itself, or the default one of a method's name."""
    if isinstance(method, MethodConfig):
        return method
    if method not in METHODS:
        raise CatsError(f"unknown method {method!r}; known are {', '.join(METHODS)}.")
    return METHODS[method]()


def ids_of(model: MultiAdapterCATSModel, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt: itself, or plain text as the model's tokenizer reads it."""
    return text_of(model).ids(prompt) if isinstance(prompt, str) else list(prompt)


def text_of(model: MultiAdapterCATSModel) -> ModelText:
    """The text side of a model that has one."""
    if not isinstance(model, CatsModel):
        raise CatsError("this model was not made by cats.load, so it knows no tokenizer; give token ids.")
    return model.text


def stream(
    model: MultiAdapterCATSModel,
    prompt: str | Sequence[int],
    method: MethodChoice = None,
    config: GenerationConfig | None = None,
    *,
    stop: Stop | None = None,
    acceptance: Acceptance | None = None,
    kept: KeptCaches | None = None,
) -> Generator[Step, None, None]:
    """Continue text or token ids step by step; see `cats.engine.stream`. Text is taken as it stands, without a chat template."""
    config = config or GenerationConfig()
    ids, chosen = ids_of(model, prompt), chosen_method(model, method)
    return engine.stream(model, ids, chosen, config, stop=stop, acceptance=acceptance, kept=kept)


def generate(
    model: MultiAdapterCATSModel,
    prompt: str | Sequence[int],
    method: MethodChoice = None,
    config: GenerationConfig | None = None,
    *,
    streamer: "BaseStreamer | None" = None,
    stop: Stop | None = None,
    acceptance: Acceptance | None = None,
    on_step: Callable[[StepTrace], object] | None = None,
    kept: KeptCaches | None = None,
) -> Answer:
    """Continue text or token ids; see `stream` and `cats.engine.generate`."""
    generated = engine.generate(
        model,
        ids_of(model, prompt),
        chosen_method(model, method),
        config or GenerationConfig(),
        streamer=streamer,
        stop=stop,
        acceptance=acceptance,
        on_step=on_step,
        kept=kept,
    )
    fields = {item.name: getattr(generated, item.name) for item in dataclasses.fields(generated)}
    return Answer(**fields, decode=lambda ids: text_of(model).decode(ids))
