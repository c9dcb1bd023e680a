"""Backends: one folder per target; each is imported only when it is asked for."""

if __name__ != "graphopt.backends":
    raise ImportError("import graphopt.backends, not backends")

import importlib

from graphopt.backends.base import Artifact, Backend, Capabilities, Verification
from graphopt.errors import LoweringError
from graphopt.specs import ExportBackend

__all__ = ["BACKENDS", "Artifact", "Backend", "Capabilities", "Verification", "load_backend"]

BACKENDS: dict[ExportBackend, str] = {
    ExportBackend.CoreAI: "graphopt.backends.coreai.backend:CoreAIBackend",
    ExportBackend.CoreML: "graphopt.backends.coreml.backend:CoreMLBackend",
    ExportBackend.ExecuTorch: "graphopt.backends.executorch.backend:ExecuTorchBackend",
    ExportBackend.Torch: "graphopt.backends.torch_export.backend:TorchBackend",
}


def load_backend(backend: ExportBackend | str) -> Backend:
    """The backend of a target.

    Args:
        backend: An `ExportBackend` or its value, such as "coreai".

    Raises:
        LoweringError: There is no such target.
    """
    try:
        target = ExportBackend(backend)
    except ValueError:
        names = [each.value for each in ExportBackend]
        raise LoweringError(f"no backend {backend!r}; there are {names}") from None
    module, _, name = BACKENDS[target].partition(":")
    found = getattr(importlib.import_module(module), name)()
    assert isinstance(found, Backend)
    return found
