"""README and guide: their code runs as it stands, their links lead somewhere."""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.pages import GUIDE, ROOT, blocks, differences, pages, run_page
from helpers.tiers import some
from helpers.walk import Shell, order, steps

# what every change runs; the subjects of the other pages have tests of their own in these tiers
OFTEN = ("README.md", "examples/guide/export_script.md")
NAMES = [str(page.relative_to(ROOT)) for page in pages() if any(b.runs for b in blocks(page))]
# files of the clone that have links
LINKED = [
    *pages(),
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "llms.txt")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@functools.cache
def digits():
    """What pages load and train: the same data, the same seed, so once for all of them."""
    from examples.digits import model

    data = model.load()
    return data, model.train(data[0])


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, from where `examples` is imported as from the root of a clone."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    from examples.digits import model

    data, network = digits()
    monkeypatch.setattr(model, "load", lambda: data)
    monkeypatch.setattr(model, "train", lambda _: network)
    return tmp_path


@pytest.mark.integration
@pytest.mark.parametrize("name", some(NAMES, OFTEN.__contains__))
def test_python_of_a_page_runs_as_it_stands(name: str, clone: Path) -> None:
    run_page(ROOT / name, shell=False)
    if name == "README.md":
        assert (clone / "out" / "model.aimodel").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in NAMES if any(b.runs and b.kind == "sh" for b in blocks(ROOT / name))]
)
def test_commands_of_a_page_run_as_they_stand(name: str, clone: Path) -> None:
    run_page(ROOT / name)


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("examples.notebooks")


def test_notebooks_hold_the_code_of_their_pages_and_no_output(notebooks: ModuleType) -> None:
    for name in notebooks.PAGES:
        page = GUIDE / f"{name}.md"
        made = notebooks.notebook(page)
        code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
        snippets = [block.text.strip() for block in blocks(page) if block.kind == "python"]
        assert [cell["source"] for cell in code][1:] == snippets
        assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
        assert all(cell["outputs"] == [] for cell in code)


@pytest.mark.slow
def test_technique_pages_run_as_notebooks(notebooks: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    for name in notebooks.PAGES:
        written = json.loads(notebooks.execute(GUIDE / f"{name}.md", tmp_path).read_text())
        assert any(cell.get("outputs") for cell in written["cells"]), name


@pytest.mark.slow
def test_guide_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    words = ("build", "--strict", "--site-dir", str(tmp_path / "site"))
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "site" / "api.html").read_text()
    assert 'id="graphopt.palettization.KMeansPalettizer"' in api


def test_shown_output_is_compared_line_by_line() -> None:
    printed = "4 of 5 tensors; 4.040 bits\nerror 3.0e-08\n"
    assert differences("4 of 5 tensors; 4.1 bits\n…\nerror 5.8e-07\n", printed) == []
    assert differences("4 of 5 tensors; 4.5 bits\n", printed) == ["4 of 5 tensors; 4.5 bits"]
    assert differences("error 5.8e-03\n", printed) == ["error 5.8e-03"]
    assert differences("error 5.8e-07\n4 of 5 tensors; 4.1 bits\n", printed)


def test_walk_keeps_one_shell_and_stops_at_what_fails(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    assert shell.run("mkdir inner; cd inner\nexport KEPT=word")[0] == 0
    code, _, printed = shell.run("echo $KEPT\npwd")
    assert (code, printed.split()) == (0, ["word", str(tmp_path / "inner")])
    assert shell.run("false\ntrue")[0] == 1
    assert shell.run("true | (exit 3)")[0] == 3
    assert shell.run("echo on")[0] == 0
    shell.close()


def test_walk_takes_every_block_that_is_run_but_the_tests(tmp_path: Path) -> None:
    pages_in_order = order(ROOT)
    assert pages_in_order[:2] == ["README.md", "index.md"]
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "guide").symlink_to(GUIDE)
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    text = "".join(lines for name in pages_in_order for _, lines in steps(tmp_path, name))
    written = "".join(path.read_text() for path in (tmp_path / "out" / "walk").iterdir())
    for page in pages():
        for block in blocks(page):
            if block.kind == "python":
                assert block.text in written
            elif block.kind == "sh":
                assert block.text.replace("make test ", "").split("\n")[0] in text
    assert "pip install -e" in text
    assert "make test" not in text


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 6 * 1024


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert found.is_relative_to(ROOT)
        if heading:
            assert heading in headings(found), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """The ids that headings get: words in small letters, joined by dashes."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_is_reached_from_the_navigation_and_for_machines() -> None:
    """`mkdocs.yml` lists each page of the guide once, `llms.txt` all that is written by hand."""
    written = sorted(str(page.relative_to(GUIDE)) for page in GUIDE.rglob("*.md"))
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == written
    named = re.findall(r"examples/guide/(\w+\.md)", (ROOT / "llms.txt").read_text())
    assert sorted(named) == sorted(set(written) - {"index.md", "api.md"})
