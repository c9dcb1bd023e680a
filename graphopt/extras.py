"""Packages that are imported late: optional ones, and heavy ones that not every program needs."""

from __future__ import annotations

import sys
from types import ModuleType

from graphopt.audited import module_of
from graphopt.errors import MissingDependencyError
from graphopt.exclusive import silent

__all__ = ["deferred", "require"]


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of graphopt provides it; what it writes meanwhile is lost.

    Args:
        module: Dotted module name, for instance "coreai_torch".
        extra: Name of the extra, for instance "coreai".

    Raises:
        MissingDependencyError: The module is not installed.
    """
    try:
        if module in sys.modules:
            return module_of(module)
        with silent():  # packages tell of compiled parts that are not for this machine
            return module_of(module)
    except ImportError as error:
        missing = error.name or module
        if missing.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{module} is not installed; it comes with the extra '{extra}': "
            f"pip install 'graphopt[{extra}]'"
        ) from error


class _Deferred(ModuleType):
    """A module that is imported when something of it is first asked for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(module_of(self.__name__), name)
        setattr(self, name, value)
        return value


def deferred(module: str) -> ModuleType:
    """A module that is needed rarely and takes long to import, such as what compiles kernels.

    The name is bound at the top of a file as an import would, beside an import for type checkers:

    >>> if TYPE_CHECKING:
    ...     from scipy import optimize
    ... else:
    ...     optimize = deferred("scipy.optimize")

    Args:
        module: Dotted module name.
    """
    return _Deferred(module)
