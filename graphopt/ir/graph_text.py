"""A graph as text: one line per node, stable enough to be compared line by line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.annotations import describe_annotations
from graphopt.ir.module_frames import module_frames

__all__ = ["graph_text", "op_name", "value_text"]

_SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "b8",
}


def graph_text(gm: fx.GraphModule) -> str:
    """The nodes of a graph with their types, modules and annotations.

    >>> print(graph_text(program.graph_module))
    %x : f32[1, 64] = placeholder
    %w : f32[128, 64] = get_attr[0.weight]
    %linear : f32[1, 128] = aten.linear.default(%x, %w)    # 0 (Linear)
    """
    return "\n".join(_line(node) for node in gm.graph.nodes) + "\n"


def _line(node: fx.Node) -> str:
    kind = value_text(node.meta.get("val"))
    if node.op == "output":
        return f"output {_argument(node.args[0])}"
    name = f"%{node.name}" + (f" : {kind}" if kind else "")
    if node.op == "placeholder":
        what = "placeholder"
    elif node.op == "get_attr":
        what = f"get_attr[{node.target}]"
    else:
        given = [_argument(value) for value in node.args]
        given += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
        called = node.target if node.op == "call_module" else op_name(node.target)
        what = f"{called}({', '.join(given)})"
    remarks = [_place(node), describe_annotations(node)]
    about = "; ".join(remark for remark in remarks if remark)
    return f"{name} = {what}" + (f"    # {about}" if about else "")


def op_name(target: Any) -> str:
    """An op's name without the package that its overload object names."""
    if isinstance(target, str):
        return target
    text = str(target)
    if text.startswith("<"):
        return str(getattr(target, "__name__", text))
    return text


def value_text(value: Any) -> str:
    """Type and shape of what a node gives, such as "f32[1, 64]"."""
    if isinstance(value, Tensor):
        dtype = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(value_text(item) for item in value)})"
    return "" if value is None else type(value).__name__


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        inner = ", ".join(_argument(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return op_name(value) if callable(value) else repr(value)


def _place(node: fx.Node) -> str:
    frames = [frame for frame in module_frames(node) if frame.name]
    if not frames:
        return ""
    return f"{frames[-1].name} ({frames[-1].type.rpartition('.')[2]})"
