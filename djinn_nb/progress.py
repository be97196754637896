"""One progress line for whatever takes longer than a glance, in a terminal or a notebook.

Off where nobody watches (a script, a test, a pipe) and with DJINN_PROGRESS=0. The line is drawn
only after `DELAY_S`, and goes away when the work is done.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

#: Work that is done sooner shows no line, seconds.
DELAY_S = 0.4

#: Told of progress: label, done, total, text.
Told = Callable[[str, float, float, str], None]
_thread = threading.local()


@contextlib.contextmanager
def heard_by(told: Told, *, drawn: bool = False) -> Iterator[None]:
    """Let `told` have what the progress lines of this thread show; drawn: and draw them."""
    before = getattr(_thread, "told", None), getattr(_thread, "drawn", True)
    _thread.told, _thread.drawn = told, drawn
    try:
        yield
    finally:
        _thread.told, _thread.drawn = before


def in_notebook() -> bool:
    """True in a Jupyter kernel."""
    shell = _shell()
    return shell is not None and getattr(shell, "kernel", None) is not None


def someone_watches() -> bool:
    """True where a line that changes makes sense."""
    if os.environ.get("DJINN_PROGRESS", "").strip().lower() in ("0", "off", "no", "false"):
        return False
    if in_notebook():
        return True
    return bool(sys.stderr is not None and sys.stderr.isatty())


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


class Progress:
    """A line with a label and a bar; nothing is drawn before something takes long.

    >>> with Progress("fetching", unit="B") as progress:
    ...     progress.at(3, 10)
    """

    def __init__(self, label: str, *, unit: str = "it", delay_s: float = DELAY_S) -> None:
        self.label = label
        self.unit = unit
        self._begin = time.monotonic()
        self._delay_s = delay_s
        self._told: Told | None = getattr(_thread, "told", None)
        self._watched = getattr(_thread, "drawn", True) and someone_watches()
        self._bar: Any = None

    def at(self, done: float, total: float, text: str = "") -> None:
        """Show that `done` of `total` is done; `text` follows the figures."""
        if self._told is not None:
            self._told(self.label, done, total, text)
        if not self._watched or time.monotonic() - self._begin < self._delay_s:
            return
        if self._bar is None:
            self._bar = self._draw(total)
        if self._bar.total != total:
            self._bar.total = total
        self._bar.n = min(done, total) if total else done
        if text:
            self._bar.set_description_str(f"{self.label}, {text[-60:]}", refresh=False)
        self._bar.refresh()

    def _draw(self, total: float) -> Any:
        from tqdm import tqdm

        arguments: dict[str, Any] = {
            "total": total,
            "desc": self.label,
            "unit": self.unit,
            "leave": False,
        }
        if self.unit == "B":
            arguments |= {"unit_scale": True, "unit_divisor": 1024}
        if self.unit == "%":
            arguments["bar_format"] = "{desc}: {percentage:3.0f}%|{bar}|"
        if in_notebook():
            # a line of its own: tqdm would move the cursor up to the place of a second one
            arguments |= {"file": _NotebookLine(), "ncols": 100, "position": 0}
        return tqdm(**arguments)

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _NotebookLine:
    """A file for tqdm that shows the last line written as one output, and leaves it empty.

    Text on stderr would stay in the saved notebook, and so would a widget's first state.
    """

    def __init__(self) -> None:
        from IPython.display import display

        self._handle = display(_Line(""), display_id=True)  # type: ignore[no-untyped-call]

    def write(self, text: str) -> int:
        line = text.strip("\r\n")
        if self._handle is not None:
            self._handle.update(_Line(line.strip()))
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


class _Line:
    """A line of text that shows as nothing when it is empty."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        from html import escape

        style = "margin:0;color:inherit;background:transparent"
        return f"<pre style='{style}'>{escape(self._text)}</pre>" if self._text else "<span></span>"
