"""Plain transformers as the reference of greedy answers: its checkpoint, whether that is the one that ours was made of, its answers kept.

transformers refuses nested weights, so the checkpoint they were made of stands for them. Their tokenizer and configuration must agree,
and its tensors must be those whose SHA-256 the conversion noted (docs/nested.md).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import GenerationConfig as TransformersConfig

from cats import CatsError
from cats.config import require
from cats.nested.conversion import COARSE_FILE, Progress, Source, check_published, fields_of, ignored, opened
from cats.text import ModelText
from evaluation.record_file import append_record, check_settings, read_records, write_json
from evaluation.subject import weights_fingerprint

SAID_BY_THE_WAY = ("quantization_config", "_name_or_path", "transformers_version")
"""Entries of config.json in which a checkpoint and the one that it was made of may differ."""


def check_reference(directory: Path, reference: Path, text: ModelText, progress: Progress = ignored) -> str:
    """What shows that `reference` is the model in `directory` as it was published; `CatsError` where it is another one.

    Args:
        text: tokenizer and template of `directory`.
    """
    if directory.resolve() == reference.resolve():
        require(
            not fields_of(directory).get("quantization_config"),
            f"transformers cannot run the weights in {directory}; give the checkpoint that they were made of by --reference-model.",
        )
        return "the same checkpoint"
    theirs = ModelText.from_pretrained(reference)
    same = (theirs.fingerprint, theirs.end_token_ids) == (text.fingerprint, ModelText.from_pretrained(directory).end_token_ids)
    require(same, f"{reference} has another vocabulary, or other end tokens, than {directory}; give the checkpoint that it was made of.")
    ours, published = fields_of(directory), fields_of(reference)
    differing = [name for name in {**ours, **published} if name not in SAID_BY_THE_WAY and ours.get(name) != published.get(name)]
    require(
        not differing,
        f"config.json says another {', '.join(differing[:1])} in {reference} than in {directory}; give the checkpoint that it was made of.",
    )
    if not (directory / COARSE_FILE).is_file():
        return "another directory; nothing records what these weights were made of"
    count = check_published(opened(directory), Source(reference), progress)
    return f"the SHA-256 of all {count} tensors is the one that the conversion noted"


@dataclass
class Reference:
    """A checkpoint as plain transformers runs it, loaded when it is first asked for something that `answers` does not hold.

    Attributes:
        dtype, compute: the dtype that weights are rounded to, and the one that they are computed in.
        end_token_ids: that end an answer.
        answers: records file of its answers, which every comparison with the same reference may share; None: they are made each time.
    """

    directory: Path
    dtype: torch.dtype
    compute: torch.dtype
    device: torch.device
    end_token_ids: Sequence[int]
    answers: Path | None = None

    def __post_init__(self) -> None:
        self.known: dict[str, list[dict[str, Any]]] = {}
        if self.answers is None:
            return
        kept = self.answers.with_suffix(".settings.json")
        check_settings(kept, self.settings, self.answers)
        write_json(kept, {"settings": self.settings})
        for record in read_records(self.answers):
            self.known.setdefault(record["prompt"], []).append(record)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides an answer, the prompt left out."""
        # "held", the weight dtype, is a key of the answers that are kept.
        names = {name: str(dtype).removeprefix("torch.") for name, dtype in (("held", self.dtype), ("compute", self.compute))}
        ends = {"end_token_ids": sorted(self.end_token_ids), "transformers": str(transformers.__version__)}
        return {"weights": weights_fingerprint(self.directory), "device": self.device.type, **names, **ends}

    @cached_property
    def model(self) -> PreTrainedModel:
        """transformers' own."""
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.directory, dtype=self.dtype)
        model: PreTrainedModel = loaded.to(self.device, self.compute).eval()  # type: ignore[arg-type]
        # The checkpoint's own generation settings (penalties, a length) must not mix in.
        model.generation_config = TransformersConfig(**self._ends)
        return model

    @property
    def _ends(self) -> dict[str, Any]:
        return {"eos_token_id": list(self.end_token_ids) or None, "pad_token_id": 0}

    def knows(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int] | None:
        """An answer that was made before; of one that went on for longer, its beginning, which greedy decoding makes the same."""
        for record in self.known.get(named(prompt_ids), ()):
            if record["max_new_tokens"] >= max_new_tokens:
                return [int(token) for token in record["ids"][:max_new_tokens]]
        return None

    def greedy(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """transformers' own greedy answer, new tokens only."""
        known = self.knows(prompt_ids, max_new_tokens)
        if known is not None:
            return known
        settings = TransformersConfig(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **self._ends)
        prompt = torch.tensor([list(prompt_ids)], device=self.device)
        whole: Any = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)  # type: ignore[operator]
        answer = [int(token) for token in whole[0, len(prompt_ids) :]]
        if self.answers is not None:
            record: dict[str, Any] = {"prompt": named(prompt_ids), "max_new_tokens": max_new_tokens, "ids": answer}
            append_record(self.answers, record)
            self.known.setdefault(record["prompt"], []).append(record)
        return answer

    @torch.no_grad()
    def gap(self, ids: Sequence[int]) -> float:
        """How far the best logit after `ids` is above the second best."""
        logits_V = self.model(torch.tensor([list(ids)], device=self.device)).logits[0, -1]
        best, second = logits_V.topk(2).values.tolist()
        return float(best - second)


def named(prompt_ids: Sequence[int]) -> str:
    """What a prompt is found by."""
    return hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()


def reference_place(asked: str | None, directory: Path) -> Path:
    """The directory of --reference-model, or else the model's own; `CatsError` where there is none."""
    if asked is None:
        return directory
    if not Path(asked).is_dir():
        raise CatsError(f"there is no directory {asked}; --reference-model takes the directory of the checkpoint that transformers runs.")
    return Path(asked)
