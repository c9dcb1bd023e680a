"""torchao's quantization specs and observers in terms of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantizer import FixedQParamsQuantizationSpec
from torchao.quantization.pt2e.quantizer import QuantizationSpec as TorchaoSpec
from typing_extensions import override

from graphopt.errors import ConfigError
from graphopt.observers import Observer, State
from graphopt.specs import (
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationScheme,
    QuantizationSpec,
)

__all__ = ["TorchaoObserver", "activation_spec", "weight_spec"]

_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_CONTAINERS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


@dataclass(frozen=True)
class TorchaoObserver(Observer):
    """An observer or fake quantizer of torchao as one of ours: its buffers are the state.

    Subclasses, one per spec, set `make`.
    """

    name: ClassVar[str] = "torchao"
    order_matters: ClassVar[bool] = True
    make: ClassVar[Callable[[], Any]]

    @override
    def init(self, groups: int) -> State:
        if groups != 1:
            raise ConfigError("activations that a torchao quantizer annotates have one scale each")
        state = {_key(name): value.clone() for name, value in type(self).make().named_buffers()}
        return {**state, "graphopt_seen": torch.zeros((), dtype=torch.bool)}

    @override
    def update(self, state: State, values: Tensor) -> State:
        if values.numel() == 0:
            return state
        observer = self._with(state)
        observer(values.reshape(-1).to(torch.float32))
        fresh = {_key(name): value.detach().clone() for name, value in observer.named_buffers()}
        return {**fresh, "graphopt_seen": torch.ones((), dtype=torch.bool)}

    @override
    def range(self, state: State, spec: QuantizationSpec) -> tuple[Tensor, Tensor]:
        if not bool(state["graphopt_seen"]):
            nothing = torch.full((1,), torch.nan)
            return nothing, nothing
        observer = self._with(state)
        scale, zero = (value.reshape(1) for value in observer.calculate_qparams())
        low, high = observer.quant_min, observer.quant_max
        step, point = scale.to(torch.float64), zero.to(torch.float64)
        ends = ((low - point) * step, (high - point) * step)
        return ends[0].to(torch.float32), ends[1].to(torch.float32)

    def _with(self, state: State) -> Any:
        observer = type(self).make()
        for name, _ in list(observer.named_buffers()):
            path, _, last = name.rpartition(".")
            holder: nn.Module = observer.get_submodule(path)
            holder._buffers[last] = state[_key(name)].clone()
        return observer


def _key(name: str) -> str:
    return name.replace(".", "__")


def _maker(spec: Any) -> Callable[[], Any]:
    constructor = spec.observer_or_fake_quant_ctr
    options = {
        "dtype": spec.dtype,
        "quant_min": spec.quant_min,
        "quant_max": spec.quant_max,
        "qscheme": spec.qscheme,
        "is_dynamic": spec.is_dynamic,
    }
    return lambda: constructor.with_args(**options)()


def _kind(spec: Any, where: str) -> tuple[torch.dtype, QuantizationScheme]:
    """Element type and scheme of a torchao spec."""
    if spec.dtype not in _CONTAINERS:
        raise ConfigError(f"{where}: {spec.dtype} is not taken over from torchao; exclude the op")
    full = _CONTAINERS[spec.dtype]
    low = full[0] if spec.quant_min is None else int(spec.quant_min)
    high = full[1] if spec.quant_max is None else int(spec.quant_max)
    symmetric = spec.qscheme in _SYMMETRIC
    scheme = QuantizationScheme.SYMMETRIC if symmetric else QuantizationScheme.ASYMMETRIC
    for bits in (2, 3, 4, 6, 8):
        half, whole = 2 ** (bits - 1), 2**bits
        signed = getattr(torch, f"int{bits}", None)
        unsigned = getattr(torch, f"uint{bits}", None)
        if (low, high) == (-half, half - 1) and signed is not None:
            return signed, scheme
        if (low, high) == (-half + 1, half - 1) and signed is not None and symmetric:
            return signed, QuantizationScheme.SYMMETRIC_WITH_CLIPPING
        if (low, high) == (0, whole - 1) and unsigned is not None:
            return unsigned, scheme
    raise ConfigError(
        f"{where}: quant_min={low}, quant_max={high} is the range of no element type here"
    )


def activation_spec(spec: Any, where: str) -> QuantizationSpec:
    """Our spec of an activation whose ranges torchao's own observer finds.

    Raises:
        ConfigError: The spec has no counterpart: several scales, a type, a clipped range at run time.
    """
    if isinstance(spec, FixedQParamsQuantizationSpec):
        dtype, scheme = _kind(spec, where)
        low, high = _CONTAINERS[spec.dtype]
        low = low if spec.quant_min is None else spec.quant_min
        high = high if spec.quant_max is None else spec.quant_max
        ends = ((low - spec.zero_point) * spec.scale, (high - spec.zero_point) * spec.scale)
        return QuantizationSpec(dtype=dtype, qscheme=scheme, float_range=ends)
    if not isinstance(spec, TorchaoSpec):
        raise ConfigError(f"{where}: {type(spec).__name__} is not taken over from torchao")
    if spec.ch_axis is not None and spec.qscheme in (
        torch.per_channel_symmetric,
        torch.per_channel_affine,
    ):
        raise ConfigError(f"{where}: activations with one scale per channel")
    dtype, scheme = _kind(spec, where)
    if spec.is_dynamic:
        return QuantizationSpec(dtype=dtype, qscheme=scheme, qparam_calculator_cls="dynamic")
    observer = type("TorchaoObserver", (TorchaoObserver,), {"make": staticmethod(_maker(spec))})
    return QuantizationSpec(dtype=dtype, qscheme=scheme, qparam_calculator_cls=observer)


def weight_spec(spec: Any, where: str) -> QuantizationSpec:
    """Our spec of a weight; its range is the weight's own minimum and maximum.

    Raises:
        ConfigError: The spec has no counterpart.
    """
    if not isinstance(spec, TorchaoSpec):
        raise ConfigError(f"{where}: {type(spec).__name__} of a weight is not taken over")
    dtype, scheme = _kind(spec, where)
    granularity: Any = PerTensorGranularity()
    if spec.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine):
        granularity = PerChannelGranularity(axis=0 if spec.ch_axis is None else spec.ch_axis)
    return QuantizationSpec(dtype=dtype, qscheme=scheme, granularity=granularity)
