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
from typing import Any, Literal, TypedDict

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
from graphopt.specs.options import Options

__all__ = ["TuningKeywords", "TuningOptions", "tune_graph"]

_log = logging.getLogger(__name__)
_LUT_TO_DENSE = torch.ops.graphopt.lut_to_dense.default
_COMPRESSED = (_LUT_TO_DENSE, torch.ops.graphopt.shift_scale.default)


@dataclass(frozen=True, kw_only=True)
class TuningOptions(Options):
    """How a compressed program is tuned.

    Attributes:
        steps: Steps per block.
        blocks: "whole" tunes everything against the outputs of the network, which gave the better
            outputs wherever both were tried; "auto" cuts the graph where at most `width` compressed
            values are alive and needs the memory of one block.
        width: See `graphopt.partition.find_blocks`.
        learning_rate: Step of a table's entries relative to their median distance; biases and
            norms move a fifth as far, relative to their spread.
        seed: Seed of the order of the data.
        progress: Show a bar; None shows it on a terminal.
    """

    steps: int = 200
    blocks: Literal["auto", "whole"] = "whole"
    width: int = 1
    learning_rate: float = 0.02
    seed: int = 0
    progress: bool | None = None


class TuningKeywords(TypedDict, total=False):
    """The options of `TuningOptions` as keywords of a call."""

    steps: int
    blocks: Literal["auto", "whole"]
    width: int
    learning_rate: float
    seed: int
    progress: bool | None


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
    blocks: list[Block],
    runs: tuple[LayerwiseRun, LayerwiseRun],
    partners: Correspondence,
    options: TuningOptions,
) -> Iterator[None]:
    run, exact = runs
    order = iter(exact.gm.graph.nodes)
    generator = torch.Generator().manual_seed(options.seed)
    for block in blocks:
        wanted = [partners[node] for node in block.outputs]
        for node in order:
            if node.op != "output":
                exact.step(node)
            if all(exact.has_run(value) for value in wanted):
                break
        goals = [list(map(torch.Tensor.detach, exact.values(value))) for value in wanted]
        yield from _tune_block(run, block, goals, options, generator)
        for node in block.nodes:
            run.step(node)


def _compressed_ops(gm: CapturedModule) -> set[fx.Node]:
    """Ops that read a compressed constant."""
    derived: set[fx.Node] = set()
    ops: set[fx.Node] = set()
    for node in gm.graph.nodes:
        used = operands(node)
        from_constants = bool(used) and all(
            operand.op == "get_attr" or operand in derived for operand in used
        )
        compressed = node.target in _COMPRESSED or any(operand in derived for operand in used)
        if from_constants and compressed:
            derived.add(node)
        elif any(operand in derived for operand in used) and node.op != "output":
            ops.add(node)
    return ops


def _merged(run: LayerwiseRun, blocks: list[Block], partners: Correspondence) -> list[Block]:
    """Blocks whose ends exist in the reference, and which share no constant with another one."""
    readers: dict[str, list[int]] = {}
    for number, block in enumerate(blocks):
        for node in _constants_of(block.nodes, run):
            readers.setdefault(str(node.target), []).append(number)
    open_until = list(range(len(blocks)))
    for numbers in readers.values():
        for number in range(min(numbers), max(numbers)):
            open_until[number] = max(open_until[number], max(numbers))
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
        nodes = tuple(node for block in pending for node in block.nodes)
        targets = tuple(node for block in pending for node in block.targets)
        if known:
            result.append(Block(nodes, pending[0].inputs, block.outputs, targets))
        pending = []
    return result


def _constants_of(nodes: tuple[fx.Node, ...], run: LayerwiseRun) -> set[fx.Node]:
    """`get_attr` nodes that nodes read, directly or through ops on constants."""
    constants: set[fx.Node] = set()
    pending = [node for node in nodes if not run.is_constant(node)]
    seen: set[fx.Node] = set()
    while pending:
        for operand in operands(pending.pop()):
            if operand.op == "get_attr":
                constants.add(operand)
            elif operand not in seen and run.is_constant(operand):
                seen.add(operand)
                pending.append(operand)
    return constants


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
    """A block, the tensors that it trains, and the dense weights that it computes from them."""

    def __init__(self, run: LayerwiseRun, block: Block) -> None:
        self.forward = BlockForward(run, block)
        self.trained: dict[str, _Trained] = {}
        self._dense: dict[fx.Node, Callable[[dict[fx.Node, Any]], Any]] = {}
        for node in self.forward.constants_read:
            if node.target is _LUT_TO_DENSE:
                self._dense[node] = partial(_dense_value, node, _element_numbers(run, node))
            if node.op == "get_attr" and (step := _step_of(node, run)) > 0:
                value = nn.Parameter(run.constant(node).detach().float().clone())
                self.trained[str(node.target)] = _Trained(str(node.target), value, step)

    def constants(self) -> dict[fx.Node, Any]:
        """Values of the constants, once for a step."""
        given = {path: trained.value for path, trained in self.trained.items()}
        return self.forward.constants(given, self._dense)


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
        max(float(torch.cat([tensor.float().reshape(-1) for tensor in goal]).var()), 1e-30)
        for goal in goals
    ]
    count = len(goals[0])

    def loss(constants: dict[fx.Node, Any], number: int) -> Tensor:
        made = tuned.forward(constants, number)
        parts = [
            (output.float() - goal[number].float()).square().mean() / scale
            for output, goal, scale in zip(made, goals, scales, strict=True)
            if output.is_floating_point()
        ]
        return torch.stack(parts).sum()

    def whole() -> float:
        with torch.no_grad():
            constants = tuned.constants()
            return sum(float(loss(constants, number)) for number in range(count)) / count

    before = whole()
    groups = [
        {"params": [trained.value], "lr": learning_rate * trained.step}
        for trained in tuned.trained.values()
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
        if user.target is _LUT_TO_DENSE and place == 1:
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
    """For each code of a palettized weight, the row of the flattened tables that it reads, int32."""
    indices, lut = (run.constant(operand) for operand in operands(node)[:2])
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


def _dense_value(node: fx.Node, codes: Tensor, values: dict[fx.Node, Any]) -> Tensor:
    lut = values[operands(node)[1]]
    shape: list[int] = list(node.args[3])  # type: ignore[arg-type]
    axis = node.args[4] if len(node.args) > 4 else None
    entries = _Gather.apply(lut.reshape(-1, lut.shape[-1]), codes)
    if not isinstance(axis, int):
        return entries.reshape(shape)
    length = lut.shape[-1]
    folded = [size // length if place == axis else size for place, size in enumerate(shape)]
    return entries.reshape(*folded, length).movedim(-1, axis + 1).reshape(shape)
