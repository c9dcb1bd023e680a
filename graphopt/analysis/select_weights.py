"""Which weight gets which spec, and what a config asked for in vain: shared by the annotating passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import fx

from graphopt.analysis.weights import WeightTensor
from graphopt.config.selection import OpUse, Selector, StateUse, closest
from graphopt.errors import CompressionError, ConfigError, ConfigWarning
from graphopt.ir.captured_module import callable_graph
from graphopt.ir.mapped import release
from graphopt.ir.module_frames import module_frames
from graphopt.ir.records import TensorRecord
from graphopt.numerics.finite import all_finite
from graphopt.specs.model import SpecModel

__all__ = ["FLOAT_DTYPES", "Decision", "decide", "report_unmatched", "skipped_row", "touch_modules"]

SpecT = TypeVar("SpecT", bound=SpecModel)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Decision(Generic[SpecT]):
    """What becomes of one weight.

    Attributes:
        spec: Its spec, or None.
        path: The config path that decided.
        reason: Why there is no spec.
        conflict: Uses that asked for something else.
        chosen: Whether a config asked for it, though it cannot be compressed.
    """

    spec: SpecT | None
    path: str = ""
    reason: str = ""
    conflict: str = ""
    chosen: bool = False


def touch_modules(gm: fx.GraphModule, selector: Selector, weights: Iterable[WeightTensor]) -> None:
    """Mark the config keys that name a module of the graph.

    Raises:
        InputError: The graph takes its weights as inputs, or keeps them in modules.
    """
    weights = list(weights)
    if not weights:
        callable_graph(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            selector.touch(module_frames(node))
    for weight in weights:
        for use in weight.uses:
            selector.touch(use.frames)


def decide(
    weight: WeightTensor,
    selector: Selector,
    kind: type[SpecT],
    refusal: Callable[[SpecT], str],
    verb: str,
) -> Decision[SpecT]:
    """The spec of a weight, the first of its uses that has one deciding.

    Args:
        weight: The weight.
        selector: The config.
        kind: Type of spec.
        refusal: Why a weight cannot have a spec, or "".
        verb: "palettize" or "quantize", for messages.

    Raises:
        CompressionError: The weight contains NaN or Inf.
    """
    chosen: SpecT | None = None
    path, reason, conflict, off = "", "", "", ""
    for use in weight.uses:
        selection = selector.select(use)
        if not isinstance(selection.spec, kind):
            reason = reason or selection.path
            off = off or (selection.path if selection.switched_off else "")
        elif weight.data_like and not selection.own_name:
            reason = (
                f"a matmul operand that the model does not train; name {use.own_name!r} in"
                f" op_state_spec or module_state_spec to {verb} it"
            )
        elif chosen is None:
            chosen, path = selection.spec, selection.path
        elif chosen != selection.spec:
            conflict = f"{use.node} asks for another spec ({selection.path}); {path} holds"
    if chosen is not None and off:
        conflict = f"it is tied, and {off}, but {path} holds"
    if conflict:
        warnings.warn(f"{weight.name}: {conflict}", ConfigWarning, stacklevel=2)
    if weight.compressed:
        return Decision(None, reason="already compressed")
    if not weight.uses:
        users = ", ".join(weight.other_users) or "no op"
        return Decision(None, reason=f"used by {users}, which takes no compressible state")
    if chosen is None:
        return Decision(None, reason=reason)
    against = refusal(chosen)
    if against:
        return Decision(None, reason=against, conflict=conflict, chosen=True)
    finite = all_finite(weight.tensor)
    release(weight.tensor)
    if not finite:
        raise CompressionError(
            f"{weight.name}: contains NaN or Inf; exclude it in the config ({path} asks for it) or"
            " repair the model"
        )
    return Decision(chosen, path, conflict=conflict)


def skipped_row(weight: WeightTensor, decision: Decision[Any]) -> TensorRecord:
    """The table's row of a weight that is left alone."""
    tensor = weight.tensor
    return TensorRecord(
        name=weight.name,
        aliases=weight.aliases,
        module_type=weight.module_type,
        ops=tuple(dict.fromkeys(use.op_types[0] for use in weight.uses)) or weight.other_users,
        nodes=tuple(use.node for use in weight.uses),
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        status="skipped",
        detail=decision.reason,
        note=decision.conflict,
        stored_bits=tensor.numel() * tensor.element_size() * 8,
    )


def report_unmatched(
    selector: Selector,
    gm: fx.GraphModule,
    weights: list[WeightTensor],
    on_unmatched: Literal["error", "warn"],
    ops: Iterable[OpUse] = (),
) -> list[str]:
    """Say which config keys matched nothing.

    Args:
        selector: After everything was selected.
        gm: The graph.
        weights: Its weights.
        on_unmatched: Whether a key that matches nothing is an error. Module and op types are always
            a warning, since one config serves many models.
        ops: Further ops that the config could have named.

    Returns:
        The remarks that are no errors.

    Raises:
        ConfigError: A key matches nothing; with the closest existing names.
    """
    missing = selector.unmatched()
    if not missing:
        return []
    frames = [frame for node in gm.graph.nodes for frame in module_frames(node)]
    uses = [use for weight in weights for use in weight.uses]
    listed: list[StateUse | OpUse] = [*uses, *ops]
    names = {
        "module_name_configs": sorted({frame.name for frame in frames if frame.name}),
        "module_type_configs": sorted({frame.type for frame in frames}),
        "op_type_config": sorted({name for use in listed for name in use.op_types}),
        "op_name_config": list(dict.fromkeys(use.node for use in listed)),
        "module_state_spec": sorted({use.tensor for use in uses}),
        "op_state_spec": sorted({name for use in uses for name in use.state_names}),
    }
    errors: list[str] = []
    remarks: list[str] = []
    for section, key in missing:
        kind = section.rpartition(".")[2]
        known = names.get(kind, ["0", "1", "*"])
        near = closest(key, known)
        text = f"{section}[{key!r}] matches nothing in the model"
        text += f"; closest: {', '.join(near)}" if near else f"; there are: {known[:8]}"
        types = ("module_type_configs", "op_type_config")
        lenient = on_unmatched == "warn" or kind in types
        (remarks if lenient else errors).append(text)
    if errors:
        raise ConfigError("\n".join(errors))
    for text in remarks:
        warnings.warn(text, ConfigWarning, stacklevel=2)
    return remarks
