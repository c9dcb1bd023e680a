"""Export of a model with the most open sizes that it allows, in functional ops."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from graphopt.capture.composites import break_up_composites
from graphopt.capture.export_errors import explain_export_error, quiet_failure
from graphopt.capture.free_names import with_free_names
from graphopt.capture.given_masks import masks_as_given
from graphopt.capture.in_place import make_functional
from graphopt.capture.inference_form import dropout_kept, is_plain
from graphopt.capture.input_sizes import settle_sizes
from graphopt.capture.quick_shapes import quick_shapes
from graphopt.capture.quick_sizes import quick_sizes
from graphopt.capture.quick_traces import quick_traces
from graphopt.capture.regions import regions_by_op
from graphopt.capture.tied_constants import tie_constants
from graphopt.errors import CaptureError, InputError
from graphopt.ir import op_info
from graphopt.ir.torch_private import symbolic_config

__all__ = [
    "as_module",
    "buffers_restored",
    "copied",
    "evaluation_mode",
    "exported_open",
    "flat",
    "run_on_copies",
]

_log = logging.getLogger(__name__)
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Let no module of a model be in training; what was, is again afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass writes into buffers, such as caches and counters."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    places = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        for module, name, buffer in places:
            module._buffers[name] = buffer
        for buffer, value in saved:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def run_on_copies(model: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    """Outputs on copies of the inputs, with the same random numbers every time."""
    copies = pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*copies[0], **copies[1])


def exported_open(
    model: nn.Module,
    args: _Args,
    kwargs: _Kwargs,
    dynamic_shapes: Any,
) -> tuple[ExportedProgram, fx.GraphModule]:
    """Export with the most open shapes that give the model's own outputs on the example.

    Returns:
        The program, and its module, which nothing else holds.
    """
    if not (isinstance(dynamic_shapes, str) and dynamic_shapes == "auto"):
        exported = _attempt(model, args, kwargs, dynamic_shapes, oblivious=True)
        return exported, as_module(exported)
    try:
        with buffers_restored(model):
            expected = run_on_copies(model, args, kwargs)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} fails on the example inputs: {type(error).__name__}: {error}"
        ) from error
    # torch.export specialises on sizes of 1, so a batch of 1 is captured as a batch of 2
    attempts: list[Callable[[], ExportedProgram]] = [
        partial(_attempt, model, *doubled, "auto", oblivious=True)
        for doubled in _double_batch(args, kwargs)
    ]
    attempts.append(lambda: _attempt(model, args, kwargs, "auto", oblivious=True))
    attempts.append(lambda: _attempt(model, args, kwargs, None, oblivious=False))
    for attempt in attempts[:-1]:
        try:
            exported = attempt()
            module = as_module(exported)
            with buffers_restored(model):
                outputs = run_on_copies(module, args, kwargs)
        except Exception as error:
            _log.debug("open shapes refused: %s: %s", type(error).__name__, error)
            continue
        if _same(expected, outputs):
            signature = exported.graph_signature
            if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
                module = as_module(exported)  # what ran has moved on
            return exported, module
        _log.debug("open shapes changed the outputs on the example; trying narrower ones")
    exported = attempts[-1]()
    return exported, as_module(exported)


def as_module(exported: ExportedProgram) -> fx.GraphModule:
    """The program as a module that can be called."""
    return exported.module(check_guards=False)


def _attempt(
    model: nn.Module,
    args: _Args,
    kwargs: _Kwargs,
    dynamic_shapes: Any,
    *,
    oblivious: bool,
) -> ExportedProgram:
    shapes = dynamic_shapes
    if isinstance(dynamic_shapes, str):
        shapes = ShapesCollection()
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.ndim:
                shapes[leaf] = dict.fromkeys(range(leaf.ndim), Dim.AUTO)
    try:
        with (
            symbolic_config.patch(  # type: ignore[attr-defined]
                backed_size_oblivious=oblivious
            ),
            quick_shapes(),
            quick_sizes(),
            quick_traces(),
            masks_as_given(),
            quiet_failure(),
        ):
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            settle_sizes(exported)
            tie_constants(exported)
            return flat(exported)
    except Exception as error:
        raise CaptureError(explain_export_error(model, error)) from error


def copied(exported: ExportedProgram) -> ExportedProgram:
    """A program with a graph of its own; tensors are shared."""
    graph = copy.deepcopy(exported.graph)
    for own, node in zip(graph.nodes, exported.graph.nodes, strict=True):
        own.name = node.name  # a copy gives "input", a builtin, another one
    return ExportedProgram(
        root=exported.graph_module,
        graph=graph,
        graph_signature=copy.deepcopy(exported.graph_signature),
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


def flat(exported: ExportedProgram) -> ExportedProgram:
    """The program in functional ops, none of which hides a weight, with names that a module can have.

    Args:
        exported: A program of one's own, which may be changed.
    """
    with_free_names(exported)
    make_functional(exported.graph)
    if is_plain(exported.graph):
        return exported
    if break_up_composites(exported, _composites()):
        return exported
    with dropout_kept(exported), regions_by_op():
        return exported.run_decompositions(_decompositions())


def _composites() -> frozenset[Any]:
    """Ops that hide a weight."""
    return frozenset(op_info.targets(lambda info: info.composite))


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """What capture breaks up: only ops whose weights would otherwise be out of sight.

    Running even an empty table flattens regions such as `wrap_with_set_grad_enabled`.
    """
    # looking an op up would have torch list every composite op of every library; taking it out does not
    known = torch.export.default_decompositions()
    rules = {op: known.pop(op, None) for op in _composites()}
    return {op: rule for op, rule in rules.items() if rule is not None}


def _double_batch(args: _Args, kwargs: _Kwargs) -> Iterator[tuple[_Args, _Kwargs]]:
    """The example with its batch of 1 repeated, in the ways that there are.

    The batch is the first axis of every tensor; or the second one of those that count layers first,
    as the hidden states of recurrent layers do; or the second one of all, where time comes first.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim]
    first, *others = tensors or [-1]
    ways = [dict.fromkeys(tensors, 0)]
    if others and all(leaves[place].ndim == 3 for place in tensors):
        ways += [{first: 0, **dict.fromkeys(others, 1)}, dict.fromkeys(tensors, 1)]
    for axes in ways:
        if not tensors or any(leaves[place].shape[axis] != 1 for place, axis in axes.items()):
            continue
        doubled = list(leaves)
        for place, axis in axes.items():
            doubled[place] = torch.cat([leaves[place]] * 2, axis)
        yield pytree.tree_unflatten(doubled, spec)


def _same(expected: Any, outputs: Any) -> bool:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(outputs), strict=False)
    for want, got in pairs:
        if not isinstance(want, Tensor):
            continue
        if want.shape != got.shape or want.dtype != got.dtype:
            return False
        finite = want[torch.isfinite(want)] if want.is_floating_point() else want.new_empty(0)
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        if not torch.allclose(want, got, rtol=1e-3, atol=1e-4 * scale, equal_nan=True):
            return False
    return True
