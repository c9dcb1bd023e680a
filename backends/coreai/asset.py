"""What is written beside the program of an asset."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["without_date"]

_DATE = re.compile(r'("creationDate"\s*:\s*")[^"]*(")')
_ALWAYS = "19800101T000000Z"  # the date of members of archives without one


def without_date(metadata: Path) -> None:
    """Replace the date of writing by a fixed one: equal programs have equal assets."""
    if metadata.exists():
        text = metadata.read_text(encoding="utf-8")
        metadata.write_text(_DATE.sub(rf"\g<1>{_ALWAYS}\g<2>", text), encoding="utf-8")
