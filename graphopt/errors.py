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
    """Base of every error that graphopt raises on purpose.

    Examples:
        >>> try:
        ...     graphopt.lower(model, "no such target", example)
        ... except GraphOptError as error:
        ...     print(error)
        no backend 'no such target'; there are ['coreai', 'coreml', 'executorch', 'onnx', 'torch']
    """


class ConfigError(GraphOptError, ValueError):
    """A spec or config holds a wrong value, an unknown key, or a key that matches nothing.

    Attributes:
        problems: (path of the key, what is wrong with it), where that is known.

    Examples:
        >>> try:
        ...     graphopt.palettization.KMeansPalettizerConfig.from_dict({"weight_threshold": -1})
        ... except ConfigError as error:
        ...     print(type(error).__name__)
        ConfigError
    """

    def __init__(
        self, message: str, problems: tuple[tuple[tuple[str | int, ...], str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.problems = problems


class InvalidExecutionModeError(ConfigError):
    """`execution_mode` is none of the modes that there are; coreai-opt's name for it.

    Examples:
        >>> issubclass(InvalidExecutionModeError, ValueError)
        True
    """


class OptionError(ConfigError, TypeError):
    """A call or a mapping names an option that there is not; the message has the closest one.

    Examples:
        >>> try:
        ...     graphopt.compress(model, example, tune_stepss=3)
        ... except OptionError as error:
        ...     print("tune_steps" in str(error))
        True
    """


class CaptureError(GraphOptError, RuntimeError):
    """A model cannot be exported; the message names the op, module and source line.

    Examples:
        >>> class Branches(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x if x.sum() > 0 else -x
        >>> try:
        ...     graphopt.capture(Branches(), torch.randn(3))
        ... except CaptureError as error:
        ...     print(type(error).__name__)
        CaptureError
    """


class InputError(GraphOptError, ValueError):
    """Inputs do not fit a captured program: structure, dtype or a dimension that is fixed.

    Examples:
        >>> issubclass(InputError, ValueError)
        True
    """


class CompressionError(GraphOptError, ValueError):
    """A tensor cannot be compressed as asked (NaN, Inf, a dtype without a rule).

    Examples:
        >>> broken = torch.nn.Linear(16, 8)
        >>> _ = torch.nn.init.constant_(broken.weight, torch.nan)
        >>> try:
        ...     graphopt.compress(broken, example, {"palettization": {}})
        ... except CompressionError as error:
        ...     print("weight" in str(error))
        True
    """


class CalibrationError(GraphOptError, RuntimeError):
    """Activations have no usable range: never observed, NaN or Inf, or empty; the message names them.

    Examples:
        >>> issubclass(CalibrationError, RuntimeError)
        True
    """


class InfeasibleError(GraphOptError, ValueError):
    """No choice meets the budget.

    Examples:
        >>> from graphopt.mixed_precision import Problem, solve_exactly
        >>> try:
        ...     solve_exactly(Problem.of([[0.5, 0.1]], [[2, 4]]), budget=1)
        ... except InfeasibleError as error:
        ...     print(type(error).__name__)
        InfeasibleError
    """


class StateError(GraphOptError, RuntimeError):
    """A call came at the wrong time, such as `finalize` before `prepare`.

    Examples:
        >>> palettizer = graphopt.palettization.KMeansPalettizer(model)
        >>> try:
        ...     palettizer.finalize()
        ... except StateError as error:
        ...     print("prepare" in str(error))
        True
    """


class PassError(GraphOptError, RuntimeError):
    """A pass ran without the passes that must precede it, or broke the graph.

    Examples:
        >>> issubclass(PassError, RuntimeError)
        True
    """


class LoweringError(GraphOptError, RuntimeError):
    """A target cannot hold the program; raised before any file is written.

    Examples:
        >>> try:
        ...     graphopt.lower(model, "coreai", example, precision="float8")
        ... except LoweringError as error:
        ...     print("precision" in str(error))
        True
    """


class CoreMLExportError(LoweringError, ValueError):
    """Core ML cannot hold the program; coreai-opt's name for it.

    Examples:
        >>> issubclass(CoreMLExportError, graphopt.errors.LoweringError)
        True
    """


class VerificationError(GraphOptError, RuntimeError):
    """A saved artifact could not be evaluated for comparison.

    Examples:
        >>> issubclass(VerificationError, RuntimeError)
        True
    """


class ArtifactExistsError(GraphOptError, FileExistsError):
    """The output path exists and `overwrite=True` was not given.

    Examples:
        >>> issubclass(ArtifactExistsError, FileExistsError)
        True
    """


class OutputError(GraphOptError, OSError):
    """The output cannot be written: no space, no permission, another run; what was there stays.

    Examples:
        >>> issubclass(OutputError, OSError)
        True
    """

    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""


class MissingDependencyError(GraphOptError, ImportError):
    """An optional package is absent; the message names the extra that brings it.

    Examples:
        >>> issubclass(MissingDependencyError, ImportError)
        True
    """


class ConfigWarning(UserWarning):
    """A config was followed, but part of it had no effect or a fallback was taken.

    Examples:
        >>> issubclass(ConfigWarning, UserWarning)
        True
    """


class DependencyVersionWarning(UserWarning):
    """A package's version is outside what this library is tested with.

    Examples:
        >>> issubclass(DependencyVersionWarning, UserWarning)
        True
    """


class UntestedTorchVersionWarning(DependencyVersionWarning):
    """The installed torch is newer than the newest that the tests were run with.

    Examples:
        >>> issubclass(UntestedTorchVersionWarning, graphopt.errors.DependencyVersionWarning)
        True
    """


class TorchaoTorchIncompatibilityWarning(DependencyVersionWarning):
    """The installed torchao is too old for the installed torch.

    Examples:
        >>> issubclass(TorchaoTorchIncompatibilityWarning, graphopt.errors.DependencyVersionWarning)
        True
    """
