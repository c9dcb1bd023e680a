"""Backends: one folder per target and one row in `registry`; each is imported when it is asked for."""

if __name__ != "graphopt.backends":
    raise ImportError("import graphopt.backends, not backends")


from graphopt.audited import module_of
from graphopt.backends.base import Artifact, Backend
from graphopt.backends.benchmark import DEVICES, Benchmark, Device
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.compute_plan import ComputePlan, PlannedOp
from graphopt.backends.registry import ExportBackend, Target, target_of
from graphopt.backends.verification import Verification

__all__ = [
    "DEVICES",
    "Artifact",
    "Backend",
    "Benchmark",
    "Capabilities",
    "ComputePlan",
    "Device",
    "ExportBackend",
    "PlannedOp",
    "Target",
    "Verification",
    "load_backend",
]


def load_backend(name: Target | str) -> Backend:
    """The backend of a target; its code is imported here, its toolchain only when it lowers.

    Args:
        name: An `ExportBackend` or its value, such as "coreai".

    Raises:
        LoweringError: There is no such target.

    Examples:
        >>> load_backend("coreml").name, load_backend(graphopt.ExportBackend.Torch).name
        ('Core ML', 'Torch')
    """
    module, _, attribute = target_of(name).backend.partition(":")
    backend = getattr(module_of(module), attribute)()
    assert isinstance(backend, Backend)
    return backend
