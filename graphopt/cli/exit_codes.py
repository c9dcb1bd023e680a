"""What the commands end with, and how their help says so."""

from __future__ import annotations

from graphopt import errors

__all__ = ["EXIT_CODES", "code_of", "epilog"]

# what it means, and the errors that mean it
EXIT_CODES: dict[int, tuple[str, tuple[type[Exception], ...]]] = {
    0: ("done", ()),
    1: ("an unexpected failure", ()),
    2: ("wrong usage", ()),
    3: ("the model cannot be captured, or the inputs do not fit it", (errors.CaptureError,)),
    4: ("the config is wrong or does not fit the model", (errors.ConfigError,)),
    5: (
        "a tensor cannot be compressed, or data for it are missing",
        (errors.CompressionError, errors.CalibrationError),
    ),
    6: ("the target cannot hold the program", (errors.LoweringError,)),
    7: ("the output exists", (errors.ArtifactExistsError,)),
    8: (
        "the artifact differs from PyTorch, by more than --max-error where that is given",
        (errors.VerificationError,),
    ),
    9: ("an optional package is missing", (errors.MissingDependencyError,)),
    10: ("no recipe meets the target", (errors.InfeasibleError,)),
}


def code_of(error: Exception) -> int:
    """The exit code of an error."""
    for code, (_, kinds) in EXIT_CODES.items():
        if isinstance(error, kinds):
            return code
    return 3 if isinstance(error, errors.InputError) else 1


def epilog(example: str) -> str:
    """The end of a command's help: an example, and the exit codes.

    Args:
        example: The words behind "graphopt".
    """
    codes = "; ".join(f"{code} {meaning}" for code, (meaning, _) in EXIT_CODES.items())
    return f"Example: graphopt {example}\n\nExit codes: {codes}."
