"""A pretended accelerator, "pretended": its tensors lie apart from those of the CPU, which computes for it.

Ops refuse tensors of both, as on a real one, and what gets float64 is refused as by Apple's GPUs where
PRETEND_NO_DOUBLE is set. It registers a backend with torch for good: for processes of its own
(`pytest -p helpers.pretended_device`).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

CALLS: list[str] = []  # ops that it has run
NO_DOUBLE = "PRETEND_NO_DOUBLE" in os.environ
# which move values between devices
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._copy_from.default)


class _Module(_DummyBackendModule):
    """What torch asks a backend's module for."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        pass


class _There(Tensor):
    """A tensor of the device; `raw` holds its values."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> _There:
        return Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device="pretended:0",
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        return f"_There({self.raw})"

    @property
    def data(self) -> Tensor:
        """The same values without gradients, for tensors of the same sizes to be set."""
        return _There(self.raw.detach())

    @data.setter
    def data(self, values: Tensor) -> None:
        assert isinstance(values, _There)
        assert values.shape == self.shape
        self.raw = values.raw

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


def _here(value: Any) -> Any:
    if isinstance(value, _There):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _there(value: Any) -> Any:
    return _There(value) if isinstance(value, Tensor) and not isinstance(value, _There) else value


def _run(op: Any, args: Any, kwargs: Any) -> Any:
    CALLS.append(str(op))
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if op not in _COPIES and any(isinstance(x, _There) for x in tensors):
        for x in tensors:
            if not isinstance(x, _There) and x.ndim:
                raise RuntimeError(f"{op}: tensors on cpu and on pretended")
    made = op(*pytree.tree_map(_here, args), **pytree.tree_map(_here, kwargs))
    schema = op._schema
    written = [
        given
        for given, argument in zip(args, schema.arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    written += [
        kwargs[argument.name]
        for argument in schema.arguments
        if argument.kwarg_only and argument.alias_info is not None and argument.name in kwargs
    ]
    if written:
        return written[0] if len(schema.returns) == 1 else tuple(written)
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
        return made
    made = pytree.tree_map(_there, made)
    for x in pytree.tree_leaves(made):
        if NO_DOUBLE and isinstance(x, _There) and x.dtype is torch.float64:
            raise TypeError(f"{op}: pretended has no float64")
    return made


_setup_privateuseone_for_python_backend("pretended", _Module())
_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
