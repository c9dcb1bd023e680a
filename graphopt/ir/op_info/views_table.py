"""Ops that rearrange, copy, cast, pad or pick values without computing new ones."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.ir.op_info.model import OpInfo, Scales, View
from graphopt.ir.op_info.overloads import aten

__all__ = ["VIEW_OPS", "without_memory_order"]

_PASS = Scales.PASS
_RESHAPE = aten("reshape")[0]
_STRICT = aten("view")[0]

_PADS_WITH_VALUES = OpInfo(
    ("pad",),
    aten(
        "reflection_pad1d reflection_pad2d reflection_pad3d"
        " replication_pad1d replication_pad2d replication_pad3d"
    ),
    scales=_PASS,
)
_PLAIN_PADDING = OpInfo(("pad",), aten("constant_pad_nd"), scales=_PASS, fill=3)


def _which_padding(node: fx.Node) -> OpInfo:
    mode = node.args[2] if len(node.args) > 2 else "constant"
    return _PLAIN_PADDING if mode == "constant" else _PADS_WITH_VALUES


VIEW_OPS: tuple[OpInfo, ...] = (
    OpInfo(("reshape",), (_STRICT,), scales=_PASS, view=View.RESHAPE, attention="between"),
    OpInfo(
        ("reshape",),
        aten("reshape _unsafe_view unflatten.int"),
        scales=_PASS,
        view=View.RESHAPE,
    ),
    OpInfo(
        ("flatten",),
        aten("flatten.using_ints"),
        scales=_PASS,
        view=View.RESHAPE,
        kept_whole=True,
    ),
    OpInfo(("transpose",), aten("transpose.int"), scales=_PASS, view=View.TRANSPOSE),
    OpInfo(("transpose",), aten("t numpy_T"), scales=_PASS, view=View.REVERSE),
    OpInfo(("transpose",), aten("permute"), scales=_PASS, view=View.PERMUTE),
    OpInfo(
        ("transpose",),
        aten("movedim.int movedim.intlist moveaxis.int moveaxis.intlist swapaxes swapdims"),
        scales=_PASS,
    ),
    OpInfo(("squeeze",), aten("squeeze squeeze.dim squeeze.dims"), scales=_PASS, view=View.RESHAPE),
    OpInfo(("squeeze",), aten("unsqueeze"), scales=_PASS, view=View.UNSQUEEZE, attention="between"),
    OpInfo(("squeeze",), aten("expand"), scales=_PASS, view=View.EXPAND, attention="between"),
    OpInfo(("slice",), aten("slice.Tensor"), scales=_PASS, view=View.KEEP, attention="between"),
    OpInfo(("slice",), aten("select.int"), scales=_PASS, view=View.SELECT),
    OpInfo(("slice",), aten("narrow index_select diagonal unfold"), scales=_PASS),
    OpInfo(("index",), aten("index.Tensor gather take_along_dim"), scales=_PASS),
    OpInfo(
        ("split",),
        aten("split.Tensor split_with_sizes chunk unsafe_chunk unsafe_split.Tensor"),
        scales=_PASS,
        view=View.KEEP,
    ),
    OpInfo(
        ("split",),
        aten(
            "unbind.int tensor_split.sections tensor_split.indices"
            " hsplit.int vsplit.int dsplit.int hsplit.array vsplit.array dsplit.array"
        ),
        scales=_PASS,
    ),
    OpInfo(
        ("clone",),
        aten("clone"),
        scales=_PASS,
        view=View.KEEP,
        copies=True,
        attention="between",
    ),
    OpInfo(("clone",), aten("alias"), scales=_PASS, view=View.KEEP, copies=True),
    OpInfo(("clone",), aten("contiguous detach"), scales=_PASS, view=View.KEEP),
    OpInfo(("lift_fresh_copy",), aten("lift_fresh_copy"), view=View.KEEP),
    OpInfo(("_to_copy",), aten("_to_copy"), view=View.KEEP, cast=True, attention="between"),
    OpInfo(("to",), aten("to.dtype to.dtype_layout to.device to.other"), view=View.KEEP, cast=True),
    OpInfo(("pad",), aten("constant_pad_nd"), scales=_PASS, fill=2),
    OpInfo(("pad",), aten("pad"), scales=_PASS, fill=3, by_node=_which_padding),
    _PADS_WITH_VALUES,
    OpInfo(("max_pool",), aten("max_pool2d"), scales=_PASS, kept_whole=True),
    OpInfo(
        ("max_pool",),
        aten(
            "max_pool1d max_pool3d max_pool1d_with_indices max_pool2d_with_indices"
            " max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
        ),
        scales=_PASS,
    ),
    OpInfo(("max",), aten("amax amin max.dim min.dim max min"), scales=_PASS),
    OpInfo(("sort",), aten("sort sort.stable topk kthvalue"), scales=_PASS),
    OpInfo(("pixel_shuffle",), aten("pixel_shuffle"), scales=_PASS, kept_whole=True),
    OpInfo(("pixel_shuffle",), aten("pixel_unshuffle channel_shuffle"), scales=_PASS),
    OpInfo(
        ("upsample_nearest",),
        aten(
            "upsample_nearest1d.vec upsample_nearest2d.vec"
            " upsample_nearest2d upsample_nearest3d.vec _upsample_nearest_exact1d.vec"
            " _upsample_nearest_exact2d.vec _upsample_nearest_exact2d _upsample_nearest_exact3d.vec"
        ),
        scales=_PASS,
    ),
    OpInfo(
        ("flip",),
        aten("flip fliplr flipud rot90 roll repeat tile repeat_interleave.self_int"),
        scales=_PASS,
    ),
    OpInfo(("assert",), aten("_assert_tensor_metadata"), check="type"),
    OpInfo(
        ("assert",),
        aten(
            "_assert_scalar _assert_async _assert_async.msg _functional_assert_scalar"
            " _functional_assert_async.msg"
        ),
        check="value",
    ),
    OpInfo(("sym_size",), aten("sym_size.int"), shape_query=True, kept_whole=True),
    OpInfo(
        ("sym_numel",),
        aten("sym_numel sym_stride.int sym_storage_offset"),
        shape_query=True,
    ),
)


def without_memory_order(target: Any) -> Any:
    """An op that does the same for operands in any order of memory.

    A captured view counts on the order that the kernel in front of it gave. With gradients or dropout
    other kernels run, attention's for one, that give another.

    Examples:
        >>> without_memory_order(torch.ops.aten.view.default)
        <OpOverload(op='aten.reshape', overload='default')>
    """
    return _RESHAPE if target is _STRICT else target
