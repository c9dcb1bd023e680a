"""The evaluator's rules for MIL ops, against PyTorch or the documented formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from graphopt.backends.coreml.mil_ops import OPS
from graphopt.errors import VerificationError

RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("mode", "reduce"), [("add", "sum"), ("mul", "prod"), ("max", "amax"), ("min", "amin")]
)
def test_scatter_along_an_axis_heeds_its_mode(mode: str, reduce: str) -> None:
    data, updates = floats(3, 4), floats(3, 6)
    places = RANDOM.integers(0, 4, (3, 6))
    got = OPS["scatter_along_axis"](
        {"data": data, "indices": places, "updates": updates, "axis": 1, "mode": mode}
    )
    want = torch.from_numpy(data).scatter_reduce(
        1, torch.from_numpy(places), torch.from_numpy(updates), reduce
    )
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["update", "add", "sub"])
def test_scatter_puts_slices(mode: str) -> None:
    data, updates, places = floats(5, 3), floats(2, 3), np.array([4, 1])
    want = data.copy()
    for place, row in zip(places, updates, strict=True):
        want[place] = {"update": row, "add": want[place] + row, "sub": want[place] - row}[mode]
    nd = {"data": data, "indices": places[:, None], "updates": updates, "mode": mode}
    np.testing.assert_allclose(OPS["scatter_nd"](nd), want, rtol=1e-6)
    along = {"data": data, "indices": places, "updates": updates, "axis": 0, "mode": mode}
    np.testing.assert_allclose(OPS["scatter"](along), want, rtol=1e-6)


def test_index_that_ios17_leaves_undefined_is_an_error() -> None:
    given = {"x": floats(4), "indices": np.array([-1]), "axis": 0}
    assert OPS["gather"](given).shape == (1,)
    with pytest.raises(VerificationError, match="outside"):
        OPS["gather"](given | {"validate_indices": False})


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_running_sums_by_the_definition(exclusive: bool, reverse: bool) -> None:
    x = floats(2, 5)
    got = OPS["cumsum"]({"x": x, "axis": 1, "exclusive": exclusive, "reverse": reverse})
    want = [
        [
            sum(row[j] for j in range(5) if (j > i if reverse else j < i))
            + (0 if exclusive else row[i])
            for i in range(5)
        ]
        for row in x
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "points"),
    [
        ("UNALIGN_CORNERS", [0.0, 0.1, 0.5, 0.9, 1.0]),
        ("STRICT_ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("DEFAULT", [0.0, 0.4, 0.8, 1.0, 1.0]),
        ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]),
    ],
)
def test_resize_samples_where_its_documentation_says(mode: str, points: list[float]) -> None:
    x = np.array([[[0.0, 1.0]]], np.float32)
    given = {"x": x, "target_size_height": 1, "target_size_width": 5, "sampling_mode": mode}
    np.testing.assert_allclose(OPS["resize_bilinear"](given)[0, 0], points, atol=1e-6)


def test_blocks_go_to_the_batch_and_come_back() -> None:
    x, block = floats(2, 3, 4, 6), np.array([2, 3])
    none = np.zeros((2, 2), np.int32)
    there = OPS["space_to_batch"]({"x": x, "block_shape": block, "paddings": none})
    assert there.shape == (12, 3, 2, 2)
    np.testing.assert_array_equal(there[:2], x[:, :, ::2, ::3])
    back = OPS["batch_to_space"]({"x": there, "block_shape": block, "crops": none})
    np.testing.assert_array_equal(back, x)


def test_blocks_go_to_the_channels_and_come_back() -> None:
    x = floats(1, 2, 4, 4)
    there = OPS["space_to_depth"]({"x": x, "block_size": 2})
    np.testing.assert_array_equal(there[:, :2], x[:, :, ::2, ::2])
    np.testing.assert_array_equal(OPS["depth_to_space"]({"x": there, "block_size": 2}), x)


def test_barred_keys_get_no_attention() -> None:
    q, k, v = floats(1, 3, 4), floats(1, 5, 4), floats(1, 5, 4)
    mask = RANDOM.random((1, 3, 5)) > 0.3
    mask[..., 0] = True
    got = OPS["scaled_dot_product_attention"]({"query": q, "key": k, "value": v, "attn_mask": mask})
    want = F.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v, mask)))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-6)


def test_half_precision_is_computed_in_single() -> None:
    x = np.full((1, 4096), 1.0, np.float16)
    assert OPS["reduce_sum"]({"x": x, "axes": [1], "keep_dims": False})[0] == 4096
    assert OPS["linear"]({"x": x, "weight": x})[0, 0] == 4096
