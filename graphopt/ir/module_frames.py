"""The modules around a node, as torch.export remembers them."""

from __future__ import annotations

import re

from torch import fx

from graphopt.config.selection import ModuleFrame

__all__ = ["module_frames"]


def module_frames(node: fx.Node) -> tuple[ModuleFrame, ...]:
    """Modules around a node, outermost first; repeated calls of one module count as one."""
    stack = node.meta.get("nn_module_stack") or {}
    frames = []
    for name, kind in stack.values():
        text = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        frames.append(ModuleFrame(re.sub(r"@\d+", "", str(name)), text))
    return tuple(frame for frame in frames if not frame.name.startswith("_empty_nn_module"))
