"""The bundled model's sentiment direction, found and judged with the tools a user has.

Slow: hundreds of short generations. The figures of the model card come from other code, which
hooks the stock model; here the same must come out of vectors, sticky edits and metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import djinn_nb as djinn
from djinn_nb.metrics import OnText
from djinn_nb.strength import StrengthCurve
from kernel_server.models.bundled.evaluate import CONTINUATION, STEERING_FACTOR, STEERING_LAYER
from kernel_server.models.bundled.generator import TELLING_WORDS, story_cases, valence_of
from tests.djinn_nb.conftest import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Stories of trained sentences that the direction comes from, and held-out ones it is judged on.
NUM_TRAINED, NUM_HELD_OUT = 200, 64
VALENCE = OnText(valence_of, name="valence")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[djinn.Server]:
    process = Process(tmp_path_factory.mktemp("bundled") / "run", "--dtype", "float32")
    try:
        with process.connect() as server:
            yield server
    finally:
        process.end()


@pytest.fixture(scope="module")
def joy(bundled: djinn.Server) -> djinn.Vector:
    stories = story_cases(NUM_TRAINED, seed=11, held_out=False)
    return bundled.vectors.from_prompts(
        "joy",
        positive=[story.prompt for story in stories if story.valence > 0],
        negative=[story.prompt for story in stories if story.valence < 0],
        location=STEERING_LAYER,
        tokens=[f" {word}" for word in TELLING_WORDS],
        replace=True,
    )


def _against(joy: djinn.Vector, valence: int) -> StrengthCurve:
    """Held-out stories of one valence, left alone and pushed against it."""
    prompts = [s.prompt for s in story_cases(NUM_HELD_OUT, seed=1) if s.valence == valence]
    strengths = [0.0, -valence * STEERING_FACTOR]
    return joy.strength_curve(prompts, strengths, VALENCE, max_new_tokens=CONTINUATION, seed=1)


def test_the_direction_flips_nine_of_ten_stories_and_a_random_one_does_not(
    joy: djinn.Vector, record_property: pytest.RecordProperty
) -> None:
    parts = []
    for valence in (1, -1):
        frame = _against(joy, valence).frame
        assert (frame.error == "").all()
        parts.append(frame.assign(story=valence))
    runs = pd.concat(parts)
    runs["flipped"] = runs.valence == -runs.story
    steered = runs[runs.alpha != 0]
    shares = steered.groupby("direction").flipped.mean()
    counts = steered.groupby("direction").flipped.count()
    alone = runs[(runs.alpha == 0) & (runs.direction == "joy")].flipped.mean()

    random = f"random (seed {1})"
    figures = {"joy": shares["joy"], "random": shares[random], "alone": alone}
    for name, share in figures.items():
        record_property(name, f"{share:.3f}")
    print({name: f"{share:.1%}" for name, share in figures.items()}, f"of {counts['joy']}")
    assert counts["joy"] == counts[random] == NUM_HELD_OUT >= 60
    assert shares["joy"] >= 0.9
    assert shares[random] <= 0.2
    assert alone <= 0.2


def test_it_is_kept_with_what_it_was_made_from_and_comes_back_from_a_file(
    joy: djinn.Vector, bundled: djinn.Server, tmp_path: Path
) -> None:
    again = bundled.vectors.from_file("again", joy.save(tmp_path / "joy"), replace=True)

    assert joy.location == f"layers.{STEERING_LAYER}.output"
    assert joy.provenance["method"] == "mean_difference"
    assert again.provenance == joy.provenance
    assert (again.numpy() == joy.numpy()).all()
