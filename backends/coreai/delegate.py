"""Core AI as a delegate of ExecuTorch programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.export import ExportedProgram
from typing_extensions import override

from graphopt.backends.coreai.backend import CoreAIBackend, run_asset
from graphopt.backends.delegate import Delegate, Payload
from graphopt.extras import require

__all__ = ["CoreAIDelegate"]


@dataclass(frozen=True)
class CoreAIDelegate(Delegate):
    """Lower to ExecuTorch's Core AI delegate; its payload is an .aimodel.

    Attributes:
        precision: "float16" casts floats, inputs and outputs too, to 16 bits.
    """

    id: ClassVar[str] = "CoreAIBackend"
    precision: Literal["float32", "float16"] = "float32"

    @override
    def export(self, program: Any) -> ExportedProgram:
        return CoreAIBackend().legal_export(program, self.precision)

    @override
    def partitioner(self) -> Any:
        require("coreai.authoring", "coreai")
        require("executorch.backends.apple.coreai", "executorch")
        from coreai.authoring import AIProgram
        from executorch.backends.apple.coreai import CoreAIPartitioner

        # the name that executorch knows became private in the version that installs beside it
        if not hasattr(AIProgram, "get_graph") and hasattr(AIProgram, "_get_graph"):
            AIProgram.get_graph = AIProgram._get_graph
        return CoreAIPartitioner()

    @override
    def edge_options(self) -> dict[str, Any]:
        from executorch.backends.apple.coreai import (
            get_default_compile_config,
            get_default_passes,
        )

        return {
            "transform_passes": get_default_passes(),
            "compile_config": get_default_compile_config(),
        }

    @override
    def run(self, payload: Payload, inputs: Sequence[Tensor], folder: Path) -> list[Tensor]:
        manifest = json.loads(payload.data)
        key = manifest["hash"]
        for name in manifest["files"]:
            target = folder / key / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(payload.named[f"coreai/{key}/{name}"])
        given = {f"input {place}": tensor for place, tensor in enumerate(inputs)}
        return run_asset(folder / manifest["path"], given)
