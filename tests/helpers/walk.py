"""README and guide as a reader follows them, in a fresh clone and a fresh environment.

    python tests/helpers/walk.py                       # README, then the guide in the order of mkdocs.yml
    python tests/helpers/walk.py README.md start.md    # some pages
    python tests/helpers/walk.py --folder out/walk     # keeps the clone there

Every fenced block of `sh` and `python` is run as it stands, in one shell, from the root of the clone;
consecutive blocks of Python are one script. Nothing else is installed or set. Left out is `make test`,
which `.ci/run` runs. Printed are the seconds of every step and the time from the clone to the first
artifact; a step that fails ends the walk with its output.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LEFT_OUT = re.compile(r"^make test\b.*\n", re.MULTILINE)
_DONE = "--- step ended"


def order(clone: Path) -> list[str]:
    """README, overview, and the rest of the guide in the order of its navigation."""
    listed = re.findall(r"([\w/]+\.md)$", (clone / "mkdocs.yml").read_text(), re.MULTILINE)
    return ["README.md", *listed]


def steps(clone: Path, name: str) -> Iterator[tuple[str, str]]:
    """(what it is, shell lines) of a page's steps."""
    path = clone / name if name == "README.md" else clone / "examples" / "guide" / name
    found = _FENCE.findall(path.read_text())
    for number, (kind, group) in enumerate(itertools.groupby(found, key=lambda each: each[0])):
        text = "\n".join(body for _, body in group)
        if kind == "sh":
            yield f"{name}, commands {number}", _LEFT_OUT.sub("", text)
        else:
            script = clone / "out" / "walk" / f"{path.stem}-{number}.py"
            script.parent.mkdir(parents=True, exist_ok=True)
            script.write_text(text)
            # as typed into a session that was started in the root
            run = f"import sys; sys.path.insert(0, ''); exec(open({str(script)!r}).read())"
            yield f"{name}, Python {number}", f"python -c {shlex.quote(run)}\n"


class Shell:
    """One shell that a reader types into; steps are timed."""

    def __init__(self, folder: Path) -> None:
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, lines: str) -> tuple[int, float, str]:
        """Exit code of the first line that failed or 0, seconds, and what was printed."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        begun = time.perf_counter()
        # in this shell, not in one below it: what a line activates stays
        self._bash.stdin.write(
            f"code=; set -o pipefail; trap 'code=${{code:-$?}}' ERR\n{lines}\n"
            f'trap - ERR; echo; echo "{_DONE} ${{code:-0}}"\n'
        )
        self._bash.stdin.flush()
        printed = []
        for line in self._bash.stdout:
            if line.startswith(_DONE):
                return int(line.split()[-1]), time.perf_counter() - begun, "".join(printed)
            printed.append(line)
        return self._bash.wait(), time.perf_counter() - begun, "".join(printed)

    def close(self) -> None:
        """End the shell."""
        self._bash.communicate("exit\n")


def walk(folder: Path, pages: list[str]) -> int:
    """Clone into a folder and follow the pages; 1 where a step failed."""
    begun = time.perf_counter()
    clone = folder / "graphopt"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    shell = Shell(clone)
    first = None
    for page in pages or order(clone):
        for name, lines in steps(clone, page):
            code, seconds, printed = shell.run(lines)
            print(
                f"{seconds:8.1f} s  {name}{'' if code == 0 else f': exit code {code}'}", flush=True
            )
            if code != 0:
                print(lines, printed, sep="\n")
                return 1
            if first is None and any((clone / "out").glob("*.aimodel")):
                first = time.perf_counter() - begun
                print(f"{first:8.1f} s  from the clone to the first artifact", flush=True)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", help="README.md, start.md, …; all when left out")
    parser.add_argument("--folder", type=Path, help="empty folder that the clone stays in")
    args = parser.parse_args()
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
        sys.exit(walk(args.folder.resolve(), args.pages))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(walk(Path(folder), args.pages))


if __name__ == "__main__":
    main()
