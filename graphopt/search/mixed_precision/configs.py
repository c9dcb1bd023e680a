"""A choice of candidates as the config that the compressors take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from graphopt.config.quantization import ModuleQuantizerConfig, OpQuantizerConfig, QuantizerConfig
from graphopt.errors import ConfigError
from graphopt.schemes.registry import scheme_of
from graphopt.search.mixed_precision.candidates import Candidate

__all__ = ["config_for"]

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
    kinds: dict[str, dict[str, Any]] = {"palettize": {}, "quantize": {}}
    for name, candidate in choice.items():
        if candidate.weight is not None:
            kind = scheme_of(candidate.weight).kind
            if kind not in kinds:
                raise ConfigError(f"{name}: no config asks for {kind!r}; use one of {list(kinds)}")
            kinds[kind][name] = candidate.weight
    tables, integers = kinds["palettize"], kinds["quantize"]
    ops: dict[str, Any] = {}
    for name, candidate in choice.items():
        if candidate.activation is not None:
            inputs = {0: candidate.activation}
            slots = OpQuantizerConfig(op_state_spec=None, op_input_spec=inputs, op_output_spec=None)
            ops |= {re.escape(node): slots for node in nodes[name]}
    palettization = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec=None, module_state_spec=tables)
    )
    if not integers and not ops:
        return palettization
    quantization = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_state_spec=None,
            op_input_spec=None,
            op_output_spec=None,
            module_state_spec=integers,
            op_name_config=ops,
        )
    )
    if not tables:
        return quantization
    return JointConfig(palettization=palettization, quantization=quantization)
