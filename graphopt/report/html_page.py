"""Pages that hold all that they show: styles, scripts and data, and nothing that is fetched.

Plotly's basic bundle lies in the package, not in an extra: a page can be made wherever graphopt is installed,
is a quarter of the size that the full bundle of the package `plotly` gives it, and is the same for the same
program whatever else is installed. A page's policy forbids its browser to load anything.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from graphopt.errors import ArtifactExistsError
from graphopt.files import replaced

__all__ = ["page_text", "plain_values", "write_text"]

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


def page_text(title: str, data: Mapping[str, Any], scripts: Sequence[str], body: str = "") -> str:
    """A page of one file.

    Args:
        title: Its title.
        data: Plain values, which the scripts find in the element "data".
        scripts: Files of `assets`, in order.
        body: HTML before the scripts.
    """
    # within a script only its end could be taken for markup
    values = json.dumps(plain_values(data), separators=(",", ":"), ensure_ascii=False)
    values = values.replace("<", "\\u003c")
    code = "".join(f"<script>{_asset(name)}</script>" for name in scripts)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_asset('page.css')}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{body}"
        f"<script type='application/json' id='data'>{values}</script>{code}</body></html>\n"
    )


def _asset(name: str) -> str:
    return files("graphopt.report").joinpath("assets", name).read_text(encoding="utf-8")


def plain_values(value: Any) -> Any:
    """Values for JSON: five significant digits, "inf" for infinite ones, None for those that are none."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return f"{value:g}" if math.isinf(value) else float(f"{value:.5g}")
    return value


def write_text(path: str | Path, text: str, *, overwrite: bool) -> Path:
    """Write a page.

    Raises:
        ArtifactExistsError: The file exists and `overwrite` is False.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise ArtifactExistsError(f"{target} exists; pass overwrite=True to replace it")
    with replaced(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target
