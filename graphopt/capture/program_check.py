"""What the JSON of a saved program may say: names, ops, sizes and data, and nothing that would run."""

from __future__ import annotations

import math
import operator
import re
import zipfile
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from graphopt.audited import Limits, parse_json
from graphopt.errors import InputError
from graphopt.ir.conditions import is_shape_condition, is_symbol_expression
from graphopt.ir.torch_private import HigherOrderOperator, OpOverload

__all__ = ["check_payloads", "check_program"]

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_PLAIN = re.compile(r"[^\x00-\x1f\x7f'\"\\{}`\u2028\u2029]*")
_PRINTABLE = re.compile(r"[^\x00-\x08\x0b-\x1f\x7f]*")
_MOST_EXPANDED = 1 << 29  # elements of tensors beyond their bytes
_FILE = re.compile(r"(weight|tensor)_\d+")
# texts that torch writes into the code of a graph, or looks attributes up by
_IDENTIFIERS = {"name", "as_name"}
_OPS_OF_TEXTS = {"aten", "prims", "graphopt", "quantized_decomposed", "coreai", "torchao"}
_CLOSED = {"prim", "inductor", "profiler", "c10d", "symm_mem", "static_runtime", "export", "_test"}
_FILES = {"aten::from_file", "aten::save", "aten::_print", "aten::warn"}
_HIGHER_ORDER = {
    *("cond", "while_loop", "scan", "map_impl", "associative_scan", "invoke_subgraph"),
    *("wrap_with_set_grad_enabled", "wrap_with_autocast", "flex_attention", "auto_functionalized"),
    *("auto_functionalized_v2", "with_effects", "out_dtype", "hints_wrapper", "strict_mode"),
    *("tag_activation_checkpoint", "wrap_activation_checkpoint", "run_const_graph"),
    *("while_loop_stack_output", "foreach_map"),
}
_OP = re.compile(r"torch\.ops\.([A-Za-z]\w*|_[A-Za-z]\w*)\.(\w+)(?:\.(\w+))?")
_PREDISPATCH = re.compile(
    r"torch\._functorch\.predispatch\."
    r"(?:_add_batch_dim|_remove_batch_dim|_vmap_(?:increment|decrement)_nesting)"
)
_FACTORIES = {"list", "dict", "int", "float", "set", "str", "tuple", "bool"}
_SPEC = Limits(characters=4 << 20, depth=200, values=1_000_000)


def _names_of_functions() -> set[str]:
    """Functions of numbers that graphs call on sizes, as torch.export writes them."""
    words = "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift"
    symbolic = "sym_not sym_int sym_float sym_ite sym_max sym_min sym_sum sym_sqrt _sym_sqrt"
    names = {f"_operator.{name}" for name in words.split() if hasattr(operator, name)}
    names |= {f"torch.{name}" for name in symbolic.split() if hasattr(torch, name)}
    numbers = ("trunc", "ceil", "floor", "sqrt")
    return names | {f"math.{name}" for name in numbers if hasattr(math, name)}


_FUNCTIONS = _names_of_functions()


def check_program(program: Any, place: str) -> None:
    """Refuse what torch.export.save would not write, in the JSON of a program.

    Raises:
        InputError: There is such a thing; the message says where and what.
    """
    if not isinstance(program, dict):
        raise InputError(f"{place} holds no program")
    _Walk(place).mapping(program, ())


def check_payloads(config: Any, place: str, members: Mapping[str, zipfile.ZipInfo]) -> set[str]:
    """Check the list of stored tensors; the members that are pickles come back.

    Args:
        config: The list.
        place: Its name.
        members: All that the archive has, by name.

    Raises:
        InputError: It holds something else.
    """
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise InputError(f"{place} holds no list of tensors")
    folder = place.rpartition("/")[0]
    pickled, more = set(), 0
    walk = _Walk(place)
    for name, payload in config["config"].items():
        walk.text(name, ("config",))
        file = payload.get("path_name") if isinstance(payload, dict) else None
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise InputError(f"{place}: {name!r} is stored as {file!r}, which is no tensor")
        if payload.get("use_pickle"):
            pickled.add(f"{folder}/{file}")
        walk.mapping(payload, ("config", name))
        stored = members.get(f"{folder}/{file}")
        more += max(_elements(payload) - (stored.file_size if stored else 0), 0)
    if more > _MOST_EXPANDED:
        raise InputError(f"{place}: tensors of {more:,} elements more than there are bytes of them")
    return pickled


def _elements(payload: Any) -> int:
    """Elements of a stored tensor, which may repeat what is stored."""
    try:
        sizes = [size["as_int"] for size in payload["tensor_meta"]["sizes"]]
        return math.prod(size for size in sizes if isinstance(size, int))
    except (KeyError, TypeError):
        return 0  # torch will say so


_Path = tuple[str | int, ...]


class _Walk:
    """One walk over all values of a program's JSON."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._known: set[str] = set()  # expressions and ops that were found good

    def refuse(self, path: _Path, what: str) -> NoReturn:
        where = ".".join(map(str, path))
        raise InputError(f"{self._place}: {where}: {what}")

    def mapping(self, value: dict[str, Any], path: _Path) -> None:
        for key, inner in value.items():
            self._check_key(key, path)
            self.value(inner, (*path, key))

    def _check_key(self, key: str, path: _Path) -> None:
        inside = path[-1] if path else ""
        values = isinstance(inside, str) and inside.endswith("_values")
        if not (_IDENTIFIER if values else _PLAIN).fullmatch(key):
            self.refuse(path, f"the name {key[:80]!r} is no name of a value")

    def value(self, value: Any, path: _Path) -> None:
        if isinstance(value, dict):
            if path[-1] == "metadata":
                self._metadata(value, path)
            elif value and path[-1] in ("as_custom_obj", "custom_obj", "custom_obj_values"):
                self.refuse(path, "an object of a class of its own")
            else:
                self.mapping(value, path)
        elif isinstance(value, list):
            for position, inner in enumerate(value):
                self.value(inner, (*path, position))
        elif isinstance(value, str):
            self.text(value, path)

    def _metadata(self, value: dict[str, Any], path: _Path) -> None:
        for key, text in value.items():
            if not isinstance(text, str) or not _PRINTABLE.fullmatch(text):
                self.refuse((*path, key), "no printable text")

    def text(self, text: str, path: _Path) -> None:
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        if text in self._known and key in ("expr_str", "target"):
            return
        if key == "guards_code":
            if not is_shape_condition(text):
                self.refuse(path, f"{_cut(text)} is no condition on sizes")
        elif key == "expr_str":
            if not is_symbol_expression(text):
                self.refuse(path, f"{_cut(text)} is no size of numbers and symbols")
            self._known.add(text)
        elif key in ("as_operator", "target"):
            self._operator(text, path)
            self._known.add(text)
        elif key in ("in_spec", "out_spec"):
            self._tree_spec(text, path)
        elif key in _IDENTIFIERS or key == "forward_arg_names":
            self._identifier(text, path)
        elif key in ("as_string", "as_strings") and "nodes" in path:
            # an argument, which graphs print as a literal
            if not _PRINTABLE.fullmatch(text):
                self.refuse(path, "no printable text")
        elif not _PLAIN.fullmatch(text):
            self.refuse(path, f"{_cut(text)} has quotes or control characters")

    def _identifier(self, text: str, path: _Path) -> None:
        # arguments of ops are called as in their schemas, positional ones ""
        if text and not _IDENTIFIER.fullmatch(text):
            self.refuse(path, f"{_cut(text)} is no identifier")

    def _operator(self, target: str, path: _Path) -> None:
        if target in _FUNCTIONS or _PREDISPATCH.fullmatch(target):
            return
        named = _OP.fullmatch(target)
        if named is None:
            self.refuse(path, f"the function {_cut(target)}, which is no op")
        space, name, overload = named.groups()
        if space == "higher_order":
            if name not in _HIGHER_ORDER or overload:
                self.refuse(path, f"the op {_cut(target)}")
            return
        found: Any = torch.ops
        for part in (space, name, overload):
            found = getattr(found, part, None) if part else found
        if isinstance(found, HigherOrderOperator):
            self.refuse(path, f"the op {_cut(target)}")
        if found is None:
            return  # an op that is not registered: torch says so, naming it
        if not isinstance(found, OpOverload):
            self.refuse(path, f"the function {_cut(target)}, which is no op")
        self._schema(found, space, path)

    def _schema(self, op: OpOverload, space: str, path: _Path) -> None:
        name = op._schema.name
        texts = any("str" in str(argument.type) for argument in op._schema.arguments)
        if name in _FILES or space in _CLOSED or (texts and space not in _OPS_OF_TEXTS):
            self.refuse(path, f"the op {name}, which may read or write files or call others")

    def _tree_spec(self, text: str, path: _Path) -> None:
        where = ".".join(map(str, path))
        content = parse_json(text, f"{self._place}: {where}", _SPEC)
        if not isinstance(content, list) or len(content) != 2:
            self.refuse(path, "no structure of inputs or outputs")
        self._structure(content[1], path)

    def _structure(self, spec: Any, path: _Path) -> None:
        if not isinstance(spec, dict) or not isinstance(spec.get("children_spec"), list):
            self.refuse(path, "no structure of inputs or outputs")
        kind, context = spec.get("type"), spec.get("context")
        if kind is not None and not (isinstance(kind, str) and _PLAIN.fullmatch(kind)):
            self.refuse(path, f"the type {_cut(str(kind))}")
        if isinstance(context, str) and kind is not None:
            context = parse_json(context, f"{self._place}: context of {kind}", _SPEC)
        self._context(context, path)
        for child in spec["children_spec"]:
            self._structure(child, path)

    def _context(self, context: Any, path: _Path) -> None:
        if isinstance(context, str):
            if not _PLAIN.fullmatch(context):
                self.refuse(path, f"{_cut(context)} has quotes or control characters")
        elif isinstance(context, list):
            for inner in context:
                self._context(inner, path)
        elif isinstance(context, dict):
            if "__enum__" in context:
                # it would be imported
                self.refuse(path, f"a member of the enumeration {context.get('fqn')!r}")
            module = context.get("default_factory_module", "builtins")
            if (
                module != "builtins"
                or context.get("default_factory_name", "list") not in _FACTORIES
            ):
                self.refuse(path, f"the factory {module}.{context.get('default_factory_name')}")
            for key, inner in context.items():
                self._context(key, path)
                self._context(inner, path)


def _cut(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}…")
