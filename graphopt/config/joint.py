"""One config for pruning, palettization and quantization together."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, Self

from pydantic import model_validator

from graphopt.config.base import CompressionConfig, read_yaml
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.pruning import MagnitudePrunerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import ConfigError
from graphopt.specs.model import SpecModel

__all__ = ["JointConfig"]


class JointConfig(SpecModel):
    """What `compress` does to a model.

    A weight that palettization and quantization select is palettized; quantization then holds for
    activations and for the other weights. What is pruned comes first: the values that stay are
    palettized or quantized with one table or scale.

    Attributes:
        pruning: Weights that get zeros, or None.
        palettization: Weights that become tables, or None.
        quantization: Activations and weights that are quantized, or None.
    """

    pruning: MagnitudePrunerConfig | None = None
    palettization: KMeansPalettizerConfig | None = None
    quantization: QuantizerConfig | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.palettization is None and self.quantization is None and self.pruning is None:
            raise ValueError("nothing to do: give pruning, palettization or quantization")
        return self

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read a config from plain values, or from parts that are configs already.

        The keys are "pruning", "palettization" and "quantization" or the parts' own root keys; a mapping of one
        part alone will do.

        Raises:
            ConfigError: A key is unknown or a value is wrong.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{cls.__name__}: expected a mapping, got {type(data).__name__}")
        parts: dict[str, Any] = {}
        kinds: dict[str, type[CompressionConfig[Any]]] = {
            "pruning": MagnitudePrunerConfig,
            "palettization": KMeansPalettizerConfig,
            "quantization": QuantizerConfig,
        }
        for name, kind in kinds.items():
            for key in (name, kind.root_key):
                given = data.get(key)
                if given is not None:
                    parts[name] = given if isinstance(given, kind) else kind.from_dict(given)
        known = {*kinds, *(kind.root_key for kind in kinds.values())}
        unknown = sorted(map(str, set(data) - known))
        if unknown:
            raise ConfigError(f"{cls.__name__}: unknown keys {unknown}; known are {sorted(known)}")
        return cls(**parts)

    @classmethod
    def from_yaml(cls, source: str | Path | IO[Any]) -> Self:
        """Read a config from a YAML file or stream.

        Raises:
            ConfigError: The file is no YAML mapping, or see `from_dict`.
        """
        return cls.from_dict(read_yaml(source, cls.__name__))
