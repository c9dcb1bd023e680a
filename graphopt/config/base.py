"""Which spec goes where: configs by global default, module type, module name, op and slot.

Field names, defaults and precedence follow coreai-opt's documented API, so that configs move over
unchanged: module name (regex, full match; the last listed wins) over module type over global, and
inside a module `module_state_spec` over op name over op type over `op_*_spec`. A config for a module
holds for everything inside it. `None` switches off.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Generic, Self, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator
from torch import nn

from graphopt.audited import Limits, attribute_of, imports_allowed, parse_json, parse_yaml
from graphopt.errors import ConfigError
from graphopt.files import replaced
from graphopt.specs.model import SpecModel

__all__ = [
    "CompressionConfig",
    "ModuleCompressionConfig",
    "OpCompressionConfig",
    "read_yaml",
    "type_name",
]

SpecT = TypeVar("SpecT", bound=SpecModel)
OpT = TypeVar("OpT", bound="OpCompressionConfig[Any]")
ModuleT = TypeVar("ModuleT", bound="ModuleCompressionConfig[Any, Any]")
_log = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()

ANY = "*"


def _slot(key: Any) -> Any:
    """A slot's number, also where JSON, whose keys are texts, has written it."""
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise ValueError(f"a slot is a name or a number, got {key!r}")
    if isinstance(key, int) or not key.isascii() or not key.removeprefix("-").isdigit():
        return key
    return int(key) if len(key) < 10 and str(int(key)) == key else key


# true and false are no numbers of slots
_Slot = Annotated[str | Annotated[int, Field(strict=True)], BeforeValidator(_slot)]
_Slots = dict[_Slot, SpecT | None]


def type_name(module_type: str | type[nn.Module]) -> str:
    """Canonical name of a module type: "torch.nn.Linear" → "torch.nn.modules.linear.Linear".

    A name that no imported module has is returned as it is; it may belong to a script.
    """
    if not isinstance(module_type, str):
        return f"{module_type.__module__}.{module_type.__qualname__}"
    value = attribute_of(module_type)
    return type_name(value) if isinstance(value, type) else module_type


class _Mutable(SpecModel):
    model_config = ConfigDict(frozen=False, extra="forbid", validate_assignment=True)

    weight_only: ClassVar[bool] = False
    no_effect: ClassVar[dict[str, str]] = {}

    @model_validator(mode="after")
    def _say_what_has_no_effect(self) -> Self:
        for field, reason in self.no_effect.items():
            given = field in self.model_fields_set
            if given and getattr(self, field) != type(self).model_fields[field].get_default():
                key = (type(self).__name__, field)
                if key not in _said:
                    _said.add(key)
                    _log.info("%s.%s is accepted and has no effect: %s", *key, reason)
        return self


class OpCompressionConfig(_Mutable, Generic[SpecT]):
    """Specs of one op's input, output and state slots.

    Attributes:
        op_input_spec: Slot (index, name or "*") → spec.
        op_output_spec: Slot → spec.
        op_state_spec: State name ("weight", "bias", a parameter's own name, or "*") → spec.

    Examples:
        >>> from graphopt.palettization import OpKMeansPalettizerConfig
        >>> config = OpKMeansPalettizerConfig(op_state_spec={"weight": {"n_bits": 2}})
        >>> isinstance(config, OpCompressionConfig), config.op_state_spec["weight"].n_bits
        (True, 2)
    """

    op_input_spec: _Slots[SpecT] = Field(default_factory=dict)
    op_output_spec: _Slots[SpecT] = Field(default_factory=dict)
    op_state_spec: dict[str, SpecT | None] = Field(default_factory=dict)

    @classmethod
    def default_slots(cls) -> dict[str, dict[Any, Any]]:
        """Specs of slots that are not given; subclasses fill this in."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _fill_slots(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        for field, slots in cls.default_slots().items():
            filled.setdefault(field, slots)
        for field in cls.model_fields:
            if field.endswith("_spec") and field in filled and filled[field] is None:
                filled[field] = {ANY: None}
            elif field in ("op_type_config", "op_name_config") and filled.get(field, 0) is None:
                filled[field] = {}
        return filled

    @model_validator(mode="after")
    def _weights_only(self) -> Self:
        if not self.weight_only:
            return self
        for field in type(self).model_fields:
            if not field.endswith(("input_spec", "output_spec")):
                continue
            if any(spec is not None for spec in getattr(self, field).values()):
                raise ValueError(
                    f"{field}: this compression is for weights only; use op_state_spec or"
                    " module_state_spec"
                )
        return self


class ModuleCompressionConfig(OpCompressionConfig[SpecT], Generic[SpecT, OpT]):
    """Specs for everything inside a module.

    Attributes:
        op_type_config: Op type ("conv2d", "linear", …) → config of such ops.
        op_name_config: Regex over node names → config of those ops.
        module_input_spec: Slot of the module's own inputs → spec.
        module_output_spec: Slot of the module's own outputs → spec.
        module_state_spec: Parameter or buffer name relative to the module → spec; holds whatever op
            uses it.

    Examples:
        >>> from graphopt.palettization import ModuleKMeansPalettizerConfig
        >>> config = ModuleKMeansPalettizerConfig(op_type_config={"conv2d": None})
        >>> isinstance(config, ModuleCompressionConfig), config.op_type_config
        (True, {'conv2d': None})
    """

    op_type_config: dict[str, OpT | None] = Field(default_factory=dict)
    op_name_config: dict[str, OpT | None] = Field(default_factory=dict)
    module_input_spec: _Slots[SpecT] = Field(default_factory=dict)
    module_output_spec: _Slots[SpecT] = Field(default_factory=dict)
    module_state_spec: dict[str, SpecT | None] = Field(default_factory=dict)


class CompressionConfig(_Mutable, Generic[ModuleT]):
    """What a compressor does to a model.

    Attributes:
        global_config: For all modules that have nothing more specific; the compression's default
            when not given, nothing when None.
        module_type_configs: Module class or qualified name → config or None.
        module_name_configs: Regex over module names → config or None.

    Examples:
        >>> config = graphopt.palettization.KMeansPalettizerConfig(module_name_configs={"2": None})
        >>> isinstance(config, CompressionConfig), config.module_name_configs
        (True, {'2': None})
    """

    root_key: ClassVar[str]
    spec_key: ClassVar[str]

    global_config: ModuleT | None = None
    module_type_configs: dict[str, ModuleT | None] = Field(default_factory=dict)
    module_name_configs: dict[str, ModuleT | None] = Field(default_factory=dict)

    @classmethod
    def default_global_config(cls) -> Any:
        """The config of modules when none is given; subclasses fill this in."""
        return None

    @model_validator(mode="before")
    @classmethod
    def _fill_global(cls, data: Any) -> Any:
        if isinstance(data, dict) and "global_config" not in data:
            return {**data, "global_config": cls.default_global_config()}
        return data

    @field_validator("module_type_configs", mode="before")
    @classmethod
    def _canonical_types(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                type_name(key) if isinstance(key, str | type) else key: config
                for key, config in value.items()
            }
        return value

    def schedule_at(self, path: str, field: str) -> Any:
        """A field of the module config in which a config path begins, or None."""
        sections = [("global_config", self.global_config)]
        for name in ("module_type_configs", "module_name_configs"):
            section = getattr(self, name)
            sections += [(f"{name}[{key!r}]", value) for key, value in section.items()]
        for key, config in sections:
            if path.startswith(f"{key}.") and config is not None:
                return getattr(config, field)
        return None

    def set_global(self, config: ModuleT | None) -> Self:
        """Replace the global config; returns self."""
        self.global_config = config
        return self

    def set_module_type(self, module_type: str | type[nn.Module], config: ModuleT | None) -> Self:
        """Set the config of a module type; returns self."""
        self.module_type_configs = {**self.module_type_configs, type_name(module_type): config}
        return self

    def set_module_name(self, module_name: str, config: ModuleT | None) -> Self:
        """Set the config of the modules whose name matches; it becomes the last listed."""
        kept = {name: old for name, old in self.module_name_configs.items() if name != module_name}
        self.module_name_configs = {**kept, module_name: config}
        return self

    def only_for(self, *targets: Any) -> Self:
        """Move the global config to the given module types and names; returns self.

        Raises:
            ConfigError: No target is given, one is neither a module type nor a name, or the global
                config is already switched off.
        """
        chosen = _targets(targets)
        if not chosen:
            raise ConfigError("only_for() needs at least one module type or name")
        if self.global_config is None:
            raise ConfigError("only_for() needs a global_config; it is None already")
        config, self.global_config = self.global_config, None
        for target in chosen:
            self._override(target, copy.deepcopy(config))
        return self

    def without(self, *targets: Any) -> Self:
        """Switch off for the given module types and names; returns self."""
        for target in _targets(targets):
            self._override(target, None)
        return self

    def _override(self, target: str | type[nn.Module], config: ModuleT | None) -> None:
        if isinstance(target, str):
            self.set_module_name(target, config)
        else:
            self.set_module_type(target, config)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under this config's root key, ready for YAML and JSON."""
        return {self.root_key: self.model_dump(mode="json")}

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The config as YAML text, also written to `path` when given."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            with replaced(Path(path)) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def to_json(self, path: str | Path | None = None) -> str:
        """The config as JSON text, also written to `path` when given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            with replaced(Path(path)) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, allow_imports: bool = False) -> Self:
        """Read a config from plain values, with or without its root key.

        A block named `spec_key`, which YAML files use to hold anchors, is ignored.

        Args:
            data: The values.
            allow_imports: Import the modules that names of classes in them name, which runs these
                modules. Otherwise names stand for classes of modules that are imported already.

        Raises:
            ConfigError: A key is unknown or a value is wrong; the message has its path.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{cls.__name__}: expected a mapping, got {type(data).__name__}")
        body = {key: value for key, value in data.items() if key != cls.spec_key}
        if cls.root_key in body:
            others = sorted(map(str, set(body) - {cls.root_key}))
            if others:
                raise ConfigError(
                    f"{cls.__name__}: unknown keys {others} beside {cls.root_key!r}; write them inside it"
                )
            body = body[cls.root_key] or {}
        if not isinstance(body, dict):
            raise ConfigError(f"{cls.root_key}: expected a mapping, got {type(body).__name__}")
        for key in body:
            if not isinstance(key, str):
                raise ConfigError(f"{cls.root_key}: the key {key!r} is no text")
        try:
            with imports_allowed(allow_imports):
                return cls(**body)
        except ConfigError as error:
            # from the file's root key on, so that the path can be followed there
            raise ConfigError(
                str(error).replace(f"{cls.__name__}.", f"{cls.root_key}."), error.problems
            ) from None

    @classmethod
    def from_yaml(cls, source: str | Path | IO[Any], *, allow_imports: bool = False) -> Self:
        """Read a config from a YAML file or stream.

        Args:
            source: The file or stream.
            allow_imports: See `from_dict`.

        Raises:
            ConfigError: The file is no YAML mapping, or see `from_dict`.
        """
        place = f" in {source}" if isinstance(source, str | Path) else ""
        return cls._from_file(read_yaml(source, cls.__name__), place, allow_imports)

    @classmethod
    def from_json(cls, source: str | Path | IO[Any], *, allow_imports: bool = False) -> Self:
        """Read a config from a JSON file or stream.

        Args:
            source: The file or stream.
            allow_imports: See `from_dict`.

        Raises:
            ConfigError: The file is no JSON mapping, or see `from_dict`.
        """
        text, place = _text_of(source)
        content = parse_json(text, f"{cls.__name__}{place}")
        return cls._from_file(content, place, allow_imports)

    @classmethod
    def _from_file(cls, content: Any, place: str, allow_imports: bool) -> Self:
        if not isinstance(content, dict):
            raise ConfigError(
                f"{cls.__name__}{place}: expected a mapping, got {type(content).__name__}"
            )
        return cls.from_dict(content, allow_imports=allow_imports)


def read_yaml(source: str | Path | IO[Any], owner: str, limits: Limits | None = None) -> Any:
    """The values of a YAML file or stream.

    Raises:
        ConfigError: It cannot be read, is no YAML, or larger than the limits; the message begins with `owner`.
    """
    text, place = _text_of(source)
    return parse_yaml(text, f"{owner}{place}", limits)


def _text_of(source: str | Path | IO[Any]) -> tuple[str, str]:
    """The text of a file or stream, and words for messages that say where it is."""
    if not isinstance(source, str | Path):
        return source.read(), ""
    try:
        return Path(source).read_text(encoding="utf-8"), f" in {source}"
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from None


def _targets(targets: tuple[Any, ...]) -> list[Any]:
    flat = targets[0] if len(targets) == 1 and isinstance(targets[0], list | tuple) else targets
    for target in flat:
        if not isinstance(target, str) and not (
            isinstance(target, type) and issubclass(target, nn.Module)
        ):
            raise ConfigError(f"a target is a module class or a module name, got {target!r}")
    return list(flat)
