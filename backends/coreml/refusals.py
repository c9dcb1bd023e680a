"""What Core ML cannot hold, in all and for older deployment targets."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.analysis.quantized import find_quantized_activations
from graphopt.analysis.stored_values import Lookup, find_lookups, find_sparse
from graphopt.backends.capabilities import (
    Capabilities,
    quantization_refusals,
)
from graphopt.ir.program import Program

__all__ = ["PACKED", "refusals"]

# what iOS16 and iOS17 take: one scalar table per tensor in a packed form
PACKED = Capabilities(
    index_bits=(1, 2, 4, 6, 8),
    padded_bits=(),
    grouped=False,
    vector=False,
    lut_dtypes=("float32", "float16"),
    channel_scale=False,
    sparse=False,
    weight_types=("int8", "uint8"),
    weight_blocks=False,
    minimum=False,
    activation_types=("int8", "uint8"),
    activation_channels=False,
)


def refusals(program: Program, allowed: Capabilities, where: str = "") -> list[str]:
    """Why a program cannot be held, one line per reason.

    Args:
        program: In our vocabulary.
        allowed: What can be held.
        where: The deployment target that it is about; "" for any that holds everything.
    """
    lookups = find_lookups(program.graph_module)
    reasons = [reason for lookup in lookups for reason in _reasons(lookup, allowed, where)]
    rounded = find_quantized_activations(program.graph_module)
    if where == "iOS16" and not all(activation.dynamic for activation in rounded):
        reasons.append("quantized activations for iOS16; raise minimum_deployment_target to iOS17")
    if not allowed.sparse:
        reasons += [
            f"{str(weight.node.args[1]).removesuffix('_mask')}: pruned weights for {where};"
            " raise minimum_deployment_target to iOS18"
            for weight in find_sparse(program.graph_module)
        ]
    return [*reasons, *quantization_refusals(program.graph_module, allowed)]


def _reasons(lookup: Lookup, allowed: Capabilities, where: str) -> Iterator[str]:
    suffix = f" for {where}; raise minimum_deployment_target to iOS18, or" if where else ";"
    if allowed.stored_bits(lookup.n_bits) is None:
        near = min(allowed.index_bits, key=lambda bits: (abs(bits - lookup.n_bits), bits))
        yield f"{lookup.name}: {lookup.n_bits}-bit indices{suffix} use {near} bits"
    if lookup.grouped and not allowed.grouped:
        yield f"{lookup.name}: several tables{suffix} use PerTensorGranularity()"
    if lookup.entries > 1 and not allowed.vector:
        yield f"{lookup.name}: cluster_dim={lookup.entries}{suffix} use cluster_dim=1"
    if lookup.lut_dtype not in allowed.lut_dtypes:
        yield (
            f"{lookup.name}: tables of {lookup.lut_dtype}{suffix} use one of {allowed.lut_dtypes}"
        )
    if lookup.channel_scale and not allowed.channel_scale:
        yield f"{lookup.name}: a per-channel scale{suffix} use enable_per_channel_scale=False"
    if lookup.outliers and not allowed.sparse:
        yield f"{lookup.name}: sparse outliers{suffix} use outlier_fraction=0"
