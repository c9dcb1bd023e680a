from __future__ import annotations

import io

import pytest
from rich.console import Console

from graphopt import progress
from graphopt.progress import display as progress_display


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(
        progress_display,
        "Console",
        lambda **_: Console(file=screen, force_terminal=True, width=100, no_color=True),
    )
    return screen


def test_bar_shows_what_is_done_how_fast_and_how_long_yet(terminal: io.StringIO) -> None:
    for number in progress.track(range(3), "measuring", 3):
        assert number < 3
        progress_display._shown[-1].refresh()
    shown = terminal.getvalue()
    assert "measuring" in shown
    assert "2/3" in shown
    assert "left" in shown
    assert not progress_display._shown


def test_what_runs_inside_shares_the_display(terminal: io.StringIO) -> None:
    for _ in progress.track(range(1), "layers", 1):
        with progress.step("lowering"):
            (display,) = progress_display._shown
            assert [task.description for task in display.tasks] == ["layers", "lowering"]
        assert [task.description for task in display.tasks] == ["layers"]


def test_an_error_inside_ends_the_display(terminal: io.StringIO) -> None:
    with pytest.raises(ValueError, match="mine"), progress.step("lowering"):
        raise ValueError("mine")
    assert not progress_display._shown


@pytest.mark.parametrize("enabled", [False, None])
def test_nothing_is_shown_where_it_is_off_or_no_terminal(
    enabled: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress.track("ab", "letters", 2, enabled=enabled)) == ["a", "b"]
    with progress.step("more", enabled=enabled):
        pass
    assert capsys.readouterr() == ("", "")
