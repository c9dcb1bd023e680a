"""Lazy imports of optional packages, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from graphopt.errors import MissingDependencyError

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of graphopt provides it.

    Args:
        module: Dotted module name, for instance "coreai_torch".
        extra: Name of the extra, for instance "coreai".

    Raises:
        MissingDependencyError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        if missing.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{module} is not installed; it comes with the extra '{extra}': "
            f"pip install 'graphopt[{extra}]'"
        ) from error
