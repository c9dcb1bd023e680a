"""Capture: a model, an exported program or a .pt2 file becomes a `Program`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

import graphopt.ir.ops  # noqa: F401 - saved programs may use our ops
from graphopt.capture.archive_check import check_archive, is_trusted, trusting
from graphopt.capture.entry_points import captured_set, with_shared_tensors
from graphopt.capture.example_check import check_example
from graphopt.capture.export_errors import without_warnings
from graphopt.capture.exporting import (
    as_module,
    buffers_restored,
    copied,
    evaluation_mode,
    exported_open,
    flat,
)
from graphopt.capture.foreign import missing_module, without_cache
from graphopt.capture.inference_form import to_inference_form
from graphopt.capture.input_sizes import size_conditions, static_dims
from graphopt.capture.mapped_archive import ALONE, read_programs
from graphopt.errors import CaptureError, GraphOptError, InputError
from graphopt.exclusive import exclusively
from graphopt.ir.captured_module import CapturedModule, InputGuards, holder_of
from graphopt.ir.decoded_tensor import with_plain_tensors
from graphopt.ir.guards import by_signature, input_places
from graphopt.ir.program import Program, Provenance, share_graph
from graphopt.ir.program_set import ProgramSet
from graphopt.ir.quick_graphs import quick_graphs
from graphopt.ir.torch_private import symbolic_config, warn_of_untested

__all__ = ["capture"]

_log = logging.getLogger(__name__)
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


@overload
def capture(
    model: nn.Module | ExportedProgram | str | Path,
    example_inputs: _Args | Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
    *,
    trust: bool = False,
) -> Program: ...


@overload
def capture(model: Mapping[str, Any], *, dynamic_shapes: Any = "auto") -> ProgramSet: ...


@exclusively
@quick_graphs()
def capture(
    model: nn.Module | ExportedProgram | Mapping[str, Any] | str | Path,
    example_inputs: _Args | Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
    *,
    trust: bool = False,
) -> Any:
    """Capture a model as the `Program` that passes, searches and backends work on.

    Args:
        model: A module, an exported program, or the path of a .pt2 file; or several entry points,
            {"prefill": (module or method, example), "decode": …}, that share weights and state.
        example_inputs: Positional inputs of one call; only needed for a module, or for a program
            that was exported without inputs.
        example_kwargs: Keyword inputs of that call.
        dynamic_shapes: "auto" leaves every dimension open that the model allows, also where the
            example has batch 1; None fixes all of them; anything else goes to `torch.export`.
        trust: Load a .pt2 file as it is. Otherwise it is checked first: a file whose graph, sizes,
            inputs or constants could run code is refused. Only for one's own files.

    Returns:
        A program that shares the model's tensors; the model itself is not changed. It is captured in
        evaluation mode. A `ProgramSet` of several entry points, given or in one file.

    Raises:
        CaptureError: The model cannot be exported, and the message names op, module and source line;
            or the file is no program, or holds what could run code.
        InputError: Example inputs are missing, or the model fails on them.

    Examples:
        >>> program = capture(model, example)
        >>> torch.equal(program.module()(*example), model(*example))
        True
    """
    if isinstance(model, Mapping):
        return captured_set(model, capture, dynamic_shapes)
    if isinstance(model, str | Path):
        with trusting(trust):
            return _from_file(Path(model), example_inputs, example_kwargs)
    if isinstance(model, ExportedProgram):
        return _from_exported(copied(model), "ExportedProgram", example_inputs, example_kwargs)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, nn.Module):
        raise InputError(
            f"cannot capture a {type(model).__name__}; give a module, an ExportedProgram or a .pt2"
        )
    warn_of_untested()
    if example_inputs is None and not example_kwargs:
        raise InputError(f"example_inputs are needed to capture {type(model).__name__}")
    args, kwargs = _as_args(example_inputs), dict(example_kwargs or {})
    if isinstance(model, CapturedModule):
        # it is a captured graph already; its metadata would only suffer from another export
        plain = with_plain_tensors(share_graph(model))
        return Program(plain, args, kwargs, Provenance(type(model).__name__))
    with evaluation_mode(model), without_cache(model), buffers_restored(model), torch.no_grad():
        exported, unlifted = exported_open(model, args, kwargs, dynamic_shapes)
    return _to_program(exported, unlifted, type(model).__name__, (args, kwargs))


def _as_args(example_inputs: _Args | Tensor | None) -> _Args:
    if example_inputs is None:
        return ()
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if not isinstance(example_inputs, tuple | list):
        raise InputError(f"example_inputs must be a tuple, got {type(example_inputs).__name__}")
    return tuple(example_inputs)


def _from_file(path: Path, args: Any, kwargs: Mapping[str, Any] | None) -> Program | ProgramSet:
    if not path.exists():
        raise InputError(f"no such file: {path}")
    if not is_trusted():
        check_archive(path)
    try:
        with without_warnings("torch.export"):
            programs = read_programs(path)
        given = args is not None or bool(kwargs)
        if given and list(programs) != [ALONE]:
            raise InputError(
                f"{path} has several entry points ({', '.join(programs)}), each with its example;"
                " capture it without example inputs"
            )
        for exported in programs.values():
            if not given and exported.example_inputs is not None:
                check_example(exported, *exported.example_inputs)
        if list(programs) == [ALONE]:
            return _from_exported(programs[ALONE], str(path), args, kwargs)
        with_shared_tensors(programs)
        return ProgramSet(
            {
                name: _from_exported(exported, f"{path}: {name}", None, None)
                for name, exported in programs.items()
            }
        )
    except CaptureError as error:
        raise CaptureError(f"{path}: {error}") from error
    except GraphOptError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{path} is not a program that torch.export can load: {error}{missing_module(path)}"
        ) from error


def _from_exported(
    exported: ExportedProgram,
    source: str,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
) -> Program:
    saved_args, saved_kwargs = exported.example_inputs or ((), {})
    given = example_inputs is not None or bool(example_kwargs)
    args = _as_args(example_inputs) if given else tuple(saved_args)
    kwargs = dict(example_kwargs or {}) if given else dict(saved_kwargs)
    with (
        symbolic_config.patch(  # type: ignore[attr-defined]
            backed_size_oblivious=True
        ),
        torch.no_grad(),
    ):
        exported = flat(exported)
    return _to_program(exported, as_module(exported), source, (args, kwargs))


def _to_program(
    exported: ExportedProgram, unlifted: fx.GraphModule, source: str, example: tuple[_Args, _Kwargs]
) -> Program:
    args, kwargs = example
    names = _input_names(exported)
    # torch.export's own tracer cannot be constructed again when a saved module is loaded
    unlifted.graph._tracer_cls = None
    to_inference_form(unlifted.graph)
    root, constants = _shared_state(unlifted)
    module = CapturedModule(root, unlifted.graph)
    for path in (*exported.graph_signature.non_persistent_buffers, *constants):
        try:
            holder, name = holder_of(module, path)
        except AttributeError:
            continue
        holder._non_persistent_buffers_set.add(name)
    module.graph.lint()
    module.recompile()
    module.eval()
    places = input_places(module, args, kwargs)
    conditions = [
        *getattr(exported, "_guards_code", ()),
        *size_conditions(exported, list(places)),
    ]
    guards = InputGuards(_signature_names(module), by_signature(conditions, places))
    # a guard that the example itself breaks comes from capturing with a larger batch
    guards = guards.without(guards.violated(args, kwargs))
    if guards.conditions:
        module.register_forward_pre_hook(guards, with_kwargs=True)
    provenance = Provenance(source, static_dims=tuple(static_dims(exported, names)))
    if provenance.static_dims:
        _log.info("%s: fixed input dimensions: %s", source, ", ".join(provenance.static_dims))
    return Program(module, args, kwargs, provenance)


def _shared_state(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """A module tree of new parameters over the same storage, so that `.to()` cannot reach back.

    Returns:
        The tree, and the names of constants that were no parameters or buffers of the model.
    """
    root = nn.Module()
    fresh: dict[int, Tensor] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    unused = _unused_constants(module)
    for path, tensor in {**parameters, **buffers}.items():
        if path in unused and path in parameters:
            tensor = _twin(tensor, path, parameters, unused)
        if id(tensor) not in fresh:
            alias = tensor.detach()
            fresh[id(tensor)] = (
                nn.Parameter(alias, tensor.requires_grad) if path in parameters else alias
            )
        holder, name = holder_of(root, path, create=True)
        if path in parameters:
            holder.register_parameter(name, fresh[id(tensor)])  # type: ignore[arg-type]
        else:
            holder.register_buffer(name, fresh[id(tensor)])
    constants = []
    for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
        path = str(node.target)
        if node.op not in ("get_attr", "call_module") or path in parameters or path in buffers:
            continue
        holder, name = holder_of(module, path)
        value = getattr(holder, name)
        holder, name = holder_of(root, path, create=True)
        if isinstance(value, Tensor):
            constants.append(path)
            holder.register_buffer(name, value.detach())
        else:
            setattr(holder, name, value)
    return root, constants


def _unused_constants(module: nn.Module) -> set[str]:
    if not isinstance(module, torch.fx.GraphModule):
        return set()
    nodes = list(module.graph.find_nodes(op="get_attr"))
    return {str(node.target) for node in nodes if not node.users}


def _twin(tensor: Tensor, path: str, parameters: Mapping[str, Tensor], unused: set[str]) -> Tensor:
    """The used parameter that an unused one repeats: a tie that saving a program has cut."""
    for other, candidate in parameters.items():
        same_kind = candidate.shape == tensor.shape and candidate.dtype == tensor.dtype
        if other != path and other not in unused and same_kind and torch.equal(candidate, tensor):
            return candidate
    return tensor


def _input_names(exported: ExportedProgram) -> list[str]:
    return [str(name) for name in exported.graph_signature.user_inputs]


def _signature_names(module: CapturedModule) -> list[str]:
    return [name for name in inspect.signature(module.forward).parameters if name != "self"]
