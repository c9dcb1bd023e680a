"""Core AI as a delegate of ExecuTorch programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.export import ExportedProgram
from typing_extensions import override

from graphopt.audited import parse_json
from graphopt.backends.coreai.check import run_asset
from graphopt.backends.coreai.lower import legal_export
from graphopt.backends.coreai.options import CoreAIOptions
from graphopt.backends.delegate import Delegate, Payload
from graphopt.extras import require
from graphopt.files import inside
from graphopt.ir.program import Program

__all__ = ["CoreAIDelegate"]


@dataclass(frozen=True)
class CoreAIDelegate(Delegate):
    """Lower to ExecuTorch's Core AI delegate; its payload is an .aimodel."""

    id: ClassVar[str] = "CoreAIBackend"
    options: CoreAIOptions = field(default_factory=CoreAIOptions)

    @override
    def export(self, program: Program) -> ExportedProgram:
        return legal_export(program, self.options)

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
        manifest = parse_json(bytes(payload.data), "the payload")
        key = manifest["hash"]
        for name in manifest["files"]:
            target = inside(folder, key, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(payload.named[f"coreai/{key}/{name}"])
        given = {f"input {place}": tensor for place, tensor in enumerate(inputs)}
        return run_asset(inside(folder, manifest["path"]), given)
