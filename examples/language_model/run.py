"""Train a small Llama and a small Qwen3, compress them, write artifacts and let them write text.

python examples/language_model/run.py --out out/language_model

The text is the docstrings of Python's standard library, a token is a byte. Each form of a model is one
artifact for Core AI, Core ML and ExecuTorch, whose entry points "prefill" and "decode" share weights
and a static cache. Core AI's and ExecuTorch's runtimes continue a prompt; their tokens are compared
with those of PyTorch's greedy decoding.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from generate import in_pytorch, on_coreai, on_executorch
from model import build, call, corpus, text_of, tokens, train, with_cache
from rich.console import Console
from rich.table import Table
from torch import Tensor

import graphopt
from graphopt import rdo
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity
from graphopt.quantization import (
    KVCacheQuantConfig,
    OpQuantizerConfig,
    QuantizationSpec,
    QuantizerConfig,
)
from graphopt.quantization.spec import PerBlockGranularity

TARGETS = ("coreai", "coreml", "executorch")
PROMPT = "Return the number of "


def tables(algorithm: str) -> KMeansPalettizerConfig:
    """4-bit tables, one for each 16 output channels."""
    groups = PerGroupedChannelGranularity(axis=0, group_size=16)
    spec = PalettizationSpec(n_bits=4, granularity=groups, algorithm=algorithm)
    return KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )


def small_caches() -> QuantizerConfig:
    """int8 caches, and nothing else."""
    int8 = KVCacheQuantConfig(op_quantizer_config=OpQuantizerConfig())
    return QuantizerConfig(global_config=None, kv_cache_quant_configs={"index_copy": int8})


def blocks(programs: Any, data: Any) -> Any:
    """int4 weights with a scale for each 32 of a row, fitted by error feedback."""
    spec = QuantizationSpec(dtype="int4", granularity=PerBlockGranularity(axis=1, block_size=32))
    config = {
        "candidates": {"int4 blocks": spec},
        "rate_weight": 0.0,
        "rounding": {"blocks": "none"},
        "draws": 1,
    }
    return rdo.optimize(programs, None, data, config, progress=False).program


Forms = dict[str, Callable[[Any, Any], Any]]
FORMS: Forms = {
    "float32": lambda programs, data: programs,
    "4-bit tables, with data": lambda programs, data: graphopt.compress(
        programs, None, tables("gptq"), calibration_data=data
    ),
    "int4 blocks, with data": blocks,
    "int8 cache": lambda programs, data: graphopt.compress(programs, None, small_caches()),
    "4-bit tables, with data; int8 cache": lambda programs, data: graphopt.compress(
        programs,
        None,
        {"palettization": tables("gptq"), "quantization": small_caches()},
        calibration_data=data,
    ),
}


def capture(network: Any, length: int) -> Any:
    """The two entry points: a prompt of any length up to the cache's, and one token behind it."""
    prompt = call(torch.arange(8))
    size = torch.export.Dim("size", min=2, max=length)
    # transformers reads the first position alone
    place = torch.export.Dim("place", min=1, max=length)
    open_length = {"input_ids": {1: size}, "cache_position": {0: place}}
    return graphopt.capture(
        {
            "prefill": (network, prompt, open_length),
            "decode": (network, call(torch.tensor([1]), 8), None),
        }
    )


def perplexity(programs: Any, pieces: Tensor) -> float:
    """exp of the mean loss per byte of pieces, int64[n, length], each read from its beginning."""
    prefill = programs["prefill"].module()
    losses = []
    with torch.no_grad():
        for piece in pieces:
            logits = prefill(**call(piece))[0, :-1]
            losses.append(F.cross_entropy(logits, piece[1:]))
    return math.exp(float(torch.stack(losses).mean()))


def agreeing(found: list[int], wanted: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    pairs = enumerate(zip(found, wanted, strict=True))
    return next((place for place, (one, other) in pairs if one != other), len(wanted))


def saved(programs: Any, target: str, path: Path, calls: Any) -> tuple[Any, str]:
    """An artifact that takes prompts of any length, compared on calls, and its size.

    Where the target refuses the program, None and "refused".
    """
    try:
        artifact = graphopt.lower(programs, target, shapes={"prefill": "open"})
        artifact.save(path.with_suffix(artifact.suffix), overwrite=True, verify=calls)
    except graphopt.errors.LoweringError as error:
        print(f"{target}: {error}")
        return None, "refused"
    return artifact, f"{artifact.size / 1024:,.0f}"


def trained(kind: str, text: Tensor, args: argparse.Namespace) -> Any:
    """A model with weights from an earlier run, or trained now."""
    network = build(kind, **({} if args.layers is None else {"num_hidden_layers": args.layers}))
    path = args.out / f"{kind}-{args.steps}.pt"
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    started = time.process_time()
    train(network, text, steps=args.steps, batch=args.batch)
    count = sum(p.numel() for p in network.parameters())
    seconds = time.process_time() - started
    print(f"{kind}: {count:,} weights, {args.steps} steps in {seconds:.0f} CPU seconds")
    torch.save(network.state_dict(), path)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/language_model"))
    parser.add_argument("--kinds", nargs="+", default=["Llama", "Qwen3"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--steps", type=int, default=250, help="of training")
    parser.add_argument("--batch", type=int, default=16, help="pieces a step of training")
    parser.add_argument("--layers", type=int, default=None, help="of the decoder")
    parser.add_argument("--modules", type=int, default=None, help="read only so many")
    parser.add_argument("--cache", type=int, default=128, help="positions of the cache")
    parser.add_argument("--pieces", type=int, default=64, help="held-out pieces for perplexity")
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=170)

    text, held_out = corpus(args.modules)
    pieces = held_out[: len(held_out) // args.cache * args.cache].reshape(-1, args.cache)
    pieces = pieces[:: max(1, len(pieces) // args.pieces)][: args.pieces]
    print(f"{len(text):,} bytes to train on, {pieces.numel():,} held out in {len(pieces)} pieces")
    starts = torch.randint(
        0, len(text) - args.cache, (32,), generator=torch.Generator().manual_seed(1)
    )
    drawn = [text[start : start + args.cache] for start in starts.tolist()]
    data = {
        "prefill": [call(piece) for piece in drawn],
        "decode": [call(piece[:1]) for piece in drawn[:4]],
    }
    prompt = tokens(PROMPT)
    for kind in args.kinds:
        network = trained(kind, text, args)
        with torch.no_grad():
            greedy = network.generate(prompt[None], max_new_tokens=args.tokens, do_sample=False)
        wanted = greedy[0, len(prompt) :].tolist()
        programs = capture(with_cache(network, args.cache), args.cache)
        table = Table(title=f"{kind}: {PROMPT!r} continued by {args.tokens} bytes")
        for heading in (
            "form",
            "bits/weight",
            "cache KiB",
            "perplexity",
            *(f"{target} KiB" for target in args.targets),
            "Core AI = PyTorch",
            "ExecuTorch = PyTorch",
            "as float",
        ):
            of_form = heading == "form"
            table.add_column(heading, justify="left" if of_form else "right", no_wrap=of_form)
        for form in args.forms:
            made = FORMS[form](programs, data)
            found = in_pytorch(made, prompt, args.tokens)
            steps = [("prefill", call(prompt))]
            steps += [
                ("decode", call(torch.tensor([token]), len(prompt) + place))
                for place, token in enumerate(found[:3])
            ]
            artifacts, sizes = {}, []
            for target in args.targets:
                path = (
                    args.out / f"{kind}-{form.replace(' ', '_').replace(';', '').replace(',', '')}"
                )
                artifacts[target], size = saved(made, target, path, steps)
                sizes.append(size)
            same = []
            for target, generate in (("coreai", on_coreai), ("executorch", on_executorch)):
                if artifacts.get(target) is None:
                    same.append("-")
                    continue
                count = agreeing(generate(artifacts[target], prompt, args.tokens), found)
                same.append(f"{count} of {args.tokens}")
            # of caches alone, no weight has a row
            bits = 32.0 if form == "float32" else made.report().bits_per_weight or 32.0
            table.add_row(
                form,
                f"{bits:.2f}",
                f"{sum(each.bytes for each in made.state) / 1024:.1f}",
                f"{perplexity(made, pieces):.3f}",
                *sizes,
                *same,
                f"{agreeing(found, wanted)} of {args.tokens}",
            )
            print(f"{kind}, {form}: {PROMPT + text_of(torch.tensor(found))!r}", flush=True)
        console.print(table)
    print(f"artifacts are in {args.out}")


if __name__ == "__main__":
    main()
