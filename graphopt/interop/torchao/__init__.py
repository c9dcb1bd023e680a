"""The code behind `graphopt.torchao`."""

import warnings
from importlib.metadata import PackageNotFoundError, version

import torch

from graphopt.errors import TorchaoTorchIncompatibilityWarning
from graphopt.ir.torch_private import minor_version

__all__ = ["warn_of_old_torchao"]

# the first torchao whose PT2E works on what `torch.export` of these torch versions gives
_NEEDS = (((2, 13), (0, 18)), ((2, 10), (0, 15)))


def warn_of_old_torchao(ours: str | None = None, torchs: str = torch.__version__) -> None:
    """Warn where the installed torchao is older than what the installed torch needs.

    Args:
        ours: Version of torchao; None looks it up.
        torchs: Version of torch.
    """
    if ours is None:
        try:
            ours = version("torchao")
        except PackageNotFoundError:
            return
    for since, needed in _NEEDS:
        if minor_version(torchs) >= since:
            if minor_version(ours) < needed:
                warnings.warn(
                    f"torchao {ours} is older than {needed[0]}.{needed[1]}, which torch {torchs} needs",
                    TorchaoTorchIncompatibilityWarning,
                    stacklevel=3,
                )
            return


warn_of_old_torchao()
