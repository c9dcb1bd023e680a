"""Layers: the weights that a search chooses for, their candidates and what those look like."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx, nn

from graphopt.analysis.matrix_form import WeightUse, weight_uses
from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.audited import pattern
from graphopt.backends import load_backend
from graphopt.capture import capture
from graphopt.compressors.joint import compress
from graphopt.config.selection import closest
from graphopt.errors import CompressionError, ConfigError, InputError, LoweringError
from graphopt.exclusive import exclusively
from graphopt.ir.program import Program
from graphopt.numerics.parallel import map_tasks
from graphopt.progress import track
from graphopt.schemes import registry
from graphopt.schemes.base import Statistics, StoredWeight
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.mixed_precision.configs import config_for
from graphopt.search.mixed_precision.sizes import SizeModel
from graphopt.specs.dtypes import bits_of

__all__ = [
    "Layer",
    "find_layers",
    "floats_of",
    "matches",
    "priced",
    "refusals_of",
    "refuse_unsupported",
    "rest_bits",
    "stored_forms",
    "weights_of",
]

_log = logging.getLogger(__name__)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Layer:
    """One weight that a search chooses for.

    Attributes:
        name: Dotted name of the tensor.
        module_type: Class of the module around its first use.
        nodes: Ops that read it.
        shape: Its shape.
        output_axis: Its output-channel axis.
        candidates: Names of its candidates.
        bits: Stored bits of each candidate.
        kept_bits: Stored bits when it stays uncompressed.
    """

    name: str
    module_type: str
    nodes: tuple[str, ...]
    shape: tuple[int, ...]
    output_axis: int
    candidates: tuple[str, ...]
    bits: tuple[int, ...]
    kept_bits: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def bits_of(self, candidate: str) -> int:
        """Stored bits of a candidate, those of the uncompressed weight where it is none."""
        if candidate in self.candidates:
            return self.bits[self.candidates.index(candidate)]
        return self.kept_bits


def weights_of(gm: fx.GraphModule, threshold: int = 0) -> list[WeightTensor]:
    """Weights that a search may choose for, in the order of their first use."""
    place = {node.name: number for number, node in enumerate(gm.graph.nodes)}
    weights = [
        weight
        for weight in find_weights(gm)
        if weight.uses
        and not weight.compressed
        and not weight.data_like
        and weight.uses[0].role == "weight"
        and weight.tensor.dtype in _FLOATS
        and weight.tensor.ndim >= 2
        and weight.tensor.numel() > threshold
    ]
    return sorted(weights, key=lambda weight: min(place[use.node] for use in weight.uses))


@exclusively
def find_layers(
    gm: fx.GraphModule,
    candidates: Sequence[Candidate],
    special: Mapping[str, Sequence[Candidate]],
    sizes: SizeModel,
    threshold: int = 0,
) -> tuple[list[Layer], dict[str, Candidate]]:
    """The layers of a graph and all candidates by name.

    Args:
        gm: The graph.
        candidates: Those of every layer that has none of its own.
        special: Regular expression on a tensor's name, its module's name or type → candidates; the
            last that matches counts.
        sizes: Prices.
        threshold: Weights of at most this many elements are left out.

    Raises:
        ConfigError: A pattern matches nothing, or a name stands for two specs.
        InputError: There is no weight to choose for.
    """
    known: dict[str, Candidate] = {}
    for candidate in (*candidates, *itertools.chain.from_iterable(special.values())):
        if known.setdefault(candidate.name, candidate) != candidate:
            raise ConfigError(f"two candidates are called {candidate.name!r}")
    matched: set[str] = set()
    layers, names = [], []
    nodes = {node.name: node for node in gm.graph.nodes}
    for weight in weights_of(gm, threshold):
        owner = weight.name.rpartition(".")[0]
        names += [weight.name, owner, weight.module_type]
        chosen = candidates
        for expression, group in special.items():
            if any(matches(expression, name) for name in names[-3:]):
                matched.add(expression)
                chosen = group
        layers.append(_layer(weight, chosen, sizes, nodes[weight.uses[0].node]))
    missing = [given for given in special if given not in matched]
    if missing:
        near = closest(missing[0], dict.fromkeys(names))
        raise ConfigError(
            f"layer_candidates[{missing[0]!r}] matches no layer"
            + (f"; closest: {', '.join(near)}" if near else "")
        )
    if not layers:
        raise InputError("the model has no weight to choose for")
    return layers, known


def matches(expression: str, name: str) -> bool:
    """Whether a regular expression fits a whole name.

    Raises:
        ConfigError: It is none.
    """
    return pattern(expression).fullmatch(name)


def _layer(
    weight: WeightTensor, candidates: Sequence[Candidate], sizes: SizeModel, reader: fx.Node
) -> Layer:
    shape = tuple(int(size) for size in weight.tensor.shape)
    kept = sizes.weight_bits(None, shape, weight.output_axis)
    names, bits = [], []
    for candidate in candidates:
        try:
            cost = _price(candidate, shape, weight.output_axis, sizes, reader)
        except CompressionError as error:
            _log.info("%s cannot be %s: %s", weight.name, candidate.name, error)
            continue
        names.append(candidate.name)
        bits.append(cost)
    if not names:
        raise ConfigError(f"{weight.name} {shape}: none of its candidates fits its shape")
    nodes = tuple(dict.fromkeys(use.node for use in weight.uses))
    return Layer(
        weight.name,
        weight.module_type,
        nodes,
        shape,
        weight.output_axis,
        tuple(names),
        tuple(bits),
        kept,
    )


def _price(
    candidate: Candidate, shape: Sequence[int], axis: int, sizes: SizeModel, reader: fx.Node
) -> int:
    rounded = candidate.activation is not None
    return sizes.weight_bits(candidate.weight, shape, axis, reader, rounded=rounded)


def priced(
    gm: fx.GraphModule,
    layers: Sequence[Layer],
    candidates: Mapping[str, Candidate],
    sizes: SizeModel,
) -> tuple[Layer, ...]:
    """Layers with other prices.

    Args:
        gm: Their graph.
        layers: With the same candidates.
        candidates: All candidates by name.
        sizes: Prices.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    found = []
    for layer in layers:
        reader = nodes[layer.nodes[0]]
        bits = tuple(
            _price(candidates[name], layer.shape, layer.output_axis, sizes, reader)
            for name in layer.candidates
        )
        kept = sizes.weight_bits(None, layer.shape, layer.output_axis)
        found.append(replace(layer, bits=bits, kept_bits=kept))
    return tuple(found)


def rest_bits(program: Program, layers: Sequence[Layer], sizes: SizeModel) -> int:
    """Stored bits of every tensor of a program that no candidate is for."""
    gm, chosen = program.graph_module, {layer.name for layer in layers}
    seen = {id(weight.tensor) for weight in weights_of(gm) if weight.name in chosen}
    total = 0
    for tensor in itertools.chain(gm.parameters(), gm.buffers()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        floats = tensor.is_floating_point()
        width = bits_of(sizes.float_dtype) if floats else 8 * tensor.element_size()
        total += tensor.numel() * width
    return total


def floats_of(program: Program) -> torch.dtype:
    """The float type that most weights of a program have."""
    counts: dict[torch.dtype, int] = {}
    for weight in weights_of(program.graph_module):
        kind = weight.tensor.dtype
        counts[kind] = counts.get(kind, 0) + weight.tensor.numel()
    return max(counts, key=lambda kind: counts[kind]) if counts else torch.float32


def refuse_unsupported(candidates: Sequence[Candidate], backend: str) -> None:
    """Raise where a target cannot hold a candidate.

    Raises:
        LoweringError: With all of them, and what would work.
    """
    refused = refusals_of(candidates, backend)
    reasons = [f"candidate {name!r}: {why}" for name, own in refused.items() for why in own]
    if reasons:
        name = load_backend(backend).name
        raise LoweringError(f"{name} cannot hold these candidates:\n" + "\n".join(reasons))


def refusals_of(candidates: Sequence[Candidate], backend: str) -> dict[str, list[str]]:
    """Why a target cannot hold a linear layer of 64 × 64 in the form of each candidate.

    Each is tried, so that the target's own refusal speaks.

    Returns:
        Name of the candidate → reasons, for those that it cannot hold.
    """
    target = load_backend(backend)
    probe = capture(nn.Sequential(nn.Linear(64, 64)), (torch.randn(4, 64),))
    (layer,) = weights_of(probe.graph_module)
    refused = {}
    for candidate in candidates:
        if candidate.is_kept:
            continue
        config = config_for({layer.name: candidate}, {layer.name: (layer.uses[0].node,)})
        program = compress(
            probe, None, config, calibration_data=[torch.randn(4, 64)], correct_statistics=False
        )
        reasons = target.unsupported(program)
        if reasons:
            refused[candidate.name] = reasons
    return refused


def stored_forms(
    gm: fx.GraphModule,
    layers: Sequence[Layer],
    candidates: Mapping[str, Candidate],
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, dict[str, StoredWeight | None]]:
    """Every layer in the form of every candidate; those that differ in bits alone share one run.

    Returns:
        Layer → candidate → stored form, None where the weight stays as it is.

    Raises:
        CompressionError: A weight contains NaN or Inf; the message names it.
    """
    tensors = {weight.name: weight.tensor.detach() for weight in weights_of(gm)}
    work = partial(_forms, tensors, candidates, seed)
    order = sorted(layers, key=lambda layer: -layer.numel)
    pairs = track(map_tasks(work, order), "compressing", len(order), enabled=progress)
    done = dict(pairs)
    return {layer.name: done[layer.name] for layer in layers}


def _forms(
    tensors: Mapping[str, Tensor], candidates: Mapping[str, Candidate], seed: int, layer: Layer
) -> tuple[str, dict[str, StoredWeight | None]]:
    weight = tensors[layer.name]
    specs = {name: candidates[name].weight for name in layer.candidates}
    forms: dict[str, StoredWeight | None] = dict.fromkeys(specs)
    known = Statistics(layer.output_axis, seed=seed)
    try:
        for scheme in registry.SCHEMES:
            own = {name: spec for name, spec in specs.items() if isinstance(spec, scheme.spec_type)}
            forms |= scheme.make_all(weight, own, known)
    except CompressionError as error:
        raise CompressionError(f"{layer.name}: {error}; repair the model") from None
    return layer.name, forms


def uses_of(gm: fx.GraphModule, names: Sequence[str]) -> dict[str, WeightUse]:
    """Name of the weight → its use in a known form, where exactly one op reads it."""
    wanted = set(names)
    weights = [weight for weight in weights_of(gm) if weight.name in wanted]
    return {name: uses[0] for name, uses in weight_uses(gm, weights).items() if len(uses) == 1}
