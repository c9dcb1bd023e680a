"""The grammars of what programs say of sizes: conditions on inputs, and expressions of symbols.

torch evaluates both as Python. What is outside of these grammars is code, not a statement on sizes.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Mapping
from types import CodeType
from typing import Any

import torch

from graphopt.audited import compiled_condition, evaluated

__all__ = ["condition_code", "holds", "is_shape_condition", "is_symbol_expression"]

_LONGEST = 20_000  # characters
_DEEPEST = 100
_LARGEST = 2**64
_MOST_TERMS = 4_096  # of an expression with its products multiplied out
_LARGEST_POWER = 8
_KEY = re.compile(r"[\w.\- ]+")

# what a condition may call, beside methods of inputs that say sizes
_FUNCTIONS: Mapping[str, Any] = {"max": max, "min": min, "abs": abs, "round": round}
_MEMBERS = {
    "math": {"floor", "ceil", "trunc", "sqrt"},
    "torch": {"sym_float", "sym_sqrt", "_sym_sqrt"},
}
_MODULES: Mapping[str, Any] = {"math": math, "torch": torch}
_METHODS = {"size", "dim", "stride", "storage_offset"}
_ARITHMETIC = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.BinOp, ast.Add, ast.Sub, ast.Mult),
    *(ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.IfExp, ast.Load),
)


def is_shape_condition(code: str) -> bool:
    """Whether `code` is arithmetic over sizes of `L[...]` and nothing else."""
    tree = _parsed(code)
    return tree is not None and _Condition().allows(tree.body)


@functools.lru_cache(maxsize=4096)
def condition_code(code: str) -> CodeType:
    """A condition that `is_shape_condition` accepts, for `holds`."""
    return compiled_condition(code)


def holds(condition: CodeType, inputs: Mapping[str, Any]) -> bool:
    """Whether inputs by name meet a condition."""
    return bool(evaluated(condition, {"L": inputs, **_FUNCTIONS, **_MODULES}))


def is_symbol_expression(code: str) -> bool:
    """Whether `code` is a size as torch.export writes it: numbers, symbols and arithmetic.

    Both forms are read: "s0 + 1" and "Add(Symbol('s0', positive=True, integer=True), Integer(1))".
    Multiplied out it has at most 4,096 terms, so that no program of algebra works on it for long.
    """
    tree = _parsed(code)
    return tree is not None and _Symbols().terms(tree.body) <= _MOST_TERMS


def _parsed(code: str) -> ast.Expression | None:
    if not isinstance(code, str) or len(code) > _LONGEST:
        return None
    try:
        tree = ast.parse(code.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    level: list[ast.AST] = [tree]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in ast.iter_child_nodes(outer)]
        if not level:
            return tree
    return None


def _is_number(node: ast.AST) -> bool:
    """A number or truth value of usual size."""
    if not isinstance(node, ast.Constant):
        return False
    value = node.value
    return isinstance(value, bool | int | float) and not abs(value) > _LARGEST


def _small_power(node: ast.AST) -> bool:
    """A constant exponent that makes no number of thousands of digits."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _small_power(node.operand)
    return _is_number(node) and abs(node.value) <= _LARGEST_POWER  # type: ignore[attr-defined]


class _Condition:
    def allows(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Constant):
            return _is_number(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Subscript | ast.Attribute):
            return self._place(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            raised = any(isinstance(inner, ast.Pow) for inner in ast.walk(node.left))
            return not raised and _small_power(node.right) and self.allows(node.left)
        if not isinstance(node, _ARITHMETIC):
            return False
        return all(map(self.allows, ast.iter_child_nodes(node)))

    def _call(self, node: ast.Call) -> bool:
        if node.keywords or not all(map(self.allows, node.args)):
            return False
        function = node.func
        if isinstance(function, ast.Name):
            return function.id in _FUNCTIONS and bool(node.args)
        if not isinstance(function, ast.Attribute):
            return False
        if isinstance(function.value, ast.Name) and function.value.id in _MEMBERS:
            return function.attr in _MEMBERS[function.value.id] and len(node.args) == 1
        return not node.args and function.attr in _METHODS and self._place(function.value)

    def _place(self, node: ast.AST) -> bool:
        """An input, an item of one, or one of its sizes."""
        while True:
            if isinstance(node, ast.Name):
                return node.id == "L"
            if isinstance(node, ast.Subscript):
                index = node.slice
                text = isinstance(index, ast.Constant) and isinstance(index.value, str)
                if text and not _KEY.fullmatch(index.value):  # type: ignore[attr-defined]
                    return False
                if not text and not _is_number(index):
                    return False
                node = node.value
            elif isinstance(node, ast.Call):
                # of a method that takes nothing
                function = node.func
                plain = isinstance(function, ast.Attribute) and function.attr in _METHODS
                if not plain or node.args or node.keywords:
                    return False
                node = function.value  # type: ignore[attr-defined]
            elif isinstance(node, ast.Attribute):
                if node.attr.startswith("_"):
                    return False
                node = node.value
            else:
                return False


_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,6}")
_NAME = re.compile(r"[A-Za-z_]\w{0,30}")
_FLOAT = re.compile(r"-?\d{1,40}(\.\d{0,40})?(e[+-]?\d{1,3})?")
_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift"}
_SUMS = {"Add"}
_PRODUCTS = {"Mul"}
_CALLS = {
    *("Max", "Min", "Abs", "floor", "ceiling", "Mod", "And", "Or", "Not", "Where", "FloorDiv"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan"),
    *("StrictGreaterThan", "GreaterThan", "ModularIndexing", "PythonMod", "CleanDiv", "CeilToInt"),
    *("FloorToInt", "CeilDiv", "RShift", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat"),
    *("TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
    "IsNonOverlappingAndDenseIndicator",
}
_CONSTANTS = {"true", "false", "True", "False", "oo", "int_oo"}
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)
_NEVER = _MOST_TERMS + 1


class _Symbols:
    """Counts terms; what is outside of the grammar has more than there may be."""

    def terms(self, node: ast.AST) -> int:
        match node:
            case ast.Constant():
                return 1 if _is_number(node) else _NEVER
            case ast.Name():
                known = node.id in _CONSTANTS or _SYMBOL.fullmatch(node.id)
                return 1 if known else _NEVER
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not() | ast.Invert()):
                return self.terms(node.operand)
            case ast.Compare():
                return self._atom([node.left, *node.comparators])
            case ast.BoolOp():
                return self._atom(node.values)
            case ast.BinOp(op=ast.Pow()):
                return self._power(node.left, node.right)
            case ast.BinOp() if isinstance(node.op, _OPERATORS):
                left, right = self.terms(node.left), self.terms(node.right)
                product = isinstance(node.op, ast.Mult)
                return min(left * right if product else left + right, _NEVER)
            case ast.Call():
                return self._call(node)
        return _NEVER

    def _call(self, node: ast.Call) -> int:
        if not isinstance(node.func, ast.Name):
            return _NEVER
        name = node.func.id
        if name == "Symbol":
            return 1 if self._symbol(node) else _NEVER
        if name == "Float":
            return 1 if self._float(node) else _NEVER
        if node.keywords:
            return _NEVER
        if name in ("Integer", "Rational"):
            numbers = [arg.operand if isinstance(arg, ast.UnaryOp) else arg for arg in node.args]
            return 1 if numbers and all(map(_is_number, numbers)) else _NEVER
        if name in _POWERS and len(node.args) == 2:
            return self._power(*node.args)
        own = [self.terms(arg) for arg in node.args]
        if name in _SUMS:
            return min(sum(own), _NEVER)
        if name in _PRODUCTS:
            return min(math.prod(own), _NEVER)
        return self._atom(node.args) if name in _CALLS else _NEVER

    def _atom(self, inner: list[ast.expr]) -> int:
        """One term, whatever is in it, if that is in the grammar."""
        return 1 if all(self.terms(node) <= _MOST_TERMS for node in inner) else _NEVER

    def _power(self, base: ast.expr, exponent: ast.expr) -> int:
        raised = (
            isinstance(inner, ast.Pow) or (isinstance(inner, ast.Name) and inner.id in _POWERS)
            for inner in ast.walk(base)
        )
        numbers = [exponent]
        match exponent:
            case ast.Call(func=ast.Name(id="Integer" | "Rational"), args=given):
                numbers = given
        if any(raised) or not all(map(_small_power, numbers)):
            return _NEVER
        return min(self.terms(base) ** _LARGEST_POWER if self.terms(base) > 1 else 1, _NEVER)

    def _symbol(self, node: ast.Call) -> bool:
        name = node.args[0] if len(node.args) == 1 else None
        return (
            isinstance(name, ast.Constant)
            and isinstance(name.value, str)
            and _NAME.fullmatch(name.value) is not None
            and all(
                keyword.arg is not None
                and isinstance(keyword.value, ast.Constant)
                and isinstance(keyword.value.value, bool | None)
                for keyword in node.keywords
            )
        )

    def _float(self, node: ast.Call) -> bool:
        text = node.args[0] if len(node.args) == 1 else None
        if not isinstance(text, ast.Constant):
            return False
        digits = [keyword for keyword in node.keywords if keyword.arg in ("precision", "dps")]
        return (
            _FLOAT.fullmatch(str(text.value)) is not None
            and len(digits) == len(node.keywords)
            and all(_is_number(keyword.value) for keyword in digits)
            and all(0 < keyword.value.value <= 256 for keyword in digits)  # type: ignore[attr-defined]
        )
