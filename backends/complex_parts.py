"""Complex numbers as pairs of real ones, for targets that have none."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.backends.fourier import NoPartsError, Parts, Transforms
from graphopt.ir import torch_private
from graphopt.ir.editor import Editor
from graphopt.ir.recording import own_value
from graphopt.passes.pass_base import Pass

__all__ = ["ComplexAsParts", "is_complex"]

_aten = torch.ops.aten
# on both parts alike where the other operand is real; of a quotient that is the divisor
_BY_REAL = frozenset(
    f"aten.{name}"
    for name in (
        *("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar"),
        *("matmul.default", "mm.default", "bmm.default"),
    )
)
# on both parts alike, beside what torch's own class for parts knows
_ON_EACH = frozenset(
    f"aten.{name}"
    for name in ("roll.default", "unfold.default", "as_strided.default", "lift_fresh_copy.default")
)
_SUMS = frozenset(f"aten.{name}" for name in ("add.Tensor", "sub.Tensor", "rsub.Scalar"))
_NOTHING = frozenset(f"aten.{name}.default" for name in ("detach", "alias", "is_pinned"))
_TRANSFORMS = ("aten.fft_", "aten.stft.", "aten.istft.")  # composites of transforms
_FACTORS = 16  # of a power that is computed as a product


@dataclass(frozen=True)
class ComplexAsParts(Pass):
    """Compute with real and imaginary parts.

    Before:
        %z = view_as_complex(%x)
        %y = mul(%z, %turn)
        %r = view_as_real(%y)

    After:
        %a, %b = select(%x, -1, 0), select(%x, -1, 1)
        %c, %d = sub(mul(%a, %turn_real), mul(%b, %turn_imag)), …
        %r = stack([%c, %d], -1)

    Fourier transforms are products with matrices of cosines and sines, along one axis after the other.
    """

    name: ClassVar[str] = "complex-as-parts"

    @override
    def run(self, edit: Editor) -> None:
        _Parting(edit).run()


def is_complex(value: Any) -> bool:
    """Whether there is a complex tensor in a value.

    Args:
        value: Of any nesting.
    """
    return any(isinstance(x, Tensor) and x.is_complex() for x in pytree.tree_leaves(value))


class _Parting:
    """One run of the pass.

    Attributes:
        edit: The graph's editor.
        parts: Complex value → its parts; value of several results → what stands for each of them.
        transforms: What writes Fourier transforms.
    """

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self.parts: dict[fx.Node, Any] = {}
        self.transforms = Transforms(edit)

    def run(self) -> None:
        """Replace every complex value.

        Raises:
            NoPartsError: There is an op that is not known.
        """
        for node in list(self.edit.gm.graph.nodes):
            about = any(map(is_complex, (x.meta.get("val") for x in (node, *node.all_input_nodes))))
            if about and str(node.target).startswith(_TRANSFORMS):
                self._broken_up(node)
        for node in list(self.edit.gm.graph.nodes):
            if node.op == "get_attr" and is_complex(node.meta.get("val")):
                value = self.edit.value(node).detach().resolve_conj()
                self.parts[node] = tuple(
                    self.edit.constant(f"{node.target}_{name}", part.clone(), like=node)
                    for name, part in (("real", value.real), ("imag", value.imag))
                )
            elif node.op == "call_function" and self._is_about(node):
                self._stand_in(node)
        for node in reversed(self.parts):
            if node.op == "get_attr":
                self.edit.drop(node)
            else:
                self.edit.erase(node)
        if self.parts:
            self.edit.relax_views()  # parts lie in memory in another order

    def _is_about(self, node: fx.Node) -> bool:
        return is_complex(node.meta.get("val")) or any(
            x in self.parts for x in node.all_input_nodes
        )

    def _stand_in(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            results = [self.parts[node.args[0]][node.args[1]]]  # type: ignore[index]
        else:
            results = list(self._results(node))
        if isinstance(node.meta["val"], tuple | list):
            self.parts[node] = results
        elif isinstance(results[0], tuple):
            self.parts[node] = results[0]
        else:
            self.edit.replace(node, results[0])

    def _results(self, node: fx.Node) -> Iterator[Any]:
        """What stands for each result of a call: a node, or two where it is complex."""
        name, rule = str(node.target), _RULES.get(str(node.target))
        split = [argument in self.parts for argument in node.args if isinstance(argument, fx.Node)]
        if rule is not None:
            yield rule(self, node)
        elif not any(x in self.parts for x in node.all_input_nodes):
            yield self._made(node)
        elif node.kwargs:
            yield from self._traced(node)
        elif name in _SUMS and len(node.all_input_nodes) == 1 and isinstance(node.args[1], Number):
            yield self._with_number(node)
        elif not isinstance(node.meta["val"], Tensor | tuple | list):  # a size
            standing = {x: self.parts.get(x, (x,))[0] for x in node.all_input_nodes}
            yield self._call(node, node.target, *fx.map_arg(node.args, standing.__getitem__))
        elif name in _ON_EACH or (
            name in _BY_REAL
            and sum(split) == 1
            and not ("div" in name and not split[0])
            and not any(isinstance(argument, complex) for argument in node.args)
        ):
            yield self._alike(node)
        else:
            yield from self._traced(node)

    def _call(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        return self.edit.call(target, *args, like=node)

    def pair(self, node: fx.Node) -> Parts:
        """The parts of a value, the second one zero where it is real."""
        if node in self.parts:
            real, imag = self.parts[node]
            return real, imag
        return node, self._call(node, _aten.zeros_like.default, node)

    def _viewed(self, node: fx.Node) -> Parts:
        real, imag = (self._call(node, _aten.select.int, node.args[0], -1, part) for part in (0, 1))
        return real, imag

    def _joined(self, node: fx.Node) -> Parts:
        real, imag = node.args
        return real, imag  # type: ignore[return-value]

    def _polar(self, node: fx.Node) -> Parts:
        length, angle = node.args
        ops = (_aten.cos.default, _aten.sin.default)
        turns = [self._call(node, op, angle) for op in ops]
        real, imag = (self._call(node, _aten.mul.Tensor, length, turn) for turn in turns)
        return real, imag

    def _made(self, node: fx.Node) -> Parts:
        """Parts of what is made of real numbers, or of none."""
        value, sources = node.meta["val"], node.all_input_nodes
        if len(sources) == 1 and str(node.target).startswith(("aten.to.", "aten._to_copy.")):
            real = self._call(node, _aten.to.dtype, sources[0], value.dtype.to_real())
            return real, self._call(node, _aten.zeros_like.default, real)
        if sources:
            raise NoPartsError(f"{node.target} makes complex numbers")
        made = node.target(*node.args, **node.kwargs)  # type: ignore[operator]
        real, imag = (
            self.edit.constant(f"{node.name}_{name}", part.clone(), like=node)
            for name, part in (("real", made.real), ("imag", made.imag))
        )
        return real, imag

    def _alike(self, node: fx.Node) -> Parts:
        """An op whose other operands are real, on both parts."""
        real, imag = (
            self._call(
                node,
                node.target,
                *(
                    self.parts[x][part] if isinstance(x, fx.Node) and x in self.parts else x
                    for x in node.args
                ),
            )
            for part in (0, 1)
        )
        return real, imag

    def _with_number(self, node: fx.Node) -> Parts:
        """A sum or difference of a complex value and a number."""
        x, number, *others = node.args
        real, imag = (
            self._call(node, node.target, part, given, *others)
            for part, given in zip(self.parts[x], (number.real, number.imag), strict=True)  # type: ignore[index,union-attr]
        )
        return real, imag

    def _traced(self, node: fx.Node) -> Iterator[Any]:
        """What torch's own class for parts does in an op, as calls of the graph."""
        sources = node.all_input_nodes
        given = [part for x in sources for part in self.parts.get(x, (x,))]
        pairs = torch_private.ComplexTensor
        target: Any = node.target
        if str(target) == "aten.pow.Tensor_Scalar" and node.args[1] in range(1, _FACTORS + 1):
            # by logarithms there would be none of zero
            target = _power

        def called(*values: Any) -> list[Any]:
            left = iter(values)
            standing = {
                x: pairs(next(left), next(left)) if x in self.parts else next(left) for x in sources
            }
            args, kwargs = fx.map_arg((node.args, node.kwargs), standing.__getitem__)
            results = pytree.tree_leaves(target(*args, **kwargs))
            return [(x.re, x.im) if isinstance(x, pairs) else x for x in results]

        yield from self._put(node, called, given)

    def _broken_up(self, node: fx.Node) -> None:
        """Let a composite op give way to the ops that it is made of."""

        def called(*values: Any) -> list[Any]:
            standing = dict(zip(node.all_input_nodes, values, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), standing.__getitem__)
            return pytree.tree_leaves(node.target(*args, **kwargs))  # type: ignore[operator]

        results = self._put(node, called, node.all_input_nodes)
        if isinstance(node.meta["val"], Tensor):
            self.edit.replace(node, results[0])
            return
        for item in list(node.users):
            self.edit.replace(item, results[item.args[1]])  # type: ignore[index]
        self.edit.erase(node)

    def _put(
        self, node: fx.Node, called: Callable[..., list[Any]], given: Sequence[fx.Node]
    ) -> list[Any]:
        """Insert what a function calls before a node.

        Returns:
            What gives each of the function's results.

        Raises:
            NoPartsError: It fails.
        """
        own = [own_value(x) for x in given]
        try:
            # kernels in C++ would fix an open size, or fail of it
            with torch_private.open_size_kernels():
                body = torch_private.tracing.make_fx(called)(*own)
        except Exception as error:
            raise NoPartsError(f"{node.target} on complex numbers: {error}") from error
        standing: dict[fx.Node, Any] = dict(
            zip(body.graph.find_nodes(op="placeholder"), given, strict=True)
        )
        # values of constants, and of what is computed from them alone
        known: dict[fx.Node, Any] = {}

        def stood_in(inner: fx.Node) -> Any:
            if inner not in standing:
                standing[inner] = self.edit.constant(f"{node.name}_part", known[inner], like=node)
            return standing[inner]

        for inner in body.graph.nodes:
            sources = inner.all_input_nodes
            if inner.op == "get_attr":
                known[inner] = getattr(body, str(inner.target))
            elif inner.op == "call_function" and sources and all(x in known for x in sources):
                args, kwargs = fx.map_arg((inner.args, inner.kwargs), known.__getitem__)
                known[inner] = inner.target(*args, **kwargs)
            elif inner.op == "call_function" and str(inner.target) in _NOTHING:
                standing[inner] = stood_in(sources[0])
            elif inner.op == "call_function":
                args, kwargs = fx.map_arg((inner.args, inner.kwargs), stood_in)
                # what the values are written to is read nowhere else
                turns = str(inner.target) == "aten.transpose_.default"
                target = _aten.transpose.int if turns else inner.target
                standing[inner] = self.edit.call(target, *args, like=node, **kwargs)
        results: Any = fx.map_arg(body.graph.output_node().args[0], stood_in)
        return list(results)


def _power(x: Any, exponent: Any) -> Any:
    return functools.reduce(operator.mul, [x] * int(exponent))


_RULES: dict[str, Callable[[_Parting, fx.Node], Any]] = {
    "aten.view_as_complex.default": _Parting._viewed,
    "aten.complex.default": _Parting._joined,
    "aten.polar.default": _Parting._polar,
    "aten._fft_c2c.default": lambda p, node: p.transforms.of_complex(
        node, p.pair(node.all_input_nodes[0])
    ),
    "aten._fft_r2c.default": lambda p, node: p.transforms.of_real(node),
    "aten._fft_c2r.default": lambda p, node: p.transforms.to_real(
        node, p.pair(node.all_input_nodes[0])
    ),
}
