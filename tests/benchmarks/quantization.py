"""Quantization against torchao PT2E and coreai-opt 0.3.0: accuracy, preparing, calibrating.

    make bench-peer     # once: an environment of its own for coreai-opt, .venv-peer
    make bench-quantization

Accuracy is the PSNR of the outputs, 10·log10(max(ref²) / mean((ref − out)²)) averaged over evaluation
batches, all on the same weights (batch norms folded beforehand, since coreai-opt 0.3.0 gives every
norm an epsilon of 1e-5) and the same calibration batches. torchao quantizes exactly the tensors that
ours does, with ExecuTorch's XNNPACK specs (affine int8, histograms) and with plain minima and maxima;
coreai-opt's set cannot be prescribed, it is its own default. Its example input is a calibration batch.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

ROOT = Path(__file__).parent.parent.parent
PEER = ROOT / ".venv-peer" / "bin" / "python"
sys.path.insert(0, str(Path(__file__).parent))


def psnr(found: Tensor, wanted: Tensor) -> float:
    error = (found - wanted).square().mean().clamp(min=1e-30)
    return float(10 * torch.log10(wanted.abs().max() ** 2 / error))


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def score(model: Callable[..., Any], batches: list[Any], wanted: list[Tensor]) -> float:
    with torch.no_grad():
        scores = [psnr(first(model(*b)), w) for b, w in zip(batches, wanted, strict=True)]
    return sum(scores) / len(scores)


# --- accuracy ------------------------------------------------------------------------------------
def folded(model: nn.Module, args: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    import graphopt
    from graphopt.passes import FoldBatchNorm, RemoveUnused
    from graphopt.passes.pass_manager import run_passes

    program = graphopt.capture(model, args, dynamic_shapes=None)
    run_passes(program.graph_module, [FoldBatchNorm(), RemoveUnused()])
    return program.export()


def ours(exported: Any, calibration: list[Any], kind: str) -> Callable[..., Any]:
    from graphopt.quantization import Quantizer, QuantizerConfig

    presets = {"default": QuantizerConfig, "affine": QuantizerConfig.presets.w8a8_affine}
    quantizer = Quantizer(exported, presets[kind]())
    quantizer.prepare(calibration[0])
    quantizer.calibrate(calibration)
    return quantizer.finalize(backend="torch")


def torchao(exported: Any, calibration: list[Any], kind: str) -> Callable[..., Any]:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.observer import MinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
        SharedQuantizationSpec,
    )

    from graphopt.analysis.quantization_plan import plan_activations
    from graphopt.analysis.weights import find_weights
    from graphopt.config.selection import Selector
    from graphopt.ir.editor import operands
    from graphopt.quantization import QuantizerConfig

    specs = get_symmetric_quantization_config(is_per_channel=True)
    activation = specs.input_activation
    if kind == "minmax":
        activation = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
            is_dynamic=False,
            observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12),
        )

    class SameSet(Quantizer):
        """Annotates the tensors of our plan."""

        def annotate(self, gm: fx.GraphModule) -> fx.GraphModule:
            plan = plan_activations(gm, Selector(QuantizerConfig()))
            notes: dict[fx.Node, Any] = {}
            owner: dict[str, Any] = {}

            def note(node: fx.Node) -> Any:
                empty = QuantizationAnnotation(input_qspec_map={}, _annotated=True)
                return notes.setdefault(node, empty)

            def spec_of(group: str, place: Any) -> Any:
                if group in owner:
                    return SharedQuantizationSpec(owner[group])
                owner[group] = place
                return activation

            for node, point in plan.outputs.items():
                note(node).output_qspec = spec_of(point.group, node)
                for user in node.users:
                    if user.op == "call_function":
                        note(user).input_qspec_map[node] = SharedQuantizationSpec(
                            owner[point.group]
                        )
            for (node, position), point in plan.inputs.items():
                value = operands(node)[position]
                note(node).input_qspec_map[value] = spec_of(point.group, (value, node))
            weighted = {each: w for w in find_weights(gm) for each in w.nodes if w.uses}
            for node in gm.graph.nodes:
                for value in node.all_input_nodes:
                    if value in weighted and weighted[value].tensor.ndim >= 2:
                        note(node).input_qspec_map[value] = specs.weight
            for node, found in notes.items():
                node.meta["quantization_annotation"] = found
            return gm

        def validate(self, gm: fx.GraphModule) -> None:
            pass

    prepared = prepare_pt2e(exported.module(check_guards=False), SameSet())
    with torch.no_grad():
        for batch in calibration:
            prepared(*batch)
    return convert_pt2e(prepared)  # type: ignore[no-any-return]


_COREAI = """
import json, sys, warnings, logging
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
import torch
from coreai_opt.quantization import Quantizer, QuantizerConfig, ModuleQuantizerConfig
from coreai_opt.quantization.spec import QuantizationSpec, default_weight_quantization_spec
folder = sys.argv[1]
data = torch.load(f"{folder}/data.pt")
def config(kind):
    if kind == "default":
        return QuantizerConfig()
    act = QuantizationSpec(dtype="int8", qscheme="asymmetric", qparam_calculator_cls="global_minmax")
    return QuantizerConfig(global_config=ModuleQuantizerConfig(op_input_spec={"*": act},
        op_output_spec={"*": act}, op_state_spec={"weight": default_weight_quantization_spec()}))
out = {}
for kind in ("default", "affine"):
    module = torch.export.load(f"{folder}/net.pt2").module(check_guards=False)
    quantizer = Quantizer(module, config(kind))
    prepared = quantizer.prepare(data["calibration"][0])
    with quantizer.calibration_mode(), torch.no_grad():
        for batch in data["calibration"]:
            prepared(*batch)
    prepared.eval()
    with torch.no_grad():
        found = [prepared(*batch) for batch in data["evaluation"]]
    out[kind] = [f[0] if isinstance(f, (tuple, list)) else f for f in found]
torch.save(out, f"{folder}/out.pt")
"""


def coreai(exported: Any, calibration: list[Any], evaluation: list[Any]) -> dict[str, list[Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(exported, f"{folder}/net.pt2")
        torch.save({"calibration": calibration, "evaluation": evaluation}, f"{folder}/data.pt")
        done = subprocess.run(
            [PEER, "-c", _COREAI, folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.stderr.write(done.stderr[-1500:])
            return {}
        return torch.load(f"{folder}/out.pt")  # type: ignore[no-any-return]


def accuracy(names: list[str]) -> dict[str, Any]:
    from quantization_nets import CASES

    rows: dict[str, Any] = {}
    for name in names:
        model, calibration, evaluation = CASES[name]()
        exported = folded(model, calibration[0])
        with torch.no_grad():
            wanted = [first(model(*batch)) for batch in evaluation]
        row: dict[str, float | None] = {}
        for kind in ("default", "affine"):
            quantized = ours(exported, calibration, kind)
            row[f"ours {kind}"] = score(quantized, evaluation, wanted)
        for kind in ("histogram", "minmax"):
            row[f"torchao {kind}"] = score(torchao(exported, calibration, kind), evaluation, wanted)
        found = coreai(exported, calibration, evaluation) if PEER.exists() else {}
        for kind in ("default", "affine"):
            outputs = found.get(kind)
            row[f"coreai-opt {kind}"] = (
                None
                if outputs is None
                else sum(psnr(o, w) for o, w in zip(outputs, wanted, strict=True)) / len(wanted)
            )
        rows[name] = row
        print(
            f"{name:18s}"
            + "  ".join(
                f"{key} {'—' if value is None else f'{value:.2f}'}" for key, value in row.items()
            ),
            flush=True,
        )
        best = max(v for k, v in row.items() if not k.startswith("ours") and v is not None)
        print(f"{'':18s}ours affine − best peer: {row['ours affine'] - best:+.2f} dB", flush=True)  # type: ignore[operator]
    return rows


# --- preparing -----------------------------------------------------------------------------------
_PREPARE = """
import sys, time, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, "{root}/examples/digits")
import torch
from torch import nn
if "{net}" == "digits":
    from model import DigitsNet
    net, x = DigitsNet().eval(), (torch.randn(1, 1, 8, 8),)
else:
    net = nn.Sequential(*[nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
                          for _ in range(40)]).eval()
    x = (torch.randn(1, 16, 32, 32),)
if "{what}" == "export":
    started = time.perf_counter()
    torch.export.export(net, x)
else:
    from graphopt.quantization import Quantizer
    started = time.perf_counter()
    Quantizer(net).prepare(x)
print(time.perf_counter() - started)
"""


def preparing(repeats: int) -> dict[str, Any]:
    """Seconds of the first call in a fresh process: `torch.export.export` alone, and `prepare`."""
    rows = {}
    for net in ("digits", "conv-bn-relu × 40"):
        seconds: dict[str, list[float]] = {"export": [], "prepare": []}
        for _ in range(repeats):
            for what, found in seconds.items():
                code = _PREPARE.format(root=ROOT, net=net, what=what)
                done = subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=True
                )
                found.append(float(done.stdout.split()[-1]))
        middle = {what: statistics.median(found) for what, found in seconds.items()}
        middle["beyond export"] = middle["prepare"] - middle["export"]
        rows[net] = middle
        print(f"{net:18s}" + "  ".join(f"{k} {v:.2f} s" for k, v in middle.items()), flush=True)
    return rows


# --- calibrating ---------------------------------------------------------------------------------
def _seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def calibrating(repeats: int) -> dict[str, float]:
    """A calibration pass over a plain one of the same exported program, ResNet-50 shapes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    from graphopt.quantization import (
        ModuleQuantizerConfig,
        QuantizationSpec,
        Quantizer,
        QuantizerConfig,
    )

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig()).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).logits  # type: ignore[no-any-return]

    x = torch.randn(4, 3, 224, 224)
    exported = folded(Logits(), (x,))
    plain = exported.module(check_guards=False)
    rows: dict[str, float] = {}
    with torch.no_grad():
        base = _seconds(lambda: plain(x), repeats)
        for calculator in ("global_minmax", "moving_average", "mse"):
            spec = QuantizationSpec(qparam_calculator_cls=calculator)
            config = QuantizerConfig(
                global_config=ModuleQuantizerConfig(
                    op_input_spec={"*": spec}, op_output_spec={"*": spec}
                )
            )
            quantizer = Quantizer(exported, config)
            quantizer.prepare((x,))
            with quantizer.calibration_mode() as prepared:
                rows[f"ours {calculator}"] = _seconds(lambda: prepared(x), repeats) / base
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    peer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(exported.module(check_guards=False), peer)
    with torch.no_grad():
        rows["torchao XNNPACKQuantizer"] = _seconds(lambda: prepared(x), repeats) / base
    print(f"plain forward {base:.3f} s, batch of 4; a calibration pass takes", flush=True)
    print("  ".join(f"{k} {v:.2f}×" for k, v in rows.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("accuracy", "preparing", "calibrating"))
    parser.add_argument(
        "--nets", nargs="*", default=["resnet", "mobilenet_v2", "bert", "sentence_encoder"]
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results: dict[str, Any] = {}
    if args.only in (None, "preparing"):
        results["preparing"] = preparing(args.repeats)
    if args.only in (None, "calibrating"):
        results["calibrating"] = calibrating(args.repeats)
    if args.only in (None, "accuracy"):
        if not PEER.exists():
            print("coreai-opt is skipped: there is no .venv-peer (make bench-peer)")
        results["accuracy"] = accuracy(args.nets)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
