"""What is written beside the program of an asset."""

from __future__ import annotations

import json
from pathlib import Path

from graphopt.audited import parse_json

__all__ = ["without_date"]

_ALWAYS = "19800101T000000Z"  # the date of members of archives without one


def without_date(metadata: Path) -> None:
    """Replace the date of writing by a fixed one, and put keys in order: equal programs, equal assets."""
    if not metadata.exists():
        return
    known = parse_json(metadata.read_text(encoding="utf-8"), str(metadata))
    if "creationDate" in known:
        known["creationDate"] = _ALWAYS
    text = json.dumps(known, indent=2, separators=(",", " : "), sort_keys=True)
    metadata.write_text(text, encoding="utf-8")
