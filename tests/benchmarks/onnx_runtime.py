"""Models in ONNX Runtime: ours beside its own quantizers, by file, latency and outputs.

    make bench-onnx

ResNet-50's shapes with random weights, the packaged sentence encoder and a decoder with random weights. Each
row is one file, run in ONNX Runtime on the CPU with one thread: bytes on disk, median latency of a call and
PSNR of the outputs on calls that nothing was calibrated on, with the peak of the float model's. The float
model of ONNX Runtime's quantizers is torch's own export, preprocessed as they ask for; all get the same
calibration calls. Latencies are of interleaved rounds.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from end_to_end import ResNet50
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.files import stored_size
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.quantization import QuantizerConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sentence_encoder"))

Call = tuple[Tensor, ...]
MODELS = ("resnet50", "encoder", "decoder")
_ROUNDS = 5


class _Decoder(nn.Module):
    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=4000,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens).logits


def _model(name: str) -> tuple[nn.Module, list[Call], list[Call]]:
    """A model, calls to calibrate on and calls to compare on."""
    torch.manual_seed(0)
    if name == "encoder":
        from model import batches, load

        # of one length, as a file without open sizes takes them
        parts = (list(batches("calibration", limit=64))[-4:], batches("evaluation")[-3:-1])
        cut = [[tuple(x[:12, :20].contiguous() for x in call) for call in part] for part in parts]
        return load(), *cut
    if name == "resnet50":
        model: nn.Module = ResNet50().eval()
        calls = [(torch.randn(1, 3, 224, 224),) for _ in range(6)]
    else:
        model, calls = _Decoder().eval(), [(torch.randint(0, 4000, (1, 64)),) for _ in range(6)]
    return model, calls[:4], calls[4:]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, names: Sequence[str], calls: Sequence[Call]) -> None:
        self._left: Iterator[dict[str, np.ndarray[Any, Any]]] = (
            {name: x.numpy() for name, x in zip(names, call, strict=True)} for call in calls
        )

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self._left, None)


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _files(model: nn.Module, calls: Sequence[Call], folder: Path) -> dict[str, Path]:
    """Name of a row → its file."""
    exported, prepared = folder / "float.onnx", folder / "prepared.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model, calls[0], str(exported), dynamo=True, external_data=False, verbose=False
        )
    quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=True)
    names = [place.name for place in _session(exported).get_inputs()]
    files = {"float, torch.onnx": exported}

    def theirs(name: str, make: Callable[[Path], object]) -> None:
        path = folder / f"theirs{len(files)}.onnx"
        try:
            make(path)
            _session(path)
            files[name] = path
        except Exception as error:
            Console().print(f"{name}: {type(error).__name__}: {str(error)[:150]}")

    theirs(
        "quantize_static, QDQ, int8 per channel",
        lambda path: quantize_static(
            str(prepared),
            str(path),
            _Reader(names, calls),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"WeightSymmetric": True},
        ),
    )
    theirs(
        "quantize_dynamic, int8 per channel",
        lambda path: quantize_dynamic(
            str(prepared), str(path), per_channel=True, weight_type=QuantType.QInt8
        ),
    )

    def in_nbits(path: Path) -> None:
        import onnx

        quantizer = MatMulNBitsQuantizer(onnx.load(str(prepared)), bits=4, block_size=32)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), False)

    theirs("MatMulNBitsQuantizer, 4 bits in 32", in_nbits)

    def compressed(config: Any, data: Any = None) -> Any:
        return graphopt.compress(model, calls[0], config, data, progress=False)

    def ours(name: str, program: Any, **options: Any) -> None:
        path = folder / f"ours{len(files)}.onnx"
        graphopt.lower(program, "onnx", **options).save(path)
        files[name] = path

    rounded = compressed(QuantizerConfig.presets.w8a8_affine(), list(calls))
    ours("graphopt, W8A8", rounded)
    ours("graphopt, W8A8, kernels=vnni", rounded, kernels="vnni")
    ours("graphopt, int8", compressed(QuantizerConfig.presets.w8()))
    ours("graphopt, tables of 4 bits", compressed(KMeansPalettizerConfig.presets.w4()))
    int4 = compressed(QuantizerConfig.presets.w4_per_block(block_size=32))
    ours("graphopt, int4 blocks, MatMulNBits", int4, matmul="nbits")
    return files


def _decibels(session: ort.InferenceSession, calls: Sequence[Call], wanted: list[Tensor]) -> float:
    found = []
    for call, want in zip(calls, wanted, strict=True):
        feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), call, strict=True)}
        got = torch.from_numpy(session.run(None, feeds)[0])
        error = float((got - want).square().mean())
        found.append(10 * math.log10(float(want.abs().max()) ** 2 / max(error, 1e-30)))
    return sum(found) / len(found)


def _latency(session: ort.InferenceSession, call: Call) -> float:
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), call, strict=True)}
    session.run(None, feeds)
    started = time.perf_counter()
    session.run(None, feeds)
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for package in ("onnxscript", "torch.onnx", "root"):
        logging.getLogger(package).setLevel(logging.ERROR)
    for name in args.models:
        model, calibration, held_out = _model(name)
        with torch.no_grad():
            wanted = [model(*call) for call in held_out]
        with tempfile.TemporaryDirectory() as folder:
            files = _files(model, calibration, Path(folder))
            sessions = {row: _session(path) for row, path in files.items()}
            times: dict[str, list[float]] = {row: [] for row in files}
            for _ in range(_ROUNDS):
                for row, session in sessions.items():
                    times[row].append(_latency(session, held_out[0]))
            table = Table(title=f"{name}, ONNX Runtime {ort.__version__}, one thread")
            for heading in ("file", "KB", "ms", "PSNR dB"):
                table.add_column(heading)
            for row, path in files.items():
                psnr = _decibels(sessions[row], held_out, wanted)
                latency = statistics.median(times[row])
                table.add_row(
                    row, f"{stored_size(path) / 1e3:,.0f}", f"{latency:.1f}", f"{psnr:.1f}"
                )
            Console(width=100).print(table)


if __name__ == "__main__":
    main()
