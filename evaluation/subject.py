"""The model under evaluation: base, adapters, chat template and end tokens, loaded together and checked before the first answer.

Knows checkpoints and templates; knows no questions and no answer files.
"""

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cats import (
    CatsError,
    CatsModel,
    Generation,
    GenerationConfig,
    MemoryOptions,
    MethodConfig,
    ModelText,
    generate,
    load,
)
from cats.adapter import read_adapter_config
from cats.checkpoint import tensor_forms, weight_files
from cats.dtypes import HALVES, NEAR_TIES
from cats.methods import needs_of
from cats.planning.plan import COARSE, EXACT, MemoryPlan, ModelSizes, View
from cats.trace import StepTrace
from evaluation.chosen_model import ChosenModel
from evaluation.metrics import ModelShape
from evaluation.options import Adapters
from evaluation.processes import choose_device
from evaluation.questions import Question

SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Subject:
    """A loaded model with what it needs to be spoken to."""

    model: CatsModel

    @property
    def text(self) -> ModelText:
        """Its tokenizer, chat template and end tokens."""
        return self.model.text

    def answer(
        self,
        prompt_ids: list[int],
        method: MethodConfig,
        config: GenerationConfig,
        on_step: Callable[[StepTrace], object] | None = None,
    ) -> Generation:
        """One answer by one method; the template's stop strings end it as the end tokens do."""
        return generate(self.model, prompt_ids, method, config, stop=self.text.stop(), on_step=on_step)

    def check_prompts(self, questions: Sequence[Question]) -> None:
        """Raise `CatsError` naming the first question whose opening prompt leaves no room for an answer."""
        for question in questions:
            length = len(self.text.prompt_ids(question.turns[0]))
            if length >= self.model.base.context:
                raise CatsError(
                    f"the prompt of question {question.question_id!r} has {length} tokens and the model's context holds "
                    f"{self.model.base.context}; leave the question out, or give --keep-going to record it as failed."
                )

    @property
    def caveats(self) -> list[str]:
        """What every result of this model has to say of itself."""
        return [NEAR_TIES] if self.model.base.dtype in HALVES else []

    @property
    def arithmetic(self) -> dict[str, str]:
        """The dtypes of the base's weights and of its arithmetic, by name."""
        base = self.model.base
        return {"weights": str(base.weight_dtype).removeprefix("torch."), "computed": str(base.dtype).removeprefix("torch.")}

    @property
    def _plan(self) -> MemoryPlan:
        return self.model.base.source.plan

    @property
    def _sizes(self) -> ModelSizes:
        """Of the loaded model's weights."""
        sizes = self._plan.sizes
        assert sizes is not None  # every load plans
        return sizes

    @property
    def has_coarse(self) -> bool:
        """Whether the layers have a coarse form."""
        return any(COARSE.needs(piece) for piece in self._sizes.pieces)

    @property
    def copy_bytes(self) -> int:
        """Resident bytes of parts that the exact model does not need: a copy of the layers that was made to draft with."""
        return sum(piece.resident_bytes for piece in self._plan.pinned if not EXACT.needs(piece))

    def _layer_bytes(self, view: View) -> int:
        """Bytes of a layer that a pass of the view reads, on average; where exact parts stand for coarse ones, theirs."""
        plan, sizes = self._plan, self._sizes
        used = [piece for piece in sizes.pieces if view.needs(piece) and (view == EXACT or piece in plan.pinned)]
        matrices = {(piece.layer, piece.matrix) for piece in used}
        used += [piece for piece in sizes.pieces if EXACT.needs(piece) and (piece.layer, piece.matrix) not in matrices]
        return sizes.other_layer_bytes + sum(piece.resident_bytes for piece in used) // sizes.layers

    def shape(self, method: MethodConfig) -> ModelShape:
        """What the cost formulas of metrics.py need to know for this method."""
        base = self.model.base
        drafts = "draft" in needs_of(method).adapters
        return ModelShape(
            layers=base.layer_count,
            draft_exit=int(self.model.adapters["draft"].exit_layer or 0) if drafts else 0,
            draft_passes=method.draft_passes if drafts else 0,
            bytes_per_layer=self._layer_bytes(EXACT),
            bytes_per_coarse_layer=self._layer_bytes(COARSE) if self.has_coarse else 0,
        )


def load_text(model_path: str | Path, template: str | None) -> ModelText:
    """Tokenizer and template of a checkpoint; quick, so that their faults are found before the weights are read."""
    text = ModelText.from_pretrained(model_path, template)
    _ = text.template  # `CatsError` where there is none
    return text


def load_subject(
    model_path: str | Path,
    adapters: Adapters,
    text: ModelText,
    dtype: str,
    device: torch.device,
    memory: MemoryOptions | None = None,
    compute_dtype: str = "auto",
) -> Subject:
    """Load base and adapters, within `memory` where it is given; whatever does not fit together raises `CatsError`."""
    named = {"dtype": dtype, "compute_dtype": compute_dtype, "template": text.template}
    model = load(model_path, adapters, device=device, memory=memory, plan=None, **named)
    exits = {name: int(adapter.exit_layer or 0) for name, adapter in model.adapters.items()}
    if {"draft", "shallow"} <= exits.keys() and exits["draft"] >= exits["shallow"]:
        raise CatsError(
            f"the draft adapter's exit {exits['draft']} is not before the shallow adapter's {exits['shallow']}; exchange or replace them."
        )
    return Subject(model)


def subject_settings(args: argparse.Namespace, model: ChosenModel, memory: MemoryOptions | None, text: ModelText) -> dict[str, Any]:
    """What the flags of the model decide, as a record: weights, dtype, device, template and, where something is streamed, how."""
    settings = {
        "model": {"name": model.name, "weights": weights_fingerprint(model.directory)},
        "adapters": {
            name: {"name": path.resolve().name, "exit_layer": said_exit(path, layer), "weights": weights_fingerprint(path)}
            for name, (path, layer) in model.adapters.items()
        },
        "dtype": args.dtype,
        "compute_dtype": args.compute_dtype,
        "device": choose_device(args.device).type,
        "template": text.template,
    }
    return settings | ({} if memory is None else {"memory": memory_record(memory)})


def memory_record(memory: MemoryOptions) -> dict[str, Any]:
    """The options as JSON can hold them, but for what follows from the method."""
    views = [{name: plain(value) for name, value in dataclasses.asdict(view).items()} for view in memory.views]
    return {name: value for name, value in dataclasses.asdict(memory).items() if name != "method_bytes"} | {"views": views}


def plain(value: Any) -> Any:
    """A setting of a view as JSON can hold it."""
    return sorted(value) if isinstance(value, frozenset) else str(value) if isinstance(value, Path) else value


def said_exit(adapter: Path, layer: int | None) -> int | None:
    """The exit that was asked for, or else the one that the adapter's config.json says; None where neither says one."""
    return layer if layer is not None else getattr(read_adapter_config(adapter), "exit_layer", None)


def stored_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's or an adapter's weights, as stored."""
    return sum(math.prod(form.shape) * form.dtype.itemsize for form in tensor_forms(directory).values())


def weights_fingerprint(directory: str | Path) -> str:
    """A hash of a checkpoint's weights, as `files_fingerprint` makes it."""
    return files_fingerprint(sorted(weight_files(directory)))


def files_fingerprint(paths: Iterable[Path]) -> str:
    """A hash of files: sizes, and the first, middle and last MiB of each; retrained weights never look the same."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in (0, max(0, (size - SAMPLE_BYTES) // 2), max(0, size - SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
