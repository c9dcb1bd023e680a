"""What peers make of a network; each job runs in the Python that has the peer.

python accuracy_peers.py JOB FOLDER

A job takes the exported net and its data, net.pt2 and data.pt of the folder, and writes what it puts out
for the held-out calls; a job on weights takes weights.pt and writes the weights that the peer gives.
Weights of one matrix are linear layers there, of a kernel convolutions, so that every peer compresses
the same set, embeddings too.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

GROUP, BLOCK = 16, 32


class Layers(nn.Module):
    """Independent layers, read through one number each."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(self._layer, weights.values()))

    @staticmethod
    def _layer(weight: Tensor) -> nn.Module:
        layer: nn.Module
        if weight.ndim == 2:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        else:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False)
        layer.weight = nn.Parameter(weight.clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for layer in self.layers:
            shape = layer.weight.shape  # type: ignore[union-attr]
            total = total + layer(x.expand(1, *shape[1:])).sum()
        return total


def _grouped(weight: Tensor) -> bool:
    return weight.shape[0] % GROUP == 0


# --- weights -------------------------------------------------------------------------------------
def coreai_tables(weights: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """coreai-opt's k-means, a table for each 16 rows."""
    from coreai_opt.palettization import (
        KMeansPalettizer,
        KMeansPalettizerConfig,
        ModuleKMeansPalettizerConfig,
        PalettizationSpec,
    )
    from coreai_opt.palettization.spec import PerGroupedChannelGranularity, PerTensorGranularity

    made = {}
    for name, weight in weights.items():
        groups = PerGroupedChannelGranularity(axis=0, group_size=GROUP)
        spec = PalettizationSpec(
            n_bits=bits, granularity=groups if _grouped(weight) else PerTensorGranularity()
        )
        config = KMeansPalettizerConfig(
            global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
        )
        prepared = KMeansPalettizer(Layers({name: weight}), config).prepare((torch.ones(()),))
        made[name] = prepared.layers[0].weight.detach()
    return made


def coreml_tables(weights: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """coremltools' k-means, a table for each 16 rows."""
    from coremltools.optimize.torch.palettization import (
        PostTrainingPalettizer,
        PostTrainingPalettizerConfig,
    )

    made = {}
    for name, weight in weights.items():
        options: dict[str, Any] = {"n_bits": bits, "granularity": "per_tensor"}
        if _grouped(weight):
            options |= {"granularity": "per_grouped_channel", "group_size": GROUP}
        config = PostTrainingPalettizerConfig.from_dict({"global_config": options})
        done = PostTrainingPalettizer(Layers({name: weight}), config).compress()
        made[name] = done.layers[0].weight.detach()
    return made


def torchao_blocks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """int4 with a scale for each 32 columns; what 32 does not divide stays."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    made = {}
    for name, weight in weights.items():
        net = Layers({name: weight})
        quantize_(net, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(BLOCK)))
        made[name] = net.layers[0].weight.dequantize().detach()  # type: ignore[union-attr, operator]
    return made


def coreai_blocks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """int4 with a scale for each 32 columns, as coreai-opt's quantizer gives it."""
    from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
    from coreai_opt.quantization.spec import PerBlockGranularity, QuantizationSpec

    made = {}
    for name, weight in weights.items():
        granularity = PerBlockGranularity(axis=1, block_size=BLOCK)
        spec = QuantizationSpec(dtype="int4", qscheme="symmetric", granularity=granularity)
        config = QuantizerConfig(
            global_config=ModuleQuantizerConfig(
                op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec}
            )
        )
        layer = Layers._layer(weight)
        prepared = Quantizer(layer, config).prepare((torch.eye(weight.shape[1]),))
        prepared.eval()
        made[name] = prepared(torch.eye(weight.shape[1])).T.detach()
    return made


# --- programs ------------------------------------------------------------------------------------
def _module(folder: str) -> nn.Module:
    return torch.export.load(f"{folder}/net.pt2").module(check_guards=False)


def torchao_pt2e(folder: str, data: dict[str, Any]) -> Callable[..., Any]:
    """XNNPACK's quantizer: weights per channel, affine activations by histograms."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    peer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(_module(folder), peer)
    for batch in data["calibration"]:
        prepared(*batch)
    return convert_pt2e(prepared)  # type: ignore[no-any-return]


def nncf_int8(folder: str, data: dict[str, Any], *, biases: bool = True) -> Callable[..., Any]:
    """NNCF's post-training quantization, with its scheme for transformers (SmoothQuant) where it is one.

    All 8 bits of weights are used, which it leaves to processors without VNNI; its fast correction of
    biases is left out on demand, since it can harm.
    """
    import nncf
    from nncf.quantization import advanced_parameters as advanced

    options = advanced.AdvancedQuantizationParameters(
        overflow_fix=advanced.OverflowFix.DISABLE, disable_bias_correction=not biases
    )
    kind = nncf.ModelType.TRANSFORMER if data["transformer"] else None
    made: Callable[..., Any] = nncf.quantize(
        _module(folder),
        nncf.Dataset(data["calibration"], lambda batch: tuple(batch)),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=kind,
        subset_size=len(data["calibration"]),
        advanced_parameters=options,
    )
    return made


def nncf_blocks(folder: str, data: dict[str, Any]) -> Callable[..., Any]:
    """NNCF's symmetric int4 with a scale for each 32 columns of every linear layer."""
    import nncf

    made: Callable[..., Any] = nncf.compress_weights(
        _module(folder),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=BLOCK,
        all_layers=True,
        dataset=nncf.Dataset(data["calibration"], lambda batch: tuple(batch)),
        ignored_scope=nncf.IgnoredScope(types=["embedding"], validate=False),
    )
    return made


def coreai_int8(folder: str, data: dict[str, Any]) -> Callable[..., Any]:
    """coreai-opt: affine int8 activations by minima and maxima, weights per channel."""
    from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
    from coreai_opt.quantization.spec import QuantizationSpec, default_weight_quantization_spec

    kind = QuantizationSpec(
        dtype="int8", qscheme="asymmetric", qparam_calculator_cls="global_minmax"
    )
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_input_spec={"*": kind},
            op_output_spec={"*": kind},
            op_state_spec={"weight": default_weight_quantization_spec()},
        )
    )
    quantizer = Quantizer(_module(folder), config)
    prepared = quantizer.prepare(data["calibration"][0])
    with quantizer.calibration_mode():
        for batch in data["calibration"]:
            prepared(*batch)
    prepared.eval()
    return prepared  # type: ignore[no-any-return]


ON_WEIGHTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    **{f"coreai tables {n}": (lambda w, n=n: coreai_tables(w, n)) for n in (4, 3, 2)},
    **{f"coreml tables {n}": (lambda w, n=n: coreml_tables(w, n)) for n in (4, 3, 2)},
    "torchao blocks": torchao_blocks,
    "coreai blocks": coreai_blocks,
}
ON_PROGRAMS: dict[str, Callable[[str, dict[str, Any]], Callable[..., Any]]] = {
    "torchao int8": torchao_pt2e,
    "nncf int8": nncf_int8,
    "nncf int8, biases kept": lambda folder, data: nncf_int8(folder, data, biases=False),
    "nncf blocks": nncf_blocks,
    "coreai int8": coreai_int8,
}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    job, folder = sys.argv[1:]
    with torch.no_grad():
        if job in ON_WEIGHTS:
            torch.save(ON_WEIGHTS[job](torch.load(f"{folder}/weights.pt")), f"{folder}/out.pt")
            return
        data = torch.load(f"{folder}/data.pt")
        made = ON_PROGRAMS[job](folder, data)
        found = [made(*batch) for batch in data["held_out"]]
        found = [each[0] if isinstance(each, tuple | list) else each for each in found]
        torch.save(found, f"{folder}/out.pt")


if __name__ == "__main__":
    main()
