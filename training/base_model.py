"""Finding and loading the frozen base model for training: from a flag or the environment, on the device of this process."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator

from cats.cli.progress import heartbeat
from cats.earlyexit import EarlyExitLlamaForCausalLM
from cats.errors import CatsError

MODEL_VARIABLE = "CATS_BASE_MODEL"


def model_path_of(flag: str | None) -> Path:
    """The base checkpoint directory: the flag, else the environment variable CATS_BASE_MODEL, else `CatsError`."""
    given = flag or os.environ.get(MODEL_VARIABLE)
    if not given:
        raise CatsError(f"no base model is named; give --model-path or set the environment variable {MODEL_VARIABLE}.")
    return Path(given)


def base_device(accelerator: Accelerator, gpu_index: list[int] | None = None) -> torch.device:
    """The device of this process; `gpu_index` chooses among CUDA devices, one number per local process.

    Without CUDA only the number 0 is accepted (it is what the paper's command lines say), and the CPU is used.
    """
    if not gpu_index:
        return accelerator.device
    if accelerator.num_processes > 1 and len(gpu_index) <= accelerator.local_process_index:
        raise CatsError(f"--gpu_index names {len(gpu_index)} devices, too few for the processes of this machine; give one per process.")
    number = gpu_index[accelerator.local_process_index]
    visible = torch.cuda.device_count() if accelerator.device.type == "cuda" else 0
    if number >= max(1, visible) or number < 0:
        raise CatsError(f"--gpu_index {number} does not exist: {visible} CUDA devices are visible.")
    return torch.device("cuda", number) if visible else accelerator.device


def load_base(
    model_path: Path, dtype: str | None, device: torch.device, length: int, compute_dtype: str = "auto"
) -> EarlyExitLlamaForCausalLM:
    """The frozen base model; float32 on a CPU and as stored elsewhere, unless `dtype` says otherwise.

    Args:
        compute_dtype: of its arithmetic, see `EarlyExitLlamaForCausalLM.from_pretrained`.

    Rows longer than its context raise `CatsError`.
    """
    chosen = dtype or ("float32" if device.type == "cpu" else "auto")
    with heartbeat("load the base model"):
        base = EarlyExitLlamaForCausalLM.from_pretrained(model_path, dtype=chosen, device=device, compute_dtype=compute_dtype)
    if length > base.context:
        raise CatsError(f"--length {length} is more than the {base.context} positions of {model_path}.")
    return base
