"""Selection: the spec that a config gives to one state tensor of one op, and what it never used."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from graphopt.config.base import ANY, CompressionConfig, ModuleCompressionConfig
from graphopt.errors import ConfigError
from graphopt.specs.model import SpecModel

__all__ = ["ModuleFrame", "Selection", "Selector", "StateUse"]


@dataclass(frozen=True)
class ModuleFrame:
    """A module around an op: its name and the qualified name of its class."""

    name: str
    type: str


@dataclass(frozen=True)
class StateUse:
    """One use of a state tensor by an op.

    Attributes:
        tensor: Dotted name of the tensor.
        node: Name of the op's node.
        op_types: Names that configs may call the op by, most usual first.
        role: What the tensor is to the op: "weight" or "bias".
        frames: Modules around the op, outermost first.
    """

    tensor: str
    node: str
    op_types: tuple[str, ...]
    role: str
    frames: tuple[ModuleFrame, ...]

    @property
    def own_name(self) -> str:
        """The tensor's name in the module that holds it."""
        return self.tensor.rpartition(".")[2]

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names that `op_state_spec` may use, most specific first."""
        own = self.own_name
        return (own, self.role, ANY) if own != self.role else (own, ANY)


@dataclass(frozen=True)
class Selection:
    """Outcome for one use.

    Attributes:
        spec: The spec, or None.
        path: The config path that decided.
        own_name: Whether the config calls the tensor by its own name, not only by its role.
    """

    spec: SpecModel | None
    path: str
    own_name: bool = False

    @property
    def switched_off(self) -> bool:
        """Whether the config says None, rather than nothing, about the tensor."""
        return self.spec is None and self.path.endswith(" is None")


_AnyConfig = CompressionConfig[Any]
_AnyModule = ModuleCompressionConfig[Any, Any]


@dataclass
class Selector:
    """Applies a config to state uses and remembers which of its keys matched."""

    config: _AnyConfig
    _matched: set[tuple[str, ...]] = field(default_factory=set)
    _patterns: dict[str, re.Pattern[str]] = field(default_factory=dict)

    def select(self, use: StateUse) -> Selection:
        """The spec of one use; None with the path that switched it off or gave nothing."""
        for path, frame, module_config in self._module_configs(use):
            if module_config is None:
                return Selection(None, f"{path} is None")
            return self._inside(module_config, use, frame, path)
        return Selection(None, "global_config is None and no other key matches")

    def touch(self, frames: Iterable[ModuleFrame]) -> None:
        """Mark the keys that match a module of the program, whether or not it holds weights."""
        for frame in frames:
            for pattern in self.config.module_name_configs:
                if self._full_match(pattern, frame.name):
                    self._matched.add(("module_name_configs", pattern))
            if frame.type in self.config.module_type_configs:
                self._matched.add(("module_type_configs", frame.type))

    def unmatched(self) -> list[tuple[str, str]]:
        """(section, key) of every key that matched nothing so far."""
        missing = []
        sections: list[tuple[str, Iterable[str]]] = [
            ("module_name_configs", self.config.module_name_configs),
            ("module_type_configs", self.config.module_type_configs),
        ]
        for path, module_config in self._all_module_configs():
            sections.append((f"{path}.op_type_config", module_config.op_type_config))
            sections.append((f"{path}.op_name_config", module_config.op_name_config))
            sections.append((f"{path}.module_state_spec", module_config.module_state_spec))
            for where, op_config in _op_configs(path, module_config):
                explicit = [key for key in op_config.op_state_spec if key not in _USUAL_STATES]
                sections.append((f"{where}.op_state_spec", explicit))
        for section, keys in sections:
            missing += [(section, key) for key in keys if (section, key) not in self._matched]
        return missing

    def _all_module_configs(self) -> Iterator[tuple[str, _AnyModule]]:
        if self.config.global_config is not None:
            yield "global_config", self.config.global_config
        for section in ("module_type_configs", "module_name_configs"):
            for key, module_config in getattr(self.config, section).items():
                if module_config is not None:
                    yield f"{section}[{key!r}]", module_config

    def _module_configs(
        self, use: StateUse
    ) -> Iterator[tuple[str, ModuleFrame | None, _AnyModule | None]]:
        """Module configs that hold for the use, the decisive one first."""
        for pattern in reversed(self.config.module_name_configs):
            for frame in reversed(use.frames):
                if self._full_match(pattern, frame.name):
                    self._matched.add(("module_name_configs", pattern))
                    path = f"module_name_configs[{pattern!r}]"
                    yield path, frame, self.config.module_name_configs[pattern]
                    break
        for frame in reversed(use.frames):
            if frame.type in self.config.module_type_configs:
                self._matched.add(("module_type_configs", frame.type))
                path = f"module_type_configs[{frame.type!r}]"
                yield path, frame, self.config.module_type_configs[frame.type]
        if self.config.global_config is not None:
            root = use.frames[0] if use.frames else None
            yield "global_config", root, self.config.global_config

    def _inside(
        self, module_config: _AnyModule, use: StateUse, frame: ModuleFrame | None, path: str
    ) -> Selection:
        prefix = f"{frame.name}." if frame is not None and frame.name else ""
        relative = use.tensor.removeprefix(prefix) if use.tensor.startswith(prefix) else None
        if relative is not None and relative in module_config.module_state_spec:
            self._matched.add((f"{path}.module_state_spec", relative))
            where = f"{path}.module_state_spec[{relative!r}]"
            return _outcome(module_config.module_state_spec[relative], where)
        for pattern in reversed(module_config.op_name_config):
            if self._full_match(pattern, use.node):
                self._matched.add((f"{path}.op_name_config", pattern))
                where = f"{path}.op_name_config[{pattern!r}]"
                return self._from_op(module_config.op_name_config[pattern], use, where)
        for op_type in use.op_types:
            if op_type in module_config.op_type_config:
                self._matched.add((f"{path}.op_type_config", op_type))
                where = f"{path}.op_type_config[{op_type!r}]"
                return self._from_op(module_config.op_type_config[op_type], use, where)
        return self._from_op(module_config, use, path)

    def _from_op(self, op_config: Any, use: StateUse, path: str) -> Selection:
        if op_config is None:
            return Selection(None, f"{path} is None")
        for name in use.state_names:
            if name in op_config.op_state_spec:
                self._matched.add((f"{path}.op_state_spec", name))
                where = f"{path}.op_state_spec[{name!r}]"
                return _outcome(op_config.op_state_spec[name], where, own_name=name == use.own_name)
        return Selection(None, f"{path}.op_state_spec has no entry for {use.own_name!r}")

    def _full_match(self, pattern: str, name: str) -> bool:
        if pattern not in self._patterns:
            try:
                self._patterns[pattern] = re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"{pattern!r} is not a valid regular expression: {error}"
                ) from None
        return self._patterns[pattern].fullmatch(name) is not None


# states that configs name by default, whether or not a model has them
_USUAL_STATES = (ANY, "weight", "bias", "in_proj_weight")


def _op_configs(path: str, module_config: _AnyModule) -> Iterator[tuple[str, Any]]:
    yield path, module_config
    for section in ("op_type_config", "op_name_config"):
        for key, op_config in getattr(module_config, section).items():
            if op_config is not None:
                yield f"{path}.{section}[{key!r}]", op_config


def _outcome(spec: SpecModel | None, path: str, *, own_name: bool = True) -> Selection:
    return Selection(spec, path if spec is not None else f"{path} is None", own_name)


def closest(key: str, names: Iterable[str], *, limit: int = 3) -> list[str]:
    """Existing names most like `key`."""
    return difflib.get_close_matches(key, list(names), n=limit, cutoff=0.3)
