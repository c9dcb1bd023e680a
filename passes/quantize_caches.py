"""QuantizeCaches: what a graph writes into key-value caches is kept in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.errors import ConfigError
from graphopt.ir import op_info
from graphopt.ir.editor import Editor
from graphopt.ir.state import state_nodes
from graphopt.passes.pass_base import Pass

__all__ = ["QuantizeCaches"]

_aten = torch.ops.aten
_LEVELS = 127
_LEAST = 1e-12  # scale of a row of zeros
# op that updates a cache → position of what it writes
_UPDATES = {"index_copy": 3, "index_put": 2}


@dataclass(frozen=True)
class QuantizeCaches(Pass):
    """Keep caches as int8 with a scale per token and head: a row of the last axis has one.

    Only what is written is rounded; rows that stay are moved as they are. A row's scale is that of its
    largest value, so that no data are needed.

    Before:
        %keys = get_attr[keys]                                # float32[1, H, L, D]
        %new = index_copy(%keys, 2, %position, %k)
        %y = scaled_dot_product_attention(%q, %new, …)
        %copy = copy_(%keys, %new)

    After:
        %keys = get_attr[keys]                                # int8[1, H, L, D]
        %scales = get_attr[keys_scale]                        # float32[1, H, L, 1]
        %s = div(amax(abs(%k), -1), 127)
        %new = index_copy(%keys, 2, %position, round(div(%k, %s)))
        %new_s = index_copy(%scales, 2, %position, %s)
        %y = scaled_dot_product_attention(%q, mul(%new, %new_s), …)
        %copy = copy_(%keys, %new)
        %copy_1 = copy_(%scales, %new_s)

    Attributes:
        ops: Ops that update caches, "index_copy" and "index_put".

    Examples:
        >>> class Cache(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("keys", torch.zeros(1, 2, 8, 16))
        ...
        ...     def forward(self, k, position):
        ...         self.keys.index_copy_(2, position, k)
        ...         return self.keys * 2
        >>> inputs = torch.randn(1, 2, 1, 16), torch.tensor([3])
        >>> gm = graphopt.capture(Cache(), inputs).graph_module
        >>> QuantizeCaches(("index_copy",))(gm).modified
        True
        >>> {name: buffer.dtype for name, buffer in gm.named_buffers()}
        {'keys': torch.int8, 'keys_scale': torch.float32}
    """

    name: ClassVar[str] = "quantize-caches"
    tolerance: ClassVar[float | None] = None
    ops: tuple[str, ...] = ()

    @override
    def run(self, edit: Editor) -> None:
        unknown = sorted(set(self.ops) - set(_UPDATES))
        if unknown:
            raise ConfigError(
                f"kv_cache_quant_configs: {unknown} update no cache that can be quantized; use one of"
                f" {sorted(_UPDATES)}"
            )
        found: set[str] = set()
        for node, writer in list(state_nodes(edit.gm).items()):
            update = writer.args[1] if len(writer.args) > 1 else None
            if node.op != "get_attr" or not isinstance(update, fx.Node):
                continue
            kind = next((name for name in op_info.op_names(update) if name in self.ops), None)
            if kind is None or not _is_cache(edit.value(node), node, update, kind):
                continue
            found.add(kind)
            _quantize(edit, node, writer, update, _UPDATES[kind])
        missing = sorted(set(self.ops) - found)
        if missing:
            raise ConfigError(
                f"kv_cache_quant_configs: no cache is updated by {missing}; the program's state is"
                f" {[str(n.target) for n in state_nodes(edit.gm)]}"
            )


def _is_cache(value: Tensor, node: fx.Node, update: fx.Node, kind: str) -> bool:
    """Whether a buffer of floats is written in whole rows of its last axis."""
    if not value.is_floating_point() or update.args[0] is not node:
        return False
    if value.dim() < 2 or value.shape[-1] == 1:  # a scale of its own would be as large
        return False
    if kind == "index_copy":
        axis: Any = update.args[1]
        return bool(int(axis) % value.dim() != value.dim() - 1)
    indices: Any = update.args[1]
    return len(indices) < value.dim() or indices[-1] is None


def _quantize(edit: Editor, node: fx.Node, writer: fx.Node, update: fx.Node, place: int) -> None:
    name, initial = str(node.target), edit.value(node).detach()
    scale = (initial.abs().amax(-1, keepdim=True) / _LEVELS).clamp_min(_LEAST)
    codes = (initial / scale).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    scales = edit.constant(f"{name}_scale", scale.float(), like=node)
    edit.set_value(node, codes)
    node.meta["val"] = edit.fake(codes)
    call = _calls(edit, update)
    first = next(user for user in node.graph.nodes if node in user.all_input_nodes)
    others = [user for user in node.users if user not in (update, writer)]
    if others:
        old = set(node.users)
        read = _dequantized(_calls(edit, first), node, scales, initial.dtype)
        edit.redirect(node, read, lambda user: user in (update, writer) or user not in old)
    given = update.args[place]
    assert isinstance(given, fx.Node)
    peak = call(_aten.amax.default, call(_aten.abs.default, given), [-1], True)
    step = call(_aten.clamp_min.default, call(_aten.div.Tensor, peak, float(_LEVELS)), _LEAST)
    ratio = call(_aten.round.default, call(_aten.div.Tensor, given, step))
    bounded = call(_aten.clamp.default, ratio, -_LEVELS, _LEVELS)
    target: Any = update.target
    new = call(
        target,
        *_with(update.args, place, node, call(_aten._to_copy.default, bounded, dtype=torch.int8)),
    )
    wide = call(_aten._to_copy.default, step, dtype=torch.float32)
    new_scales = call(target, *_with(update.args, place, scales, wide))
    value = _dequantized(call, new, new_scales, initial.dtype)
    made = {new, new_scales, value}
    edit.redirect(update, value, lambda user: user is writer or user in made)
    edit.set_args(writer, (node, new))
    edit.call(_aten.copy_.default, scales, new_scales, like=writer)
    if not update.users:
        edit.erase(update)


def _calls(edit: Editor, like: fx.Node) -> Callable[..., fx.Node]:
    return lambda op, *args, **kwargs: edit.call(op, *args, like=like, **kwargs)


def _dequantized(
    call: Callable[..., fx.Node], codes: fx.Node, scales: fx.Node, dtype: torch.dtype
) -> fx.Node:
    wide = call(_aten._to_copy.default, codes, dtype=torch.float32)
    value = call(_aten.mul.Tensor, wide, scales)
    return value if dtype is torch.float32 else call(_aten._to_copy.default, value, dtype=dtype)


def _with(args: tuple[Any, ...], place: int, cache: fx.Node, written: fx.Node) -> list[Any]:
    changed = list(args)
    changed[0], changed[place] = cache, written
    return changed
