"""The panel of layers × tokens: logit lens and norms, and where the model stopped."""

from __future__ import annotations

from djinn_nb.cards import image
from djinn_nb.panels.canvas import CanvasPanel
from djinn_nb.panels.layers_model import LayersModel
from djinn_nb.plots import norm_heat_map


class LayersPanel(CanvasPanel):
    """A grid of layers and tokens; a cell chosen is chosen in every panel."""

    name, title = "layers", "Layers × tokens"
    picture_class = LayersModel

    def figure_html(self) -> str:
        shown = self.picture.shown
        assert isinstance(self.picture, LayersModel)
        norm = self.picture.norms()
        title = f"stopped at {shown['stop']['location']}, forward {shown['stop']['forward']}"
        figure = norm_heat_map(
            norm, shown["rows"], range(norm.shape[1]), shown["tokens"], title=title
        )
        return image(figure, f"{title}: L2 norm of each token's vector by layer")
