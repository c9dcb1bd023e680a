"""Options of lowering to ExecuTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from graphopt.backends import load_backend
from graphopt.backends.delegate import Delegate
from graphopt.backends.options import TargetOptions, in_shell
from graphopt.backends.registry import targets
from graphopt.backends.shapes import Shapes
from graphopt.errors import LoweringError

__all__ = ["ExecuTorchOptions", "Tables", "delegates_of_targets"]

Tables = Literal["auto", "dense", "int8", "compressed"]
_TABLES = ("auto", "dense", "int8", "compressed")


def delegates_of_targets() -> dict[str, type[Delegate]]:
    """Name of a target that is a delegate of ExecuTorch programs, too → its delegate."""
    known = {target.value: load_backend(target).delegate_type for target in targets()}
    return {name: kind for name, kind in known.items() if kind is not None}


def _delegate_names() -> tuple[str, ...]:
    return ("xnnpack", "portable", *delegates_of_targets())


@dataclass(frozen=True, kw_only=True)
class ExecuTorchOptions(TargetOptions):
    """What ExecuTorch's `lower` takes; for another target's delegate also that target's options.

    Attributes:
        delegate: "xnnpack" and "portable" (no delegate) run on any host; "coreml" and "coreai" hold
            the whole program in the form of these targets and run on Apple's systems.
        tables: What becomes of lookup tables for "xnnpack" and "portable". "dense": the weights that
            they stand for, the fastest and largest. "int8": tables of int8 entries become int8
            weights, exactly equal and a quarter of the size; others dense. "compressed": packed
            codes that are decoded at every call, the smallest file and the slowest. "auto": int8
            where XNNPACK computes with it (then it is the fastest, too), codes for embeddings, of
            which only the rows that are read are decoded, dense for the rest. Integers that no
            kernel computes with (those of convolutions that read floats, in blocks, or with zero
            points) are codes in "auto" and "compressed", there also those for which a kernel takes
            a wider type; in the other two they take a byte or become floats.
        shapes: Sizes of the inputs that the artifact takes: the example's; "open", those that the
            capture leaves open, where they have upper bounds, as memory is planned for these; or
            bounds by input, see `backends.shapes`. Enumerated shapes are taken as bounds.

    Raises:
        LoweringError: There is no such delegate or form of tables, or the delegate takes no tables.
    """

    delegate: str = field(
        default="xnnpack",
        metadata=in_shell(_delegate_names, "For .pte: what computes; xnnpack when omitted."),
    )
    tables: Tables = field(
        default="auto",
        metadata=in_shell(
            _TABLES, "For .pte with xnnpack or portable: what becomes of lookup tables."
        ),
    )
    shapes: Shapes = "example"

    def __post_init__(self) -> None:
        names = _delegate_names()
        if self.delegate not in names:
            raise LoweringError(f"delegate must be one of {names}, got {self.delegate!r}")
        if self.tables not in _TABLES:
            raise LoweringError(f"tables must be one of {list(_TABLES)}, got {self.tables!r}")
        if self.tables != "auto" and self.delegate not in ("xnnpack", "portable"):
            raise LoweringError(
                f"tables={self.tables!r} is for xnnpack and portable, not {self.delegate}"
            )
