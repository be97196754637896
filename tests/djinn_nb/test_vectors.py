"""Named vectors from prompts, stops, files and arrays; kept by the server, used on its model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from djinn_nb.directions import mean_difference, paired_pca, random_direction
from djinn_nb.metrics import OnText, Probability, Rank
from djinn_nb.vector_store import VectorStore
from tests.djinn_nb.conftest import HIDDEN, PROMPT

GOOD = ["Mary went to the store", "Anna gave a book to Paul", "John gave Mary a drink"]
BAD = ["Paul went to the park", "John went to the store", "Mary and John went"]
LOCATION = "layers.2.output"


@pytest.fixture
def vectors(server: djinn.Server) -> Iterator[VectorStore]:
    yield server.vectors
    for name in server.vectors:
        del server.vectors[name]


def _rows(server: djinn.Server, prompts: list[str], tokens: slice = slice(-1, None)) -> np.ndarray:
    """The mean of some rows at the location, prompt by prompt, read by hand."""
    found = []
    for prompt in prompts:
        session = server.launch(prompt, max_new_tokens=1)
        found.append(session.run_to(LOCATION).value.numpy()[tokens].mean(0, dtype=np.float64))
        session.terminate()
    return np.array(found)


def test_a_mean_difference_is_that_of_the_rows_read_by_hand(
    server: djinn.Server, vectors: VectorStore
) -> None:
    made = vectors.from_prompts("joy", positive=GOOD, negative=BAD[:2], location=2)

    expected = _rows(server, GOOD).mean(0) - _rows(server, BAD[:2]).mean(0)
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert made.location == LOCATION
    assert made.provenance["positive"] == GOOD
    assert made.provenance["method"] == "mean_difference"
    assert made.provenance["djinn"] == djinn.__version__
    assert made.info.weights == server.model.fingerprint["weights"]
    assert len(server.sessions()) == 0


def test_the_values_of_several_tokens_are_averaged_in_each_prompt(
    server: djinn.Server, vectors: VectorStore
) -> None:
    everywhere = vectors.from_prompts("all", GOOD, BAD, location=2, tokens="all")
    expected = _rows(server, GOOD, slice(None)).mean(0) - _rows(server, BAD, slice(None)).mean(0)
    np.testing.assert_allclose(everywhere.numpy(), expected, rtol=1e-6, atol=1e-7)

    words = {" gave", " went"}
    at_words = vectors.from_prompts("words", GOOD, BAD, location=2, tokens=words)
    rows = {}
    for side, prompts in (("good", GOOD), ("bad", BAD)):
        rows[side] = []
        for prompt in prompts:
            stop = server.launch(prompt, max_new_tokens=1).run_to(LOCATION)
            here = [i for i, token in enumerate(stop.tokens) if token.text in words]
            rows[side].append(stop.value.numpy()[here].mean(0))
    expected = np.mean(rows["good"], 0) - np.mean(rows["bad"], 0)
    np.testing.assert_allclose(at_words.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_pca_of_pairs_is_the_singular_direction_turned_towards_the_positive(
    server: djinn.Server, vectors: VectorStore
) -> None:
    made = vectors.from_prompts("joy", GOOD, BAD, location=2, method="pca")

    positive, negative = _rows(server, GOOD), _rows(server, BAD)
    direction, share = paired_pca(positive, negative)
    np.testing.assert_allclose(made.numpy(), direction, rtol=1e-5, atol=1e-6)
    assert made.provenance["share_of_squares"] == pytest.approx(share)
    assert (positive @ direction).mean() > (negative @ direction).mean()


def test_pca_finds_a_planted_direction_under_noise_and_is_no_centred_one() -> None:
    rng = np.random.default_rng(0)
    planted = rng.standard_normal(16)
    negative = rng.standard_normal((40, 16))
    positive = negative + 3 * planted + 0.1 * rng.standard_normal((40, 16))

    found, share = paired_pca(positive, negative)

    cosine = found @ planted / np.linalg.norm(found) / np.linalg.norm(planted)
    assert cosine > 0.999
    assert share > 0.99
    np.testing.assert_allclose(found, mean_difference(positive, negative), atol=0.1)
    np.testing.assert_allclose(paired_pca(negative, positive)[0], -found, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"method": "mean"}, errors.BadArgument, "method is one of mean_difference, pca"),
        ({"method": "pca", "negative": BAD[:2]}, errors.BadArgument, "3 positive and 2 negative"),
        ({"negative": []}, errors.BadArgument, "negative is empty"),
        ({"positive": "a text"}, errors.BadArgument, "positive is a list of prompts"),
        ({"location": 99}, errors.UnknownLocation, "99"),
        ({"tokens": 40}, errors.BadSelector, r"positive\[0\]: position 40"),
        ({"tokens": " Marie"}, errors.BadSelector, r"positive\[0\]: none of the \d+ tokens"),
        ({"tokens": [" gave", 3]}, errors.BadArgument, "positions or texts"),
        ({"positive": [*GOOD, ""]}, errors.BadPrompt, r"positive\[3\]: the prompt is empty"),
        ({"negative": GOOD}, errors.BadArgument, "zero everywhere"),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_neither_vector_nor_session(
    server: djinn.Server, vectors: VectorStore, change: dict, error: type, words: str
) -> None:
    wishes = {"positive": GOOD, "negative": BAD, "location": 2} | change

    with pytest.raises(error, match=words):
        vectors.from_prompts("joy", **wishes)
    assert len(vectors) == 0
    assert len(server.sessions()) == 0


def test_a_vector_of_a_stop_is_its_row(server: djinn.Server, vectors: VectorStore) -> None:
    stop = server.launch(PROMPT, max_new_tokens=3).run_to(LOCATION)
    rows = stop.value.numpy()

    np.testing.assert_array_equal(vectors.from_stop("last", stop).numpy(), rows[-1])
    both = vectors.from_stop("john", stop, tokens=" John")
    assert both.provenance["rows"] == 2
    assert both.location == LOCATION
    with pytest.raises(errors.BadArgument, match="takes a stop"):
        vectors.from_stop("none", server)


def test_the_store_is_a_mapping_shown_as_a_table(vectors: VectorStore) -> None:
    assert "no named vectors yet" in repr(vectors)
    vectors.from_array("joy", np.ones(HIDDEN), location=2)

    assert "joy" in vectors and "fear" not in vectors and 3 not in vectors
    assert list(vectors) == ["joy"] == vectors._ipython_key_completions_()
    assert vectors["joy"].norm == pytest.approx(HIDDEN**0.5)
    row = vectors.frame().loc["joy"]
    assert (row.width, row.location, row.method, row.usable) == (HIDDEN, LOCATION, "array", True)
    assert "joy" in vectors._repr_html_()
    assert repr(vectors["joy"]) == "vector 'joy' [32] · norm 5.657 · layers.2.output · array"
    with pytest.raises(errors.BadArgument, match="replace=True"):
        vectors.from_array("joy", np.ones(HIDDEN), location=2)
    del vectors["joy"]
    for call in (lambda: vectors["joy"], lambda: vectors.__delitem__("joy")):
        with pytest.raises(errors.UnknownVector, match="no vector named 'joy'"):
            call()


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("joy", np.ones(HIDDEN - 1), "31 numbers, layers.2.output of .* has 32 channels"),
        ("joy", np.zeros(HIDDEN), "no direction"),
        ("../joy", np.ones(HIDDEN), "cannot name a vector"),
        (7, np.ones(HIDDEN), "named by a text"),
        ("joy", 2.5, "shape|channels"),
    ],
)
def test_an_array_that_is_no_direction_there_is_refused(
    vectors: VectorStore, name: str, array: object, words: str
) -> None:
    with pytest.raises(errors.BadArgument, match=words):
        vectors.from_array(name, array, location=2)
    assert len(vectors) == 0


def test_a_saved_vector_comes_back_with_how_it_was_made(
    vectors: VectorStore, tmp_path: Path
) -> None:
    made = vectors.from_prompts("joy", GOOD, BAD, location=2)
    path = made.save(tmp_path / "joy")

    again = vectors.from_file("again", path)

    assert path.name == "joy.safetensors"
    np.testing.assert_array_equal(again.numpy(), made.numpy())
    assert (again.provenance, again.location) == (made.provenance, made.location)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(errors.BrokenVector, match="was changed since it was saved"):
        vectors.from_file("torn", path)
    path.write_bytes(content[:50])
    with pytest.raises(errors.BadArgument, match="torn"):
        vectors.from_file("torn", path)
    assert "torn" not in vectors


def test_plain_files_need_a_location(vectors: VectorStore, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    numbers = np.arange(1, HIDDEN + 1, dtype=np.float32)
    np.save(tmp_path / "a.npy", numbers)
    save_file({"direction": numbers}, tmp_path / "b.safetensors")
    save_file({"one": numbers, "two": numbers}, tmp_path / "two.safetensors")

    with pytest.raises(errors.BadArgument, match="pass location="):
        vectors.from_file("a", tmp_path / "a.npy")
    for name in ("a.npy", "b.safetensors"):
        made = vectors.from_file(name[0], tmp_path / name, location=2)
        np.testing.assert_array_equal(made.numpy(), numbers)
        assert made.provenance["file"] == name
    for name in ("two.safetensors", "nowhere.npy", "joy.txt"):
        with pytest.raises(errors.BadArgument):
            vectors.from_file("c", tmp_path / name, location=2)


# -- using one ----------------------------------------------------------------------------------


def _foreign(vectors: VectorStore, width: int = HIDDEN) -> djinn.Vector:
    made = vectors.from_array("mine", np.ones(HIDDEN), location=2)
    info = replace(made.info, name="foreign", model="other-model", weights="0123456789abcdef")
    vectors._send(info, np.ones(width), replace=True)
    return vectors["foreign"]


def test_applying_it_is_adding_its_numbers(server: djinn.Server, vectors: VectorStore) -> None:
    joy = vectors.from_prompts("joy", GOOD, BAD, location=2)
    plain, named, by_hand = (server.launch(PROMPT, max_new_tokens=6) for _ in range(3))

    edit = joy.apply(named, alpha=3)
    by_hand.run_to("layers.0.output").edit(
        add=joy, alpha=3, location=LOCATION, tokens="all", sticky=True
    )

    assert (edit.sticky, edit.location) == (True, LOCATION)
    assert "vector 'joy'" in repr(edit)
    texts = [session.continue_().text for session in (plain, named, by_hand)]
    assert texts[1] == texts[2] != texts[0]
    np.testing.assert_array_equal(named.logits, by_hand.logits)


def test_at_a_stop_it_is_added_to_what_is_there(server: djinn.Server, vectors: VectorStore) -> None:
    joy = vectors.from_array("joy", np.arange(HIDDEN), location=2)
    stop = server.launch(PROMPT, max_new_tokens=2).run_to(LOCATION)
    before = stop.value.numpy()

    joy.apply(stop, -0.5, tokens=-1, sticky=False)

    change = stop.value.numpy() - before
    np.testing.assert_allclose(change[-1], -0.5 * np.arange(HIDDEN), rtol=1e-5, atol=1e-5)
    assert not change[:-1].any()


def test_a_vector_of_another_model_is_used_only_as_numbers_and_says_so(
    server: djinn.Server, vectors: VectorStore
) -> None:
    foreign = _foreign(vectors)
    session = server.launch(PROMPT, max_new_tokens=2)

    assert not vectors.frame().loc["foreign"].usable
    assert "made on other-model" in repr(foreign)
    for use in (
        foreign.numpy,
        lambda: foreign.apply(session),
        lambda: session.run_to(LOCATION).edit(add=foreign),
        lambda: foreign.strength_curve([PROMPT], [1.0]),
    ):
        with pytest.raises(errors.WrongModel, match=r"0123456789ab.*inexact=True"):
            use()
    assert session.edits == []
    edit = foreign.apply(session, inexact=True)
    assert "vector 'foreign (of other-model)'" in repr(edit)


def test_one_of_another_width_is_refused_even_as_numbers(
    server: djinn.Server, vectors: VectorStore
) -> None:
    foreign = _foreign(vectors, HIDDEN * 2)
    session = server.launch(PROMPT, max_new_tokens=2)

    with pytest.raises(errors.BadEdit, match="64"):
        foreign.apply(session, inexact=True)


def test_one_that_was_replaced_is_not_applied_by_its_old_handle(
    server: djinn.Server, vectors: VectorStore
) -> None:
    old = vectors.from_array("joy", np.ones(HIDDEN), location=2)
    vectors.from_array("joy", -np.ones(HIDDEN), location=2, replace=True)
    session = server.launch(PROMPT, max_new_tokens=2)

    with pytest.raises(errors.BadArgument, match="has been replaced"):
        old.apply(session)
    vectors["joy"].apply(session)


def test_a_finished_session_takes_no_vector(server: djinn.Server, vectors: VectorStore) -> None:
    joy = vectors.from_array("joy", np.ones(HIDDEN), location=2)
    session = server.launch(PROMPT, max_new_tokens=1)
    end = session.continue_()

    for where in (end, session):
        with pytest.raises(errors.NotStopped):
            joy.apply(where)


# -- strength curves ----------------------------------------------------------------------------


def test_a_strength_curve_has_every_run_and_a_control_of_the_same_norm(
    server: djinn.Server, vectors: VectorStore
) -> None:
    joy = vectors.from_prompts("joy", GOOD, BAD, location=2)
    metrics = [Probability(" Mary"), OnText(len, name="length")]

    curve = joy.strength_curve([PROMPT, GOOD[0]], [0, 4, -4], metrics, max_new_tokens=3, seed=1)

    frame = curve.frame
    assert len(frame) == 2 * 2 * 3
    assert list(frame.direction.unique()) == ["joy", "random (seed 1)"]
    assert (frame.error == "").all()
    assert (frame.tokens == 3).all()
    assert (frame.length == frame.text.map(len)).all()
    plain = frame[frame.alpha == 0].groupby("prompt")["probability ' Mary'"].nunique()
    assert (plain == 1).all()
    steered = server.launch(PROMPT, max_new_tokens=3)
    joy.apply(steered, 4)
    row = frame[(frame.direction == "joy") & (frame.alpha == 4) & (frame.prompt == 0)].iloc[0]
    value = Probability(" Mary").on(server.model)(steered.run_to("logits").value)
    assert row["probability ' Mary'"] == value
    assert row.text == steered.continue_().generated_text
    control = random_direction(joy.numpy(), 1)
    assert np.linalg.norm(control) == pytest.approx(joy.norm, rel=1e-5)
    assert len(curve.mean()) == 6
    assert len(curve.plot().axes[0].lines) > 4
    assert "joy at layers.2.output, 2 prompts" in repr(curve)
    steered.terminate()
    assert len(server.sessions()) == 0


def test_a_prompt_that_fails_is_a_row_with_its_error(
    server: djinn.Server, vectors: VectorStore
) -> None:
    joy = vectors.from_array("joy", np.ones(HIDDEN), location=2)

    frame = joy.strength_curve([PROMPT, ""], [1], Rank(3), max_new_tokens=2).frame

    failed = frame[frame.prompt == 1]
    assert failed.error.str.startswith("BadPrompt").all() and failed["rank 3"].isna().all()
    assert (frame[frame.prompt == 0].error == "").all()


def test_a_curve_that_makes_no_sense_is_refused(server: djinn.Server, vectors: VectorStore) -> None:
    joy = vectors.from_array("joy", np.ones(HIDDEN), location=2)

    for wishes in (
        {"prompts": [], "alphas": [1]},
        {"prompts": PROMPT, "alphas": [1]},
        {"prompts": [PROMPT], "alphas": []},
        {"prompts": [PROMPT], "alphas": [1, 1.0]},
        {"prompts": [PROMPT], "alphas": [1], "metric": "rank"},
        {"prompts": [PROMPT], "alphas": [1], "max_new_tokens": 0},
    ):
        with pytest.raises(errors.BadArgument):
            joy.strength_curve(**wishes)
    with pytest.raises(errors.BadEdit, match="could never match"):
        joy.strength_curve([PROMPT], [1], tokens=-999)
    with pytest.raises(errors.BadArgument, match="nothing to plot"):
        joy.strength_curve([PROMPT], [1], max_new_tokens=1).plot()
    assert len(server.sessions()) == 0
