"""Tune tables, ranges of activations, biases and norms of a compressed program towards the exact one.

Codes of weights stay. The target are the outputs of the uncompressed network, or of one block after
the other in the order of the graph, with the inputs that the tuned blocks before give (Li et al.,
BRECQ, arXiv 2102.05426, section 3.2, with table entries and ranges in place of roundings); no labels
are needed. Activations are rounded in every step with straight-through gradients
(`graphopt.fitting.moving`). The step counts that is best on batches that are held out: by how far the errors
of their samples fall on the mean, at the upper end of what their spread leaves open, so that what few
samples show by chance does not count.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, fx

from graphopt.analysis.partition import Block, find_blocks
from graphopt.analysis.quantized import find_quantized_activations, quantized_ops
from graphopt.fitting.tuned_block import TunedBlock
from graphopt.ir.annotations import is_rescaled
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import operands
from graphopt.numerics.device import device_of, for_doubles
from graphopt.progress import track
from graphopt.run.batches import Batch
from graphopt.run.layerwise import LayerwiseRun
from graphopt.run.placing import batch_on, placed
from graphopt.specs.options import Options

__all__ = ["FEW", "TuningKeywords", "TuningOptions", "held_out_of", "safe_change", "tune_graph"]

_log = logging.getLogger(__name__)
_ours = torch.ops.graphopt
_HELD_OUT = 8  # one batch of so many is held out where there are many
_SPREAD = 4  # batches that show how far single ones deviate
_SHARE = 3  # one of so many is held out where they are few
# 95 % quantiles of Student's distribution with 1, 2, … degrees of freedom
_STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895)
_ENOUGH = 4  # batches from which on any are held out
FEW = _HELD_OUT * _SPREAD  # fewer batches than these hold more of them out than one in eight
_CHECKS = 10  # times that the error on those is looked at


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
            norms move a fifth as far, relative to their spread, and beside rounded activations a
            thirtieth; scales of activations a tenth, relative, and zero points a hundredth of their
            grid.
        seed: Seed of what is held out and of the order of the data.
        progress: Show a bar; None shows it on a terminal.
        device: Torch device that every pass runs on, such as "cuda" or "mps"; None is where the
            program's tensors are. The outputs' errors come out within 5 % of the CPU's, on "cpu" the
            same bits as without. It holds both programs, the inputs and the wanted outputs; where it
            has no kernel or type for some op, all runs where the tensors are, and a remark says so.
    """

    steps: int = 200
    blocks: Literal["auto", "whole"] = "whole"
    width: int = 1
    learning_rate: float = 0.02
    seed: int = 0
    progress: bool | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        device_of(self.device)


class TuningKeywords(TypedDict, total=False):
    """The options of `TuningOptions` as keywords of a call."""

    steps: int
    blocks: Literal["auto", "whole"]
    width: int
    learning_rate: float
    seed: int
    progress: bool | None
    device: str | None


def tune_graph(
    gm: CapturedModule,
    exact: CapturedModule,
    batches: Sequence[Batch],
    options: TuningOptions,
    *,
    held_out: Sequence[Batch] = (),
) -> None:
    """Tune a compressed graph in place; a block whose error on held-out data did not fall stays.

    Args:
        gm: The compressed graph.
        exact: The exact one, with the norms folded that `gm` has folded; it is used alone meanwhile.
        batches: Inputs of one call each.
        options: How.
        held_out: Inputs that decide when it was best; without any, some of `batches` do.
    """
    targets = _compressed_ops(gm)
    if not targets:
        return
    partners = _partners(gm, exact)
    place = device_of(options.device)
    every = [batch_on(batch, place) for batch in (*batches, *held_out)]
    with placed(gm, place), placed(exact, place):
        runs = (LayerwiseRun(gm, every), LayerwiseRun(exact, every))
        blocks = _blocks(gm, targets, options.blocks, options.width)
        merged = _merged(runs[0], blocks, partners)
        total = options.steps * len(merged)
        work = _all_blocks(merged, runs, partners, options, len(held_out))
        for _ in track(work, "tuning blocks", total, enabled=options.progress):
            pass


def _all_blocks(
    blocks: list[Block],
    runs: tuple[LayerwiseRun, LayerwiseRun],
    partners: dict[fx.Node, fx.Node],
    options: TuningOptions,
    held: int,
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
        yield from _tune_block(TunedBlock(run, block), goals, options, generator, held)
        for node in block.nodes:
            run.step(node)


def _compressed_ops(gm: CapturedModule) -> set[fx.Node]:
    """Ops that read a compressed constant, and ops that round a value."""
    known = quantized_ops()
    decoders = {_ours.lut_to_dense.default, _ours.shift_scale.default}
    decoders |= {known.dequantize_per_tensor.default, known.dequantize_per_channel.default}
    derived: set[fx.Node] = set()
    ops = {rounded.node for rounded in find_quantized_activations(gm)}
    for node in gm.graph.nodes:
        used = operands(node)
        from_constants = bool(used) and all(
            operand.op == "get_attr" or operand in derived for operand in used
        )
        compressed = node.target in decoders or any(operand in derived for operand in used)
        if from_constants and compressed:
            derived.add(node)
        elif any(operand in derived for operand in used) and node.op != "output":
            ops.add(node)
    return ops


def _partners(gm: CapturedModule, exact: CapturedModule) -> dict[fx.Node, fx.Node]:
    """Values of a graph → the exact ones; what the graph puts out may be rounded."""
    known = Correspondence.by_name(gm, exact)
    partners = {mine: theirs for mine, theirs in known.items() if not is_rescaled(mine)}
    ends = (operands(next(iter(each.graph.find_nodes(op="output")))) for each in (gm, exact))
    return partners | dict(zip(*ends, strict=True))


def _merged(
    run: LayerwiseRun, blocks: list[Block], partners: dict[fx.Node, fx.Node]
) -> list[Block]:
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


def _tune_block(
    tuned: TunedBlock,
    goals: list[list[Tensor]],
    options: TuningOptions,
    generator: torch.Generator,
    given: int,
) -> Iterator[None]:
    steps = options.steps
    moving = tuned.moving
    if not moving:
        yield from (None for _ in range(steps))
        return
    error = _Error(tuned, goals)
    train, held = _split(len(goals[0]), given, generator)
    before = error.over(held)
    least, after = 0.0, before
    kept: list[Tensor] = []
    groups = [{"params": [each.v for each in moving], "lr": options.learning_rate}]
    # gradients of a good program are far below Adam's own epsilon
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    order: list[int] = []
    checks = {round(steps * (part + 1) / _CHECKS) for part in range(_CHECKS)}
    for step in range(steps):
        order = order or [train[i] for i in torch.randperm(len(train), generator=generator)]
        optimizer.zero_grad()
        with torch.enable_grad():
            error(tuned.constants(), order.pop()).backward()
        optimizer.step()
        schedule.step()
        if step + 1 in checks:
            held_out = error.over(held)
            # on the batches that were learned from, chance has no say
            apart = not set(held) <= set(train)
            change = safe_change(held_out, before) if apart else float((held_out - before).mean())
            _log.debug("step %d: error %.3g, change %.3g", step + 1, held_out.mean(), change)
            if change < least:
                least, after, kept = change, held_out, [each.v.detach().clone() for each in moving]
        yield
    _log.info(
        "block of %d ops: error %.3g before, %.3g after",
        len(tuned.forward.block.targets),
        before.mean(),
        after.mean(),
    )
    if kept:
        for each, value in zip(moving, kept, strict=True):
            each.v.data = value
        tuned.store()


class _Error:
    """Squared error at the outputs of a block, relative to their variances."""

    def __init__(self, tuned: TunedBlock, goals: list[list[Tensor]]) -> None:
        self.tuned, self.goals = tuned, goals
        self.scales = [
            max(float(torch.cat([tensor.float().reshape(-1) for tensor in goal]).var()), 1e-30)
            for goal in goals
        ]

    def __call__(self, constants: dict[fx.Node, Any], number: int) -> Tensor:
        return torch.stack([part.mean() for part in self.squares(constants, number)]).sum()

    def squares(self, constants: dict[fx.Node, Any], number: int) -> list[Tensor]:
        """Of each output, the squared difference of each of its values."""
        made = self.tuned(constants, number)
        return [
            (output.float() - goal[number].float()).square() / scale
            for output, goal, scale in zip(made, self.goals, self.scales, strict=True)
            if output.is_floating_point()
        ]

    def over(self, numbers: Sequence[int]) -> Tensor:
        """Error of each sample of some batches, or of each batch whose outputs count samples apart; float64."""
        errors = []
        with torch.no_grad():
            constants = self.tuned.constants()
            for number in numbers:
                parts = self.squares(constants, number)
                lengths = {part.shape[0] if part.ndim else 1 for part in parts}
                rows = lengths.pop() if len(lengths) == 1 else 1
                means = [_doubles(part).reshape(rows, -1).mean(1) for part in parts]
                errors.append(torch.stack(means).sum(0))
        return torch.cat(errors)


def _doubles(values: Tensor) -> Tensor:
    return values.to(for_doubles(values.device)).double()


def safe_change(found: Tensor, before: Tensor) -> float:
    """Mean change of errors relative to their mean before, at the upper end of its one-sided 95 % interval.

    The interval is Student's for paired values; a single one shows no spread and stands for itself.
    """
    change, size = found - before, max(float(before.mean()), 1e-300)
    if len(change) < 2:
        return float(change.mean()) / size
    freedom = len(change) - 1
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.645 + 1.6 / freedom
    return float(change.mean() + quantile * change.std() / math.sqrt(len(change))) / size


def held_out_of(count: int) -> int:
    """How many of some batches are held out: one in eight, but a third or four where they are few.

    Less than four are all learned from.
    """
    if count < _ENOUGH:
        return 0
    return max(2, count // _HELD_OUT, min(_SPREAD, count // _SHARE))


def _split(count: int, given: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Batches to learn from, and those to judge by; the same where they are few."""
    if given:
        return list(range(count - given)), list(range(count - given, count))
    order = torch.randperm(count, generator=generator).tolist()
    held = held_out_of(count)
    return order[held:], order[:held] or order
