"""The panel of an activation: one vector as line, histogram and largest channels."""

from __future__ import annotations

from typing import Any

import numpy as np

from djinn_nb.cards import image, note
from djinn_nb.figures import vector_figure
from djinn_nb.panels.activation_model import ActivationModel
from djinn_nb.panels.canvas import CanvasPanel


class ActivationPanel(CanvasPanel):
    """The chosen vector, alone or against another token, layer or session."""

    name, title = "activation", "Activation"
    picture_class = ActivationModel

    def figure_html(self) -> str:
        shown = self.picture.shown
        named = [(one["name"], np.frombuffer(one["values"], np.float32)) for one in shown["series"]]
        words = "; ".join(_words(one) for one in shown["series"])
        if shown["cosine"] is not None:
            words += f"; cosine {shown['cosine']:.4f}, distance {shown['distance']:.4g} (L2)"
        return image(vector_figure(named), words) + note(words)


def _words(one: dict[str, Any]) -> str:
    norm = "is no number" if one["norm"] is None else f"{one['norm']:.4g} (L2)"
    return f"{one['name']}: norm {norm}"
