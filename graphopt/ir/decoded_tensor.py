"""DecodedTensor: a parameter that keeps a stored form and has its values only while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.ir.torch_private import FakeTensorMode, without_torch_function

_Module = TypeVar("_Module", bound=nn.Module)

__all__ = ["Decodable", "DecodedTensor", "fake_of", "settle", "settled", "with_plain_tensors"]


class Decodable(Protocol):
    """What stands for a dense tensor, such as codes with their table."""

    def dense(self) -> Tensor:
        """The values, in new memory."""
        ...


class _Values:
    """What a tensor and its aliases hold: a stored form, or the values once they were written to."""

    def __init__(self, source: Decodable | Tensor, *, fixed: bool = False) -> None:
        self.source = source
        self.fixed = fixed

    def read(self) -> Tensor:
        source = self.source
        return source if isinstance(source, Tensor) else source.dense()

    def keep(self) -> Tensor:
        """The values, which stay from now on."""
        self.source = values = self.read()
        return values


class DecodedTensor(Tensor):
    """A tensor whose values are decoded whenever an op reads them, and freed after it.

    It has the size, type and place of its values, takes gradients as any leaf, and copies share the
    stored form, which nothing changes. What writes to it, or may (`x[0] = 1`, `x.view(-1)`,
    `x.numpy()`, `x.data_ptr()`), lets the values stay: from then on it takes their memory, once for
    all its aliases. It is saved as the plain tensor that it stands for.

    Args:
        source: The stored form.
        like: A tensor of the size, type and device that the values have, which are contiguous.
        fixed: Nothing writes through arrays of it: `x.numpy()` gives a copy, and no values stay.
    """

    _held: _Values

    @staticmethod
    def __new__(  # noqa: D102 - see the class
        cls, source: Decodable, like: Tensor, *, fixed: bool = False
    ) -> Self:
        return cls._of(_Values(source, fixed=fixed), like, None)

    @classmethod
    def _of(cls, held: _Values, like: Tensor, strides: tuple[int, ...] | None) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=strides, dtype=like.dtype, device=like.device
        )
        made._held = held
        return made

    def _alias(self, held: _Values) -> Self:
        return self._of(held, self, self.stride())

    @property
    def is_decoded(self) -> bool:
        """Whether the values have stayed."""
        return isinstance(self._held.source, Tensor)

    @property
    def source(self) -> Decodable | Tensor:
        """The stored form, or the values once they have stayed."""
        return self._held.source

    @property
    @override
    def data(self) -> Tensor:
        """An alias without gradients; given another tensor, that takes the place of the values."""
        return self._alias(self._held)

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._held = value._held if isinstance(value, DecodedTensor) else _Values(value)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._held.read().detach().requires_grad_(self.requires_grad))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            source = self._held.source
            values = source.clone() if isinstance(source, Tensor) else source
            held = _Values(values, fixed=self._held.fixed)
            copied = self._alias(held).requires_grad_(self.requires_grad)
            if isinstance(self, nn.Parameter):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        values = self._held.read()
        if isinstance(self, nn.Parameter):
            values = nn.Parameter(values, self.requires_grad)
        return values.__reduce_ex__(protocol)

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = list(args)
        if given and isinstance(given[0], DecodedTensor):
            if func in _ARRAYS and given[0]._held.fixed:
                given[0] = given[0]._held.read()
            elif func in _MEMORY:
                given[0] = given[0]._held.keep()
            elif func in _VIEWS:
                given[0]._held.keep()
        with without_torch_function():
            return func(*given, **dict(kwargs or {}))

    @classmethod
    @override
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func._schema.name == _DETACH:
            return args[0].data
        written: dict[int, Tensor] = {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                value = args[place] if place < len(args) else named.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for each in pytree.tree_leaves(value):
                        if isinstance(each, DecodedTensor):
                            written[id(each._held.keep())] = each
        read = pytree.tree_map_only(DecodedTensor, lambda each: each._held.read(), (args, named))
        result = func(*read[0], **read[1])
        return pytree.tree_map_only(Tensor, lambda each: written.get(id(each), each), result)


_DETACH = "aten::detach"
_ARRAYS: set[Any] = {Tensor.numpy, Tensor.__array__}
# what hands out the memory itself
_MEMORY = {
    *(*_ARRAYS, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage),
    *(Tensor.is_shared, Tensor.share_memory_, Tensor.pin_memory, Tensor.__dlpack__),
}
# what a later write may go through
_VIEWS = {
    *(Tensor.__getitem__, Tensor.__setitem__, Tensor.view, Tensor.view_as, Tensor.reshape),
    *(Tensor.flatten, Tensor.narrow, Tensor.select, Tensor.squeeze, Tensor.unsqueeze),
    *(Tensor.transpose, Tensor.t, Tensor.permute, Tensor.T.__get__, Tensor.mT.__get__),  # type: ignore[attr-defined]
    *(Tensor.split, Tensor.chunk, Tensor.unbind, Tensor.diagonal, Tensor.expand, Tensor.unfold),
}


def settled(tensor: Tensor) -> Tensor:
    """The tensor, or the plain one that a `DecodedTensor` stands for, a parameter if it is one."""
    if not isinstance(tensor, DecodedTensor):
        return tensor
    values = tensor._held.read()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, tensor.requires_grad)
    return values


def fake_of(tensor: Tensor, mode: FakeTensorMode) -> Any:
    """A fake tensor of the size, type and place of one, which is not read for it."""
    if not isinstance(tensor, DecodedTensor):
        return mode.from_tensor(tensor.detach(), static_shapes=True)
    with mode:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def settle(parameter: Tensor, values: Tensor) -> None:
    """Give a tensor other values in place, plain ones; it stays the same object.

    Where something refers to it weakly, as torch.export does, a `DecodedTensor` stays one around them.
    """
    if not isinstance(parameter, DecodedTensor):
        parameter.data = values
        return
    plain = nn.Parameter(values, parameter.requires_grad)
    plain.grad = parameter.grad
    try:
        torch.utils.swap_tensors(parameter, plain)
    except RuntimeError:
        parameter.data = values


def with_plain_tensors(module: _Module) -> _Module:
    """Let a module of its own hold plain parameters; tied ones stay tied."""
    plain: dict[int, Tensor] = {}
    for holder in module.modules():
        for name, parameter in holder._parameters.items():
            if isinstance(parameter, DecodedTensor):
                made = plain.setdefault(id(parameter), settled(parameter))
                holder._parameters[name] = made
    return module
