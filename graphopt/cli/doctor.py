"""graphopt doctor: versions, extras, and what each target can do on this machine."""

from __future__ import annotations

import platform
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from graphopt import __version__
from graphopt.backends.lowering import lower
from graphopt.backends.registry import Target, targets
from graphopt.capture import capture
from graphopt.cli.common import OUT, Json, print_json
from graphopt.compressors.joint import compress
from graphopt.errors import GraphOptError, MissingDependencyError
from graphopt.ir.program import Program
from graphopt.ir.torch_private import TESTED
from graphopt.progress import track

__all__ = ["doctor"]

_REQUIREMENT = re.compile(r"""([\w.-]+)[^;]*;.*extra == ["']([\w-]+)["']""")


def doctor(as_json: Json = False) -> None:
    """Show versions, extras, and what each target can do here: each makes and runs a small artifact."""
    found = {
        "graphopt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    extras, probe = _extras(), _probe()
    rows = track(targets(), "trying targets", len(targets()), enabled=False if as_json else None)
    tried = {str(target): _tried(target, probe) for target in rows}
    if as_json:
        print_json({"versions": found, "extras": extras, "targets": tried})
        return
    tested = f"; tested with torch {' to '.join(dict.fromkeys(TESTED))}"
    OUT.print(", ".join(f"{name} {version}" for name, version in found.items()) + tested)
    table = Table(title="extras")
    for heading in ("extra", "packages"):
        table.add_column(heading)
    for extra, packages in extras.items():
        listed = ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items())
        missing = None in packages.values()
        table.add_row(extra, listed, style="yellow" if missing else None)
    OUT.print(table)
    table = Table(title="targets on this machine")
    for heading in ("target", "file", "what it can do here"):
        table.add_column(heading)
    for target in targets():
        table.add_row(str(target), target.suffix, tried[str(target)])
    OUT.print(table)


def _extras() -> dict[str, dict[str, str | None]]:
    """Extra → its packages → their versions, None where one is not installed."""
    try:
        required = metadata.requires("graphopt") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, dict[str, str | None]] = {}
    for line in required:
        match = _REQUIREMENT.match(line)
        if match is not None and match[1] != "graphopt" and match[2] not in ("all", "dev"):
            found.setdefault(match[2], {})[match[1]] = _version(match[1])
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _probe() -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        return capture(net, (torch.randn(2, 16),))


def _tried(target: Target, program: Program) -> str:
    """What became of a small compressed net on a target."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            artifact: Any = lower(compress(program, progress=False), target)
            artifact.save(Path(folder) / f"net{target.suffix}")
    except MissingDependencyError as error:
        return f"nothing: {error}"
    except GraphOptError as error:
        return f"fails: {error}"
    outcome = artifact.verification
    if not outcome.complete:
        return f"lowers; {outcome.how}, a partial check"
    return f"lowers and checks: {outcome.how}"
