"""Accuracy of compressed networks beside coreai-opt 0.4.0, torchao, NNCF and coremltools, in one table.

    make bench-peer       # once: environments of their own for coreai-opt and NNCF
    make bench-accuracy
    make bench-accuracy ARGS="--nets vit decoder --methods w8a8 --seeds 0 1 2"

A row for each net, form and maker: PSNR of the outputs against the float net on held-out data (with the peak
of each call's outputs, averaged) and the task's own score, as means over seeds with half of their range.
Seeds are those of training; the packaged encoder's draws its calibration sentences. Batch norms are
folded beforehand, calibration data are the same for all; the exports that peers take have fixed sizes,
to which calls are padded. Tables have 4, 3 and 2 bits for each 16 rows,
embeddings included; blocks are of 32 columns of linear layers. What a peer cannot do is a dash.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from accuracy_encoder import ROWS
from accuracy_nets import NETS, Call, Case, case

import graphopt
from graphopt.ir.program import Program
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity
from graphopt.passes import FoldBatchNorm, RemoveUnused
from graphopt.passes.pass_manager import run_passes
from graphopt.quantization import KVCacheQuantConfig, OpQuantizerConfig, QuantizerConfig

ROOT = Path(__file__).parents[2]
PEERS = {
    "coreai": ROOT / ".venv-peer" / "bin" / "python",
    "nncf": ROOT / ".venv-nncf" / "bin" / "python",
    "torchao": Path(sys.executable),
    "coreml": Path(sys.executable),
}
NAMES = {"coreai": "coreai-opt", "nncf": "NNCF", "torchao": "torchao", "coreml": "coremltools"}
Outputs = list[Tensor]
Method = Callable[["Run"], Outputs]


class Run:
    """A net, what it is measured with, and what several methods need of it."""

    def __init__(self, made: Case) -> None:
        self.case = made
        self.program: Program = graphopt.capture(made.net, made.calls[-1])
        run_passes(self.program.graph_module, [FoldBatchNorm(), RemoveUnused()])
        with torch.no_grad():
            self.wanted = [made.net(*call) for call in made.held_out]

    def with_fixed_sizes(self) -> tuple[Any, list[Call], list[Call]]:
        """The export with the largest sizes, and calls and held-out calls padded to them."""
        every = [*self.case.calls, *self.case.held_out]
        sizes = [
            tuple(map(max, zip(*(value.shape for value in values), strict=True)))
            for values in zip(*every, strict=True)
        ]
        calls, held = (
            [padded(call, sizes) for call in calls]
            for calls in (self.case.calls, self.case.held_out)
        )
        return self.program.with_example(calls[0]).export(), calls, held

    def cut(self, found: Outputs) -> Outputs:
        """Outputs of padded calls, of the sizes that were wanted."""
        pairs = zip(found, self.wanted, strict=True)
        return [out[tuple(map(slice, want.shape))] for out, want in pairs]

    def compressed(self, config: Any, **options: Any) -> Outputs:
        """What our program puts out."""
        made = graphopt.compress(self.program, None, config, self.case.calls, **options)
        module = made.module()
        with torch.no_grad():
            return [module(*call) for call in self.case.held_out]

    def weights(self, *, blocks: bool) -> dict[str, Tensor]:
        """Weights by name: all of rank 2 and more, or those of linear layers that blocks divide."""
        kinds = (nn.Linear,) if blocks else (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
        found = {
            f"{name}.weight": module.weight.detach()
            for name, module in self.case.net.named_modules()
            if isinstance(module, kinds)
        }
        return {name: w for name, w in found.items() if not blocks or w.shape[1] % 32 == 0}

    def with_weights(self, weights: dict[str, Tensor]) -> Outputs:
        """What the net puts out with other weights."""
        kept = {name: self.case.net.get_parameter(name).data for name in weights}
        try:
            for name, weight in weights.items():
                self.case.net.get_parameter(name).data = weight.reshape(kept[name].shape)
            with torch.no_grad():
                return [self.case.net(*call) for call in self.case.held_out]
        finally:
            for name, weight in kept.items():
                self.case.net.get_parameter(name).data = weight


def padded(call: Call, sizes: list[tuple[int, ...]]) -> Call:
    """A call with the shapes of every other one: masked tokens behind, and its last sample again."""
    made = []
    for value, size in zip(call, sizes, strict=True):
        ends = [(0, size[axis] - value.shape[axis]) for axis in reversed(range(1, value.ndim))]
        wide = nn.functional.pad(value, [each for pair in ends for each in pair])
        made.append(torch.cat([wide, *[wide[-1:]] * (size[0] - len(wide))]))
    return tuple(made)


class UnavailableError(Exception):
    """Why a method has no figure."""


def by_peer(job: str) -> Method:
    """A method of `accuracy_peers`."""

    def method(run: Run) -> Outputs:
        python = PEERS[job.partition(" ")[0]]
        if not python.exists():
            raise UnavailableError(f"there is no {python}")
        on_weights = "tables" in job or job in ("torchao blocks", "coreai blocks")
        with tempfile.TemporaryDirectory() as folder:
            if on_weights:
                torch.save(run.weights(blocks="blocks" in job), f"{folder}/weights.pt")
            else:
                exported, calls, held = run.with_fixed_sizes()
                torch.export.save(exported, f"{folder}/net.pt2")
                data = {"calibration": calls, "held_out": held}
                torch.save(data | {"transformer": run.case.transformer}, f"{folder}/data.pt")
            script = Path(__file__).parent / "accuracy_peers.py"
            done = subprocess.run(
                [python, script, job, folder], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise UnavailableError((done.stderr.strip().splitlines() or ["no message"])[-1])
            found = torch.load(f"{folder}/out.pt")
        if on_weights:
            return run.with_weights(found)
        return run.cut(found)

    return method


def torchao_in_our_places(run: Run) -> Outputs:
    """torchao's observers and ranges for the tensors that ours rounds, floats in front of norms too."""
    from quantization import torchao

    exported, calls, held = run.with_fixed_sizes()
    module = torchao(exported, calls, "histogram")
    with torch.no_grad():
        found = [module(*call) for call in held]
    return run.cut([each[0] if isinstance(each, tuple | list) else each for each in found])


def scalars(bits: int) -> Method:
    groups = PerGroupedChannelGranularity(axis=0, group_size=16)
    spec = PalettizationSpec(n_bits=bits, granularity=groups)
    module = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    return lambda run: run.compressed(KMeansPalettizerConfig(global_config=module))


def vectors(bits: int) -> Method:
    config = getattr(KMeansPalettizerConfig.presets, f"w{bits}_vectors")()
    return lambda run: run.compressed(config)


def blocks(run: Run) -> Outputs:
    config = QuantizerConfig.presets.w4_per_block()
    assert config.global_config is not None
    config.global_config.op_type_config = {"embedding": None}
    return run.compressed(config)


def changed(change: Callable[[QuantizerConfig], None], **options: Any) -> Method:
    def method(run: Run) -> Outputs:
        config = QuantizerConfig.presets.w8a8_affine()
        change(config)
        return run.compressed(config, **options)

    return method


def _inputs_alone(config: QuantizerConfig) -> None:
    """Round what layers and products of matrices read, and nothing else, as NNCF does in transformers."""
    assert config.global_config is not None
    config.global_config.op_output_spec = {}
    others = ("add", "sub", "mul", "div", "neg", "cat", "silu", "embedding")
    config.global_config.op_type_config = dict.fromkeys(others)


def int8_cache(run: Run) -> Outputs:
    """A decoder that reads keys and values from an int8 cache, each held-out piece from its start."""
    sys.path.insert(0, str(ROOT / "examples" / "language_model"))
    sys.modules.pop("model", None)
    from model import call, with_cache

    pieces = torch.cat([ids for (ids,) in run.case.held_out])
    cached = with_cache(run.case.net.model, pieces.shape[1])
    program = graphopt.capture(cached, (), call(pieces[0]), dynamic_shapes=None)
    int8 = KVCacheQuantConfig(op_quantizer_config=OpQuantizerConfig())
    config = QuantizerConfig(global_config=None, kv_cache_quant_configs={"index_copy": int8})
    module = graphopt.compress(program, None, config).module()
    with torch.no_grad():
        found = torch.cat([module(**call(piece)) for piece in pieces])
    return list(found.split([len(ids) for (ids,) in run.case.held_out]))


ALL, LINEAR = tuple(NETS), ("encoder", "vit", "decoder")
# form, maker → nets, method
METHODS: dict[tuple[str, str], tuple[tuple[str, ...], Method]] = {
    ("w8a8", "graphopt"): (ALL, changed(lambda config: None)),
    ("w8a8", "graphopt, inputs of layers alone"): (ALL, changed(_inputs_alone)),
    ("w8a8", "graphopt, tuned 120 steps"): (ALL, changed(lambda config: None, tune_steps=120)),
    **{
        ("w8a8", f"graphopt, {name}"): (ALL, changed(change))
        for name, change in ROWS
        if "default" not in name
    },
    **{
        ("w8a8", NAMES[peer]): (ALL, by_peer(f"{peer} int8"))
        for peer in ("torchao", "nncf", "coreai")
    },
    ("w8a8", "NNCF, biases kept"): (ALL, by_peer("nncf int8, biases kept")),
    ("w8a8", "torchao, our tensors"): (ALL, torchao_in_our_places),
    **{
        (f"{bits}-bit tables", maker): (ALL, method)
        for bits in (4, 3, 2)
        for maker, method in (
            ("graphopt", scalars(bits)),
            ("graphopt, vectors", vectors(bits)),
            ("coreai-opt", by_peer(f"coreai tables {bits}")),
            ("coremltools", by_peer(f"coreml tables {bits}")),
        )
    },
    ("int4 blocks", "graphopt"): (LINEAR, blocks),
    **{
        ("int4 blocks", NAMES[peer]): (LINEAR, by_peer(f"{peer} blocks"))
        for peer in ("torchao", "nncf", "coreai")
    },
    ("int8 cache", "graphopt"): (("decoder",), int8_cache),
}


def psnr(found: Outputs, wanted: Outputs) -> float:
    each = [
        10 * torch.log10(want.abs().max() ** 2 / (got - want).square().mean().clamp_min(1e-30))
        for got, want in zip(found, wanted, strict=True)
    ]
    return float(torch.stack(each).mean())


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each net, seed and method that was asked for."""
    for net in args.nets:
        for seed in args.seeds:
            run = Run(case(net, seed, args.cache))
            score = run.case.score(run.wanted)
            base = {"net": net, "seed": seed, "unit": run.case.unit}
            yield {**base, "form": "float", "maker": "", "score": score}
            for (form, maker), (nets, method) in METHODS.items():
                asked = any(part in f"{form}, {maker}" for part in args.methods)
                if net not in nets or not asked:
                    continue
                row, started = {**base, "form": form, "maker": maker}, time.perf_counter()
                try:
                    found = method(run)
                    row |= {"psnr": psnr(found, run.wanted), "score": run.case.score(found)}
                except Exception as error:  # a benchmark goes on without a maker that fails
                    row["failure"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
                yield row | {"seconds": time.perf_counter() - started}


def _mean(rows: list[dict[str, Any]], key: str, digits: int) -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return "—"
    middle, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def table(rows: list[dict[str, Any]]) -> Table:
    """Rows of all seeds together."""
    made = Table(title="outputs against the float net, and the task's score")
    for heading in ("net", "form", "maker", "PSNR dB", "score", "of"):
        made.add_column(heading)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["net"], row["form"], row["maker"]), []).append(row)
    for key, group in groups.items():
        digits = {"mean cosine": 4, "perplexity per letter": 3}.get(group[0]["unit"], 2)
        made.add_row(*key, _mean(group, "psnr", 2), _mean(group, "score", digits), group[0]["unit"])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--methods", nargs="+", default=[""], help="parts of 'form, maker'")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("out/accuracy"), help="trained nets")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for row in measured(args):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    Console(width=120).print(table(rows))


if __name__ == "__main__":
    main()
