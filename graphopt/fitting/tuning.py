"""Tune tables, biases and norms of a compressed program to reproduce the uncompressed one.

Codes stay. The target are the outputs of the uncompressed network, or of one block after the other
in the order of the graph, with the inputs that the tuned blocks before give (Li et al., BRECQ, arXiv
2102.05426, section 3.2, with table entries in place of roundings); no labels are needed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from graphopt.analysis.partition import Block, find_blocks
from graphopt.ir import op_info
from graphopt.ir.captured_module import CapturedModule, holder_of, set_tensor
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import operands
from graphopt.numerics.packing import unpack
from graphopt.progress import track
from graphopt.run.batches import Batch
from graphopt.run.block_forward import BlockForward
from graphopt.run.layerwise import LayerwiseRun

__all__ = ["TuningOptions", "tune_graph"]

_log = logging.getLogger(__name__)
_LOOKUP = torch.ops.graphopt.lut_to_dense.default
_COMPRESSED = (_LOOKUP, torch.ops.graphopt.shift_scale.default)


@dataclass(frozen=True)
class TuningOptions:
    """How blocks are tuned.

    Attributes:
        steps: Steps per block.
        blocks: "whole" or "auto", see `graphopt.tuning.tune`.
        width: See `graphopt.partition.find_blocks`.
        learning_rate: Step of a table's entries relative to their median distance.
        seed: Seed of the order of the data.
        progress: Show a bar; None shows it on a terminal.
    """

    steps: int = 200
    blocks: Literal["auto", "whole"] = "whole"
    width: int = 1
    learning_rate: float = 0.02
    seed: int = 0
    progress: bool | None = None


def tune_graph(
    gm: CapturedModule, exact: CapturedModule, batches: Sequence[Batch], options: TuningOptions
) -> None:
    """Tune a compressed graph in place; a block whose error did not fall keeps its values.

    Args:
        gm: The compressed graph.
        exact: The exact one, with the norms folded that `gm` has folded.
        batches: Inputs of one call each.
        options: How.
    """
    targets = _compressed_ops(gm)
    if not targets:
        return
    partners = Correspondence.by_name(gm, exact)
    runs = (LayerwiseRun(gm, batches), LayerwiseRun(exact, batches))
    blocks = _blocks(gm, targets, options.blocks, options.width)
    merged = _merged(runs[0], blocks, partners)
    total = options.steps * len(merged)
    work = _all_blocks(merged, runs, partners, options)
    for _ in track(work, "tuning blocks", total, enabled=options.progress):
        pass


def _all_blocks(
    found: list[Block],
    runs: tuple[LayerwiseRun, LayerwiseRun],
    partners: Correspondence,
    options: TuningOptions,
) -> Iterator[None]:
    run, exact = runs
    order = iter(exact.gm.graph.nodes)
    generator = torch.Generator().manual_seed(options.seed)
    for block in found:
        wanted = [partners[node] for node in block.outputs]
        for node in order:
            if node.op != "output":
                exact.step(node)
            if all(exact.has_run(each) for each in wanted):
                break
        goals = [list(map(torch.Tensor.detach, exact.values(each))) for each in wanted]
        yield from _tune_block(run, block, goals, options, generator)
        for node in block.nodes:
            run.step(node)


def _compressed_ops(gm: CapturedModule) -> set[fx.Node]:
    """Ops that read a compressed constant."""
    derived: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        used = operands(node)
        from_constants = bool(used) and all(
            each.op == "get_attr" or each in derived for each in used
        )
        compressed = node.target in _COMPRESSED or any(each in derived for each in used)
        if from_constants and compressed:
            derived.add(node)
        elif any(each in derived for each in used) and node.op != "output":
            found.add(node)
    return found


def _merged(run: LayerwiseRun, blocks: list[Block], partners: Correspondence) -> list[Block]:
    """Blocks whose ends exist in the reference, and which share no constant with another one."""
    readers: dict[str, list[int]] = {}
    for number, block in enumerate(blocks):
        for node in _constants_of(block.nodes, run):
            readers.setdefault(str(node.target), []).append(number)
    open_until = list(range(len(blocks)))
    for found in readers.values():
        for number in range(min(found), max(found)):
            open_until[number] = max(open_until[number], max(found))
    result: list[Block] = []
    pending: list[Block] = []
    reach = -1
    for number, block in enumerate(blocks):
        pending.append(block)
        reach = max(reach, open_until[number])
        last = number + 1 == len(blocks)
        known = all(node in partners for node in block.outputs)
        if (number < reach or not known) and not last:
            continue
        nodes = tuple(node for each in pending for node in each.nodes)
        targets = tuple(node for each in pending for node in each.targets)
        if known:
            result.append(Block(nodes, pending[0].inputs, block.outputs, targets))
        pending = []
    return result


def _constants_of(nodes: tuple[fx.Node, ...], run: LayerwiseRun) -> set[fx.Node]:
    """`get_attr` nodes that nodes read, directly or through ops on constants."""
    found: set[fx.Node] = set()
    pending = [node for node in nodes if not run.is_constant(node)]
    seen: set[fx.Node] = set()
    while pending:
        for each in operands(pending.pop()):
            if each.op == "get_attr":
                found.add(each)
            elif each not in seen and run.is_constant(each):
                seen.add(each)
                pending.append(each)
    return found


def _blocks(gm: CapturedModule, targets: set[fx.Node], kind: str, width: int) -> list[Block]:
    if kind == "auto":
        return find_blocks(gm.graph, targets.__contains__, width=width)
    nodes = tuple(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output"))
    result = next(node for node in gm.graph.nodes if node.op == "output")
    return [Block(nodes, (), tuple(dict.fromkeys(operands(result))), tuple(targets))]


@dataclass
class _Trained:
    """One tensor that a block trains.

    Attributes:
        path: Its dotted name.
        value: What the optimizer moves, float32.
        step: Unit of its learning rate.
    """

    path: str
    value: nn.Parameter
    step: float


class _Gather(torch.autograd.Function):
    """`table[codes]` whose backward pass sums by code."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.length = table.shape[0]
        return table.index_select(0, codes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        (gradient,) = gradients
        total = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        return total.index_add_(0, codes, gradient), None


class _TunedBlock:
    """A block, the tensors that it trains, and the lookups that it computes from them."""

    def __init__(self, run: LayerwiseRun, block: Block) -> None:
        self.forward = BlockForward(run, block)
        self.trained: dict[str, _Trained] = {}
        self._lookups: dict[fx.Node, Callable[[dict[fx.Node, Any]], Any]] = {}
        for node in self.forward.constants_read:
            if node.target is _LOOKUP:
                self._lookups[node] = partial(_looked_up, node, _element_numbers(run, node))
            if node.op == "get_attr" and (step := _step_of(node, run)) > 0:
                value = nn.Parameter(run.constant(node).detach().float().clone())
                self.trained[str(node.target)] = _Trained(str(node.target), value, step)

    def constants(self) -> dict[fx.Node, Any]:
        """Values of the constants, once for a step."""
        given = {path: each.value for path, each in self.trained.items()}
        return self.forward.constants(given, self._lookups)


def _tune_block(
    run: LayerwiseRun,
    block: Block,
    goals: list[list[Tensor]],
    options: TuningOptions,
    generator: torch.Generator,
) -> Iterator[None]:
    steps, learning_rate = options.steps, options.learning_rate
    tuned = _TunedBlock(run, block)
    if not tuned.trained:
        yield from (None for _ in range(steps))
        return
    scales = [
        max(float(torch.cat([each.float().reshape(-1) for each in goal]).var()), 1e-30)
        for goal in goals
    ]
    count = len(goals[0])

    def loss(constants: dict[fx.Node, Any], number: int) -> Tensor:
        made = tuned.forward(constants, number)
        parts = [
            (each.float() - goal[number].float()).square().mean() / scale
            for each, goal, scale in zip(made, goals, scales, strict=True)
            if each.is_floating_point()
        ]
        return torch.stack(parts).sum()

    def whole() -> float:
        with torch.no_grad():
            constants = tuned.constants()
            return sum(float(loss(constants, number)) for number in range(count)) / count

    before = whole()
    groups = [
        {"params": [each.value], "lr": learning_rate * each.step} for each in tuned.trained.values()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(count, generator=generator).tolist()
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(tuned.constants(), order.pop()).backward()
        optimizer.step()
        schedule.step()
        yield
    after = whole()
    _log.info("block of %d ops: error %.3g before, %.3g after", len(block.targets), before, after)
    if after < before:
        for path, trained in tuned.trained.items():
            holder, name = holder_of(run.gm, path)
            kept = getattr(holder, name).dtype
            set_tensor(holder, name, trained.value.detach().to(kept))


def _step_of(node: fx.Node, run: LayerwiseRun) -> float:
    """Unit by which a constant may move; 0 for what stays."""
    value = run.constant(node)
    value = value.detach() if isinstance(value, Tensor) else value
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return 0.0
    for user in node.users:
        place = user.args.index(node) if node in user.args else -1
        if user.target is _LOOKUP and place == 1:
            gaps = value.float().sort(dim=-2).values.diff(dim=-2)
            return float(gaps[gaps > 0].median()) if bool((gaps > 0).any()) else 0.0
        if place in _tuned_places(user):
            return 0.2 * max(float(value.float().std()) if value.numel() > 1 else 0.0, 1e-2)
        return 0.0
    return 0.0


def _tuned_places(node: fx.Node) -> tuple[int, ...]:
    """Places of an op's bias, or of a norm's gain and shift."""
    info = op_info.info_of(node)
    if info is None:
        return ()
    norm = () if info.norm is None else (info.norm.gain, info.norm.shift)
    places = (*norm, *(bias.position for bias in info.biases))
    return tuple(place for place in places if place is not None)


def _element_numbers(run: LayerwiseRun, node: fx.Node) -> Tensor:
    """For each code of a lookup, the row of the flattened tables that it reads, int32."""
    indices, lut = (run.constant(each) for each in operands(node)[:2])
    n_bits, shape = node.args[2], list(node.args[3])  # type: ignore[arg-type]
    assert isinstance(n_bits, int)
    axis = node.args[4] if len(node.args) > 4 else None
    if isinstance(axis, int):
        shape[axis] //= lut.shape[-1]
    codes = unpack(indices, n_bits, math.prod(shape)).reshape(shape).int()
    counts = lut.shape[:-2]
    offset = torch.zeros([1] * len(shape), dtype=torch.int32)
    stride = 1
    for place in reversed(range(len(shape))):
        number = torch.arange(shape[place], dtype=torch.int32) // (shape[place] // counts[place])
        offset = offset + stride * number.reshape(
            [-1 if i == place else 1 for i in range(len(shape))]
        )
        stride *= counts[place]
    return (offset * lut.shape[-2] + codes).reshape(-1)


def _looked_up(node: fx.Node, codes: Tensor, values: dict[fx.Node, Any]) -> Tensor:
    lut = values[operands(node)[1]]
    shape: list[int] = list(node.args[3])  # type: ignore[arg-type]
    axis = node.args[4] if len(node.args) > 4 else None
    found = _Gather.apply(lut.reshape(-1, lut.shape[-1]), codes)
    if not isinstance(axis, int):
        return found.reshape(shape)
    length = lut.shape[-1]
    folded = [size // length if place == axis else size for place, size in enumerate(shape)]
    return found.reshape(*folded, length).movedim(-1, axis + 1).reshape(shape)
