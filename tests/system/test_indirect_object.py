"""Which head of the bundled model moves the indirect object, found with the tools a user has.

Slow: a preview of every head ablated. Direct attribution proposes a head, its attention says what
it reads, and ablating it says whether the model needs it; heads that attribution makes nothing of
are the control. They are taken from the later half of the layers: an early head works through the
later ones, which direct attribution does not count.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

import djinn_nb as djinn
from djinn_nb.metrics import LogitDifference
from tests.djinn_nb.conftest import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: The same indirect object, mentioned first and second.
PROMPTS = (
    "When Mary and John went to the store, John gave a drink to",
    "When John and Mary went to the store, John gave a drink to",
)
METRIC = LogitDifference(" Mary", " John")
NUM_CONTROLS = 8


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[djinn.Server]:
    process = Process(tmp_path_factory.mktemp("bundled") / "run", "--dtype", "float32")
    try:
        with process.connect() as server:
            yield server
    finally:
        process.end()


@pytest.fixture(params=PROMPTS, ids=["Mary first", "Mary second"])
def stop(bundled: djinn.Server, request: pytest.FixtureRequest) -> Iterator[djinn.Stopped]:
    session = bundled.launch(request.param, max_new_tokens=1)
    found = session.run_to("embedding")
    assert isinstance(found, djinn.Stopped)
    yield found
    session.terminate()


def _without(stop: djinn.Stopped, layer: int, heads: object = None) -> float:
    """How the logit difference changes with heads of a layer taken out."""
    place = f"layers.{layer}.attention.heads"
    return stop.preview(zero=True, location=place, heads=heads, metric=METRIC).metric.change


def _read_by(stop: djinn.Stopped, layer: int, head: int) -> tuple[int, str]:
    """Position and text of the token that a head reads most at the last token."""
    position, text = stop.attention(layer, head, tokens=-1).frame(head).iloc[0].idxmax()
    return int(position), str(text)


def test_attribution_finds_the_head_that_moves_the_name_and_ablation_confirms_it(
    stop: djinn.Stopped, record_property: pytest.RecordProperty
) -> None:
    parts = stop.attribution(" Mary", against=" John")
    heads = parts.heads
    order = heads.stack().sort_values(ascending=False).index
    (layer, head), second = ((int(i), int(h)) for i, h in order[:2])
    effect = pd.DataFrame(
        [[_without(stop, i, h) for h in heads.columns] for i in heads.index],
        index=heads.index, columns=heads.columns,
    )  # fmt: skip
    late = heads.loc[len(heads) // 2 :].stack().abs().sort_values()
    controls = [(int(i), int(h)) for i, h in late.index[:NUM_CONTROLS]]
    worst = max(abs(effect.loc[one]) for one in controls)
    by_layer = pd.Series({i: _without(stop, i) for i in heads.index})
    reads = {one: _read_by(stop, *one) for one in ((layer, head), second)}

    lines = [
        f"Mary − John: {parts.logit:.2f} = {parts.total:.2f} in parts, rest {parts.rest:.1e}",
        *(
            f"head {one[0]}.{one[1]}: part {heads.loc[one]:+.2f}, reads {read} at {position},"
            f" without it {effect.loc[one]:+.2f}"
            for one, (position, read) in reads.items()
        ),
        f"controls {controls}: at most {worst:.2f} either way",
        f"layer {by_layer.idxmin()} without its heads {by_layer.min():+.2f}",
    ]
    print("\n".join(lines))
    record_property("indirect object", " | ".join(lines))
    assert abs(parts.rest) <= 1e-3
    # one head reads the name that is not repeated; the other the repeated one, and holds it down
    assert {read for _, read in reads.values()} == {" Mary", " John"}
    assert (10, " John") in reads.values()
    assert effect.loc[layer, head] == effect.to_numpy().min()  # no other head does more
    assert effect.loc[layer, head] < -0.3 * parts.logit
    assert worst < 0.1 * parts.logit
    assert np.isfinite(effect.to_numpy()).all()
