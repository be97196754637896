"""The body of a picture: a canvas of anywidget, whose script and style travel in the wheel.

Scripts are joined here, since a widget's module can import nothing beside it; they import nothing
from a network either. What they draw is decided by the view models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import ipywidgets as widgets
import traitlets

from djinn_nb.cards import MUTED
from djinn_nb.panels.base import Panel
from djinn_nb.panels.pictures import Picture
from djinn_nb.workbench import Workbench
from kernel_server.protocol.snapshot import Snapshot

STATIC = Path(__file__).parent / "static"
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([a-z_]+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class) )", re.MULTILINE)


@cache
def script(name: str) -> str:
    """A script and what it imports, as one module; what it exports last is what a widget calls.

    >>> script("layers").count("export default")
    1
    """
    return "\n".join(_parts(name, [])[::-1])


def _parts(name: str, seen: list[str]) -> list[str]:
    """The text of a script and of those it imports, each once, the importer first."""
    seen.append(name)
    text = (STATIC / f"{name}.js").read_text(encoding="utf-8")
    found = [_EXPORT.sub("", _IMPORT.sub("", text))]
    for other in _IMPORT.findall(text):
        if other not in seen:
            found += _parts(other, seen)
    return found


class Canvas(anywidget.AnyWidget):
    """Draws a picture: `shown` once per stop, `marks` whenever something is chosen."""

    shown = traitlets.Dict().tag(sync=True)
    marks = traitlets.Dict().tag(sync=True)


@cache
def _canvas_class(name: str) -> type[Canvas]:
    style = (STATIC / "view.css").read_text(encoding="utf-8")
    return type(f"Canvas{name.title()}", (Canvas,), {"_esm": script(name), "_css": style})


class CanvasPanel(Panel):
    """A panel whose body is one canvas."""

    #: makes its view model
    picture_class: ClassVar[type[Picture]]

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench)
        self.picture = self.picture_class(bench)

    def make(self) -> Sequence[widgets.Widget]:
        picture = self.picture
        canvas = _canvas_class(self.name)(shown=picture.shown, marks=picture.marks)
        canvas.on_msg(lambda _, message, buffers: picture.take(message))

        def told(name: str, values: dict[str, Any]) -> None:
            setattr(canvas, name, values)

        picture.told, picture.sent = told, canvas.send
        return [canvas]

    def draw(self, shown: Snapshot) -> None:
        self.picture.follow(shown)

    def html(self, shown: Snapshot) -> str:
        """The picture as it is now; of one that was not read yet, what it says instead."""
        if self.picture.shown["state"] == "ready":
            return self.figure_html()
        return f"<div style='{MUTED}'>{self.picture.shown['text']}</div>"

    def figure_html(self) -> str:
        """Its static form, of values that are there."""
        raise NotImplementedError
