"""The neutral program that a module finalized for a target keeps beside its own graph."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from graphopt.ir.annotations import keep_neutral_graph, neutral_graph_of
from graphopt.ir.captured_module import CapturedModule, KeptGraph

__all__ = ["content_digest", "neutral_form", "with_neutral_form"]


def with_neutral_form(finalized: CapturedModule, neutral: CapturedModule) -> CapturedModule:
    """The finalized module, which keeps the graph that it was made from.

    Both are taken over and share the tensors that both hold. The kept graph goes along with copies
    of the module; it is neither exported nor saved.

    Args:
        finalized: In a target's ops.
        neutral: The same program in ours.
    """
    keep_neutral_graph(finalized, KeptGraph(neutral, content_digest(finalized)))
    return finalized


def neutral_form(gm: CapturedModule) -> CapturedModule | None:
    """The graph that a finalized module was made from; None where it is gone or no longer the same.

    Args:
        gm: Any module. One whose ops, tensors, types or device have changed since it was finalized
            has no neutral form.
    """
    kept = neutral_graph_of(gm)
    if kept is None or kept.digest != content_digest(gm):
        return None
    return kept.graph


def content_digest(gm: CapturedModule) -> str:
    """Hash of a module's ops and of the values, types and devices of its tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for node in gm.graph.nodes:
        digest.update(f"{node.op}|{node.name}|{node.target}|{node.args}|{node.kwargs}\n".encode())
    named = (
        *gm.named_parameters(remove_duplicate=False),
        *gm.named_buffers(remove_duplicate=False),
    )
    for name, tensor in named:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{tensor.device}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes | memoryview:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_quantized or tensor.device.type == "meta":
        return str(id(tensor)).encode()  # equal to itself alone
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
