"""A progress line appears only where somebody watches, only when work takes long, and goes away."""

from __future__ import annotations

import io
import sys

import pytest

from djinn_nb import progress
from djinn_nb.progress import Progress, someone_watches


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _terminal(monkeypatch: pytest.MonkeyPatch) -> _Terminal:
    """Put a terminal where stderr is; in the test itself, since pytest swaps stderr before it."""
    made = _Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.delenv("DJINN_PROGRESS")
    return made


def test_a_line_is_drawn_with_what_is_going_on_and_taken_away(monkeypatch):
    terminal = _terminal(monkeypatch)
    with Progress("loading the model", unit="%", delay_s=0) as progress:
        progress.at(40, 100, "reading weights")

    shown = terminal.getvalue()
    assert "loading the model, reading weights" in shown
    assert "40%" in shown
    assert shown.rstrip("\r").rsplit("\r", 1)[-1].strip() == ""


def test_a_line_within_another_moves_no_cursor_in_a_notebook(monkeypatch):
    """Each has an output of its own there, which would show the moves as they are."""
    written: list[str] = []

    class Line(progress._NotebookLine):
        def __init__(self) -> None:
            self._handle = None

        def write(self, text: str) -> int:
            written.append(text)
            return super().write(text)

    monkeypatch.setattr(progress, "_NotebookLine", Line)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.delenv("DJINN_PROGRESS")
    with Progress("strengths", delay_s=0) as outer:
        outer.at(1, 5)
        with Progress("prompts", delay_s=0) as inner:
            inner.at(1, 3)
        outer.at(2, 5)

    text = "".join(written)
    assert "strengths" in text and "prompts" in text
    assert "\x1b" not in text and "\n" not in text


def test_quick_work_shows_nothing(monkeypatch):
    terminal = _terminal(monkeypatch)
    with Progress("fetching", unit="B", delay_s=60) as progress:
        progress.at(1, 2)

    assert terminal.getvalue() == ""


@pytest.mark.parametrize("value", ["0", "off", "No", "false"])
def test_it_can_be_switched_off(monkeypatch, value):
    _terminal(monkeypatch)
    assert someone_watches()

    monkeypatch.setenv("DJINN_PROGRESS", value)

    assert not someone_watches()


def test_a_pipe_is_not_watched(monkeypatch):
    monkeypatch.delenv("DJINN_PROGRESS")
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    assert not someone_watches()
