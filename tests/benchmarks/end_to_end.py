"""CPU time from the start of a process to the artifact on disk, beside the toolchain's own calls and the peer's.

    make bench-peer     # once: an environment of its own for the peer, .venv-peer
    make bench-e2e

Each figure is the least of three processes, stage by stage, of the command as a whole; all sides of a row
run in turn, none is warmed up, and nothing is taken off; modules are compiled to bytecode first, as pip does
where it installs. The floor exports, converts and saves the uncompressed model with the target's own tools; for
a program in a .pt2 file it loads, converts and saves. Ours compresses weights to tables of 4 bits for 16 channels
each, by the classes, by `graphopt.compress` and by `graphopt compress`, without the comparison on save, which is
reported beside it; "fixed" asks the first two for the example's sizes alone, as the floor has them, where the
target takes no others. The peer has no route but its classes' to Core AI.
"""

from __future__ import annotations

import argparse
import compileall
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parent.parent.parent
PEER = ROOT / ".venv-peer" / "bin" / "python"
MODELS = ("resnet50", "encoder", "vit", "llama")
SUFFIXES = {"coreai": ".aimodel", "coreml": ".mlpackage", "executorch": ".pte", "torch": ".pt2"}
SIDES = (
    *("floor", "classes", "classes fixed", "compress", "compress fixed"),
    *("file floor", "shell", "peer"),
)
REPEATS = 3


class Bottleneck(nn.Module):
    """Of ResNet-50."""

    def __init__(self, ins: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(ins, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or ins != 4 * width:
            self.down = nn.Sequential(
                nn.Conv2d(ins, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.down(x))


class ResNet50(nn.Module):
    """The published shapes with random weights."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks, ins = [], 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for number in range(depth):
                blocks.append(Bottleneck(ins, width, stride if number == 0 else 1))
                ins = 4 * width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(2048, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Called(nn.Module):
    """A model of transformers that gives one tensor."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, values, strict=True))
        return self.model(**given)[0]


def model_of(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model in evaluation mode, and its example."""
    torch.manual_seed(0)
    if name == "resnet50":
        return ResNet50().eval(), (torch.randn(1, 3, 224, 224),)
    import transformers as hf

    if name == "vit":
        sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
        vit = hf.ViTModel(hf.ViTConfig(**sizes, intermediate_size=1536))
        return Called(vit, ("pixel_values",)).eval(), (torch.randn(1, 3, 224, 224),)
    if name == "llama":
        sizes = {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 8}
        config = hf.LlamaConfig(**sizes, intermediate_size=688, vocab_size=4096, use_cache=False)
        llama = Called(hf.LlamaForCausalLM(config), ("input_ids",))
        return llama.eval(), (torch.randint(0, 4096, (1, 32)),)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    bert = hf.BertModel(hf.BertConfig(**sizes, intermediate_size=1536))
    example = torch.randint(0, 30000, (1, 32)), torch.ones(1, 32, dtype=torch.long)
    return Called(bert, ("input_ids", "attention_mask")).eval(), example


def floor(target: str, exported: Any, out: Path) -> None:
    """Convert and save with the target's own tools."""
    if target == "coreai":
        import coreai_torch

        exported = exported.run_decompositions(coreai_torch.get_decomp_table())
        converter = coreai_torch.TorchConverter().add_exported_program(exported)
        converter.to_coreai().save_asset(out)
    elif target == "coreml":
        import coremltools as ct

        exported = exported.run_decompositions({})
        ct.convert(exported, minimum_deployment_target=ct.target.iOS18).save(str(out))
    elif target == "executorch":
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        out.write_bytes(edge.to_executorch().buffer)
    else:
        torch.export.save(exported, out)


def exported_of(target: str, model: nn.Module, example: tuple[torch.Tensor, ...]) -> Any:
    """The export that the target needs: open sizes where ours are."""
    if target != "torch":
        return torch.export.export(model, example, strict=False)
    shapes = torch.export.ShapesCollection()
    for tensor in example:
        shapes[tensor] = dict.fromkeys(range(tensor.ndim), torch.export.Dim.AUTO)
    return torch.export.export(model, example, dynamic_shapes=shapes, strict=False)


def run_side(side: str, name: str, target: str, folder: Path) -> dict[str, Any]:
    """One process: CPU seconds from its start, and of its stages."""
    warnings.filterwarnings("ignore")
    sys.modules["coverage"] = None  # type: ignore[assignment]  # numba loads it where tests have it
    marks = [("torch", time.process_time())]
    out = folder / f"{side.replace(' ', '_')}{SUFFIXES[target]}"

    def done(stage: str) -> None:
        marks.append((stage, time.process_time()))

    artifact: Any = None
    with torch.no_grad():
        if side == "file floor":
            program = torch.export.load(folder / "model.pt2")
            done("load")
            floor(target, program, out)
        else:
            model, example = model_of(name)
            done("model")
            artifact = _SIDES[side](target, model, example, out, done)
    done("save")
    total, compared = time.process_time(), 0.0
    if artifact is not None:
        artifact.verify()
        compared = time.process_time() - total
    stages = {
        stage: now - before
        for (stage, now), (_, before) in zip(marks, [("", 0.0), *marks], strict=False)
    }
    return {"cpu": total, "stages": stages, "compared": compared}


def _floor_side(target: str, model: nn.Module, example: Any, out: Path, done: Any) -> None:
    exported = exported_of(target, model, example)
    done("export")
    floor(target, exported, out)


def _classes(
    target: str, model: nn.Module, example: Any, out: Path, done: Any, shapes: Any = "auto"
) -> Any:
    import graphopt
    from graphopt.palettization import KMeansPalettizer, KMeansPalettizerConfig

    done("import")
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig.presets.w4(group_size=16))
    palettizer.prepare(example, dynamic_shapes=shapes)
    done("prepare")
    finalized = palettizer.finalize(backend=graphopt.ExportBackend(target))
    done("finalize")
    artifact = graphopt.lower(finalized, target, example)
    done("lower")
    artifact.save(out, verify=False)
    return artifact


def _compress(
    target: str, model: nn.Module, example: Any, out: Path, done: Any, shapes: Any = "auto"
) -> None:
    import graphopt
    from graphopt.palettization import KMeansPalettizerConfig

    del target
    done("import")
    config = KMeansPalettizerConfig.presets.w4(group_size=16)
    program = graphopt.compress(model, example, config, dynamic_shapes=shapes)
    done("compress")
    program.save(out, verify=False)


def _peer(target: str, model: nn.Module, example: Any, out: Path, done: Any) -> None:
    import coreai_opt
    from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig

    done("import")
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig.presets.w4(group_size=16))
    palettizer.prepare(example)
    done("prepare")
    finalized = palettizer.finalize(backend=coreai_opt.ExportBackend.CoreAI)
    done("finalize")
    floor(target, torch.export.export(finalized, example), out)


_SIDES: dict[str, Callable[..., Any]] = {
    "floor": _floor_side,
    "classes": _classes,
    "classes fixed": functools.partial(_classes, shapes=None),
    "compress": _compress,
    "compress fixed": functools.partial(_compress, shapes=None),
    "peer": _peer,
}


def _shell(target: str, folder: Path) -> dict[str, Any]:
    """CPU seconds of the command, by the system's account."""
    config = folder / "w4.yaml"
    config.write_text(
        "global_config:\n  op_state_spec:\n    weight:\n      n_bits: 4\n"
        "      granularity: {type: per_grouped_channel, axis: 0, group_size: 16}\n"
    )
    command = Path(sys.executable).with_name("graphopt")
    words = [str(command), "compress", str(folder / "model.pt2")]
    words += ["--config", str(config), "-o", str(folder / f"shell{SUFFIXES[target]}")]
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    )
    words = [sys.executable, "-c", code, *words, "--no-verify"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:150]}
    return {"cpu": float(done.stdout), "stages": {}, "compared": 0.0}


def measured(side: str, name: str, target: str, folder: Path) -> dict[str, Any]:
    """What a process of one side prints."""
    for path in folder.iterdir():
        if path.suffix in SUFFIXES.values() and path.stem != "model":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if side == "shell":
        return _shell(target, folder)
    python = str(PEER) if side == "peer" else sys.executable
    words = [python, __file__, "--child", side, name, target, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:150]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def best(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest process, with the least of each stage, or what went wrong."""
    right = [result for result in results if "cpu" in result]
    if not right:
        return results[0]
    fastest = min(right, key=lambda result: float(result["cpu"]))
    stages = {
        stage: min(float(result["stages"][stage]) for result in right)
        for stage in fastest["stages"]
    }
    compared = min(float(result["compared"]) for result in right)
    return {"cpu": fastest["cpu"], "stages": stages, "compared": compared}


def row(name: str, target: str, sides: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """The sides of a model on a target, in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "shell" in sides or "file floor" in sides:
            model, example = model_of(name)
            with torch.no_grad():
                exported = exported_of(target, model, example)
            torch.export.save(exported, folder / "model.pt2")
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side in sides:
                results[side].append(measured(side, name, target, folder))
    least = {side: best(found) for side, found in results.items()}
    alike = [each["stages"] for side, each in least.items() if side != "peer" and "cpu" in each]
    for stage in ("torch", "model"):
        # the same code in each of our processes, so that what differs is the machine's
        having = [stages for stages in alike if stage in stages]
        for stages in having:
            stages[stage] = min(each[stage] for each in having)
    return least


def compile_packages() -> None:
    """Compile our modules to bytecode, as pip does where it installs."""
    for package in ("graphopt", "passes", "backends"):
        compileall.compile_dir(ROOT / package, quiet=1)


def main() -> None:
    """Print a line for each model and target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--targets", nargs="+", choices=list(SUFFIXES), default=list(SUFFIXES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        side, name, target, folder = given.child
        sys.stdout.write(json.dumps(run_side(side, name, target, Path(folder))) + "\n")
        return
    compile_packages()
    if not PEER.exists():
        sys.stdout.write("no .venv-peer: `make bench-peer` installs the peer\n")
    for name in given.models:
        for target in given.targets:
            sides = [
                side
                for side in given.sides
                if (side != "peer" or (target == "coreai" and PEER.exists()))
                and not (side.endswith(" fixed") and target == "torch")
            ]
            _print(name, target, row(name, target, sides, given.repeats))


def _print(name: str, target: str, found: dict[str, dict[str, Any]]) -> None:
    write = sys.stdout.write
    write(f"{name} {target}: CPU seconds\n")
    for side, result in found.items():
        if "error" in result:
            write(f"  {side:14} {result['error']}\n")
            continue
        base = found.get("file floor" if side in ("file floor", "shell") else "floor", {})
        whole = side == "shell" or not base.get("stages")
        times = [_seconds(each, whole) for each in (result, base) if "cpu" in each]
        ratio = f" {times[0] / times[1]:5.2f} × floor" if len(times) > 1 else ""
        stages = ", ".join(f"{stage} {value:.2f}" for stage, value in result["stages"].items())
        compared = f"; compared {result['compared']:.2f}" if result["compared"] else ""
        write(f"  {side:14} {times[0]:6.2f}{ratio}  {stages}{compared}\n")
    sys.stdout.flush()


def _seconds(result: dict[str, Any], whole: bool) -> float:
    """CPU seconds of a process: its stages, each at its least, or of the fastest as a whole."""
    return float(result["cpu"]) if whole else sum(result["stages"].values())


if __name__ == "__main__":
    main()
