"""Configs by name: `w4`, `w8a8` and their like, and one per family of models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.config.selection import closest
from graphopt.errors import ConfigError

__all__ = ["DEFAULT_PRESET", "preset", "preset_names", "preset_text"]

DEFAULT_PRESET = "w4"
_FAMILIES = Path(__file__).parents[1] / "presets"
_TABLES, _INTEGERS = KMeansPalettizerConfig.presets, QuantizerConfig.presets
_FORMS: dict[str, Callable[[], KMeansPalettizerConfig | QuantizerConfig]] = {
    "w4": _TABLES.w4,
    "w6": _TABLES.w6,
    "w8": _TABLES.w8,
    "w4_vectors": _TABLES.w4_vectors,
    "w3_vectors": _TABLES.w3_vectors,
    "w2_vectors": _TABLES.w2_vectors,
    "int8": _INTEGERS.w8,
    "int4": _INTEGERS.w4_per_block,
    "w8a8": _INTEGERS.w8a8,
    "w8a8_affine": _INTEGERS.w8a8_affine,
    "w4a8": _INTEGERS.w4a8,
    "fp8": _INTEGERS.fp8,
    "mxfp4": _INTEGERS.mxfp4,
}


def preset(name: str) -> JointConfig:
    """A config by its name.

    >>> preset("w4").palettization.global_config.op_state_spec["weight"].n_bits
    4

    Args:
        name: A form, such as "w4" or "w8a8", or a family, such as "cnn" or "bert".

    Raises:
        ConfigError: There is no such preset; with the closest.
    """
    if name in _FORMS:
        made = _FORMS[name]()
        if isinstance(made, QuantizerConfig):
            return JointConfig(quantization=made)
        return JointConfig(palettization=made)
    return JointConfig.from_yaml(_file(name))


def preset_names() -> dict[str, str]:
    """Name → what it does, in a sentence; forms first, then families."""
    names = {name: (make.__doc__ or "").strip() for name, make in _FORMS.items()}
    for path in sorted(_FAMILIES.glob("*.yaml")):
        names[path.stem] = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return names


def preset_text(name: str) -> str:
    """A preset as YAML, with the comments of a family's.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in _FORMS:
        return _file(name).read_text(encoding="utf-8")
    return yaml.safe_dump(_plain(name), sort_keys=False)


def _file(name: str) -> Path:
    path = _FAMILIES / f"{name}.yaml"
    names = list(preset_names())
    if name not in names:
        near = closest(name, names, limit=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"there is no preset {name!r}; {hint}there are {', '.join(names)}")
    return path


def _plain(name: str) -> dict[str, Any]:
    """What a form says, without what is so anyway but what kind and width it is."""
    made = _FORMS[name]()
    whole = made.model_dump(mode="json")
    return {made.root_key: _said(whole, made.model_dump(mode="json", exclude_defaults=True))}


def _said(whole: Any, short: Any) -> Any:
    if not isinstance(whole, dict) or not isinstance(short, dict):
        return whole
    names = [name for name in whole if name in short or name in ("type", "n_bits", "dtype")]
    return {name: _said(whole[name], short.get(name)) for name in names}
