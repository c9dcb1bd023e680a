"""What ExecuTorch cannot hold."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.backends.capabilities import Capabilities, quantization_refusals
from graphopt.backends.executorch.kernels import MAX_NDIM
from graphopt.ir import op_info
from graphopt.ir.program import Program

__all__ = ["refusals"]


def refusals(program: Program, allowed: Capabilities) -> list[str]:
    """Why a program cannot be held, one line per reason.

    Args:
        program: In our vocabulary.
        allowed: What ExecuTorch can hold.
    """
    gm = program.graph_module
    reasons = quantization_refusals(gm, allowed)
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        name = str(node.target)
        if "dequantize_per" in name and value.dtype != torch.float32:
            kind = str(value.dtype).removeprefix("torch.")
            reasons.append(f"{node.name}: integers beside {kind}; quantize a float32 model")
        info = op_info.info_of(node)
        places = None if info is None else info.convolution
        if places is not None and places.ndim > MAX_NDIM:
            reasons.append(f"{node.name}: there are no kernels of 3-D convolutions")
    return reasons
