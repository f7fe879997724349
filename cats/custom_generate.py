"""The methods as a decoding loop of transformers: `model.generate(..., custom_generate=cats.transformers_generate(...))`.

The model is the one that transformers loaded: its layers are run in place, no weight is copied. The engine decodes, and at every token of
the answer what `generate` prepared decides: its logits processors, its stopping criteria, and its way of choosing a token.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from cats import engine
from cats.acceptance import Verdict
from cats.adapter import AdapterModel
from cats.api import AdapterPlace, MethodChoice, chosen_method, located
from cats.cats_model import MultiAdapterCATSModel
from cats.config import GenerationConfig, require
from cats.earlyexit import EarlyExitLlamaForCausalLM
from cats.families import check_layers, check_rope, family_of
from cats.tree import TokenTree

if TYPE_CHECKING:
    from transformers import GenerationConfig as TheirConfig
    from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

ATTENTIONS = ("sdpa", "eager")
"""Implementations that take a bias, as trees need one."""
OURS_TO_IGNORE = {"use_cache", "logits_to_keep", "cache_position"}
"""What `generate` prepares for a forward pass of its own."""


class TransformersGenerate:
    """A `custom_generate` for `generate` of models that transformers loaded (cats/families.py); serves any number of answers.

    Greedy text is `generate`'s own, token for token, up to near ties in half precision. Sampled text is distributed as its own, whatever
    the processors: at each node that is reached they see the ids of that node's path, one row, in the order in which `generate` would call
    them, and the token is drawn by the same call of `torch.multinomial`; so one seed of torch gives one text, here and there. What is
    drafted is not processed, which costs accepted tokens where processors change much.

    Args:
        method: a name, a configuration, or None: the best that the adapters allow.
        adapters: as in `cats.load`.
        streamer: gets the prompt, then tokens as they are committed. Give it here: `generate` hands its own to no callable (transformers
            5.23).
    """

    def __init__(
        self, method: MethodChoice = None, adapters: Mapping[str, AdapterPlace] | None = None, streamer: "BaseStreamer | None" = None
    ):
        self._method, self._adapters, self._streamer = method, dict(adapters or {}), streamer
        self._made: WeakKeyDictionary[PreTrainedModel, MultiAdapterCATSModel] = WeakKeyDictionary()

    def model_for(self, model: "PreTrainedModel") -> MultiAdapterCATSModel:
        """The engine's view of a model, with the adapters; made anew where the model was moved or cast."""
        base = self._made[model].base if model in self._made else None
        weight = model.lm_head.weight
        if base is None or (base.dtype, base.device) != (weight.dtype, weight.device):
            self._made[model] = shared(model, self._adapters)
        return self._made[model]

    @torch.no_grad()
    def __call__(
        self,
        model: "PreTrainedModel",
        input_ids: torch.Tensor,
        logits_processor: "LogitsProcessorList",
        stopping_criteria: "StoppingCriteriaList",
        generation_config: "TheirConfig",
        **given: Any,
    ) -> "torch.Tensor | GenerateDecoderOnlyOutput":
        """See `GenerationMixin._sample`; what cannot be honoured raises `CatsError`."""
        check_model(model)
        check_request(input_ids, generation_config, given)
        ours, prompt = self.model_for(model), input_ids[0].tolist()
        room = int(generation_config.max_length) - len(prompt)  # `generate` has made sure that it is above 0
        context = ours.base.context
        require(
            len(prompt) + room <= context,
            f"prompt and answer may take {len(prompt) + room} positions and the model's context holds {context}; lower max_new_tokens.",
        )
        rule = ProcessedChoice(input_ids, logits_processor, stopping_criteria, generation_config)
        config = GenerationConfig(max_new_tokens=room, eos_token_ids=())
        method = chosen_method(ours, self._method)
        engine.generate(ours, prompt, method, config, streamer=self._streamer, stop=rule.stop, acceptance=rule)
        return rule.output()


transformers_generate = TransformersGenerate


class ProcessedChoice:
    """An acceptance rule: the walk through the tree is `generate`'s own loop, token by token.

    Verdicts about nodes that the walk does not reach, which methods only learn from, are those of the unprocessed logits' best tokens.
    """

    def __init__(self, input_ids: torch.Tensor, processor: "LogitsProcessorList", criteria: "StoppingCriteriaList", config: "TheirConfig"):
        self._ids, self._processor, self._criteria, self._config = input_ids, processor, criteria, config
        asked = config.return_dict_in_generate
        self._scores: list[torch.Tensor] | None = [] if asked and config.output_scores else None
        self._logits: list[torch.Tensor] | None = [] if asked and config.output_logits else None
        self._ended = False

    def judge(self, tree: TokenTree, nodes: Sequence[int], logits_TV: torch.Tensor) -> Verdict:
        """See `Acceptance`."""
        row = {node: place for place, node in enumerate(nodes)}
        choice = dict(zip(nodes, logits_TV.argmax(dim=-1).tolist(), strict=True))
        path = [0]
        choice[0] = self._choose(logits_TV[0])
        while not self._ended and (child := tree.child(path[-1], choice[path[-1]])) in row:
            assert child is not None
            path.append(child)
            choice[child] = self._choose(logits_TV[row[child]])
        accepted = {node: tree.tokens[node] == choice[tree.parents[node]] for node in nodes if node and tree.kinds[node] != "probe"}
        return Verdict(tuple(path), choice[path[-1]], accepted)

    def _choose(self, logits_V: torch.Tensor) -> int:
        """The next token of the text so far, which grows by it."""
        logits_1V = logits_V[None].to(self._ids.device, torch.float32, copy=True)
        scores_1V = self._processor(self._ids, logits_1V)  # type: ignore[arg-type]
        for kept, row_1V in ((self._scores, scores_1V), (self._logits, logits_1V)):
            if kept is not None:
                kept.append(row_1V)
        if self._config.do_sample:
            token_1 = torch.multinomial(torch.softmax(scores_1V, dim=-1), num_samples=1)[:, 0]
        else:
            token_1 = scores_1V.argmax(dim=-1)
        self._ids = torch.cat([self._ids, token_1[:, None]], dim=-1)
        self._ended = bool(torch.as_tensor(self._criteria(self._ids, self._seen_scores)).all())
        return int(token_1)

    @property
    def _seen_scores(self) -> Any:
        """What `generate` shows its criteria."""
        return None if self._scores is None else tuple(self._scores)

    def stop(self, answer: list[int], new: int) -> int | None:
        """The `stop` argument of the engine: the text ends where a criterion said so, which is where the walk has ended."""
        return len(answer) if self._ended else None

    def output(self) -> "torch.Tensor | GenerateDecoderOnlyOutput":
        """What `generate` returns."""
        ids = self._ids.clone()
        if not self._config.return_dict_in_generate:
            return ids
        scores, logits = (None if kept is None else tuple(row.clone() for row in kept) for kept in (self._scores, self._logits))
        return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=logits)  # type: ignore[arg-type]


def shared(model: "PreTrainedModel", adapters: Mapping[str, AdapterPlace]) -> MultiAdapterCATSModel:
    """A model that transformers loaded, as the engine sees it: the same modules, and adapters beside them."""
    ours = MultiAdapterCATSModel(EarlyExitLlamaForCausalLM(model, model.config))
    dtype = str(ours.base.dtype).removeprefix("torch.")
    for name, place in adapters.items():
        ((directory, exit_layer),) = located(place)
        adapter = AdapterModel.from_pretrained(directory, exit_layer, dtype, ours.base.device)
        ours.add_adapter(name, adapter, f"the adapter in {directory}")
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ours.end_token_ids = tuple(ends) if isinstance(ends, list) else None if ends is None else (ends,)
    return ours


def check_model(model: "PreTrainedModel") -> None:
    """Raise `CatsError` where the engine cannot run this model in place."""
    config = model.config
    family_of(config.model_type, "the model")
    check_layers(config, "the model")
    check_rope(config)
    attention = config._attn_implementation
    require(
        attention in ATTENTIONS,
        f"the model was loaded with attn_implementation {attention!r}, and trees need {' or '.join(ATTENTIONS)}; load it with one of them.",
    )
    devices = {str(weight.device) for weight in model.parameters()}
    require(len(devices) == 1, f"the model lies on {', '.join(sorted(devices))}; put it on one device, or load it by cats.load.")


def check_request(input_ids: torch.Tensor, config: "TheirConfig", given: Mapping[str, Any]) -> None:
    """Raise `CatsError` for what was asked of `generate` and cannot be honoured."""
    require(config.num_beams in (None, 1), f"num_beams is {config.num_beams}; drafts are verified for one text at a time: use num_beams=1.")
    rows = input_ids.shape[0]
    require(rows == 1, f"the batch has {rows} rows (num_return_sequences counts); give one prompt at a time.")
    for name in ("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens"):
        require(not getattr(config, name, None), f"{name} asks for another way of decoding; leave it out, or custom_generate.")
    for name in ("output_attentions", "output_hidden_states"):
        require(not getattr(config, name, None), f"{name} is not kept of verified trees; leave it out.")
    length = input_ids.shape[1]
    mask, places = given.get("attention_mask"), given.get("position_ids")
    require(mask is None or bool((mask == 1).all()), "the attention_mask hides tokens; give the prompt without padding.")
    usual = places is None or bool((places.flatten() == torch.arange(length, device=places.device)).all())
    require(usual, "the position_ids are not 0, 1, 2, ..; leave them out.")
    cache = given.get("past_key_values")
    empty = cache is None or cache.get_seq_length() == 0
    require(empty, "past_key_values holds a text already; give the whole prompt and no cache.")
    known = OURS_TO_IGNORE | {"attention_mask", "position_ids", "past_key_values", "streamer"}
    strange = sorted(name for name, value in given.items() if name not in known and value is not None and value is not False)
    require(not strange, f"{', '.join(strange)} would not be honoured; leave it out.")
