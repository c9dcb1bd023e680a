"""Exceptions and warnings of graphopt; each also derives from the fitting builtin."""

from __future__ import annotations

__all__ = [
    "ArtifactExistsError",
    "CalibrationError",
    "CaptureError",
    "CompressionError",
    "ConfigError",
    "ConfigWarning",
    "CoreMLExportError",
    "DependencyVersionWarning",
    "GraphOptError",
    "InfeasibleError",
    "InputError",
    "InvalidExecutionModeError",
    "LoweringError",
    "MissingDependencyError",
    "OptionError",
    "OutputError",
    "PassError",
    "StateError",
    "TorchaoTorchIncompatibilityWarning",
    "UntestedTorchVersionWarning",
    "VerificationError",
]


class GraphOptError(Exception):
    """Base of every error that graphopt raises on purpose."""


class ConfigError(GraphOptError, ValueError):
    """A spec or config holds a wrong value, an unknown key, or a key that matches nothing.

    Attributes:
        problems: (path of the key, what is wrong with it), where that is known.
    """

    def __init__(
        self, message: str, problems: tuple[tuple[tuple[str | int, ...], str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.problems = problems


class InvalidExecutionModeError(ConfigError):
    """`execution_mode` is none of the modes that there are; coreai-opt's name for it."""


class OptionError(ConfigError, TypeError):
    """A call or a mapping names an option that there is not; the message has the closest one."""


class CaptureError(GraphOptError, RuntimeError):
    """A model cannot be exported; the message names the op, module and source line."""


class InputError(GraphOptError, ValueError):
    """Inputs do not fit a captured program: structure, dtype or a dimension that is fixed."""


class CompressionError(GraphOptError, ValueError):
    """A tensor cannot be compressed as asked (NaN, Inf, a dtype without a rule)."""


class CalibrationError(GraphOptError, RuntimeError):
    """Activations have no usable range: never observed, NaN or Inf, or empty; the message names them."""


class InfeasibleError(GraphOptError, ValueError):
    """No choice meets the budget."""


class StateError(GraphOptError, RuntimeError):
    """A call came at the wrong time, such as `finalize` before `prepare`."""


class PassError(GraphOptError, RuntimeError):
    """A pass ran without the passes that must precede it, or broke the graph."""


class LoweringError(GraphOptError, RuntimeError):
    """A target cannot hold the program; raised before any file is written."""


class CoreMLExportError(LoweringError, ValueError):
    """Core ML cannot hold the program; coreai-opt's name for it."""


class VerificationError(GraphOptError, RuntimeError):
    """A saved artifact could not be evaluated for comparison."""


class ArtifactExistsError(GraphOptError, FileExistsError):
    """The output path exists and `overwrite=True` was not given."""


class OutputError(GraphOptError, OSError):
    """The output cannot be written: no space, no permission, another run; what was there stays."""

    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""


class MissingDependencyError(GraphOptError, ImportError):
    """An optional package is absent; the message names the extra that brings it."""


class ConfigWarning(UserWarning):
    """A config was followed, but part of it had no effect or a fallback was taken."""


class DependencyVersionWarning(UserWarning):
    """A package's version is outside what this library is tested with."""


class UntestedTorchVersionWarning(DependencyVersionWarning):
    """The installed torch is newer than the newest that the tests were run with."""


class TorchaoTorchIncompatibilityWarning(DependencyVersionWarning):
    """The installed torchao is too old for the installed torch."""
