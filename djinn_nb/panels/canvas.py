"""The body of a picture: a canvas of anywidget. What it draws is decided by the view models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import anywidget
import ipywidgets as widgets
import traitlets

from djinn_nb.cards import MUTED
from djinn_nb.panels.base import Panel
from djinn_nb.panels.pictures import Picture
from djinn_nb.panels.scripts import script, style
from djinn_nb.workbench import Workbench
from kernel_server.protocol.snapshot import Snapshot


class Canvas(anywidget.AnyWidget):
    """Draws a picture: `shown` once per stop, `marks` whenever something is chosen."""

    shown = traitlets.Dict().tag(sync=True)
    marks = traitlets.Dict().tag(sync=True)


@cache
def _canvas_class(name: str) -> type[Canvas]:
    return type(f"Canvas{name.title()}", (Canvas,), {"_esm": script(name), "_css": style()})


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
