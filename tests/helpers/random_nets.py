"""Random networks of random ops, and random ways to compress them, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from graphopt.config.pruning import MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from graphopt.config.quantization import ModuleQuantizerConfig, QuantizerConfig
from graphopt.specs import (
    PalettizationSpec,
    PerBlockGranularity,
    PerGroupedChannelGranularity,
    PruningSpec,
    QuantizationSpec,
)

__all__ = ["COMPRESSIONS", "TABLES", "RandomNet", "compression", "nets"]

_WIDTHS = (4, 8, 12)
_STEPS = (
    *("linear", "linear", "linear", "norm", "relu", "gelu", "silu", "sigmoid", "tanh", "softmax"),
    *("residual", "residual", "scale", "split", "pad", "transpose", "attention", "tied", "embed"),
    *("clamp", "where", "mean", "cat", "inplace", "matmul", "conv", "gru", "mul", "slice"),
    *("heads", "mha", "lstm", "rnn", "tied head", "image", "batchnorm", "depthwise", "upconv"),
    *("maxpool", "roll", "flip", "einsum", "relu_", "mask_", "row_", "rms", "cumsum", "shared"),
)
_FIRST = ("linear", "linear", "heads", "conv", "gru", "shared", "mha", "image")
_DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Step:
    """One op on the running value, by its kind and a number that settles the details."""

    kind: str
    number: int


@dataclass(frozen=True)
class Plan:
    """A network as data, so that a smaller one can be found.

    Attributes:
        width: Of the input's last axis.
        length: Of its middle axis.
        batch: Of its first one.
        steps: Ops in order.
        outputs: Number of outputs, of the last values.
        form: What holds them: a tensor or tuple, or a mapping.
        dtype: Of weights and input.
        seed: Of weights and input.
    """

    width: int
    length: int
    batch: int
    steps: tuple[Step, ...]
    outputs: int
    form: str
    dtype: torch.dtype
    seed: int


class RandomNet(nn.Module):
    """The network of a plan: values of three axes, (batch, length, width)."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(plan.seed)
        self.plan = plan
        self.layers = nn.ModuleList()
        width, self._tied = plan.width, {}
        for step in plan.steps:
            layer, width = self._layer(step, width)
            self.layers.append(layer)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.to(plan.dtype)

    def _layer(self, step: Step, width: int) -> tuple[nn.Module, int]:
        to = _WIDTHS[step.number % len(_WIDTHS)]
        match step.kind:
            case "linear":
                return nn.Linear(width, to, bias=step.number % 2 == 0), to
            case "tied":
                if (width, width) not in self._tied:
                    self._tied[width, width] = nn.Linear(width, width)
                return self._tied[width, width], width
            case "norm":
                return nn.LayerNorm(width), width
            case "residual":
                return nn.Linear(width, width), width
            case "attention":
                return nn.Linear(width, 3 * width), width
            case "embed":
                return nn.Embedding(7, width), width
            case "conv":
                return nn.Conv1d(width, to, 3, padding=1), to
            case "gru":
                return nn.GRU(width, to, batch_first=True), to
            case "matmul":
                return nn.ParameterList([torch.empty(width, to)]), to
            case "scale":
                return nn.ParameterList([torch.empty(width)]), width
            case "cat":
                return nn.Identity(), 2 * width if width <= 12 else width
            case "heads" | "shared":
                return nn.Linear(width, width, bias=False), width
            case "mha":
                return nn.MultiheadAttention(width, 2, batch_first=True), width
            case "lstm":
                both = step.number % 2 == 1
                layer = nn.LSTM(width, to, batch_first=True, bidirectional=both)
                return layer, to * (1 + both)
            case "rnn":
                return nn.RNN(width, to, batch_first=True), to
            case "tied head":
                return nn.Embedding(5, width), 5 if step.number % 2 else width
        return self._of_channels(step, width)

    def _of_channels(self, step: Step, width: int) -> tuple[nn.Module, int]:
        match step.kind:
            case "image":
                return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)), width
            case "batchnorm":
                return nn.BatchNorm1d(width), width
            case "depthwise":
                return nn.Conv1d(width, width, 3, padding=1, groups=width), width
            case "upconv":
                return nn.ConvTranspose1d(width, 4, 3, padding=1), 4
            case "einsum":
                return nn.ParameterList([torch.empty(width, width)]), width
            case "rms":
                return nn.ParameterList([torch.empty(width)]), width
        return nn.Identity(), width

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor | dict[str, Tensor]:
        """All steps, one after the other; the last values are the outputs."""
        values = [x]
        for step, layer in zip(self.plan.steps, self.layers, strict=True):
            values.append(_apply(step, layer, values[-1]))
        chosen = tuple(values[-self.plan.outputs :])
        if self.plan.form == "mapping":
            return {f"y{number}": value for number, value in enumerate(chosen)}
        return chosen if len(chosen) > 1 else chosen[0]


def _apply(step: Step, layer: Any, x: Tensor) -> Tensor:
    n = step.number
    match step.kind:
        case "linear" | "norm" | "tied":
            return layer(x)
        case "residual":
            return x + F.relu(layer(x))
        case "attention":
            q, k, v = layer(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)
        case "embed":
            return x + layer((x.sum(-1) > 0).long() * (n % 6))
        case "conv":
            return layer(x.transpose(1, 2)).transpose(1, 2)
        case "gru":
            return layer(x)[0]
        case "matmul":
            return x @ layer[0]
        case "scale":
            return x * layer[0]
        case "relu" | "gelu" | "silu" | "sigmoid" | "tanh":
            return getattr(torch if step.kind in ("sigmoid", "tanh") else F, step.kind)(x)
        case "softmax":
            return x.softmax(-1 if n % 2 else 1)
        case "split":
            first, second = x.chunk(2, -1)
            return torch.cat([second, first], -1)
        case "pad":
            return F.pad(x, (0, 0, 1, 0))[:, :-1]
        case "transpose":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case "clamp":
            return x.clamp(-1.5, 1.0 + n % 3)
        case "where":
            return torch.where(x > 0, x, x * 0.1)
        case "mean":
            return x - x.mean(-1, keepdim=True)
        case "cat":
            return torch.cat([x, -x], -1) if x.shape[-1] <= 12 else x
        case "inplace":
            y = x.clone()
            y[:, 0] = y[:, 0] * 2
            return y.add_(1.0)
        case "mul":
            return x * torch.sigmoid(x)
        case "slice":
            return torch.cat([x[:, 1:], x[:, :1]], 1)
    return _apply_more(step, layer, x)


def _apply_more(step: Step, layer: Any, x: Tensor) -> Tensor:
    n = step.number
    match step.kind:
        case "heads":
            q = layer(x).unflatten(-1, (2, -1)).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, q, q * 0.5, is_causal=n % 2 == 1)
            return x + y.transpose(1, 2).flatten(2)
        case "mha":
            return layer(x, x, x, need_weights=False)[0]
        case "lstm" | "rnn":
            return layer(x)[0]
        case "shared":
            return layer(F.silu(layer(x)))
        case "tied head":
            y = x + layer((x.mean(-1) > 0).long() * (n % 4))
            return F.linear(y, layer.weight) if n % 2 else y
        case "image":
            return layer(x.unsqueeze(1)).sum(1)
        case "batchnorm" | "depthwise" | "upconv":
            return layer(x.transpose(1, 2)).transpose(1, 2)
        case "maxpool":
            return F.max_pool1d(x, 3, stride=1, padding=1)
        case "roll":
            return x.roll(1, n % 2 + 1)
        case "flip":
            return x.flip(n % 2 + 1)
        case "einsum":
            return torch.einsum("bij,jk->bik", x, layer[0])
        case "relu_":
            return (x * 1.5).relu_()
        case "mask_":
            return x.clone().masked_fill_(x > 1, -1.0)
        case "row_":
            y = x.clone()
            y[:, -1:].mul_(0.5)
            return y
        case "rms":
            wide = x.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
            return wide.to(x.dtype) * layer[0]
        case "cumsum":
            return x.cumsum(1) * 0.5
    raise AssertionError(step.kind)


def nets(most: int = 6, dtypes: Sequence[torch.dtype] = _DTYPES) -> st.SearchStrategy[Plan]:
    """Plans of up to `most` steps, at least one with a weight."""
    step = st.builds(Step, st.sampled_from(_STEPS), st.integers(0, 5))
    first = st.builds(Step, st.sampled_from(_FIRST), st.integers(0, 5))
    steps = st.builds(lambda one, rest: (one, *rest), first, st.lists(step, max_size=most - 1))
    return st.builds(
        Plan,
        width=st.sampled_from([4, 8]),
        length=st.integers(2, 4),
        batch=st.integers(1, 3),
        steps=steps,
        outputs=st.integers(1, 3),
        form=st.sampled_from(["tuple", "mapping"]),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 2**16),
    )


TABLES = ("tables", "grouped tables", "vector tables", "scaled tables", "int8 tables")
COMPRESSIONS = (*TABLES, "w8a8", "int4 blocks", "pruning", "joint")
_GROUPS = PerGroupedChannelGranularity(group_size=2)
_PALETTES = {
    "tables": PalettizationSpec(n_bits=4),
    "grouped tables": PalettizationSpec(n_bits=2, granularity=_GROUPS),
    "vector tables": PalettizationSpec(n_bits=2, cluster_dim=2),
    "scaled tables": PalettizationSpec(n_bits=3, enable_per_channel_scale=True),
    "int8 tables": PalettizationSpec(n_bits=4, lut_qspec=QuantizationSpec(dtype="int8")),
    "joint": PalettizationSpec(n_bits=4),
}


def compression(kind: str) -> JointConfig:
    """What becomes of a network."""
    palettes = pruning = integers = None
    if kind in _PALETTES:
        inside = ModuleKMeansPalettizerConfig(op_state_spec={"weight": _PALETTES[kind]})
        palettes = KMeansPalettizerConfig(global_config=inside)
    if kind in ("pruning", "joint"):
        zeros = ModuleMagnitudePrunerConfig(
            op_state_spec={"weight": PruningSpec(target_sparsity=0.5)}
        )
        pruning = MagnitudePrunerConfig(global_config=zeros)
    if kind in ("w8a8", "joint"):
        integers = QuantizerConfig()
    if kind == "int4 blocks":
        blocks = QuantizationSpec(dtype="int4", granularity=PerBlockGranularity(block_size=2))
        only = ModuleQuantizerConfig(
            op_state_spec={"weight": blocks}, op_input_spec=None, op_output_spec=None
        )
        integers = QuantizerConfig(global_config=only)
    return JointConfig(pruning=pruning, palettization=palettes, quantization=integers)
