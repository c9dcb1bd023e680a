"""Conditions on the sizes of inputs, as torch.export writes them, by where a call has its tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from graphopt.ir.conditions import condition_code, holds, is_shape_condition

__all__ = ["by_signature", "input_places"]

_PLACE = re.compile(r"L(?:\['[^']+'\]|\[\d+\]|\.(?!size\b|ndim\b|dim\b)\w+)+")
# the tracer assumes that an open size is neither 0 nor 1; that a graph of 2 serves 1 is tried when it
# is captured
_NOT_ONE = re.compile(r"(?:(?:2 <=|1 <|1 !=) )?L\S*\.size\(\)\[\d+\](?: (?:!= 1|> 1|>= 2))?")
# neither is a product of sizes, or a size behind a stride
_UNEQUAL = re.compile(r"[^<>=!]+ != [^<>=!]+")
_SIZE = re.compile(r"L(?:\['[^']+'\]|\[\d+\]|\.(?!size\b|ndim\b|dim\b)\w+)+\.size\(\)\[\d+\]")
_ITEM = re.compile(r"L\['([^']+)'\]\[(\d+)\]")
_KEYWORD = re.compile(r"L\['[^']+'\]\['([^']+)'\]")


def input_places(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Place, as "L['x'][0]", → value of each leaf of a call's inputs, in the order of the graph's.

    Args:
        module: What is called; its signature says the names.
        args: Inputs.
        kwargs: Keyword inputs.
    """
    names = [*inspect.signature(module.forward).parameters]
    places = {}
    leaves: Any = pytree.tree_leaves_with_path((tuple(args), dict(kwargs)))
    for (side, first, *rest), leaf in leaves:
        name = names[first.idx] if side.idx == 0 else first.key
        places[f"L[{name!r}]" + pytree.keystr(tuple(rest))] = leaf
    return places


def by_signature(conditions: Iterable[str], places: Mapping[str, Any]) -> list[str]:
    """Conditions over the places of a signature; what speaks of anything else is left out.

    A captured graph has names of its own where the model takes `*args` or `**kwargs`: "args_0" is
    what the model calls `args[0]`, and the tracer `flat_args[0]`.

    Args:
        conditions: Code that reads sizes of "L[…]".
        places: Those of the captured graph, from `input_places`.
    """
    known = list(dict.fromkeys(_Names(places).renamed(code) for code in conditions))
    return [
        code
        for code in known
        if all(place in places for place in _PLACE.findall(code))
        and not _NOT_ONE.fullmatch(code.strip())
        and not _fails_for_ones(code)
    ]


def _fails_for_ones(code: str) -> bool:
    """Whether a condition says that two numbers differ which are equal where every size is 1."""
    if not _UNEQUAL.fullmatch(code.strip()) or not is_shape_condition(code):
        return False
    ones = _SIZE.sub("1", code)
    if "L[" in ones:
        return False
    try:
        return not holds(condition_code(ones), {})
    except ArithmeticError:  # by zero: it says something of other sizes
        return False


class _Names:
    def __init__(self, places: Mapping[str, Any]) -> None:
        self.listed = list(places)
        self.names = set(places)

    def renamed(self, code: str) -> str:
        if "L['flat_args']" not in self.names:
            code = re.sub(r"L\['flat_args'\]\[(\d+)\]", self._by_number, code)
        return _KEYWORD.sub(self._keyword, _ITEM.sub(self._item, code))

    def _by_number(self, found: re.Match[str]) -> str:
        number = int(found[1])
        return self.listed[number] if number < len(self.listed) else found[0]

    def _item(self, found: re.Match[str]) -> str:
        return self._known_or(f"L['{found[1]}_{found[2]}']", found[0])

    def _keyword(self, found: re.Match[str]) -> str:
        return self._known_or(f"L['{found[1]}']", found[0])

    def _known_or(self, place: str, other: str) -> str:
        # a longer place may begin with this one
        if any(name.startswith(other) for name in self.names):
            return other
        known = any(name.startswith(place) for name in self.names)
        return place if known else other
