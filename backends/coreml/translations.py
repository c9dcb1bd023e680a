"""Torch ops that coremltools translates with ours, while we convert: it has none, or wrong ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

__all__ = ["TRANSLATED", "our_translations"]

_MODES = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}


def _inputs(context: Any, node: Any) -> list[Any]:
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    return list(_get_inputs(context, node))


def _keyword(context: Any, node: Any, name: str, default: Any = None) -> Any:
    from coremltools.converters.mil.frontend.torch.ops import _get_kwinputs

    value = _get_kwinputs(context, node, name, default=[default])[0]
    return getattr(value, "val", value)


def _integers(*values: Any) -> bool:
    from coremltools.converters.mil.mil import types

    return all(types.is_int(value.dtype) for value in values)


def _promoted(values: list[Any]) -> list[Any]:
    from coremltools.converters.mil.mil.ops.defs._utils import promote_input_dtypes

    return list(promote_input_dtypes(values))


def floor_divide(context: Any, node: Any) -> None:
    """Integers stay integers."""
    from coremltools.converters.mil.mil import Builder

    x, y = _promoted(_inputs(context, node)[:2])
    context.add(Builder.floor_div(x=x, y=y, name=node.name))


def div(context: Any, node: Any) -> None:
    """Rounded quotients of integers are integers."""
    from coremltools.converters.mil.mil import Builder

    x, y = _inputs(context, node)[:2]
    mode = _keyword(context, node, "rounding_mode")
    whole = _integers(x, y)
    if mode == "floor":
        x, y = _promoted([x, y])
        context.add(Builder.floor_div(x=x, y=y, name=node.name))
        return
    x, y = _promoted([Builder.cast(x=v, dtype="fp32") if _integers(v) else v for v in (x, y)])
    if mode is None:
        context.add(Builder.real_div(x=x, y=y, name=node.name))
        return
    quotient = Builder.real_div(x=x, y=y)
    size = Builder.floor(x=Builder.abs(x=quotient))
    rounded = Builder.mul(x=size, y=Builder.sign(x=quotient))
    if whole:
        rounded = Builder.cast(x=rounded, dtype="int32")
    context.add(rounded, node.name)


def prod(context: Any, node: Any) -> None:
    """Of all elements, or along an axis."""
    from coremltools.converters.mil.mil import Builder, types

    values = _inputs(context, node)
    x = values[0]
    dtype = _keyword(context, node, "dtype")
    if types.is_bool(x.dtype):
        x = Builder.cast(x=x, dtype="int32")
    if dtype is not None and dtype in (5, 6, 7):
        x = Builder.cast(x=x, dtype="fp32")
    options: dict[str, Any] = {}
    if len(values) > 1 and values[1] is not None:
        options["axes"] = [int(values[1].val)]
    if len(values) > 2 and values[2] is not None:
        options["keep_dims"] = bool(values[2].val)
    context.add(Builder.reduce_prod(x=x, name=node.name, **options))


def scatter_reduce(context: Any, node: Any) -> None:
    """Updates combined with what is there."""
    from coremltools.converters.mil.mil import Builder

    data, axis, indices, updates, how = _inputs(context, node)[:5]
    data, updates = _promoted([data, updates])
    result = Builder.scatter_along_axis(
        data=data,
        indices=indices,
        updates=updates,
        axis=int(axis.val),
        mode=_MODES[str(getattr(how, "val", how))],
        name=node.name,
    )
    context.add(result)


def prelu(context: Any, node: Any) -> None:
    """Core ML's own op for constant factors of images, else a choice of two."""
    from coremltools.converters.mil.mil import Builder

    x, alpha = _inputs(context, node)[:2]
    if x.rank >= 3 and alpha.val is not None:
        factors = np.broadcast_to(alpha.val, (x.shape[1],)).copy()
        context.add(Builder.prelu(x=x, alpha=factors, name=node.name))
        return
    if x.rank > 1:
        alpha = Builder.reshape(x=alpha, shape=[1, -1, *[1] * (x.rank - 2)])
    below = Builder.mul(x=Builder.minimum(x=x, y=0.0), y=alpha)
    context.add(Builder.add(x=Builder.maximum(x=x, y=0.0), y=below, name=node.name))


def layer_norm(context: Any, node: Any) -> None:
    """Factors and shifts that are computed come behind the norm."""
    from coremltools.converters.mil.mil import Builder

    values = [*_inputs(context, node), None, None, None]
    x, shape, weight, bias, eps = values[:5]
    epsilon = 1e-5 if eps is None else float(eps.val)
    constant = all(value is None or _constant(value) for value in (weight, bias))
    axes = list(range(-len(np.atleast_1d(shape.val)), 0))
    options = {"gamma": weight, "beta": bias} if constant else {}
    given = {name: value for name, value in options.items() if value is not None}
    result = Builder.layer_norm(x=x, axes=axes, epsilon=_of_type(epsilon, x), **given)
    if not constant and weight is not None:
        result = Builder.mul(x=result, y=weight)
    if not constant and bias is not None:
        result = Builder.add(x=result, y=bias)
    result = Builder.identity(x=result, name=node.name)
    context.add((result, None, None) if node.kind == "native_layer_norm" else result, node.name)


def instance_norm(context: Any, node: Any) -> None:
    """Factors and shifts that are computed come behind the norm."""
    from coremltools.converters.mil.mil import Builder

    values = _inputs(context, node)
    x, weight, bias = values[:3]
    epsilon = _of_type(float(values[7].val), x)
    constant = all(value is None or value.val is not None for value in (weight, bias))
    options = {"gamma": weight, "beta": bias} if constant else {}
    given = {name: value for name, value in options.items() if value is not None}
    result = Builder.instance_norm(x=x, epsilon=epsilon, **given)
    shape = [1, -1, *[1] * (x.rank - 2)]
    if not constant and weight is not None:
        result = Builder.mul(x=result, y=Builder.reshape(x=weight, shape=shape))
    if not constant and bias is not None:
        result = Builder.add(x=result, y=Builder.reshape(x=bias, shape=shape))
    context.add(Builder.identity(x=result, name=node.name))


def _constant(value: Any) -> bool:
    source = value.op
    return value.val is not None or (source is not None and source.op_type.startswith("constexpr_"))


def _of_type(number: float, like: Any) -> Any:
    """A number of a value's float type: coremltools refuses epsilons of another."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(like.dtype)(number)


def where(context: Any, node: Any) -> None:
    """Scalars too, which coremltools cannot broadcast."""
    from coremltools.converters.mil.frontend import _utils
    from coremltools.converters.mil.mil import Builder, types

    cond, a, b = _inputs(context, node)
    a, b = _promoted([a, b])
    if not types.is_bool(cond.dtype):
        cond = Builder.cast(x=cond, dtype="bool")
    if any(value.rank for value in (cond, a, b)):
        cond, a, b = _utils.pymil_broadcast_tensors([cond, a, b])
    context.add(Builder.select(cond=cond, a=a, b=b, name=node.name))


def view(context: Any, node: Any) -> None:
    """To no axes too, where coremltools keeps one."""
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil import Builder

    x, shape = _inputs(context, node)[:2]
    empty = not shape if isinstance(shape, list) else shape.shape == (0,)
    if x.rank and empty:
        # coremltools infers the value of one axis alone
        x = x if x.rank == 1 else Builder.reshape(x=x, shape=[1])
        context.add(Builder.squeeze(x=x, axes=[0], name=node.name))
    else:
        ops.view(context, node)


def expand(context: Any, node: Any) -> None:
    """Scalars stay; beside an axis whose size is open, coremltools forgets the sizes of the others."""
    from coremltools.converters.mil.frontend import _utils
    from coremltools.converters.mil.mil import Builder

    x, shape = _inputs(context, node)[:2]
    sizes = getattr(shape, "val", shape)
    sizes = sizes.tolist() if isinstance(sizes, np.ndarray) else sizes
    if isinstance(sizes, list) and not sizes:
        context.add(Builder.identity(x=x, name=node.name))
        return
    times = _repetitions(x, sizes) if isinstance(sizes, list) else None
    if times is None:
        context.add(_utils.pymil_broadcast_to(x, sizes, node.name))
        return
    if len(sizes) > x.rank:
        x = Builder.expand_dims(x=x, axes=list(range(len(sizes) - x.rank)))
    if all(count == 1 for count in times):
        context.add(Builder.identity(x=x, name=node.name))
    else:
        context.add(Builder.tile(x=x, reps=times, name=node.name))


def _repetitions(x: Any, sizes: list[Any]) -> list[int] | None:
    """How often each axis is repeated; None where one of size 1 becomes one of open size."""
    own = [1] * (len(sizes) - x.rank) + list(x.shape)
    wanted = [getattr(size, "val", size) for size in sizes]
    times = [1 if has != 1 else value for has, value in zip(own, wanted, strict=True)]
    if any(value is None for value in times):
        return None
    return [max(int(value), 1) for value in times]  # -1 keeps a size


TRANSLATED: dict[str, Callable[[Any, Any], None]] = {
    "floor_divide": floor_divide,
    "floordiv": floor_divide,
    "div": div,
    "prod": prod,
    "prod.dim_int": prod,
    "scatter_reduce": scatter_reduce,
    "scatter_reduce.two": scatter_reduce,
    "prelu": prelu,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "native_layer_norm": layer_norm,
    "where": where,
    "where.self": where,
    "view": view,
    "view_copy": view,
    "_unsafe_view": view,
    "reshape": view,
    "expand": expand,
    "expand_copy": expand,
}


@contextlib.contextmanager
def our_translations() -> Iterator[None]:
    """Let coremltools use them; its own are put back."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    known = _TORCH_OPS_REGISTRY.name_to_func_mapping
    before = dict(known)
    known.update(TRANSLATED)
    try:
        yield
    finally:
        known.clear()
        known.update(before)
