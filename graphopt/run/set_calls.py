"""Data for several entry points, as calls of the one graph that holds them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import InputError
from graphopt.ir.program_set import ProgramSet, own_state
from graphopt.ir.state import carried_state, state_values, with_state
from graphopt.run.batches import Batch, CallSequence, StatefulCall
from graphopt.run.calibration_data import read_calls

__all__ = ["merged_calls", "method_calls"]

_Call = tuple[list[Any], Mapping[str, Tensor]]


def method_calls(
    programs: ProgramSet, calls: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, StatefulCall]]:
    """Calls of methods, one behind the other, with the state before each.

    Args:
        programs: The methods.
        calls: (method, inputs) of each.

    Raises:
        InputError: There is no such method, or inputs do not fit.
    """
    state: dict[str, Tensor] = {}
    for pair in calls:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or pair[0] not in programs.methods:
            raise InputError(
                f"calls of several entry points are pairs (name, inputs), the names being"
                f" {list(programs.methods)}"
            )
        name, inputs = pair
        gm = programs[name].graph_module
        (batch,) = read_calls(gm, [inputs])
        with carried_state(gm), torch.no_grad():
            own = state_values(gm)
            with_state(gm, {key: state.get(key, value) for key, value in own.items()})
            start = {key: value.clone() for key, value in state_values(gm).items()}
            gm(*batch[0], **batch[1])
            state |= {key: value.detach().clone() for key, value in state_values(gm).items()}
        yield name, StatefulCall(batch, start)


def merged_calls(programs: ProgramSet, data: Any) -> list[Any]:
    """Calls of `programs.merged()`: the first of each method together, the second, and so on.

    Where methods have different numbers of calls, those of the shorter ones come again.

    Args:
        programs: The methods.
        data: Method → calls as for `read_calls`; or a list of (method, inputs) and of
            `CallSequence` of such. A method without any takes its example.

    Raises:
        InputError: There is no such method, or inputs do not fit.
    """
    queues: dict[str, list[_Call]] = {name: [] for name in programs}
    if isinstance(data, Mapping):
        unknown = sorted(set(data) - set(queues))
        if unknown:
            raise InputError(f"no entry points {unknown}; there are {list(queues)}")
        for name, calls in data.items():
            for batch in read_calls(programs[name].graph_module, calls):
                queues[name].append((pytree.tree_leaves(tuple(batch)), _start(batch)))
    else:
        for each in data:
            sequence = each if isinstance(each, CallSequence) else [each]
            for name, batch in method_calls(programs, sequence):
                queues[name].append((pytree.tree_leaves(tuple(batch)), _start(batch)))
    for name, program in programs.methods.items():
        if not queues[name]:
            example = (program.example_args, program.example_kwargs)
            queues[name].append((pytree.tree_leaves(example), {}))
    made: list[Any] = []
    for number in range(max(map(len, queues.values()))):
        leaves: list[Any] = []
        start: dict[str, Tensor] = {}
        for name, queue in queues.items():
            own, state = queue[number % len(queue)]
            leaves += own
            start |= {own_state(name, key): value for key, value in state.items()}
        made.append(StatefulCall((tuple(leaves), {}), start) if start else tuple(leaves))
    return made


def _start(batch: Batch) -> Mapping[str, Tensor]:
    return getattr(batch, "state", None) or {}
