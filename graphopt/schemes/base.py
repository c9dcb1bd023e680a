"""StoredWeight and Scheme: what every compressed form of a weight offers to passes, sizes and searches.

A scheme turns a spec and a tensor into a stored weight; a stored weight knows its dense value, its
parts, and the ops of the vocabulary that compute it. Nothing outside this package asks of which kind
either is.

A new scheme takes four files at most: its spec (`graphopt/specs/`), its scheme with its stored weight
(here), a pass that annotates weights or finds them annotated and calls `replace_weight`
(`graphopt/passes/`), and its line in `SCHEMES` (`graphopt/schemes/registry.py`). Lookups, dequantize
ops and masks are read back from a graph by their ops (`graphopt.analysis.stored_values`), whatever
scheme they come from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor, fx

from graphopt.config.base import CompressionConfig
from graphopt.errors import ConfigError
from graphopt.ir.editor import Editor
from graphopt.schemes.sizes import Parts, coded_bits
from graphopt.specs import QuantizationSpec
from graphopt.specs.model import SpecModel
from graphopt.specs.storage import StorageRules

if TYPE_CHECKING:  # it stands on the stored weights
    from graphopt.schemes.relaxed import RelaxedWeight

__all__ = ["Scheme", "Statistics", "StoredWeight"]

SpecT = TypeVar("SpecT", bound=SpecModel)
StoredT = TypeVar("StoredT", bound="StoredWeight")


class StoredWeight(ABC):
    """The stored form of one weight; a frozen dataclass.

    Attributes:
        kind: Name of the form in files.
        nested: Fields that are frozen values themselves, and their types.
        sse: Sum of squared errors against the weight.
        energy: Sum of squares of the weight.
    """

    kind: ClassVar[str]
    nested: ClassVar[Mapping[str, type]] = {}
    sse: float
    energy: float

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight as the compressed program computes it."""

    @abstractmethod
    def parts(self) -> Parts:
        """What is stored, counted."""

    @abstractmethod
    def emit(
        self, edit: Editor, name: str, like: fx.Node, *, before: fx.Node | None = None
    ) -> fx.Node:
        """Emit the constants and the ops of the vocabulary that give the dense value.

        Args:
            edit: The editor.
            name: The weight's name, from which the constants get theirs.
            like: Node whose origin the new ones take, and their place when `before` is None.
            before: Node in front of which they stand.
        """

    @abstractmethod
    def described(self, spec: Any) -> dict[str, Any]:
        """`status`, `detail`, and if there are any `note`, `n_bits` and `n_luts` of its record."""

    def symbols(self) -> Tensor | None:
        """The codes as an entropy coder takes them; None where nothing is coded."""
        return None

    def stored_bits(self, rules: StorageRules | None = None) -> int:
        """Bits that an artifact stores; None counts every code at its own width."""
        return self.parts().bits(rules)

    def coded_bits(self) -> float:
        """Bits of a weight whose codes an ideal coder compresses (`sizes.coded_bits`)."""
        return coded_bits(self.parts(), self.symbols())

    @property
    def snr_db(self) -> float | None:
        """`10·log10(energy / sse)`; None of a weight that is 0."""
        if self.energy <= 0:
            return None
        return math.inf if self.sse <= 0 else 10 * math.log10(self.energy / self.sse)

    def measured(self, weight: Tensor) -> Self:
        """The same form with its error against a weight."""
        exact = weight.double()
        error = float((self.dense().double() - exact).square().sum())
        return replace(self, sse=error, energy=float(exact.square().sum()))  # type: ignore[type-var]

    def to_state(self) -> dict[str, Any]:
        """Plain values and tensors, which `from_state` reads."""
        state = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **state, **{name: asdict(state[name]) for name in self.nested}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The form that `to_state` has written down."""
        values = {name: value for name, value in state.items() if name != "kind"}
        return cls(**values | {name: kind(**values[name]) for name, kind in cls.nested.items()})


@dataclass(frozen=True)
class Statistics:
    """What is known of a weight besides its values; a scheme uses what it can.

    Attributes:
        output_axis: Its output-channel axis.
        importance: What each element's squared error counts, of the weight's shape; None weighs all
            alike.
        seed: Seed of initial values.
    """

    output_axis: int = 0
    importance: Tensor | None = None
    seed: int = 0


class Scheme(ABC, Generic[SpecT, StoredT]):
    """How weights of one kind of spec are stored.

    Attributes:
        kind: Name in files: the key of a candidate with such a spec.
        spec_type: Its specs.
        stored_type: What they become.
        searched: Whether searches may choose it for a layer.
        part: Field of a `JointConfig` that asks for it.
    """

    kind: ClassVar[str]
    spec_type: type[SpecT]
    stored_type: type[StoredT]
    searched: ClassVar[bool] = False
    part: ClassVar[str] = ""

    @abstractmethod
    def make(self, weight: Tensor, spec: SpecT, known: Statistics) -> StoredT:
        """The stored form of a weight.

        Args:
            weight: Floating point, any rank from 1.
            spec: What it becomes.
            known: What else is known.

        Raises:
            CompressionError: NaN or Inf in the weight, or the spec does not fit its shape.
        """

    @abstractmethod
    def parts(
        self, spec: SpecT, shape: Sequence[int], output_axis: int, rules: StorageRules
    ) -> Parts:
        """What will be stored of a weight, counted without it.

        Raises:
            CompressionError: The spec does not fit the shape.
        """

    @abstractmethod
    def name_of(self, spec: SpecT) -> str:
        """A short name of a spec, for tables and files."""

    def config_of(self, specs: Mapping[str, SpecT]) -> CompressionConfig[Any]:
        """The config that asks for these specs by the names of weights, and for nothing else.

        Raises:
            ConfigError: No config asks for the scheme by name.
        """
        raise ConfigError(
            f"{', '.join(specs)}: no config asks for {self.kind!r} by names of weights"
        )

    def parse(self, text: str) -> tuple[SpecT, QuantizationSpec | None] | None:
        """What a short text stands for: a spec, and one of the op's data input if it names one.

        None where it is not understood.
        """
        del text
        return None

    def with_algorithm(self, spec: SpecT, algorithm: str) -> SpecT:
        """The spec with another way to find its numbers, where it has several."""
        del algorithm
        return spec

    def make_all(
        self, weight: Tensor, specs: Mapping[str, SpecT], known: Statistics
    ) -> dict[str, StoredT]:
        """`make` for several specs by name, which may share work."""
        return {name: self.make(weight, spec, known) for name, spec in specs.items()}

    def relax(self, stored: StoredT, spec: SpecT, target: Tensor) -> RelaxedWeight | None:
        """A form in which the codes can be trained; None where there is none.

        Args:
            stored: Where it starts.
            spec: What it was made for.
            target: The weight that it stands for.
        """
        del stored, spec, target
        return None

    def bits(self, spec: SpecT, shape: Sequence[int], output_axis: int, rules: StorageRules) -> int:
        """Stored bits of a weight of this shape, without it.

        Raises:
            CompressionError: The spec does not fit the shape.
        """
        return self.parts(spec, shape, output_axis, rules).bits(rules)
