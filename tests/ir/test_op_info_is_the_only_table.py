"""What an op is, is said in `graphopt/ir/op_info` alone: other files name ops to emit them only."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt.ir import op_info

ROOT = Path(__file__).parents[2]
TABLE = "graphopt/ir/op_info/"
# file → why it names ops of aten
ALLOWED = {
    "graphopt/analysis/matrix_form.py": "runs torch's own backward kernel of convolutions",
    "graphopt/capture/composites.py": "emits sizes, and copies of constants",
    "graphopt/capture/entry_points.py": "emits the copies that keep what a method only reads as state",
    "graphopt/capture/inference_form.py": "emits the copies that dropouts become",
    "graphopt/schemes/palette.py": "emits the sum of a table's values and outliers",
    "passes/convert_quantization.py": "emits the shift by a float minimum",
    "passes/expand_range_rounding.py": "emits the arithmetic of scales that are found at run time",
    "backends/casting.py": "emits casts",
    "backends/interface.py": "emits casts and shapes of inputs and outputs, and copies of outputs",
    "backends/promotion.py": "emits casts of operands",
    "backends/complex_parts.py": "emits what complex numbers become",
    "backends/fourier.py": "emits products for transforms",
    "backends/scalar_states.py": "emits reshapes of state",
    "backends/coreml/states.py": "emits what state is encoded by",
    "passes/migrate_scales.py": "emits the products and sums that give a scaled value back",
    "passes/quantize_caches.py": "emits the rounding of what is written to caches",
    "backends/coreai/decompose.py": "names the ops that coreai-torch has not right",
    "backends/coreai/legalize_quantization.py": "emits casts",
    "backends/coreai/lower.py": "emits reshapes for views",
    "backends/coreai/merged_axes.py": "emits products with 1",
    "backends/coreai/rules/places.py": "emits lookups, whose shape says what is put",
    "backends/coreml/decompose.py": "hands torch its own rule for gelu",
    "backends/coreml/halves.py": "emits casts of inputs and outputs",
    "backends/coreml/legal_ops.py": "hands torch rules for what coremltools has not right",
    "backends/decompositions/products.py": "emits convolutions",
    "backends/executorch/compress_tables.py": "emits decoders of tables",
    "backends/executorch/constant_operands.py": "emits products for norms, and 2-D convolutions",
    "backends/executorch/convolutions_as_linear.py": "emits linear layers for convolutions",
    "backends/executorch/decompose.py": "hands torch rules for what has no kernel",
    "backends/executorch/exact_ops.py": "hands torch its own rule for resizing",
    "backends/executorch/legalize.py": "emits the forms that XNNPACK computes",
    "backends/onnx/decompose.py": "hands torch rules for what its exporter has no translation of",
    "backends/executorch/weight_forms.py": "emits biases apart from linear layers, and views",
}


def is_aten(node: ast.AST) -> bool:
    """Whether an expression is `torch.ops.aten`, `ops.aten`, or the same through `getattr`."""
    if isinstance(node, ast.Attribute):
        owner = node.value
        name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        return node.attr == "aten" and name == "ops"
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
        return any(isinstance(given, ast.Constant) and given.value == "aten" for given in node.args)
    return isinstance(node, ast.alias) and node.name.endswith("ops.aten")


def is_batch_norm(node: ast.AST) -> bool:
    """Whether the name of the batch norm of captured graphs stands in the code."""
    name = str(op_info.BATCH_NORM).split(".")[1]
    text = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
    return isinstance(text, str) and name in text


def without_docstrings(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but strings that stand alone."""
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and node in alone):
            yield node


def aliases(tree: ast.AST) -> set[str]:
    """Names that stand for `torch.ops.aten` in a module."""
    return {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and is_aten(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def compared_ops(tree: ast.AST) -> list[str]:
    """Ops of aten that the code compares something with, or lists in a display to look it up."""
    names = aliases(tree)

    def is_op(node: ast.AST) -> bool:
        return is_aten(node) or (isinstance(node, ast.Name) and node.id in names)

    places = [
        operand
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for operand in (node.left, *node.comparators)
    ]
    places += [node for node in ast.walk(tree) if isinstance(node, ast.Set)]
    return [ast.unparse(place) for place in places if any(is_op(part) for part in ast.walk(place))]


@functools.cache
def sources() -> dict[str, ast.AST]:
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for folder in ("graphopt", "passes", "backends")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.relative_to(ROOT)
        .as_posix()
        .startswith(("graphopt/passes", "graphopt/backends"))
    }


@pytest.mark.parametrize(
    ("code", "names", "compares"),
    [
        ("x = torch.ops.aten.add.Tensor", True, False),
        ("from torch import ops\nx = ops.aten.add", True, False),
        ("x = getattr(torch.ops, 'aten')", True, False),
        ("import torch.ops.aten as a", True, False),
        ("_aten = torch.ops.aten\nx = node.target is _aten.relu.default", True, True),
        ("x = node.target in (torch.ops.aten.relu.default,)", True, True),
        ("_aten = torch.ops.aten\nX = {_aten.relu.default}", True, True),
        ("x = torch.ops.graphopt.dropout", False, False),
    ],
)
def test_ops_are_recognised_in_code(code: str, names: bool, compares: bool) -> None:
    tree = ast.parse(code)
    assert any(map(is_aten, ast.walk(tree))) is names
    assert bool(compared_ops(tree)) is compares


@pytest.mark.integration
def test_only_files_that_emit_ops_name_them() -> None:
    naming = {path for path, tree in sources().items() if any(map(is_aten, ast.walk(tree)))}
    naming = {path for path in naming if not path.startswith(TABLE)}
    assert naming - set(ALLOWED) == set(), "ask graphopt.ir.op_info what the op is"
    assert set(ALLOWED) - naming == set(), "no longer needs a place in the table"


@pytest.mark.integration
def test_no_file_asks_which_op_a_node_calls_by_naming_it() -> None:
    asked = {path: compared_ops(tree) for path, tree in sources().items()}
    assert {path: ops for path, ops in asked.items() if ops} == {}


@pytest.mark.integration
def test_the_op_of_batch_norms_is_spelled_in_the_table_only() -> None:
    spelled = {
        path
        for path, tree in sources().items()
        if any(map(is_batch_norm, without_docstrings(tree)))
    }
    assert {str(Path(path).parent) + "/" for path in spelled} == {TABLE}
