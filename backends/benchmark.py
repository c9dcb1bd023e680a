"""How long a call of an artifact takes: measured where the target runs here, else estimated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from graphopt.backends.compute_plan import ComputePlan
from graphopt.errors import InputError
from graphopt.ir import op_info
from graphopt.ir.program import Program, export_graph
from graphopt.run.batches import Batch

__all__ = [
    "DEVICES",
    "Benchmark",
    "Device",
    "benchmark_of",
    "bytes_moved",
    "device_of",
    "multiply_adds",
]


@dataclass(frozen=True)
class Device:
    """The two limits of a roofline (Williams, Waterman and Patterson, CACM 52(4), 2009).

    Attributes:
        name: What it is.
        operations: Multiplications and additions per second in 16-bit floats.
        bandwidth: Bytes per second between memory and chip.

    Examples:
        >>> from graphopt.backends import Device
        >>> Device("a board of ours", operations=4e12, bandwidth=17e9).milliseconds(2e9, 17e6)
        1.0
    """

    name: str
    operations: float
    bandwidth: float

    def milliseconds(self, operations: float, moved: float) -> float:
        """The shortest time in which a call with these operations and bytes can be done."""
        return 1e3 * max(operations / self.operations, moved / self.bandwidth)


# the manufacturer's figures: peak of the Neural Engine in 16-bit floats, bandwidth of the memory
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "m1": Device("Apple M1", 11e12, 68.25e9),
        "m2": Device("Apple M2", 15.8e12, 100e9),
        "m3": Device("Apple M3", 18e12, 100e9),
        "m4": Device("Apple M4", 19e12, 120e9),
        "a17-pro": Device("Apple A17 Pro", 17.5e12, 51.2e9),
    }
)


@dataclass(frozen=True)
class Benchmark:
    """Time and memory of a call.

    Attributes:
        milliseconds: Median of the runs, or the estimate.
        fastest: The fastest run, or the estimate.
        measured: Whether it was timed; else it is a lower bound for a device.
        how: What was timed, or which device was taken.
        multiply_adds: Of matrix products, convolutions and attention.
        bytes_moved: Weights as stored, and each op's operands and results once.
        file_bytes: Bytes of the artifact.
        planned_memory: Bytes that the runtime sets aside for values; None where it doesn't tell.
        plan: Which device computes each op; None where the target doesn't tell.

    Examples:
        >>> import pathlib, tempfile
        >>> from graphopt.backends import Benchmark
        >>> artifact = graphopt.lower(graphopt.capture(model, example), "torch")
        >>> path = artifact.save(pathlib.Path(tempfile.mkdtemp()) / "model.pt2")
        >>> outcome = artifact.benchmark(runs=3)
        >>> isinstance(outcome, Benchmark), outcome.measured
        (True, True)
    """

    milliseconds: float
    fastest: float
    measured: bool
    how: str
    multiply_adds: int
    bytes_moved: int
    file_bytes: int
    planned_memory: int | None = None
    plan: ComputePlan | None = None

    def __str__(self) -> str:
        kind = "" if self.measured else "estimate, at least "
        memory = "" if self.planned_memory is None else f", {self.planned_memory:,} bytes planned"
        return (
            f"{kind}{self.milliseconds:.3g} ms a call ({self.how}); {self.multiply_adds:,}"
            f" multiply-adds, {self.bytes_moved:,} bytes moved, file {self.file_bytes:,}{memory}"
            + ("" if self.plan is None else f"; {self.plan}")
        )


def device_of(device: str | Device) -> Device:
    """A device by its name, or itself.

    Raises:
        InputError: There is none of that name.
    """
    if isinstance(device, Device):
        return device
    if device not in DEVICES:
        raise InputError(
            f"no figures of a device {device!r}; there are {', '.join(DEVICES)}, or give a"
            " Device(name, operations, bandwidth)"
        )
    return DEVICES[device]


def benchmark_of(
    program: Program,
    call: Batch,
    run: Callable[[], object] | None,
    *,
    runs: int,
    device: str | Device,
    file_bytes: int,
    width: int | None,
) -> Benchmark:
    """Time a call, or estimate it where there is nothing to run.

    Args:
        program: What the artifact was made from.
        call: Inputs.
        run: Computes the call on the target, with everything loaded; None where it does not run here.
        runs: How often it is timed.
        device: What to estimate for.
        file_bytes: Bytes of the artifact.
        width: Bytes of a float on the target; None for the program's own.
    """
    work, moved = multiply_adds(program, call), bytes_moved(program, call, width) + file_bytes
    if run is None:
        chosen = device_of(device)
        least = chosen.milliseconds(2 * work, moved)
        how = f"roofline of {chosen.name}"
        return Benchmark(least, least, False, how, work, moved, file_bytes)
    times = _times(run, runs)
    middle = float(statistics.median(times))
    how = f"median of {runs} calls on this machine, {torch.get_num_threads()} threads in PyTorch"
    return Benchmark(middle, min(times), True, how, work, moved, file_bytes)


def _times(run: Callable[[], object], runs: int) -> list[float]:
    """Milliseconds of each of `runs` calls, behind two that warm up."""
    for _ in range(2):
        run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def multiply_adds(program: Program, call: Batch) -> int:
    """Multiply-adds of matrix products, convolutions and attention in one call."""
    module = program.module()
    args, kwargs = call
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        module(*args, **kwargs)
    return int(counted.get_total_flops()) // 2


def bytes_moved(program: Program, call: Batch, width: int | None = None) -> int:
    """Bytes of values that the ops of one call read and write, each once; weights apart.

    Args:
        program: What is called.
        call: Its inputs.
        width: Bytes of a float; None for those that it has in the program.
    """
    args, kwargs = call
    exported = export_graph(program.graph_module, args, kwargs)
    inputs, graph = set(exported.graph_signature.user_inputs), exported.graph
    # weights, and what is computed from them alone
    stored = {node for node in graph.find_nodes(op="placeholder") if node.name not in inputs}
    total = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        operands = node.all_input_nodes
        if operands and all(operand in stored for operand in operands):
            stored.add(node)
        elif op_info.view_of(node) is None:
            values = [node, *(operand for operand in operands if operand not in stored)]
            total += sum(_bytes(value, width) for value in values)
    return total


def _bytes(node: fx.Node, width: int | None) -> int:
    total = 0
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(leaf, Tensor):
            floating = width is not None and leaf.is_floating_point()
            total += leaf.numel() * (width if floating and width else leaf.element_size())
    return total
