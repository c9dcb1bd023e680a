"""DKMPalettizer: palettes that are learned by differentiable k-means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.export import ExportedProgram
from typing_extensions import Unpack, override

from graphopt.compressors.kmeans import KMeansPalettizer
from graphopt.compressors.options import PrepareKeywords
from graphopt.config.palettization import DKMPalettizerConfig
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program
from graphopt.specs import DKMTrainingSpec

__all__ = ["DKMPalettizer"]


class DKMPalettizer(KMeansPalettizer):
    """Learn tables and codes in training (Cho et al., DKM, arXiv 2108.12659).

    >>> palettizer = DKMPalettizer(model)
    >>> prepared = palettizer.prepare(example)
    >>> optimizer = torch.optim.Adam(prepared.parameters())
    >>> with palettizer.training_mode():
    ...     for x in batches:
    ...         optimizer.zero_grad()
    ...         (prepared(x) - model(x).detach()).square().mean().backward()
    ...         _ = optimizer.step(), palettizer.step()
    >>> finalized = palettizer.finalize(backend=graphopt.ExportBackend.Torch)

    A training step keeps no attention matrix: long tables work on the weights' distinct 16-bit
    values (eDKM, arXiv 2309.00964), others in chunks.

    Args:
        model: A module, an `ExportedProgram`, or a `Program`; it is never changed.
        config: What becomes of which weight; 4 bits per tensor everywhere by default.
    """

    _strategy: ClassVar[DKMTrainingSpec | None] = DKMTrainingSpec()

    def __init__(
        self,
        model: nn.Module | ExportedProgram | Program,
        config: DKMPalettizerConfig | None = None,
    ) -> None:
        super().__init__(model, DKMPalettizerConfig() if config is None else config)

    @override
    def prepare(
        self,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[PrepareKeywords],
    ) -> CapturedModule:
        """Capture the model, cluster its weights and give them trainable palettes.

        Args:
            example_inputs: Inputs of one call.
            example_kwargs: Keyword inputs of that call.
            options: Further options of `KMeansPalettizer.prepare`.

        Returns:
            A module with the model's signature and parameter names, in evaluation mode.

        Raises:
            CaptureError, ConfigError, CompressionError, StateError: As `KMeansPalettizer.prepare`.
        """
        prepared = super().prepare(example_inputs, example_kwargs, **options)
        self._train().leave()
        return prepared
