"""Facts about the source itself: parameters of functions, questions of kind, names of targets."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt.backends.registry import NEUTRAL, targets

ROOT = Path(__file__).parents[1]
MOST = 7
_KERNEL = "a compiled kernel, which takes arrays and numbers only"
_COREAI_OPT = "coreai-opt's documented signature"

# file, function → why it may take more
EXEMPT = {
    **dict.fromkeys(
        [
            ("backends/coreai/rules/attention.py", "attention"),
            ("backends/coreai/rules/forms.py", "group_norm"),
            ("backends/coreai/rules/windows.py", "rule"),
            ("backends/decompositions/comparisons.py", "embedding_bag"),
            ("backends/decompositions/pooling.py", "avg_pool"),
            ("backends/decompositions/products.py", "conv_transpose"),
            ("backends/decompositions/products.py", "trilinear"),
            ("backends/executorch/exact_ops.py", "convolution"),
            ("backends/decompositions/normalization.py", "instance_norm"),
            ("backends/decompositions/attention.py", "attention_of_equal_heads"),
            ("backends/onnx/attention.py", "attention_of_four_axes"),
        ],
        "takes what the op takes that it stands for",
    ),
    ("graphopt/numerics/kernels_cuts.py", "_best_start"): _KERNEL,
    ("graphopt/numerics/kernels.py", "_centroids"): _KERNEL,
    ("graphopt/numerics/kernels.py", "fit_groups"): _KERNEL,
    ("graphopt/numerics/kernels_cuts.py", "_halve"): _KERNEL,
    ("graphopt/numerics/kernels_cuts.py", "_move_cuts"): _KERNEL,
    ("graphopt/numerics/kernels_columns.py", "descend"): _KERNEL,
    ("graphopt/numerics/kernels_columns.py", "feedback"): _KERNEL,
    ("graphopt/numerics/kernels_feedback.py", "descend"): _KERNEL,
    ("graphopt/numerics/kernels_feedback.py", "feedback"): _KERNEL,
    ("graphopt/numerics/kernels_vectors.py", "assign_vectors"): _KERNEL,
    ("graphopt/compressors/kmeans.py", "prepare"): _COREAI_OPT,
    ("graphopt/compressors/kmeans.py", "calibration_mode"): _COREAI_OPT,
    ("graphopt/compressors/quantizer.py", "prepare"): _COREAI_OPT,
    ("graphopt/interop/coreai_utils/passes.py", "palettize_weights"): _COREAI_OPT,
    ("graphopt/interop/coreai_utils/passes.py", "quantize_weights"): _COREAI_OPT,
    ("graphopt/interop/coreai_utils/passes.py", "sparsify_weights"): _COREAI_OPT,
}

# where what is stored and what it becomes are defined
KINDS = ("graphopt/schemes/", "graphopt/specs/", "graphopt/analysis/stored_values.py")
# folders that may name targets: their own, and what speaks of one to coreai-opt's users
TARGETS = ("graphopt/interop/", "graphopt/coreai_utils/", "graphopt/coreml_utils/")
NAMING = {("graphopt/capture/program_check.py", "coreai"): "a namespace of ops that take texts"}


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Path and syntax of every file below folders, by default of the package, each once."""
    for folder in folders or ("graphopt", "passes", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.resolve().relative_to(ROOT).as_posix()
            if name.startswith(folder):  # graphopt/ has links to the others
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of a function's parameters, without `self`, `cls`, `*args` and `**kwargs`."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def long_functions() -> Iterator[tuple[str, str, int]]:
    """File, name and number of parameters of every function with more than `MOST`."""
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = len(parameters(node))
                if count > MOST:
                    yield path, node.name, count


def kinds() -> set[str]:
    """Names of specs, of what they become, and of what stands for it in a graph."""
    return {
        node.name
        for path, tree in sources("graphopt")
        if path.startswith(KINDS)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and node.name.endswith(("Spec", "Weight", "Lookup", "Tensor"))
    }


def asked_kinds(tree: ast.AST) -> set[str]:
    """Names of classes that the code asks values for, by `isinstance` or `match`."""
    asked: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            asked |= {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.MatchClass):
            asked.add(ast.unparse(node.cls))
    return asked


def named_targets(tree: ast.AST) -> set[str]:
    """Targets but the neutral one that code names: by a text, a suffix, or a member."""
    known = [target for target in targets() if target is not NEUTRAL]
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in alone:
            text = node.value
            named |= {target.value for target in known if text == target or target.suffix in text}
        elif isinstance(node, ast.Attribute):
            named |= {target.value for target in known if node.attr in (target.name, target.value)}
    return named


def test_parameters_are_counted_without_receiver_and_rest() -> None:
    method = "def f(self, a, /, b, *rest, c, **more): ..."
    (node,) = ast.parse(method).body
    assert isinstance(node, ast.FunctionDef)
    assert parameters(node) == ["a", "b", "c"]


def test_no_function_takes_more_than_seven_parameters() -> None:
    known = {(path, name) for path, name, _ in long_functions()}
    assert known - set(EXEMPT) == set(), "pass an option object instead"
    assert set(EXEMPT) - known == set(), "no longer needs to be exempt"


@pytest.mark.parametrize(
    ("code", "asked", "named"),
    [
        ("isinstance(x, A | B)", {"A", "B"}, set()),
        ("match x:\n    case A(): pass", {"A"}, set()),
        ("path = 'model.mlpackage'", set(), {"coreml"}),
        ("x = torch.ops.coreai", set(), {"coreai"}),
        ("x = ExportBackend.CoreML", set(), {"coreml"}),
        ("'A docstring about an .mlpackage.'", set(), set()),
    ],
)
def test_questions_and_targets_are_recognised(code: str, asked: set[str], named: set[str]) -> None:
    tree = ast.parse(code)
    assert asked_kinds(tree) == asked
    assert named_targets(tree) == named


def test_nothing_asks_of_which_kind_a_spec_or_a_stored_weight_is() -> None:
    known = kinds()
    assert {"PalettizationSpec", "QuantizedWeight", "Lookup"} <= known
    asking = {
        (path, kind)
        for path, tree in sources()
        if not path.startswith(KINDS)
        for kind in asked_kinds(tree) & known
    }
    assert asking == set(), "give the kinds a property or a method"


def test_targets_are_named_in_their_folders_only() -> None:
    naming = {
        (path, target)
        for path, tree in sources("graphopt", "passes")
        if not path.startswith(TARGETS)
        for target in named_targets(tree)
    }
    assert naming == set(NAMING)


def test_graphs_are_computed_by_one_interpreter() -> None:
    deriving = {
        path
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).startswith(("fx.", "torch.fx.")) for base in node.bases)
    }
    assert deriving <= {"graphopt/ir/captured_module.py"}, "walk the graph with run.interpreter"
