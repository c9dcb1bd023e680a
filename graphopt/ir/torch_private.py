"""The parts of torch without a public name that are used here, in the versions that the tests run with.

Nothing else imports from a private module of torch. Where a later torch has moved a part, the error
says which one, and which versions there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from graphopt.audited import module_of
from graphopt.errors import MissingDependencyError, UntestedTorchVersionWarning

if TYPE_CHECKING:
    from torch._C import DispatchKey
    from torch._C import PyTorchFileReader as ArchiveReader
    from torch._decomp import core_aten_decompositions, decomposition_table
    from torch._dispatch.python import enable_python_dispatcher as open_size_kernels
    from torch._export import utils as export_utils
    from torch._export.serde import serialize as serializing
    from torch._export.utils import _check_valid_to_preserve as may_stay_whole
    from torch._export.utils import _get_decomp_for_cia as decomposition_of_composite
    from torch._export.utils import _is_cia_op as is_composite
    from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
    from torch._prims_common import is_contiguous_for_memory_format_or_false as contiguous_for_sure
    from torch._subclasses.complex_tensor import ComplexTensor
    from torch._subclasses.fake_impls import get_fast_op_impls as shape_rules
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch._subclasses.fake_tensor import in_kernel_invocation_manager as in_kernel
    from torch.export.pt2_archive import _package as archive_package
    from torch.export.pt2_archive._package import load_pt2, package_pt2
    from torch.fx.experimental import _config as symbolic_config
    from torch.fx.experimental import proxy_tensor as tracing
    from torch.fx.experimental.sym_node import SymNode
    from torch.nn.modules import transformer
    from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
    from torch.utils._python_dispatch import TorchDispatchMode

    below_autograd: Callable[[], AbstractContextManager[None]]
    enable_mkldnn: Callable[[bool], None]
    is_mkldnn_enabled: Callable[[], bool]
    has_kernel: Callable[[str, str], bool]
    learnable_per_channel: Callable[..., torch.Tensor]
    learnable_per_tensor: Callable[..., torch.Tensor]
    without_torch_function: Callable[[], AbstractContextManager[None]]

__all__ = [
    "TESTED",
    "AnyBatchNorm",
    "ArchiveReader",
    "ComplexTensor",
    "DispatchKey",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "SymNode",
    "TorchDispatchMode",
    "archive_package",
    "below_autograd",
    "contiguous_for_sure",
    "core_aten_decompositions",
    "decomposition_of_composite",
    "decomposition_table",
    "enable_mkldnn",
    "export_utils",
    "has_kernel",
    "in_kernel",
    "is_composite",
    "is_mkldnn_enabled",
    "learnable_per_channel",
    "learnable_per_tensor",
    "load_pt2",
    "may_stay_whole",
    "minor_version",
    "open_size_kernels",
    "package_pt2",
    "part_of_torch",
    "serializing",
    "shape_rules",
    "symbolic_config",
    "tracing",
    "transformer",
    "warn_of_untested",
    "without_torch_function",
]

TESTED = (
    "2.13",
    "2.13",
)  # lowest and highest minor version that the whole of the tests passes with

_PARTS = {
    "AnyBatchNorm": ("torch.nn.modules.batchnorm", "_BatchNorm"),
    "ArchiveReader": ("torch._C", "PyTorchFileReader"),
    "ComplexTensor": ("torch._subclasses.complex_tensor", "ComplexTensor"),
    "DispatchKey": ("torch._C", "DispatchKey"),
    "FakeTensor": ("torch._subclasses.fake_tensor", "FakeTensor"),
    "FakeTensorMode": ("torch._subclasses.fake_tensor", "FakeTensorMode"),
    "HigherOrderOperator": ("torch._ops", "HigherOrderOperator"),
    "OpOverload": ("torch._ops", "OpOverload"),
    "OpOverloadPacket": ("torch._ops", "OpOverloadPacket"),
    "SymNode": ("torch.fx.experimental.sym_node", "SymNode"),
    "TorchDispatchMode": ("torch.utils._python_dispatch", "TorchDispatchMode"),
    "core_aten_decompositions": ("torch._decomp", "core_aten_decompositions"),
    "archive_package": ("torch.export.pt2_archive", "_package"),
    "below_autograd": ("torch._C", "_AutoDispatchBelowADInplaceOrView"),
    "load_pt2": ("torch.export.pt2_archive._package", "load_pt2"),
    "package_pt2": ("torch.export.pt2_archive._package", "package_pt2"),
    "decomposition_of_composite": ("torch._export.utils", "_get_decomp_for_cia"),
    "contiguous_for_sure": (
        "torch._prims_common",
        "is_contiguous_for_memory_format_or_false",
    ),
    "serializing": ("torch._export.serde", "serialize"),
    "shape_rules": ("torch._subclasses.fake_impls", "get_fast_op_impls"),
    "enable_mkldnn": ("torch._C", "_set_mkldnn_enabled"),
    "is_mkldnn_enabled": ("torch._C", "_get_mkldnn_enabled"),
    "export_utils": ("torch._export", "utils"),
    "has_kernel": ("torch._C", "_dispatch_has_kernel_for_dispatch_key"),
    "in_kernel": ("torch._subclasses.fake_tensor", "in_kernel_invocation_manager"),
    "is_composite": ("torch._export.utils", "_is_cia_op"),
    "open_size_kernels": ("torch._dispatch.python", "enable_python_dispatcher"),
    "may_stay_whole": ("torch._export.utils", "_check_valid_to_preserve"),
    "decomposition_table": ("torch._decomp", "decomposition_table"),
    "symbolic_config": ("torch.fx.experimental", "_config"),
    "transformer": ("torch.nn.modules", "transformer"),
    "tracing": ("torch.fx.experimental", "proxy_tensor"),
    "without_torch_function": ("torch._C", "DisableTorchFunctionSubclass"),
    "learnable_per_channel": ("torch", "_fake_quantize_learnable_per_channel_affine"),
    "learnable_per_tensor": ("torch", "_fake_quantize_learnable_per_tensor_affine"),
}


def part_of_torch(name: str, module: str, attribute: str) -> Any:
    """A part of torch.

    Args:
        name: What it is called here.
        module: Dotted name of its module.
        attribute: Its name there.

    Raises:
        MissingDependencyError: This torch has no such part.
    """
    try:
        owner = module_of(module)
        if not hasattr(owner, attribute) and hasattr(owner, "__path__"):
            return module_of(f"{module}.{attribute}")  # a module that nothing has imported yet
        return getattr(owner, attribute)
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(
            f"torch {torch.__version__} has no {module}.{attribute} ({name}), which graphopt needs;"
            f" it is tested with torch {' to '.join(dict.fromkeys(TESTED))}: install one of these"
        ) from error


def minor_version(version: str) -> tuple[int, int]:
    """First two numbers of a version, such as (2, 13)."""
    major, minor = version.split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()) or 0)


def warn_of_untested(version: str = torch.__version__) -> None:
    """Warn, once for each place of a call, where torch is newer than what the tests ran with."""
    if minor_version(version) > minor_version(TESTED[1]):
        warnings.warn(
            f"torch {version} is newer than {TESTED[1]}, the newest that graphopt is tested with",
            UntestedTorchVersionWarning,
            stacklevel=3,
        )


def __getattr__(name: str) -> Any:
    """A part is imported when it is first asked for: some bring the whole of torch's compiler."""
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    part = globals()[name] = part_of_torch(name, *_PARTS[name])
    return part
