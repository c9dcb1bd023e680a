"""XNNPACK's partitioner with repairs.

Its rules for convolutions and linear layers mark quantize and dequantize ops as part of a delegate
before they know whether they will take the op; where they then do not, the delegate drops the marked
ops and the op left outside reads integers as floats. Here the marks are undone. And a linear layer
whose weight is computed while the program runs is taken as a float one, and one with integers whose
data are floats by the kernel for these, which the rules do not know. Padding of integers is left to the
convolution that reads it, as alone it would read integers and give floats, and so would a batch norm,
which becomes a convolution.
Ops that read rounded tensors without dimensions stay outside, as delegates cannot be made of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from graphopt.backends.executorch.integer_kernels import ZEROS
from graphopt.backends.executorch.kernels import edge_info, is_fused_activation

__all__ = ["partition_configs"]


@functools.cache
def partition_configs() -> tuple[Any, ...]:
    """The partitioner's rules, repaired."""
    from executorch.backends.xnnpack.partition.config import (
        ALL_PARTITIONER_CONFIGS,
        gemm_configs,
        generic_node_configs,
        node_configs,
    )

    repaired = {
        rule: _with_clean_refusal(rule)
        for rule in (
            gemm_configs.ConvolutionConfig,
            gemm_configs.AddmmConfig,
            gemm_configs.MMConfig,
        )
    }
    repaired[gemm_configs.LinearConfig] = _with_computed_weights(
        _with_clean_refusal(gemm_configs.LinearConfig)
    )
    repaired[generic_node_configs.ConstantPadConfig] = _with_constraint(
        generic_node_configs.ConstantPadConfig, _reads_integers
    )
    repaired[node_configs.BatchNormConfig] = _with_constraint(
        node_configs.BatchNormConfig, _is_beside_integers
    )
    return tuple(
        _with_constraint(repaired.get(rule, rule), _reads_rounded_scalar)
        for rule in ALL_PARTITIONER_CONFIGS
    )


def _with_constraint(base: Any, refused: Callable[[Any], bool]) -> Any:
    class Constrained(base):  # type: ignore[misc]
        def get_deps(self, node: Any, program: Any) -> Any:
            return (False, []) if refused(node) else super().get_deps(node, program)

        def check_constraints(self, node: Any, program: Any) -> bool:
            return not refused(node) and super().check_constraints(node, program)

    Constrained.__name__ = Constrained.__qualname__ = base.__name__
    return Constrained


def _reads_integers(node: Any) -> bool:
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant

    return bool(is_dequant(node.args[0]))


def _is_beside_integers(node: Any) -> bool:
    """Whether a batch norm, which becomes a convolution, would have integers on one side alone."""
    from executorch.backends.xnnpack.utils.quant_utils import is_quant

    readers = [reader for item in node.users for reader in item.users]
    return _reads_integers(node) or any(is_quant(reader) for reader in readers)


def _reads_rounded_scalar(node: Any) -> bool:
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, is_quant

    return any(
        (is_dequant(used) or is_quant(node) or is_dequant(node)) and not used.meta["val"].ndim
        for used in node.all_input_nodes
        if isinstance(used.meta.get("val"), Tensor)
    )


def _with_clean_refusal(base: Any) -> Any:
    from executorch.backends.xnnpack.utils.quant_utils import IS_IMPLICIT_Q_DQ_TAG

    class Repaired(base):  # type: ignore[misc]
        def get_deps(self, node: Any, program: Any) -> Any:
            if _is_half_quantized(node):
                return False, []
            nodes = program.graph.nodes
            marked = {other for other in nodes if other.meta.get(IS_IMPLICIT_Q_DQ_TAG)}
            taken, needed = super().get_deps(node, program)
            if not taken:
                for other in nodes:
                    if other not in marked:
                        other.meta.pop(IS_IMPLICIT_Q_DQ_TAG, None)
            return taken, needed

    Repaired.__name__ = Repaired.__qualname__ = base.__name__
    return Repaired


def _is_half_quantized(node: Any) -> bool:
    """A 1-D transposed convolution of integers by a float weight, which is taken and then fails."""
    info = edge_info(node)
    if info is None or info.convolution is None:
        return False
    if not info.convolution.transposed or info.convolution.ndim != 1:
        return False
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant

    slot = info.weights[0]
    return is_dequant(node.args[slot.data]) and not is_dequant(node.args[slot.position])


def _with_computed_weights(base: Any) -> Any:
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.utils.quant_utils import (
        is_dequant,
        is_dynamic_qdq,
        is_quant,
        tag_as_implicit_q_dq,
    )
    from executorch.backends.xnnpack.utils.utils import get_input_node

    def quantized_behind(node: Any) -> bool:
        if is_dynamic_qdq(get_input_node(node, 0)):
            return True
        users = list(node.users)
        if len(users) == 1 and is_fused_activation(users[0]):
            users = list(users[0].users)
        return len(users) == 1 and bool(is_quant(users[0]))

    def computed(node: Any) -> bool:
        weight = get_input_node(node, 1)
        if weight.op == "placeholder":
            return False
        reads_integers = is_dequant(weight) and is_dequant(get_input_node(node, 0))
        return not (reads_integers and quantized_behind(node))

    class Linear(base):  # type: ignore[misc]
        def get_deps(self, node: Any, program: Any) -> Any:
            weight = get_input_node(node, 1)
            if not computed(node) or not _is_kernel_weight(node, weight, program):
                return super().get_deps(node, program)
            tag_as_implicit_q_dq(weight)
            return True, [weight, *weight.all_input_nodes]

        def _detect_precision(self, node: Any) -> Any:
            if computed(node):
                return ConfigPrecisionType.FP32
            return super()._detect_precision(node)

        def _get_weight_deps(self, node: Any, program: Any, precision: Any) -> Any:
            if precision == ConfigPrecisionType.FP32 and computed(node):
                return True, []
            return super()._get_weight_deps(node, program, precision)

    Linear.__name__ = Linear.__qualname__ = base.__name__
    return Linear


def _is_kernel_weight(node: Any, weight: Any, program: Any) -> bool:
    """Whether a layer without a bias reads integers with a scale per output channel, no zero points.

    Rules see tensors without content, so that zero points are told by the name that they were given.
    """
    from executorch.backends.xnnpack.utils.utils import is_param_node

    if "dequantize_per_channel.default" not in str(weight.target) or len(node.args) > 2:
        return False
    if not all(is_param_node(program, given) for given in weight.all_input_nodes):
        return False
    zeros = str(program.graph_signature.inputs_to_buffers.get(weight.args[2].name))
    return ZEROS in zeros and weight.args[3] == 0 and len(weight.users) == 1
