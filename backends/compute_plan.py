"""Where the ops of an artifact will be computed and what share of a call each takes, as its target tells."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ComputePlan", "PlannedOp", "on_macos", "plan_or_none"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedOp:
    """An op, or several that the target computes in one step.

    Attributes:
        name: Its first result, or its number in the target's program.
        kind: The target's own op; several are joined by " + ".
        device: "Neural Engine", "GPU", "CPU" or "unknown".
        share: Of the time of a call, from 0 to 1; None where the target does not tell.
        others: Further devices that could compute it.
        why: What the target says about the choice of the device.

    Examples:
        >>> from graphopt.backends import PlannedOp
        >>> PlannedOp("y", "conv", "GPU", 0.25, others=("CPU",)).share
        0.25
    """

    name: str
    kind: str
    device: str
    share: float | None = None
    others: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class ComputePlan:
    """The devices of an artifact's ops on this machine.

    Attributes:
        ops: In the target's order, without constants.
        source: What told it.

    Examples:
        >>> from graphopt.backends import ComputePlan, PlannedOp
        >>> conv = PlannedOp("y", "conv", "Neural Engine", 0.9)
        >>> plan = ComputePlan((conv, PlannedOp("z", "gather", "CPU", 0.1)), "Core ML's compute plan")
        >>> print(plan)
        Neural Engine 1 op, 90 %; CPU 1 op, 10 % (Core ML's compute plan)
        >>> [op.kind for op in plan.on("CPU")]
        ['gather']
    """

    ops: tuple[PlannedOp, ...]
    source: str

    @property
    def devices(self) -> dict[str, int]:
        """Device → number of ops, most first."""
        names = [op.device for op in self.ops]
        return dict(
            sorted(((d, names.count(d)) for d in dict.fromkeys(names)), key=lambda x: -x[1])
        )

    def on(self, device: str) -> tuple[PlannedOp, ...]:
        """The ops of one device."""
        return tuple(op for op in self.ops if op.device == device)

    def share(self, device: str) -> float | None:
        """The part of a call's time that a device takes; None where nothing is known of its ops."""
        known = [op.share for op in self.on(device) if op.share is not None]
        return sum(known) if known else None

    def __str__(self) -> str:
        parts = []
        for device, count in self.devices.items():
            share = self.share(device)
            ops = "1 op" if count == 1 else f"{count} ops"
            parts.append(f"{device} {ops}" + ("" if share is None else f", {100 * share:.0f} %"))
        return f"{'; '.join(parts) or 'no ops'} ({self.source})"


def on_macos() -> bool:
    """Whether the runtimes of Core AI and Core ML drive the devices of this machine."""
    return platform.system() == "Darwin"


def plan_or_none(name: str, make: Callable[[], ComputePlan | None]) -> ComputePlan | None:
    """A plan; None, with a warning that says why, where the target cannot tell: older systems do not.

    Args:
        name: Of the target.
        make: Asks it.
    """
    try:
        return make()
    except Exception as error:
        _log.warning("%s tells no compute plan here: %s: %s", name, type(error).__name__, error)
        return None
