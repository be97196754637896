"""The panel of attention: every head of a layer, and one of them token by token."""

from __future__ import annotations

import numpy as np

from djinn_nb.cards import image
from djinn_nb.figures import attention_grid
from djinn_nb.panels.attention_model import AttentionModel
from djinn_nb.panels.canvas import CanvasPanel


class AttentionPanel(CanvasPanel):
    """A small map of each head; one that is clicked stays, in every panel."""

    name, title = "attention", "Attention"
    picture_class = AttentionModel

    def figure_html(self) -> str:
        picture, shown = self.picture, self.picture.shown
        assert isinstance(picture, AttentionModel)
        if picture.weights is None:
            return ""
        heads, weights = shown["heads"], picture.weights
        head = picture.marks.get("head")
        if head in heads:
            weights, heads = weights[:, [heads.index(head)]], [head]
        labels = [text or str(i) for i, text in enumerate(shown["tokens"])]
        rows = labels[shown["first"] : shown["first"] + shown["count"]]
        title = f"layers.{shown['layer']}.attention.pattern, forward {shown['stop']['forward']}"
        figure = attention_grid(np.asarray(weights), heads, rows, labels, title=title)
        return image(figure, f"{title}: attention weight by head, token and key")
