"""The compiled pass: layers, products and norms in float32 on a CPU, at the speed of memory, bit for bit the same for every row whatever
stands beside it. Optional: without numba, or on a processor that it has no vectors for, all runs on torch.
"""

import functools
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

if TYPE_CHECKING:
    from cats.kernels.layers import CompiledLayers
    from cats.runtime.store import Store

SWITCH = "CATS_KERNELS"
"""Environment variable that switches them off, by "off"."""


@functools.cache
def why_not() -> str | None:
    """Why nothing is compiled here, in a few words; None where it is. The first call imports, and compiles what no cache holds."""
    if os.environ.get(SWITCH, "on") == "off":
        return f"{SWITCH} is off"
    try:
        from numba.core.errors import NumbaError
    except ImportError:
        return "numba is not installed"
    try:
        from cats.kernels import code

        if not code.LANES:
            return "this processor has no vector instructions that the compiled pass knows"
        from cats.kernels.layers import warm_up

        warm_up()
    except (NumbaError, RuntimeError, OSError) as error:  # a compilation that fails, or no directory that the cache may be written to
        return f"compiling failed: {str(error).splitlines()[0]}"
    return None


def compiled_layers(
    layers: Iterable[nn.Module],
    config: PretrainedConfig,
    dtype: torch.dtype,
    beside: "CompiledLayers | None" = None,
    source: "Store | None" = None,
) -> "CompiledLayers | None":
    """The compiled form of decoder layers, or None where they are not covered.

    Args:
        dtype: of the arithmetic.
        beside: other layers of the model, whose work space these use too.
        source: where weights that are not resident come from.
    """
    if why_not() is not None:
        return None
    from cats.kernels.layers import CompiledLayers, Room, covers

    chosen = list(layers)
    if not covers(chosen, config, dtype):
        return None
    return CompiledLayers(chosen, config, Room() if beside is None else beside.room, source)


def compiled_norm(norm: nn.Module) -> LlamaRMSNorm:
    """The compiled form of an RMS norm in float32 on a CPU."""
    from cats.kernels.layers import Norm

    return Norm(norm)


def multiply(dtype: torch.dtype) -> bool:
    """Whether `product` is for arithmetic on a CPU in this dtype."""
    return dtype == torch.float32 and why_not() is None


def product(x: torch.Tensor, weight_RK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` [.., R] of float32 x [.., K], the weight in any float dtype that float32 holds."""
    from cats.kernels.layers import KINDS
    from cats.kernels.layers import product as compiled

    return compiled(x, (weight_RK if weight_RK.dtype in KINDS else weight_RK.float()).contiguous(), bias)


def leading() -> AbstractContextManager[None]:
    """See `cats.kernels.team.leading`."""
    from cats.kernels.team import leading as led

    return led()
