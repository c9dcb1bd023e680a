"""The calls of torch's own databases of ops and modules that every target is tried on.

Counted are the functional ops and the modules (`nn.Linear`) whose samples are real and finite, of
rank 5 at most and with 20,000 elements at most, and whose outputs are deterministic: of each the
first, the middle and the last sample in float32. What is not counted stands in `NOT_COUNTED`, with
the reason.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NOT_COUNTED", "OpCall", "calls_of", "counted_ops"]

_MOST_ELEMENTS = 20_000
_HIGHEST_RANK = 5
_RUNS = 4  # with a seed each: what is random differs

# reason → ops, by their name or, where it ends in "." or "_", by how their names start
NOT_COUNTED: dict[str, str] = {
    "linear algebra: factorisations and solvers": """linalg. cholesky cholesky_inverse cholesky_solve
        geqrf logdet lu lu_solve lu_unpack matrix_exp norm.nuc ormqr pca_lowrank pinverse qr svd
        svd_lowrank triangular_solve""",
    "special functions": "special.",
    "sparse layouts": "sparse. to_sparse",
    "signal windows": "signal.windows.",
    "complex numbers": "fft. cdouble cfloat chalf complex polar stft view_as_complex",
    "shapes or results that depend on data": """allclose argwhere equal item masked_select nonzero
        nonzero_static unique unique_consecutive histogram histogramdd hash_tensor""",
    "values that nobody has written": """empty empty_like empty_permuted empty_strided new_empty
        new_empty_strided""",
    "constructors": """arange eye full full_like linspace linspace. logspace logspace.
        new_full new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like
        broadcast_shapes""",
    "random numbers": """bernoulli cauchy exponential geometric log_normal multinomial normal normal.
        rand_like randint_like randn_like uniform nn.functional.dropout nn.functional.dropout2d nn.functional.dropout3d
        nn.functional.alpha_dropout nn.functional.feature_alpha_dropout.
        nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d
        nn.functional.rrelu""",
    "backward formulas and internal ops": """_softmax_backward_data
        max_pool2d_with_indices_backward native_dropout_backward torch.ops.aten.
        _batch_norm_with_update _native_batch_norm_legit native_batch_norm _segment_reduce.
        _chunk_cat jiterator_ nn.functional.max_unpool1d.grad nn.functional.max_unpool2d.grad
        nn.functional.max_unpool3d.grad _unsafe_masked_index
        _unsafe_masked_index_put_accumulate""",
    "in-place resizing": "resize_ resize_as_ zero_",
}


@dataclass(frozen=True)
class OpCall:
    """One sample of one op.

    Attributes:
        name: Op, variant and position among the samples, as "add#0".
        module: Calls the op; its inputs are the tensors of the sample.
        inputs: Those tensors.
    """

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]


class _Call(nn.Module):
    def __init__(self, op: Any, leaves: list[Any], spec: Any) -> None:
        super().__init__()
        self.op, self.leaves, self.spec = op, leaves, spec

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.op(*args, **kwargs)


@functools.cache
def _database() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {
        ".".join(filter(None, (op.name, op.variant_test_name))): op
        for op in op_db
        if torch.float32 in op.dtypes
    }


def _counted(name: str) -> bool:
    starts = (start for group in NOT_COUNTED.values() for start in group.split())
    return not any(
        name.startswith(start) if start.endswith((".", "_")) else name == start for start in starts
    )


@functools.cache
def _modules() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db
    return {info.name: info for info in module_db}


def counted_ops() -> list[str]:
    """Names of the ops and modules, in the databases' order; some have no call that fits."""
    return [name for name in (*_database(), *_modules()) if _counted(name)]


def calls_of(name: str) -> list[OpCall]:
    """First, middle and last sample of an op or a module, those that count."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _module_samples(name) if name in _modules() else _op_samples(name)
        chosen = sorted({0, len(made) // 2, len(made) - 1}) if made else []
        return [call for n in chosen for call in _call(f"{name}#{n}", *made[n])]


def _op_samples(name: str) -> list[tuple[Any, Any]]:
    op = _database()[name]
    samples = op.sample_inputs("cpu", torch.float32, requires_grad=False)
    return [(op.op, ((sample.input, *sample.args), dict(sample.kwargs))) for sample in samples]


def _module_samples(name: str) -> list[tuple[Any, Any]]:
    info = _modules()[name]
    options = {"device": "cpu", "dtype": torch.float32, "requires_grad": False}
    samples = info.module_inputs_func(info, training=False, **options)
    made = []
    for sample in samples:
        if sample.forward_input is None:
            continue
        module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
        given = (sample.forward_input.args, dict(sample.forward_input.kwargs))
        made.append((module.eval(), given))
    return made


def _call(name: str, op: Any, given: Any) -> Iterator[OpCall]:
    leaves, spec = pytree.tree_flatten(given)
    inputs = tuple(leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor))
    if not inputs or any(callable(leaf) and not isinstance(leaf, Tensor) for leaf in leaves):
        return
    module = _Call(op, leaves, spec).eval()
    try:
        with torch.no_grad():
            with _Drawn() as drawn:
                _results(module, inputs, 0)
            if drawn.seen:
                return
            first, *others = (_results(module, inputs, seed) for seed in range(_RUNS))
    except Exception:
        return
    if not first or not all(isinstance(x, Tensor) for x in first):
        return
    if not all(torch.equal(a, b) for again in others for a, b in zip(first, again, strict=True)):
        return
    if all(_fits(x) for x in (*inputs, *first)):
        yield OpCall(name, module, inputs)


class _Drawn(TorchDispatchMode):
    """Notes whether an op draws random numbers, which samples with a seed of their own hide."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _results(module: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> list[Any]:
    torch.manual_seed(seed)
    return pytree.tree_leaves(module(*(x.clone() for x in inputs)))


def _fits(x: Tensor) -> bool:
    if x.layout is not torch.strided or x.is_complex() or x.ndim > _HIGHEST_RANK:
        return False
    return 0 < x.numel() <= _MOST_ELEMENTS and bool(torch.isfinite(x).all())
