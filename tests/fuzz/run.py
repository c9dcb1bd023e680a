"""Run the fuzzers for a time and print what was tried, held and wrong: `make fuzz TIME=600`.

Each round takes new examples. What fails is printed with a minimal reproduction by hypothesis, and the round's
seed; the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("configs", "files", "pipelines", "graphs")


def main() -> int:
    """Rounds until the time is over; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", type=float, default=600, help="seconds")
    parser.add_argument("--examples", type=int, default=100, help="of each test and round")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument(
        "--targets",
        default="torch torch coreml coreml coreai coreai executorch onnx",
        help="of graphs; one that is named twice is drawn twice as often",
    )
    parser.add_argument("--counts", type=Path, default=ROOT / "out" / "fuzz-counts.jsonl")
    given = parser.parse_args()
    given.counts.parent.mkdir(parents=True, exist_ok=True)
    last = given.counts.with_suffix(".last")
    ends, failed = time.monotonic() + given.time, False
    while time.monotonic() < ends:
        for kind in given.kinds:
            seed = secrets.randbelow(2**32)
            words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            words += ["--show-capture=no", "--tb=short", f"--hypothesis-seed={seed}"]
            env = {
                **os.environ,
                "GRAPHOPT_FUZZ": str(given.examples),
                "GRAPHOPT_FUZZ_COUNTS": str(given.counts),
                "GRAPHOPT_FUZZ_LAST": str(last),
                "GRAPHOPT_FUZZ_TARGETS": given.targets,
                "PYTHONFAULTHANDLER": "1",
            }
            last.unlink(missing_ok=True)
            try:
                done = subprocess.run(
                    [*words, f"tests/fuzz/test_{kind}.py"],
                    cwd=ROOT,
                    env=env,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=max(ends - time.monotonic() + 60, 60),
                )
            except subprocess.TimeoutExpired:
                print(f"{kind}: seed {seed} ran past its time")
                continue
            if done.returncode:
                failed = True
                print(f"{kind}, seed {seed}:\n{done.stdout[-8_000:]}\n{done.stderr[-2_000:]}")
                if done.returncode < 0 and last.exists():
                    print(f"signal {-done.returncode} while trying {last.read_text('utf-8')}")
    print(table(given.counts))
    return int(failed)


def table(path: Path) -> str:
    """Kind, tried, held, wrong: those refused with an error of graphopt are held.

    What was tried and is in no other column was stopped, or ended the process.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        counts[row["kind"]][row["what"]] += row["n"]
    lines = [f"{'kind':32} {'tried':>8} {'held':>8} {'refused':>8} {'wrong':>6}"]
    for kind, own in sorted(counts.items()):
        held = own["done"] + own["refused"]
        lines.append(f"{kind:32} {own['tried']:8} {held:8} {own['refused']:8} {own['wrong']:6}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
