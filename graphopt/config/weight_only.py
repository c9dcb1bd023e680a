"""Bases of configs that have specs of states only."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["WeightOnlyModuleValidationMixin", "WeightOnlyOpValidationMixin"]


class WeightOnlyOpValidationMixin:
    """First base of an op's config that has specs of states only: others are refused.

    Raises:
        ConfigError: From the config's constructor, where an input or an output has a spec.

    Examples:
        >>> from graphopt.palettization import OpKMeansPalettizerConfig
        >>> issubclass(OpKMeansPalettizerConfig, WeightOnlyOpValidationMixin)
        True
        >>> try:
        ...     OpKMeansPalettizerConfig(op_input_spec={"*": {"n_bits": 4}})
        ... except graphopt.errors.ConfigError as error:
        ...     print(type(error).__name__)
        ConfigError
    """

    weight_only: ClassVar[bool] = True


class WeightOnlyModuleValidationMixin(WeightOnlyOpValidationMixin):
    """The same for a module's config.

    Examples:
        >>> from graphopt.palettization import ModuleKMeansPalettizerConfig
        >>> issubclass(ModuleKMeansPalettizerConfig, WeightOnlyModuleValidationMixin)
        True
    """
