"""Calibration data as people have them: calls of a captured graph, checked before any of them runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.state import carried_state, state_of, state_values, writes
from graphopt.run.batches import Batch, CallSequence, StatefulCall, as_batch, flat_inputs

__all__ = ["data_list", "inputs_of_pairs", "read_calls", "refuse_non_finite"]


def data_list(data: Iterable[Any] | None) -> list[Any] | None:
    """The calls as a list; None stays None.

    Raises:
        InputError: There are none, or one tensor stands where a list of calls must be.
    """
    if data is None:
        return None
    _refuse_one_tensor(data)
    calls = list(data)
    if not calls:
        raise InputError(
            "there are no data: calibration data must hold at least one call; pass None to go without"
        )
    return calls


def inputs_of_pairs(data: Sequence[Any]) -> list[Any]:
    """The inputs of (inputs, target) pairs.

    Raises:
        InputError: Something is no pair.
    """
    for number, pair in enumerate(data):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(
                f"calibration data [{number}]: with loss_fn each must be a pair (inputs, target),"
                f" got {_described(pair)}"
            )
    return [pair[0] for pair in data]


def read_calls(
    gm: CapturedModule, data: Iterable[Any], *, recorded: bool = True
) -> Iterator[Batch]:
    """Each call as its graph takes it: arrays as tensors, numbers in the types of the capture.

    Args:
        gm: The graph.
        data: Inputs of one call each, as for `as_batch`; numpy arrays and, for float inputs, other
            float types are taken too, and a pair (args, kwargs). The calls of a `CallSequence` come one by one, as
            `StatefulCall`, which is taken as it is.
        recorded: Run the graph on sequences, so that each of their calls knows the state that it
            starts from and can be run at any time; else the calls must be run in order.

    Raises:
        InputError: One does not fit, or holds NaN or Inf; with its number and the input's name.
    """
    _refuse_one_tensor(data)
    wanted = gm.graph.find_nodes(op="placeholder")
    spec = gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    for number, inputs in enumerate(data):
        if isinstance(inputs, CallSequence):
            calls = read_calls(gm, inputs, recorded=False)
            yield from _recorded(gm, calls) if recorded else _in_order(calls)
            continue
        known = isinstance(inputs, StatefulCall)
        tensors = pytree.tree_map_only(np.ndarray, torch.from_numpy, inputs)
        given: Batch = (tensors[0], tensors[1]) if known else as_batch(tensors)
        try:
            leaves = _flat(gm, given, tensors)
        except InputError as error:
            raise InputError(
                f"calibration data [{number}]: {error}{_advice(given, wanted)}"
            ) from None
        leaves = [_converted(node, leaf, number) for node, leaf in zip(wanted, leaves, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        batch = tuple(args), dict(kwargs)
        yield StatefulCall(batch, inputs.state) if known else batch


def _flat(gm: CapturedModule, given: Batch, inputs: Any) -> list[Any]:
    """The values of the placeholders; a pair (args, kwargs) is taken where it fits as nothing else does."""
    try:
        return flat_inputs(gm, given)
    except InputError:
        if not _is_args_and_kwargs(inputs):
            raise
        with contextlib.suppress(InputError):
            return flat_inputs(gm, (tuple(inputs[0]), dict(inputs[1])))
        raise


def _is_args_and_kwargs(inputs: Any) -> bool:
    return (
        isinstance(inputs, tuple)
        and len(inputs) == 2
        and isinstance(inputs[0], tuple)
        and isinstance(inputs[1], Mapping)
        and all(isinstance(name, str) for name in inputs[1])
    )


def _in_order(calls: Iterable[Batch]) -> Iterator[Batch]:
    for number, call in enumerate(calls):
        yield StatefulCall(call, None if number else {})


def _recorded(gm: CapturedModule, calls: Iterable[Batch]) -> Iterator[Batch]:
    """The calls with the state before each, which is that of the graph as it is now."""
    batches = list(calls)
    if not state_of(gm):
        yield from batches
        return
    made = []
    with carried_state(gm), torch.no_grad():
        for call in batches:
            made.append(StatefulCall(call, {k: v.clone() for k, v in state_values(gm).items()}))
            gm(*call[0], **call[1])
    yield from made


def _refuse_one_tensor(data: Any) -> None:
    if isinstance(data, Tensor | np.ndarray):
        raise InputError(
            f"calibration data of type {type(data).__name__}: a list of calls is needed, such as"
            " [batch_1, batch_2]; one batch x is [x]"
        )


def refuse_non_finite(gm: CapturedModule, batch: Batch, number: int) -> None:
    """Refuse inputs from which every value behind them would be NaN.

    Raises:
        InputError: With the number of the call and the name of the input.
    """
    wanted = gm.graph.find_nodes(op="placeholder")
    for node, leaf in zip(wanted, flat_inputs(gm, batch), strict=True):
        _check_finite(str(node.target), leaf, number)


def _converted(node: fx.Node, leaf: Any, number: int) -> Any:
    captured = node.meta.get("val")
    if not isinstance(leaf, Tensor):
        if isinstance(captured, Tensor) and not isinstance(leaf, bool | int | float):
            raise InputError(
                f"calibration data [{number}]: input {str(node.target)!r} is {_described(leaf)}, the"
                f" model was captured with a tensor of {captured.dtype}"
            )
        return leaf
    _check_finite(str(node.target), leaf, number)
    if any(writes(user) for user in node.users):
        leaf = leaf.clone()  # so that the caller's stays as it is
    if not isinstance(captured, Tensor) or captured.dtype == leaf.dtype:
        return leaf
    if captured.is_floating_point() != leaf.is_floating_point():
        raise InputError(
            f"calibration data [{number}]: input {str(node.target)!r} is {leaf.dtype}, the model was"
            f" captured with {captured.dtype}"
        )
    both_numbers = torch.bool not in (captured.dtype, leaf.dtype)
    return leaf.to(captured.dtype) if both_numbers else leaf


def _check_finite(name: str, leaf: Any, number: int) -> None:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return
    bad = ~torch.isfinite(leaf)
    if not bool(bad.any()):
        return
    # masks that are added hold -inf, and nothing above 0
    if bool((torch.isneginf(leaf) | (leaf <= 0)).all()):
        return
    raise InputError(
        f"calibration data [{number}]: input {name!r} holds NaN or Inf"
        f" ({int(bad.sum())} of {leaf.numel()} values); leave this call out or repair it"
    )


def _advice(given: Batch, wanted: Sequence[fx.Node]) -> str:
    names = [str(node.target) for node in wanted]
    text = f"; the model takes {names}"
    if len(given[0]) == 2 and len(names) == 1 and not given[1]:
        text += (
            ": pass the inputs alone, as [x for x, label in data], or pairs (inputs, target)"
            " together with loss_fn"
        )
    return text


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
