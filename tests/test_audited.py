"""One module turns what others wrote into values, patterns, modules or code; here is that it is the only one."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt import audited
from graphopt.audited import Limits, Pattern, parse_json, parse_yaml
from graphopt.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
HOME = "graphopt/audited.py"
# whole names of calls, and last parts of names whatever stands before them
CALLS = {"eval", "exec", "compile", "__import__", "input"}
MEMBERS = {
    *("importlib.import_module", "torch.load", "torch.jit.load", "torch.export.load", "np.load"),
    *("numpy.load", "yaml.load", "yaml.safe_load", "yaml.full_load", "yaml.unsafe_load"),
    *("json.loads", "json.load", "pickle.loads", "pickle.load", "marshal.loads", "os.system"),
    *("torch.hub.load", "torch.package.PackageImporter", "pydoc.locate", "runpy.run_path"),
    *("ctypes.CDLL", "torch.ops.load_library", "torch.classes.load_library", "sympy.sympify"),
}
PATTERNS = {
    "compile",
    "match",
    "search",
    "fullmatch",
    "sub",
    "subn",
    "split",
    "findall",
    "finditer",
}


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Dotted name of what is called, and the call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def findings(source: str) -> list[str]:
    """Calls that belong into the audited module."""
    found = []
    for name, call in calls(source):
        # of a pattern that the source itself holds
        fixed = bool(call.args) and isinstance(call.args[0], ast.Constant | ast.JoinedStr)
        module, _, last = name.rpartition(".")
        given = module == "re" and last in PATTERNS and not fixed
        if name == "ctypes.CDLL" and ast.unparse(call) == "ctypes.CDLL(None)":
            continue  # the process itself
        if name in CALLS or name in MEMBERS or given or module in ("subprocess", "shelve"):
            found.append(f"{call.lineno}: {name}")
    return found


def sources() -> list[Path]:
    folders = ("graphopt", "passes", "backends")
    found = {path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return sorted(path.relative_to(ROOT) for path in found)


@pytest.mark.parametrize(
    "code",
    ["eval(x)", "importlib.import_module(x)", "re.compile(x)", "torch.load(p)", "pickle.loads(b)"],
)
def test_the_search_finds(code: str) -> None:
    assert findings(code)
    assert findings("re.compile('a+')\nmodule.eval()\nx.compile(y)") == []


def test_nothing_else_evaluates_unpickles_imports_or_compiles_what_it_was_given() -> None:
    assert len(sources()) > 300
    found = {str(path): findings((ROOT / path).read_text()) for path in sources()}
    assert found.pop(HOME)
    # a table of its own op names, escaped and joined, is a pattern of the source
    assert {path: lines for path, lines in found.items() if lines} == {}


# --- patterns -------------------------------------------------------------------------------------
def test_patterns_match_as_those_of_python() -> None:
    assert Pattern("layer1.*").fullmatch("layer1.conv")
    assert not Pattern("layer1").fullmatch("layer1.conv")
    assert Pattern("(?!head).*").fullmatch("body")
    assert not Pattern("(?!head).*").fullmatch("head")
    assert Pattern(r"(a|b)+c{1,3}").fullmatch("abacc")
    assert Pattern("conv").search("a.conv1")


def test_patterns_that_would_take_for_ever_are_stopped() -> None:
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=r"'\(a\|aa\)\+\[bc\]' takes longer than 1 s"):
        Pattern("(a|aa)+[bc]").fullmatch("a" * 60)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("text", ["(", "[", "a" * 3_000, "(" * 1_000, "*", "a{2,1}"])
def test_patterns_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="regular expression"):
        Pattern(text)


# --- values ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", [70, 1_000, 100_000])
def test_deep_texts_are_refused(levels: int) -> None:
    text = "[" * levels + "]" * levels
    with pytest.raises(ConfigError, match=r"x: (not valid|nested more)"):
        parse_json(text, "x")
    with pytest.raises(ConfigError, match=r"x: (not valid|nested more)"):
        parse_yaml(text, "x")


def test_aliases_count_as_what_they_stand_for() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="more than 200,000 values"):
        parse_yaml("\n".join(lines), "x")
    assert parse_yaml("a: &a [1]\nb: *a", "x") == {"a": [1], "b": [1]}
    with pytest.raises(ConfigError, match="more than"):
        parse_yaml("a: &a [*a]", "x")


@pytest.mark.parametrize(
    "text",
    ["9" * 5_000, "2001-13-45", "{[1]: 2}", "!!python/object:os.system {}", "\x00", "a: b: c"],
)
def test_texts_that_are_no_yaml_are_refused_as_such(text: str) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml(text, "x")


def test_long_texts_are_refused_before_they_are_read() -> None:
    with pytest.raises(ConfigError, match="11 characters; at most 10"):
        parse_json('"123456789"', "x", Limits(characters=10))
    with pytest.raises(ConfigError, match="more than 3 values"):
        parse_json("[1, 2, 3]", "x", Limits(values=3))


# --- modules --------------------------------------------------------------------------------------
def test_names_stand_for_what_is_imported_and_import_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unseen_module.py").write_text("class X: ...\nran = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert audited.attribute_of("pathlib.Path") is Path
    for name in ("unseen_module.X", ".x.Y", "..a", "X", "", "a b.c"):
        assert audited.attribute_of(name) is None
    with audited.imports_allowed():
        found = audited.attribute_of("unseen_module.X")
    assert isinstance(found, type)
    with pytest.raises(ValueError, match="no module of graphopt"):
        audited.own_module("os")
