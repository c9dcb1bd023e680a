"""Graphs without what torch does to each of them for nobody.

It writes and compiles the code of a graph module whenever one is made, copied or changed, a dozen times while it
exports a model and hundreds of times while ExecuTorch lowers one; hardly any of it ever runs. And each time that it
makes a node of another one it copies all that is known of where that one came from.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import fx
from torch.fx import traceback

from graphopt.exclusive import patched

__all__ = ["compile_now", "compile_when_called", "quick_graphs"]

_compile = fx.GraphModule.recompile
_compiling = threading.RLock()
_WRITTEN = ("_code", "_lineno_map", "_prologue_start")


class _Late:
    """`forward` of a graph module's class, or what else its code gives, until somebody wants it."""

    def __init__(self, module: fx.GraphModule, name: str) -> None:
        # each graph module has a class of its own
        self._module, self._name = weakref.ref(module), name

    def __get__(self, instance: Any, owner: Any) -> Any:
        module = self._module()
        if module is None:
            raise AttributeError("the module of this class is gone")
        compile_now(module)
        return getattr(owner if instance is None else instance, self._name)


class _LateCode:
    """What `recompile` returns."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(_compile(self._module), name)


def _compiled_and_reduced(module: fx.GraphModule) -> Any:
    """`__reduce__`, which reads the code before it has it written."""
    compile_now(module)
    return super(type(module), module).__reduce__()


def compile_when_called(module: fx.GraphModule) -> None:
    """Let the graph of a module become code at its first use."""
    codegen = module.graph._codegen
    if hasattr(codegen, "pytree_info"):
        module._in_spec = codegen.pytree_info.in_spec
        module._out_spec = codegen.pytree_info.out_spec
    cls: Any = type(module)
    for name in _WRITTEN:
        module.__dict__.pop(name, None)
        setattr(cls, name, _Late(module, name))
    cls.forward = _Late(module, "forward")


def compile_now(module: fx.GraphModule) -> None:
    """Turn the graph of a module into code, unless it is up to date."""
    with _compiling:
        if isinstance(inspect.getattr_static(type(module), "forward"), _Late):
            _compile(module)


@contextmanager
def quick_graphs() -> Iterator[None]:
    """Let graph modules that this thread makes or changes become code when called, and origins be shared.

    It patches torch for all threads, so it belongs inside `exclusive`.
    """
    own, compiled = threading.get_ident(), fx.GraphModule.recompile
    copier: Any = vars(traceback)["copy"]

    def recompile(module: fx.GraphModule) -> Any:
        if threading.get_ident() != own:
            return compiled(module)
        compile_when_called(module)
        cls: Any = type(module)
        cls.__reduce__ = _compiled_and_reduced
        return _LateCode(module)

    # nothing ever changes the origins of a node, which it has in a list of its own
    origins = SimpleNamespace(copy=copier.copy, deepcopy=list)
    with patched(fx.GraphModule, recompile=recompile), patched(traceback, copy=origins):
        yield
