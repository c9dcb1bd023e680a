"""Pages of the guide as notebooks: text becomes Markdown, Python becomes cells.

    python examples/notebooks.py out/notebooks             # every technique page, executed
    python examples/notebooks.py out/notebooks k_means     # one

Needs the extra `docs`. As a hook of MkDocs it adds the notebooks, not executed, to the site, and a link to
each page.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "examples" / "guide"
PAGES = (
    *("k_means", "with_data", "dkm", "vectors", "w8a8", "qat", "joint"),
    *("mixed_precision", "rate_distortion", "pruning"),
)
_PYTHON = re.compile(r"^```python\n(.*?)^```\n?", re.DOTALL | re.MULTILINE)
_TO_PAGE = re.compile(r"\]\((\w+)\.md(#[\w-]+)?\)")
# kernels start in the notebook's folder
_SET_UP = """import os
import sys

while not os.path.exists("pyproject.toml"):  # the root of the clone
    assert os.getcwd() != "/", "start it in the clone"
    os.chdir("..")
sys.path.insert(0, os.getcwd())"""


def notebook(page: Path) -> dict[str, Any]:
    """A page as a notebook of format 4.5, without outputs."""
    cells = [_cell("code", _SET_UP)]
    parts = _PYTHON.split(page.read_text())  # text, code, text, …
    for position, part in enumerate(parts):
        text = part.strip()
        if text:
            cells.append(_cell("code" if position % 2 else "markdown", text))
    for number, cell in enumerate(cells):
        cell["id"] = f"{page.stem}-{number}"
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": text}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    else:
        cell["source"] = _TO_PAGE.sub(r"](../docs/\1.html\2)", text)
    return cell


def execute(page: Path, folder: Path, timeout: int = 600) -> Path:
    """Run a page's notebook in a kernel that starts in the clone, and write it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    made = nbformat.from_dict(notebook(page))
    NotebookClient(
        made, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{page.stem}.ipynb"
    nbformat.write(made, path)
    return path


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: the notebooks are files of the site."""
    from mkdocs.structure.files import File

    for name in PAGES:
        content = json.dumps(notebook(GUIDE / f"{name}.md"), indent=1, ensure_ascii=False)
        files.append(File.generated(config, f"notebooks/{name}.ipynb", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """MkDocs: a page that is a notebook, too, says so below its title."""
    del config, files
    name = page.file.src_uri.removesuffix(".md")
    if name not in PAGES:
        return markdown
    title, _, rest = markdown.partition("\n")
    return f"{title}\n\n[As a notebook](notebooks/{name}.ipynb)\n{rest}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path("out/notebooks"))
    parser.add_argument("pages", nargs="*", default=list(PAGES), help="names without .md")
    args = parser.parse_args()
    for name in args.pages:
        print(execute(GUIDE / f"{name}.md", args.out))


if __name__ == "__main__":
    main()
