"""MIL ops that coremltools cannot evaluate (or evaluates wrongly), as functions of numpy values.

Each takes the op's input values by name (arrays, scalars, strings; absent optional inputs left out)
and returns one array or a tuple of arrays. float16 is computed in float32 and rounded by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from graphopt.errors import VerificationError

__all__ = ["OPS"]

Values = dict[str, Any]
Array = NDArray[Any]


def _t(a: Any) -> torch.Tensor:
    """Numpy -> torch; fp16 is computed in fp32 and rounded to the output type by the caller."""
    a = np.asarray(a)
    return torch.from_numpy(np.array(a, np.float32 if a.dtype == np.float16 else a.dtype))


def _ints(v: Values, key: str, default: int, n: int) -> list[int]:
    return [int(i) for i in np.atleast_1d(v[key])] if v.get(key) is not None else [default] * n


def _padding(
    v: Values, size: list[int], kernel: list[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """[before0, after0, before1, ...] for MIL's valid / custom / same / same_lower."""
    kind = str(v.get("pad_type", "valid"))
    if kind == "valid":
        return [0] * 2 * len(size)
    if kind == "custom":
        return _ints(v, "pad", 0, 2 * len(size))
    out = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=False):
        total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
        lo = total // 2 if kind == "same" else total - total // 2
        out += [lo, total - lo]
    return out


def _torch_pad(pad: list[int]) -> list[int]:
    """MIL order (first spatial axis first) -> F.pad order (last axis first)."""
    return [p for i in reversed(range(len(pad) // 2)) for p in pad[2 * i : 2 * i + 2]]


def conv(v: Values) -> Array:
    x, w = _t(v["x"]), _t(v["weight"])
    n = x.dim() - 2
    stride, dil = _ints(v, "strides", 1, n), _ints(v, "dilations", 1, n)
    pad = _padding(v, list(x.shape[2:]), list(w.shape[2:]), stride, dil)
    bias = _t(v["bias"]) if v.get("bias") is not None else None
    fn = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    return fn(F.pad(x, _torch_pad(pad)), w, bias, stride, 0, dil, int(v.get("groups", 1))).numpy()


def conv_transpose(v: Values) -> Array:
    x, w = _t(v["x"]), _t(v["weight"])
    n = x.dim() - 2
    stride, dil, groups = (
        _ints(v, "strides", 1, n),
        _ints(v, "dilations", 1, n),
        int(v.get("groups", 1)),
    )
    fn = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    full = fn(x, w, None, stride, 0, 0, groups, dil)
    if str(v.get("pad_type", "valid")) == "same":
        want = [a * s for a, s in zip(x.shape[2:], stride, strict=False)]
        lows = [max(0, f - o) // 2 for f, o in zip(full.shape[2:], want, strict=False)]
    else:
        pad = _padding(v, [0] * n, [0] * n, stride, dil)
        lows = pad[::2]
        want = [f - a - b for f, a, b in zip(full.shape[2:], pad[::2], pad[1::2], strict=False)]
    if v.get("output_shape") is not None:
        want = _ints(v, "output_shape", 0, n)[-n:]
    crop = [
        c for lo, o, f in zip(lows, want, full.shape[2:], strict=False) for c in (-lo, lo + o - f)
    ]
    full = F.pad(full, _torch_pad(crop))
    if v.get("bias") is not None:
        full = full + _t(v["bias"]).reshape(-1, *[1] * n)
    return full.numpy()


def _pool(v: Values, kind: str) -> Array:
    x = _t(v["x"])
    n = x.dim() - 2
    kernel, stride = _ints(v, "kernel_sizes", 1, n), _ints(v, "strides", 1, n)
    pad = _padding(v, list(x.shape[2:]), kernel, stride, [1] * n)
    if v.get(
        "ceil_mode"
    ):  # extra room at the end, as far as the last window still starts inside x or its left pad
        for i, size in enumerate(x.shape[2:]):
            span = size + pad[2 * i] + pad[2 * i + 1]
            out = -(-(span - kernel[i]) // stride[i]) + 1
            if (out - 1) * stride[i] >= size + pad[2 * i]:
                out -= 1
            pad[2 * i + 1] += max(0, (out - 1) * stride[i] + kernel[i] - span)
    if kind == "max":
        padded = F.pad(x, _torch_pad(pad), value=-float("inf"))
        return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1](padded, kernel, stride).numpy()
    avg = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]
    mean = avg(F.pad(x, _torch_pad(pad)), kernel, stride)
    if v.get("exclude_padding_from_average"):
        mean = mean / avg(F.pad(torch.ones_like(x), _torch_pad(pad)), kernel, stride)
    return mean.numpy()


def batch_norm(v: Values) -> Array:
    args = [
        _t(v[k]) if v.get(k) is not None else None
        for k in ("x", "mean", "variance", "gamma", "beta")
    ]
    return F.batch_norm(*args, training=False, eps=float(v.get("epsilon", 1e-5))).numpy()


def instance_norm(v: Values) -> Array:
    gamma, beta = (_t(v[k]) if v.get(k) is not None else None for k in ("gamma", "beta"))
    return F.instance_norm(
        _t(v["x"]), weight=gamma, bias=beta, eps=float(v.get("epsilon", 1e-5))
    ).numpy()


def gather_nd(v: Values) -> Array:
    x, idx, b = (
        np.asarray(v["x"]),
        np.asarray(v["indices"]).astype(np.int64),
        int(v.get("batch_dims", 0)),
    )
    grid = np.ogrid[tuple(slice(n) for n in idx.shape[:-1])]  # the batch axes index themselves
    own = tuple(g for g in grid[:b])
    return x[own + tuple(np.moveaxis(idx, -1, 0))]


def one_hot(v: Values) -> Array:
    size, on, off = int(v["one_hot_vector_size"]), v.get("on_value", 1), v.get("off_value", 0)
    hit = np.asarray(v["indices"])[..., None] == np.arange(size)
    return np.moveaxis(np.where(hit, on, off), -1, int(v.get("axis", -1)))


def crop(v: Values) -> Array:
    (top, bottom), (left, right) = _ints(v, "crop_height", 0, 2), _ints(v, "crop_width", 0, 2)
    h, w = v["x"].shape[-2:]
    return np.asarray(v["x"])[..., top : h - bottom, left : w - right]


def gelu(v: Values) -> Array:
    x, mode = _t(v["x"]), str(v.get("mode", "EXACT"))
    if mode == "SIGMOID_APPROXIMATION":
        return (x * torch.sigmoid(1.702 * x)).numpy()
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none").numpy()


def dequantize(v: Values) -> Array:
    q = np.asarray(v["input"])

    def along(p: Any) -> Array:  # scalar, or a vector along `axis`
        p = np.asarray(p, np.float32)
        return (
            p.reshape([-1 if i == int(v["axis"]) % q.ndim else 1 for i in range(q.ndim)])
            if p.ndim
            else p
        )

    zero = along(v["zero_point"]) if v.get("zero_point") is not None else np.float32(0)
    return (q.astype(np.float32) - zero) * along(v["scale"])


def _resize(v: Values, size: list[int], mode: str, align: bool) -> Array:
    kw = {"align_corners": align} if mode == "bilinear" else {}
    return F.interpolate(_t(v["x"]), size=size, mode=mode, **kw).numpy()


def upsample_nearest_neighbor(v: Values) -> Array:
    h, w = v["x"].shape[-2:]
    return _resize(
        v, [int(h * v["scale_factor_height"]), int(w * v["scale_factor_width"])], "nearest", False
    )


def upsample_bilinear(v: Values) -> Array:
    h, w = v["x"].shape[-2:]
    size = [int(h * v["scale_factor_height"]), int(w * v["scale_factor_width"])]
    return _resize(v, size, "bilinear", bool(v.get("align_corners", True)))


def resize_bilinear(v: Values) -> Array:
    mode = str(v.get("sampling_mode", "DEFAULT"))
    if mode not in ("STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS"):
        raise VerificationError(f"resize_bilinear sampling_mode {mode}")
    size = [int(v["target_size_height"]), int(v["target_size_width"])]
    return _resize(v, size, "bilinear", mode == "STRICT_ALIGN_CORNERS")


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "linear": lambda x: x,
    }[name]


def _scan(
    v: Values,
    cell: Callable[..., tuple[torch.Tensor, ...]],
    states: tuple[str, ...],
    banks: list[str],
) -> tuple[Array, ...]:
    """Run ``cell(x_t, *state, w_ih, w_hh, bias)`` over time, for one or two directions."""
    x, direction = _t(v["x"]), str(v.get("direction", "forward"))
    init = [_t(v[s]).chunk(len(banks), dim=-1) for s in states]
    seqs, finals = [], []
    for i, bank in enumerate(banks):
        w_ih, w_hh = _t(v["weight_ih" + bank]), _t(v["weight_hh" + bank])
        bias = (
            _t(v["bias" + bank]) if v.get("bias" + bank) is not None else torch.zeros(w_ih.shape[0])
        )
        state = tuple(s[i] for s in init)
        back = direction == "reverse" or bank == "_back"
        out: list[torch.Tensor] = []
        for step in x.flip(0) if back else x:
            state = cell(step, *state, w_ih, w_hh, bias)
            out.append(state[0])
        seqs.append(torch.stack(out[::-1] if back else out))
        finals.append(state)
    last = [torch.cat([f[k] for f in finals], -1) for k in range(len(states))]
    seq = torch.cat(seqs, -1) if v.get("output_sequence") else last[0][None]
    return tuple(a.numpy() for a in (seq, *last))


def lstm(v: Values) -> tuple[Array, ...]:
    """Gate order [input, forget, output, cell]; outputs (sequence, h, c)."""
    if v.get("peephole") is not None or v.get("clip") is not None:
        raise VerificationError("lstm: peephole or clip")
    gate = _activation(str(v.get("recurrent_activation", "sigmoid")))
    cell_act, act = (
        _activation(str(v.get("cell_activation", "tanh"))),
        _activation(str(v.get("activation", "tanh"))),
    )

    def cell(
        x: torch.Tensor,
        h: torch.Tensor,
        c: torch.Tensor,
        wi: torch.Tensor,
        wh: torch.Tensor,
        b: torch.Tensor,
    ):
        i, f, o, z = (x @ wi.T + h @ wh.T + b).chunk(4, -1)
        c = gate(f) * c + gate(i) * cell_act(z)
        return gate(o) * act(c), c

    banks = ["", "_back"] if str(v.get("direction", "forward")) == "bidirectional" else [""]
    return _scan(v, cell, ("initial_h", "initial_c"), banks)


def gru(v: Values) -> tuple[Array, ...]:
    """Gate order [reset, output, update]; ``input_bias`` (iOS17) is the part of the bias outside r * (...)."""
    gate, act = (
        _activation(str(v.get("recurrent_activation", "sigmoid"))),
        _activation(str(v.get("activation", "tanh"))),
    )
    extra = _t(v["input_bias"]) if v.get("input_bias") is not None else None

    def cell(x: torch.Tensor, h: torch.Tensor, wi: torch.Tensor, wh: torch.Tensor, b: torch.Tensor):
        xr, xo, xz = (x @ wi.T + (extra if extra is not None else 0)).chunk(3, -1)
        hr, ho, hz = (h @ wh.T + b).chunk(3, -1)
        r, z = gate(xr + hr), gate(xz + hz)
        return ((1 - z) * act(xo + r * ho) + z * h,)

    return _scan(v, cell, ("initial_h",), [""])


OPS: dict[str, Callable[[Values], Array | tuple[Array, ...]]] = {
    # no value inference in coremltools 9.0
    "conv": conv,
    "conv_transpose": conv_transpose,
    "max_pool": lambda v: _pool(v, "max"),
    "avg_pool": lambda v: _pool(v, "avg"),
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "silu": lambda v: F.silu(_t(v["x"])).numpy(),
    "pixel_shuffle": lambda v: F.pixel_shuffle(_t(v["x"]), int(v["upscale_factor"])).numpy(),
    "pixel_unshuffle": lambda v: F.pixel_unshuffle(_t(v["x"]), int(v["downscale_factor"])).numpy(),
    "gather_nd": gather_nd,
    "one_hot": one_hot,
    "crop": crop,
    "lstm": lstm,
    "gru": gru,
    "dequantize": dequantize,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "resize_bilinear": resize_bilinear,
    # value inference exists but overwrites its input array in place / is a python loop per element
    "thresholded_relu": lambda v: np.where(v["x"] < v["alpha"], 0, v["x"]),
    "gelu": gelu,
}
