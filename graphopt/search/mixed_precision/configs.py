"""A choice of candidates as the config that the compressors take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.quantization import OpQuantizerConfig, QuantizerConfig
from graphopt.schemes.palettize import Palettization
from graphopt.schemes.quantize import Quantization
from graphopt.schemes.registry import scheme_of
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.specs import QuantizationSpec

__all__ = ["config_for", "joint_config_for"]

AnyConfig = KMeansPalettizerConfig | QuantizerConfig | JointConfig


def config_for(choice: Mapping[str, Candidate], nodes: Mapping[str, Sequence[str]]) -> AnyConfig:
    """The config that gives each weight its candidate and leaves everything else alone.

    Args:
        choice: Name of the weight → its candidate.
        nodes: Name of the weight → ops that read it, for candidates with activations.

    Returns:
        A palettization config, a quantization config, or both where the choice has both kinds.

    Raises:
        ConfigError: A candidate is of a scheme that no config asks for.
    """
    joint = joint_config_for(choice, nodes)
    parts = [part for part in (joint.palettization, joint.quantization) if part is not None]
    return parts[0] if len(parts) == 1 else joint


def joint_config_for(
    choice: Mapping[str, Candidate],
    nodes: Mapping[str, Sequence[str]],
    activations: QuantizationSpec | None = None,
) -> JointConfig:
    """`config_for` in its joint form, with a spec of all activations if wanted.

    Args:
        choice: Name of the weight → its candidate.
        nodes: Name of the weight → ops that read it, for candidates with activations.
        activations: What becomes of every activation; None leaves those in float that no candidate
            has a spec for.

    Raises:
        ConfigError: A candidate is of a scheme that no config asks for.
    """
    parts: dict[str, Any] = {}
    schemes = {
        name: scheme_of(candidate.weight)
        for name, candidate in choice.items()
        if candidate.weight is not None
    }
    for scheme in dict.fromkeys(schemes.values()):
        specs = {name: choice[name].weight for name, own in schemes.items() if own is scheme}
        parts[scheme.part] = scheme.config_of(specs)
    slots = {
        re.escape(node): OpQuantizerConfig(
            op_state_spec=None, op_input_spec={0: candidate.activation}, op_output_spec=None
        )
        for name, candidate in choice.items()
        if candidate.activation is not None
        for node in nodes[name]
    }
    if slots or activations is not None:
        quantization = parts.setdefault(Quantization.part, Quantization().config_of({}))
        whole = quantization.global_config
        whole.op_name_config = slots
        if activations is not None:
            whole.op_input_spec = whole.op_output_spec = {"*": activations}
    if not parts:
        parts[Palettization.part] = Palettization().config_of({})
    return JointConfig(**parts)
