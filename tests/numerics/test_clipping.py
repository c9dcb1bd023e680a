"""The compiled search for clipping ranges finds what the plain one does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.numerics.clipping import _ends, _search, _squared_error, clip_by_value
from graphopt.specs import QuantizationSpec


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [
        ("int4", "symmetric"),
        ("uint4", "symmetric"),
        ("int4", "asymmetric"),
        ("int8", "symmetric_with_clipping"),
    ],
)
def test_compiled_ranges_are_those_of_the_definition(
    dtype: str, scheme: str, *, weighed: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(40, 64, generator=generator)
    weights = torch.rand(40, 64, generator=generator) if weighed else None
    spec = QuantizationSpec(dtype=dtype, qscheme=scheme)

    def squared(low: Tensor, high: Tensor) -> Tensor:
        errors = _squared_error(groups, low, high, spec)
        return (errors if weights is None else errors * weights).sum(1)

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        return torch.stack([squared(a, b) for a, b in zip(lows, highs, strict=True)])

    plain = squared(*_search(*_ends(groups), errors, both=scheme == "asymmetric"))
    found = squared(*clip_by_value(groups, spec, weights))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=0)
    assert float(found.sum()) < float(squared(*_ends(groups)).sum())
