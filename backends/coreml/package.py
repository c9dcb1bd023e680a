"""What is written beside the program of a package."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from graphopt.audited import parse_json

__all__ = ["with_identifiers_of_content"]


def with_identifiers_of_content(manifest: Path) -> None:
    """Make the identifiers of a package's items from their paths: equal programs have equal packages."""
    data = parse_json(manifest.read_bytes(), "the package's manifest")
    items = data["itemInfoEntries"]
    new = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for old, item in items.items()}
    named = sorted(((new[old], item) for old, item in items.items()), key=lambda pair: pair[0])
    data["itemInfoEntries"] = dict(named)
    if data.get("rootModelIdentifier") in new:
        data["rootModelIdentifier"] = new[data["rootModelIdentifier"]]
    manifest.write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")
