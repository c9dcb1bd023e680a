"""Pages of documentation: their blocks of code, run in order as a reader would."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "examples" / "guide"
# what sets an environment up is run by `tests/helpers/walk.py`, in an environment of its own
_SETS_UP = re.compile(r"^\s*(git clone|cd |\S*pip3? install|python3? -m venv|make |source )", re.M)
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        kind: What stands behind the fence: "python", "sh", "text", ….
        text: What is in it.
        line: Where its fence is, from 1.
    """

    kind: str
    text: str
    line: int

    @property
    def sets_up(self) -> bool:
        """Whether it installs or builds something."""
        return self.kind == "sh" and _SETS_UP.search(self.text) is not None

    @property
    def runs(self) -> bool:
        """Whether it is code that a test runs."""
        return self.kind in ("python", "sh") and not self.sets_up


def pages() -> list[Path]:
    """README and the guide, in the order of their paths."""
    return [ROOT / "README.md", *sorted(GUIDE.rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks with a kind."""
    text = page.read_text()
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)
        for found in _FENCE.finditer(text)
    ]


def run_page(page: Path, *, shell: bool = True) -> dict[str, object]:
    """Run a page's blocks in the working directory, in one namespace.

    A block of text right behind code is what it prints, compared by `differences`.

    Args:
        page: Whose.
        shell: Run its commands, too; without, they and what follows from them are left out.

    Returns:
        The names that its Python has defined.

    Raises:
        AssertionError: A command failed, or printed something else than the page shows.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(page):
        if block.runs and block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                code = "\n" * block.line + block.text
                exec(compile(code, str(page), "exec"), names)
            printed = out.getvalue()
        elif block.runs:
            printed = command_lines(block.text) if shell else None
        elif block.kind == "text" and printed is not None:
            found = differences(block.text, printed)
            assert not found, f"{page.name}:{block.line}: {found}\n--- printed\n{printed}"
            printed = None
        else:
            printed = None
    return names


def command_lines(text: str) -> str:
    """What commands print, run by bash with this environment's programs and this checkout."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    imports = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", text],
        env={**os.environ, "PATH": path, "PYTHONPATH": imports, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def differences(shown: str, printed: str) -> list[str]:
    """Lines that a page shows and a run did not print.

    Words must be equal; numbers may be a twentieth off, those of rounding errors ("2.1e-07") a
    hundredfold: machines differ. A line "…" stands for any lines.
    """
    problems = []
    rest = iter(printed.splitlines())
    for line in shown.splitlines():
        if line.strip() in ("…", "") or any(_alike(line, other) for other in rest):
            continue
        problems.append(line)
        break
    return problems


def _alike(shown: str, printed: str) -> bool:
    words = [" ".join(_NUMBER.sub("#", line).split()) for line in (shown, printed)]
    numbers = [_NUMBER.findall(line) for line in (shown, printed)]
    if words[0] != words[1] or len(numbers[0]) != len(numbers[1]):
        return False
    return all(_near(*pair) for pair in zip(*numbers, strict=True))


def _near(shown: str, printed: str) -> bool:
    wanted, found = (float(number.replace(",", "")) for number in (shown, printed))
    if "e-" in shown:
        return 0.01 * wanted <= found <= 100 * wanted
    return abs(wanted - found) <= 0.05 * abs(wanted)
