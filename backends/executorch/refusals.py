"""What ExecuTorch cannot hold."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt.backends.capabilities import Capabilities, quantization_refusals
from graphopt.ir.module_frames import module_frames
from graphopt.ir.op_info import info_of
from graphopt.ir.program import Program

__all__ = ["refusals"]

_MAKE_COMPLEX = ("aten.complex.", "aten.polar.", "aten.view_as_complex.")


def refusals(program: Program, allowed: Capabilities) -> list[str]:
    """Why a program cannot be held, one line per reason.

    Args:
        program: In our vocabulary.
        allowed: What ExecuTorch can hold.
    """
    gm = program.graph_module
    reasons = quantization_refusals(gm, allowed)
    halves: dict[str, str] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        if "dequantize_per" in str(node.target) and value.dtype != torch.float32:
            for reader in node.users:
                info = info_of(reader)
                if info is not None and info.check is not None:
                    continue
                frames = module_frames(reader)
                layer = frames[-1].name if frames and frames[-1].name else reader.name
                halves.setdefault(layer, str(value.dtype).removeprefix("torch."))
    reasons += [
        f"{layer}: 8-bit activations beside {kind}; XNNPACK computes with integers beside float32"
        " only: quantize a float32 model, as `model.float()` is, without torch.autocast inside"
        for layer, kind in halves.items()
    ]
    return reasons + _made_complex(gm)


def _made_complex(gm: fx.GraphModule) -> list[str]:
    """Complex numbers made of real ones, other than by Fourier transforms."""
    return [
        f"{node.target}{_where(node)}: ExecuTorch has no kernel for it; compute with real and imaginary"
        " parts, as rotary embeddings do with cosines and sines"
        for node in gm.graph.nodes
        if str(node.target).startswith(_MAKE_COMPLEX) and node.op == "call_function"
    ]


def _where(node: fx.Node) -> str:
    frames = module_frames(node)
    return f" of {frames[-1].name}" if frames and frames[-1].name else ""
