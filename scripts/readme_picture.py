"""Draw the README's pictures from a real stop of the bundled model.

`python -m scripts.readme_picture` writes `docs/stop.png` and `docs/attribution.png`, and prints the
stop as a terminal does.
"""

from __future__ import annotations

from pathlib import Path

import djinn_nb
from djinn_nb.plots import norm_heat_map, png
from scripts.private_runtime import private_runtime

DOCS = Path(__file__).parents[1] / "docs"
PROMPT = "When Mary and John went to the store, John gave a drink to"


def main() -> None:
    """Stop after layer 20; draw what the stop's own panel draws, and an attribution."""
    with private_runtime(), djinn_nb.connect() as server:
        session = server.launch(PROMPT, max_new_tokens=24)
        session.break_at(20)
        stop = session.continue_()
        assert isinstance(stop, djinn_nb.Stopped)
        view = stop.view()
        print(stop)
        figure = norm_heat_map(
            view.norm,
            view.norm_locations,
            range(view.norm.shape[1]),
            view.texts,
            title=f"stopped at {stop.location}: norm of each token's vector so far",
        )
        DOCS.mkdir(exist_ok=True)
        (DOCS / "stop.png").write_bytes(png(figure, dpi=130))
        parts = stop.attribution(" Mary", against=" John")
        (DOCS / "attribution.png").write_bytes(png(parts.plot(), dpi=100))
        session.terminate()


if __name__ == "__main__":
    main()
