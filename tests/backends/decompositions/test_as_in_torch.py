"""Every op that is written in simpler ones gives what it gives, on the calls of torch's database."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.op_calls import calls_of
from torch.utils import _pytree as pytree

from graphopt.backends.coreai.decompose import decompositions as for_coreai
from graphopt.backends.coreml.decompose import decompose_for_coreml
from graphopt.backends.executorch.decompose import decompositions as for_executorch

OPS = [
    *("acosh", "asinh", "copysign", "erfinv", "fmax", "fmin", "hypot", "logaddexp"),
    *("nan_to_num", "clamp", "add", "sub", "isinf", "isclose", "signbit", "sinc", "trunc"),
    *("round.decimals_3", "fmod", "nn.functional.celu", "nn.functional.softplus"),
    *("var", "std_mean", "mean", "sum", "any", "all", "argmax", "count_nonzero", "norm"),
    *("cummax", "cummin", "cumprod", "cumsum", "logcumsumexp"),
    *("gather", "index_add", "index_copy", "index_fill", "index_put", "index_select", "put"),
    *("take", "masked_scatter", "scatter", "scatter_add", "scatter_reduce.mean"),
    *("scatter_reduce.prod", "index_reduce.amax"),
    *("as_strided", "diag_embed", "diagonal", "diagonal_scatter", "roll", "select_scatter"),
    *("trace", "unfold", "nn.functional.pad.circular", "nn.functional.pad.constant"),
    *("argsort", "bucketize", "histc", "kthvalue", "median", "mode", "nanmedian", "sort"),
    *("searchsorted", "cdist", "nn.functional.pdist", "cross", "addbmm", "__rmatmul__"),
    *("nn.functional.interpolate.nearest", "nn.functional.interpolate.nearest-exact"),
    *("nn.functional.interpolate.linear", "nn.functional.interpolate.bilinear"),
    *("nn.functional.interpolate.bicubic", "nn.functional.interpolate.trilinear"),
    *("nn.functional.avg_pool1d", "nn.functional.avg_pool2d", "nn.functional.avg_pool3d"),
    *("nn.functional.max_pool1d", "nn.functional.max_pool2d", "nn.functional.max_pool3d"),
    *("nn.functional.adaptive_avg_pool2d", "nn.functional.adaptive_avg_pool3d"),
    *("nn.functional.adaptive_max_pool1d", "nn.functional.adaptive_max_pool2d"),
    *("nn.functional.max_unpool2d", "nn.functional.grid_sample", "grid_sampler_3d"),
    *("nn.functional.instance_norm", "nn.functional.scaled_dot_product_attention"),
]


def tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


REWRITE = {
    "coreml": decompose_for_coreml,
    "coreai": lambda exported: exported.run_decompositions(for_coreai()),
    "executorch": lambda exported: exported.run_decompositions(for_executorch([])),
}


@pytest.mark.integration
@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in REWRITE]
)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_op_in_simpler_ops_gives_what_it_gives(op: str, target: str, every: int) -> None:
    calls = calls_of(op)
    assert calls
    for call in calls[:: every if target == "coreml" else 2 * every]:
        with torch.no_grad():
            want = tensors(call.module(*(x.clone() for x in call.inputs)))
            exported = torch.export.export(call.module, call.inputs, strict=False)
            rewritten = REWRITE[target](exported.run_decompositions({}))
            got = tensors(rewritten.module()(*(x.clone() for x in call.inputs)))
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), call.name
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True, msg=call.name)
