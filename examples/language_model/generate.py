"""Greedy decoding with a prompt's cache: in PyTorch, on Core AI's runtime and on ExecuTorch's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import call
from torch import Tensor

# entry point and inputs → logits float32[1, n, vocabulary]
Step = Callable[[str, Mapping[str, Tensor]], Tensor]


def greedy(step: Step, prompt: Tensor, count: int) -> list[int]:
    """The most probable next token, again and again.

    Args:
        step: What computes logits; the cache is its own.
        prompt: int64[n], for the entry point "prefill".
        count: How many tokens.
    """
    found = [int(step("prefill", call(prompt))[0, -1].argmax())]
    while len(found) < count:
        position = len(prompt) + len(found) - 1
        logits = step("decode", call(torch.tensor(found[-1:]), position))
        found.append(int(logits[0, -1].argmax()))
    return found


def in_pytorch(programs: Any, prompt: Tensor, count: int) -> list[int]:
    """What a set of programs gives in PyTorch, one cache for its entry points.

    Args:
        programs: With "prefill" and "decode".
        prompt: int64[n].
        count: How many tokens.
    """
    modules = {name: programs[name].module() for name in programs}
    first, second = modules.values()
    own = dict(first.named_buffers())
    for state in programs.state:
        owner, _, name = state.name.rpartition(".")
        second.get_submodule(owner)._buffers[name] = own[state.name]

    def step(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return modules[name](**inputs)  # type: ignore[no-any-return]

    return greedy(step, prompt, count)


def on_coreai(artifact: Any, prompt: Tensor, count: int) -> list[int]:
    """What a saved .aimodel gives on Core AI's runtime; the caller holds the cache.

    Args:
        artifact: Saved, with the functions "prefill" and "decode".
        prompt: int64[n].
        count: How many tokens.
    """
    return asyncio.run(_on_coreai(artifact.path, artifact.state, prompt, count))


async def _on_coreai(path: Path, state: Any, prompt: Tensor, count: int) -> list[int]:
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    async with AIModelAsset.load(path).executable() as model:
        functions = {name: model.load_function(name) for name in ("prefill", "decode")}
        caches: dict[str, Any] = {}
        for each in state:
            value = each.initial.reshape(each.shape or (1,)).numpy()
            described = functions["decode"].desc.state_descriptor(each.name)
            caches[each.name] = NDArray(value.astype(np.dtype(described.dtype)))

        async def step(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
            function = functions[name]
            given = {
                key: NDArray(value.numpy().astype(function.desc.input_descriptor(key).dtype))
                for key, value in inputs.items()
            }
            result = await function(given, state=caches)
            return torch.from_numpy(np.array(result[function.desc.output_names[0]].numpy()))

        logits = await step("prefill", call(prompt))
        found = [int(logits[0, -1].argmax())]
        while len(found) < count:
            position = len(prompt) + len(found) - 1
            logits = await step("decode", call(torch.tensor(found[-1:]), position))
            found.append(int(logits[0, -1].argmax()))
        return found


def on_executorch(artifact: Any, prompt: Tensor, count: int) -> list[int]:
    """What a saved .pte gives on ExecuTorch's runtime; its methods share the cache.

    Args:
        artifact: Saved, with the methods "prefill" and "decode".
        prompt: int64[n].
        count: How many tokens.
    """
    import executorch.kernels.quantized  # noqa: F401  (registers kernels)
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(artifact.path))
    # loading a method writes the cache's initial values, so both are loaded before the first call
    methods = {name: program.load_method(name) for name in ("prefill", "decode")}

    def step(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        return methods[name].execute(list(inputs.values()))[0].clone()  # type: ignore[no-any-return]

    return greedy(step, prompt, count)
