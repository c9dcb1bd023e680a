"""One config for pruning, palettization and quantization together."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from pydantic import model_validator

from graphopt.config.base import CompressionConfig, read_yaml
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.pruning import MagnitudePrunerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import ConfigError, InputError
from graphopt.specs.artifact import ArtifactSpec
from graphopt.specs.model import SpecModel

__all__ = ["JointConfig", "only_part"]

ConfigT = TypeVar("ConfigT", bound=CompressionConfig[Any])


class JointConfig(SpecModel):
    """What `compress` does to a model.

    A weight that palettization and quantization select is palettized; quantization then holds for
    activations and for the other weights. What is pruned comes first: the values that stay are
    palettized or quantized with one table or scale.

    Attributes:
        pruning: Weights that get zeros, or None.
        palettization: Weights that become tables, or None.
        quantization: Activations and weights that are quantized, or None.
        artifact: The file that it is for: the program is lowered with its options, and saved only
            if it has no more bytes; None for any file.

    Examples:
        >>> config = JointConfig.from_dict({"palettization": {}, "quantization": {}})
        >>> program = graphopt.compress(model, example, config, calibration_data=batches)
        >>> [row.status for row in program.report()]
        ['palettized', 'palettized']
    """

    pruning: MagnitudePrunerConfig | None = None
    palettization: KMeansPalettizerConfig | None = None
    quantization: QuantizerConfig | None = None
    artifact: ArtifactSpec | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.palettization is None and self.quantization is None and self.pruning is None:
            raise ValueError("nothing to do: give pruning, palettization or quantization")
        return self

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read a config from plain values, or from parts that are configs already.

        The keys are "pruning", "palettization" and "quantization" or the parts' own root keys, and
        "artifact"; a mapping of one part alone will do.

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
        given = data.get("artifact")
        if given is not None:
            parts["artifact"] = ArtifactSpec.model_validate(given)
        known = {*kinds, "artifact", *(kind.root_key for kind in kinds.values())}
        unknown = sorted(map(str, set(data) - known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], sorted(known), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"{cls.__name__}: unknown keys {unknown}; {hint}known are {sorted(known)}"
            )
        return cls(**parts)

    @classmethod
    def from_yaml(cls, source: str | Path | IO[Any]) -> Self:
        """Read a config from a YAML file or stream.

        Raises:
            ConfigError: The file is no YAML mapping, or see `from_dict`.
        """
        return cls.from_dict(read_yaml(source, cls.__name__))


def only_part(
    config: ConfigT | JointConfig | None, kind: type[ConfigT]
) -> tuple[ConfigT | None, ArtifactSpec | None]:
    """What a compressor of one kind takes of a config, and the file that it is for.

    Args:
        config: A config of this kind, or a joint one with no part of another; None for neither.
        kind: The compressor's own kind.

    Raises:
        InputError: A joint config asks for something else, too.
    """
    if not isinstance(config, JointConfig):
        return config, None
    parts = [
        part
        for part in (config.pruning, config.palettization, config.quantization)
        if part is not None
    ]
    if len(parts) != 1 or not isinstance(parts[0], kind):
        raise InputError(
            f"the config asks for {', '.join(type(part).__name__ for part in parts)}; this class takes"
            f" {kind.__name__} alone, `graphopt.compress` takes all"
        )
    return parts[0], config.artifact
