"""Facts about the source itself: how many parameters functions take."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

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


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of a function's parameters, without `self`, `cls`, `*args` and `**kwargs`."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def long_functions() -> Iterator[tuple[str, str, int]]:
    """File, name and number of parameters of every function with more than `MOST`."""
    for folder in ("graphopt", "passes", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    count = len(parameters(node))
                    if count > MOST:
                        yield path.relative_to(ROOT).as_posix(), node.name, count


def test_parameters_are_counted_without_receiver_and_rest() -> None:
    method = "def f(self, a, /, b, *rest, c, **more): ..."
    (node,) = ast.parse(method).body
    assert isinstance(node, ast.FunctionDef)
    assert parameters(node) == ["a", "b", "c"]


def test_no_function_takes_more_than_seven_parameters() -> None:
    known = {(path, name) for path, name, _ in long_functions()}
    assert known - set(EXEMPT) == set(), "pass an option object instead"
    assert set(EXEMPT) - known == set(), "no longer needs to be exempt"
