"""Selection: the spec that a config gives to one state tensor of one op, and what it never used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from graphopt.audited import pattern as pattern_of
from graphopt.config.base import ANY, CompressionConfig, ModuleCompressionConfig
from graphopt.specs.model import SpecModel

__all__ = ["ModuleFrame", "OpUse", "Selection", "Selector", "StateUse"]


@dataclass(frozen=True)
class ModuleFrame:
    """A module around an op: its name and the qualified name of its class."""

    name: str
    type: str


@dataclass(frozen=True)
class OpUse:
    """An op as configs see it.

    Attributes:
        node: Name of the op's node.
        op_types: Names that configs may call the op by, most usual first.
        frames: Modules around the op, outermost first.
    """

    node: str
    op_types: tuple[str, ...]
    frames: tuple[ModuleFrame, ...]


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
        rank: How specific the deciding keys are, (module, op); larger wins where specs compete.
        named_op: Whether the config calls the op by its type or name.
    """

    spec: SpecModel | None
    path: str
    own_name: bool = False
    rank: tuple[int, int] = (0, 0)
    named_op: bool = False

    @property
    def switched_off(self) -> bool:
        """Whether the config says None, rather than nothing, about the tensor."""
        return self.spec is None and self.path.endswith(" is None")


_RANKS = {"module_name_configs": 2, "module_type_configs": 1, "global_config": 0}
_AnyConfig = CompressionConfig[Any]
_AnyModule = ModuleCompressionConfig[Any, Any]


@dataclass
class Selector:
    """Applies a config to state uses and remembers which of its keys matched."""

    config: _AnyConfig
    _matched: set[tuple[str, ...]] = field(default_factory=set)

    def select(self, use: StateUse) -> Selection:
        """The spec of one use; None with the path that switched it off or gave nothing."""
        for path, frame, module_config in self._module_configs(use):
            if module_config is None:
                return Selection(None, f"{path} is None")
            return self._inside(module_config, use, frame, path)
        return Selection(None, "global_config is None and no other key matches")

    def select_slot(
        self, use: OpUse, side: Literal["input", "output"], slots: tuple[str | int, ...]
    ) -> Selection:
        """The spec of one input or output of an op.

        Args:
            use: The op.
            side: Which of its ends.
            slots: Names of the slot, most specific first; "*" is added.
        """
        for path, _, module_config in self._module_configs(use):
            rank = _RANKS[path.partition("[")[0]]
            if module_config is None:
                return Selection(None, f"{path} is None", rank=(rank, 0))
            op_config, where, level = self._op_config(module_config, use, path)
            ranks = (rank, level)
            if op_config is None:
                return Selection(None, f"{where} is None", False, ranks, level > 0)
            section = f"op_{side}_spec"
            by_slot = getattr(op_config, section)
            for slot in (*slots, ANY):
                if slot in by_slot:
                    self._matched.add((f"{where}.{section}", str(slot)))
                    text = f"{where}.{section}[{slot!r}]"
                    text += " is None" if by_slot[slot] is None else ""
                    return Selection(by_slot[slot], text, slot != ANY, ranks, level > 0)
            text = f"{where}.{section} has no entry for {slots[0]!r}"
            return Selection(None, text, False, ranks, level > 0)
        return Selection(None, "global_config is None and no other key matches")

    def module_slots(
        self, frame: ModuleFrame, side: Literal["input", "output"]
    ) -> tuple[str, dict[str | int, Any]]:
        """The path and entries of `module_input_spec` or `module_output_spec` of one module."""
        section = f"module_{side}_spec"
        for path, config in self._configs_of(frame):
            return f"{path}.{section}", {} if config is None else dict(getattr(config, section))
        return "", {}

    def matched_slot(self, path: str, slot: str | int) -> None:
        """Note that a slot of `module_slots` had a place."""
        self._matched.add((path, str(slot)))

    def _configs_of(self, frame: ModuleFrame) -> Iterator[tuple[str, _AnyModule | None]]:
        for pattern in reversed(self.config.module_name_configs):
            if _full_match(pattern, frame.name):
                yield f"module_name_configs[{pattern!r}]", self.config.module_name_configs[pattern]
        if frame.type in self.config.module_type_configs:
            config = self.config.module_type_configs[frame.type]
            yield f"module_type_configs[{frame.type!r}]", config
        if frame.name == "" and self.config.global_config is not None:
            yield "global_config", self.config.global_config

    def touch(self, frames: Iterable[ModuleFrame]) -> None:
        """Mark the keys that match a module of the program, whether or not it holds weights."""
        for frame in frames:
            for pattern in self.config.module_name_configs:
                if _full_match(pattern, frame.name):
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
                for section in ("op_input_spec", "op_output_spec"):
                    named = [str(key) for key in getattr(op_config, section) if key != ANY]
                    sections.append((f"{where}.{section}", named))
            for section in ("module_input_spec", "module_output_spec"):
                slots = [str(key) for key in getattr(module_config, section)]
                sections.append((f"{path}.{section}", slots))
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
        self, use: StateUse | OpUse
    ) -> Iterator[tuple[str, ModuleFrame | None, _AnyModule | None]]:
        """Module configs that hold for the use, the decisive one first."""
        for pattern in reversed(self.config.module_name_configs):
            for frame in reversed(use.frames):
                if _full_match(pattern, frame.name):
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
        op_config, where, _ = self._op_config(module_config, use, path)
        return self._from_op(op_config, use, where)

    def _op_config(
        self, module_config: _AnyModule, use: StateUse | OpUse, path: str
    ) -> tuple[Any, str, int]:
        """The config that holds for an op inside a module config, its path and how specific it is."""
        for pattern in reversed(module_config.op_name_config):
            if _full_match(pattern, use.node):
                self._matched.add((f"{path}.op_name_config", pattern))
                return (
                    module_config.op_name_config[pattern],
                    f"{path}.op_name_config[{pattern!r}]",
                    2,
                )
        for op_type in use.op_types:
            if op_type in module_config.op_type_config:
                self._matched.add((f"{path}.op_type_config", op_type))
                where = f"{path}.op_type_config[{op_type!r}]"
                return module_config.op_type_config[op_type], where, 1
        return module_config, path, 0

    def _from_op(self, op_config: Any, use: StateUse, path: str) -> Selection:
        if op_config is None:
            return Selection(None, f"{path} is None")
        for name in use.state_names:
            if name in op_config.op_state_spec:
                self._matched.add((f"{path}.op_state_spec", name))
                where = f"{path}.op_state_spec[{name!r}]"
                return _outcome(op_config.op_state_spec[name], where, own_name=name == use.own_name)
        return Selection(None, f"{path}.op_state_spec has no entry for {use.own_name!r}")


# states that configs name by default, whether or not a model has them
_USUAL_STATES = (ANY, "weight", "bias", "in_proj_weight")


def _full_match(expression: str, name: str) -> bool:
    return pattern_of(expression).fullmatch(name)


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
