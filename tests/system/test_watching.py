"""Data breakpoints and logpoints through the public API, on a real server with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors, logs
from tests.djinn_nb.conftest import HIDDEN, NUM_LAYERS, VOCABULARY
from tests.system.conftest import Canary, World

LAYERS = [f"layers.{i}.output" for i in range(NUM_LAYERS)]


@pytest.fixture
def session(world: World, canary: Canary) -> djinn.Session:
    return world.launch(max_new_tokens=5, temperature=0.8, seed=3)


def softmax(logits: Any) -> Any:
    raised = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


# --- conditions on the lens -----------------------------------------------------------------------


def test_the_lens_of_a_condition_is_the_one_a_stop_shows(world: World, session: djinn.Session):
    shown = world.launch(max_new_tokens=1).run_to(2).lens(top_k=VOCABULARY, tokens="all")
    tops = shown[shown["rank"] == 1].set_index("position")
    word = tops.loc[3, "text"]
    like = [int(p) for p, text in zip(tops.index, tops["text"], strict=True) if text == word]
    entropies = sorted(tops["entropy_nats"])
    middle = (entropies[4] + entropies[5]) / 2
    above = [int(p) for p in tops.index if tops.loc[p, "entropy_nats"] > middle]
    # pandas takes a text of a zero byte for an empty one
    named = [text == word for text in shown["text"]]
    chosen = shown[named].groupby("position")["probability"].sum()
    limit = float(chosen.loc[3]) - 1e-6
    likely = [int(p) for p in chosen.index if chosen.loc[p] > limit]

    for condition, expected in [
        (f"top_token == {json.dumps(word, ensure_ascii=False)}", like),
        (f"entropy > {middle}", above),
        (f"prob({json.dumps(word, ensure_ascii=False)}) > {limit}", likely),
    ]:
        fresh = world.launch(max_new_tokens=1)
        fresh.break_at(2, condition=condition)
        assert fresh.continue_().hit_tokens == expected, condition


def test_at_the_logits_the_true_logits_are_judged(session: djinn.Session):
    logits = session.fork().step_out().value.numpy()[0]
    found = softmax(logits)
    entropy = float(-(found * np.log(found)).sum())
    session.break_at(
        "logits", condition=f"entropy > {entropy - 1e-4} and entropy < {entropy + 1e-4}"
    )

    stop = session.continue_()

    assert (stop.location, stop.hit_tokens) == ("logits", [len(stop.tokens) - 1])


def test_a_named_vector_is_taken_as_it_is_when_the_breakpoint_is_set(
    world: World, session: djinn.Session
):
    rows = session.fork().run_to(3).value.numpy()
    one = rows[5] / np.linalg.norm(rows[5])
    cosines = rows @ one / np.linalg.norm(rows, axis=1)
    vectors = world.server.vectors
    try:
        vectors.from_array("watched", one, location=3)
        session.break_when(cosine_above=("watched", float(cosines[5]) - 1e-3), at=3)
        del vectors["watched"]
        stop = session.continue_()

        assert stop.reason == "data breakpoint"
        assert stop.hit_tokens == [p for p, c in enumerate(cosines) if c > cosines[5] - 1e-3]
        with pytest.raises(errors.UnknownVector, match="watched"):
            session.break_when(cosine_above=("watched", 0.5))
        vectors.from_array("watched", one, location=3)
        with pytest.raises(
            errors.BadCondition, match=rf"\[{HIDDEN}\].*logits is {VOCABULARY} wide"
        ):
            session.break_when(cosine_above=("watched", 0.5), at="logits")
    finally:
        if "watched" in vectors:
            del vectors["watched"]


@pytest.mark.parametrize(
    ("condition", "place", "words"),
    [
        ('top_token == " Marx"', 2, "no token of this model has the text"),
        ('prob(" Marx") > 0.5', 2, "no token of this model has the text"),
        ("entropy > 1", "layers.2.attention.heads", "not as wide as the residual stream"),
        ('cosine("nobody") > 0', 2, "no vector named 'nobody'"),
        ("prob(3) > 0", 2, "takes one text"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_runs(
    session: djinn.Session, condition: str, place: object, words: str
):
    with pytest.raises(errors.RequestError, match=words):
        session.break_at(place, condition=condition)  # type: ignore[arg-type]

    assert session.breakpoints == []


# --- data breakpoints -----------------------------------------------------------------------------


def test_the_first_layer_whose_norm_is_above_is_where_it_stops(session: djinn.Session):
    capture = session.fork().run_to("final_norm").capture().norm
    limit = float(capture.to_numpy()[2:].max()) * 0.999
    first = next(n for n in capture.index if capture.loc[n].max() > limit and n != "embedding")
    watch = session.break_when(norm_above=limit)
    stop = session.continue_()

    assert (stop.location, stop.reason) == (first, "data breakpoint")
    assert stop.hit_tokens == [int(p) for p in capture.columns if capture.loc[first, p] > limit]
    assert watch.locations == LAYERS
    assert f"norm > {limit!r}" in repr(watch)


def test_a_value_that_blows_up_is_found_at_the_next_site_that_shows_it(session: djinn.Session):
    session.break_when(condition="norm > 1e30 and num_nan == 0", at="every site", tokens="prompt")
    session.run_to(1)
    session.stop.edit(set=3e35, channels=0, tokens=2)
    stop = session.continue_()

    assert (stop.reason, stop.location) == ("data breakpoint", "layers.2.middle")
    assert stop.hit_tokens == [2]


def test_a_changed_top_token_is_found_where_the_lens_changes(world: World, session: djinn.Session):
    shown = session.fork().run_to("final_norm").lens(layers="all", top_k=1)
    tops = list(shown["text"])[1:]  # without the embedding
    changes = [i for i in range(1, len(tops)) if tops[i] != tops[i - 1]]
    session.break_when(top_token_changes=True, tokens=-1, when="prefill")
    found = []
    while isinstance(stop := session.continue_(), djinn.Stopped):
        found.append(int(stop.location.split(".")[1]))

    assert found == changes


def test_an_edit_at_the_stop_counts_for_the_change_after_it(session: djinn.Session):
    session.break_when(top_token_changes=True, tokens=-1, when="prefill", at=[1, 2])
    session.run_to(1)
    child = session.fork()
    child.stop.edit(scale=-40.0, tokens=-1)
    before = child.stop.lens(top_k=1)["text"][0]
    after = child.fork().run_to(2).lens(top_k=1)["text"][0]
    now = child.continue_()

    assert isinstance(now, djinn.Stopped) == (before != after)
    assert before != session.stop.lens(top_k=1)["text"][0]  # the edit did change it


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"nan": True, "norm_above": 3},
        {"nan": True, "condition": "norm > 3"},
        {"norm_above": float("nan")},
        {"cosine_above": 0.5},
        {"cosine_above": ("watched", 1.0)},
        {"cosine_above": ("watched", -2)},
        {"entropy_below": 0},
        {"top_token": 3},
        {"nan": True, "at": []},
        {"nan": True, "at": 3.5},
        {"entropy_above": 1.0, "at": "layers.1.attention.q"},
        {"nan": True, "at": "layers.99.output"},
        {"nan": True, "tokens": " Marx"},
    ],
)
def test_a_watch_that_makes_no_sense_is_refused(session: djinn.Session, wish: dict[str, Any]):
    with pytest.raises(errors.RequestError):
        session.break_when(**wish)

    assert session.breakpoints == []


def test_what_never_happened_is_told_at_the_end_without_being_asked(world: World, canary: Canary):
    session = world.launch(max_new_tokens=1)
    session.break_at(2, when="decode")
    session.break_when(norm_above=1e9)
    session.break_at(1, ignore=5)
    session.break_at(3).disable()
    log = session.log_at(0, condition="norm > 1e9")
    end = session.continue_()

    assert isinstance(end, djinn.Finished)
    text = repr(end)
    assert "breakpoint 1 (layers.2.output) was never reached: there was no decode" in text
    assert f"data breakpoint 2 ({NUM_LAYERS} locations" in text
    assert f"never held in {NUM_LAYERS} hits: norm > 1000000000" in text
    assert "breakpoint 3 (layers.1.output) held once and never stopped" in text
    assert "breakpoint 4" not in text
    assert f"logpoint {log.id} (layers.0.output) never held in 1 hit" in text
    assert all(
        line.strip() in end._repr_html_().replace("&gt;", ">") for line in text.splitlines()[2:]
    )


# --- logpoints ------------------------------------------------------------------------------------


def test_a_run_with_three_logpoints_is_bit_equal_to_one_without(
    world: World, session: djinn.Session
):
    plain = session.fork()
    session.log_at("every site")
    session.log_at([1, "layers.2.mlp.output"], what="tensor", tokens=-1)
    session.log_at("logits", condition="entropy > 0", what="tensor")
    assert session.continue_().tokens == plain.continue_().tokens

    np.testing.assert_array_equal(session.logits, plain.logits)


def test_a_log_holds_what_stops_show(session: djinn.Session):
    other = session.fork()
    log = session.log_at([1, 4], what="tensor", tokens=[2, 0, -1], when="any")
    summary = session.log_at("every layer")
    session.continue_()
    other.break_at(4)
    rows, norms = [], []
    while isinstance(stop := other.continue_(), djinn.Stopped):
        value = stop.value.numpy()
        rows.append(value[[2, 0, -1]] if stop.forward == 0 else value)
        norms += [float(n) for n in np.linalg.norm(value, axis=1)]

    found = log.tensors()["layers.4.output"]
    np.testing.assert_array_equal(found.values, np.concatenate(rows))
    count = other.newest.num_prompt_tokens
    assert found.positions.tolist() == [2, 0, count - 1, *range(count, count + 4)]
    assert found.forwards.tolist() == [0, 0, 0, 1, 2, 3, 4]
    frame = summary.frame()
    assert frame[frame["location"] == "layers.4.output"]["norm"].tolist() == pytest.approx(norms)
    assert list(frame["location"].unique()) == LAYERS
    assert (frame["num_nan"] == 0).all()
    ids = dict(enumerate(session.tokens))
    assert (frame["position"].map(ids) == frame["token_id"]).all()
    assert frame["token"].iloc[0] == session.client.token_texts([frame["token_id"].iloc[0]])[0]


def test_a_full_log_says_so_once_and_the_run_goes_on(world: World, canary: Canary):
    session = world.launch(max_new_tokens=30)
    log = session.log_at("every layer", max_bytes=20_000)
    with pytest.warns(UserWarning, match=r"logpoint 1 .* is full and has lost \d+ records") as told:
        end = session.continue_()

    assert isinstance(end, djinn.Finished) and len(told) == 1
    kept = log.records()
    assert log.dropped == 30 * NUM_LAYERS - len(kept) > 0
    assert [record.seq for record in kept] == list(range(1, len(kept) + 1))
    assert f"{log.dropped} lost: the log is full" in repr(log)
    assert log.info.log_bytes <= 20_000


def test_a_log_that_may_lose_nothing_stops_the_session(
    world: World, canary: Canary, tmp_path: Path
):
    session = world.launch(max_new_tokens=30)
    log = session.log_at(2, max_bytes=9_000, on_full="stop")
    with pytest.warns(UserWarning, match="is full"):
        stop = session.continue_()

    assert (stop.reason, stop.hit_breakpoints) == ("exception", [log.id])
    assert isinstance(stop.error, errors.QuotaExceeded)
    log.stream(tmp_path / "log", release=True).close()
    assert session.continue_().reason == "exception"  # and again when it is full again


def test_a_log_outlives_its_client_and_is_read_by_two(world: World, session: djinn.Session):
    log = session.log_at([0, 3])
    with world.connect() as other:
        theirs = other.attach(session.id)
        theirs.continue_()
        (same,) = theirs.breakpoints
        assert isinstance(same, logs.Logpoint)
        seen = same.records()

    assert seen == log.records()
    assert len(seen) == 10
    session.terminate()
    with pytest.raises(errors.UnknownSession):
        log.records()


def test_a_fork_starts_with_an_empty_log(session: djinn.Session):
    log = session.log_at(3)
    session.run_to(4)
    child = session.fork()
    child.continue_()
    (copied,) = child.breakpoints

    assert isinstance(copied, logs.Logpoint)
    assert len(log.records()) == 1
    assert [record.forward for record in copied.records()] == [1, 2, 3, 4]


# --- files ----------------------------------------------------------------------------------------


def test_a_streamed_log_is_read_back_as_it_was(world: World, canary: Canary, tmp_path: Path):
    session = world.launch(max_new_tokens=40)
    log = session.log_at([1, "logits"], what="tensor", tokens=-1)
    with log.stream(tmp_path / "log") as stream:
        session.continue_()
    saved = logs.read(tmp_path / "log")

    assert stream.last_seq == 80
    assert saved.torn == ()
    assert saved.frame.equals(log.frame())
    for place, found in log.tensors().items():
        np.testing.assert_array_equal(saved.tensors[place].values, found.values)
        assert saved.tensors[place].positions.tolist() == found.positions.tolist()


def test_streaming_again_goes_on_and_writes_torn_files_anew(
    world: World, canary: Canary, tmp_path: Path
):
    session = world.launch(max_new_tokens=12)
    log = session.log_at([1, 2, 3], what="tensor")
    folder = tmp_path / "log"
    for _ in range(3):
        session.step_out()
        session.run_to("embedding")
        log.stream(folder).close()
    whole = logs.read(folder).frame
    rows, tensors = sorted(folder.glob("*.jsonl")), sorted(folder.glob("*.safetensors"))
    tensors[1].write_bytes(tensors[1].read_bytes()[:-1])
    rows[2].write_bytes(rows[2].read_bytes()[:-30])
    (folder / ".part-000004.jsonl.new").write_bytes(b"{")

    torn = logs.read(folder)
    assert torn.torn == (rows[1].name, rows[2].name)
    assert len(torn.frame) < len(whole)
    log.stream(folder).close()
    log.stream(folder).close()  # nothing is written twice
    again = logs.read(folder)
    assert again.torn == () and again.frame.equals(whole)
    assert not list(folder.glob(".*.new"))

    last = sorted(folder.glob("*.jsonl"))[-1]
    last.write_bytes(last.read_bytes().replace(b'"norm": ', b'"norm": 1', 1))
    assert logs.read(folder).torn == (last.name,)
    log.stream(folder).close()
    assert logs.read(folder).frame.equals(whole)


KILLED = """
    import sys, time
    import djinn_nb as djinn
    server = djinn.connect(sys.argv[1])
    session = server.attach(sys.argv[2])
    log, = session.breakpoints
    stream = log.stream(sys.argv[3], release=True)
    while stream.last_seq < 3:
        stream.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_client_resumes_streaming_where_it_was(
    world: World, canary: Canary, tmp_path: Path
):
    session = world.launch(max_new_tokens=400)
    log = session.log_at([1, 4], what="tensor")
    reference = session.fork()
    with pytest.raises(errors.StillRunning):
        session.continue_(timeout=0.01)
    folder = tmp_path / "log"
    command = [sys.executable, "-c", textwrap.dedent(KILLED)]
    command += [world.process.address, session.id, str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert child.stdout is not None
    assert child.stdout.readline() == b"written\n"
    with pytest.raises(errors.BadArgument, match="being written by another stream"):
        log.stream(folder)
    child.kill()
    child.communicate()
    session.wait()
    log.stream(folder).close()
    reference.continue_()

    saved = logs.read(folder)
    (same,) = reference.breakpoints
    assert isinstance(same, logs.Logpoint)
    assert saved.frame.equals(same.frame())
    for place, found in same.tensors().items():
        np.testing.assert_array_equal(saved.tensors[place].values, found.values)


def test_a_folder_of_something_else_is_refused(
    world: World, session: djinn.Session, tmp_path: Path
):
    log, other = session.log_at(1), session.log_at(2)
    session.continue_()
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(errors.BadArgument, match=r"holds 1 other files, such as thesis\.tex"):
        log.stream(tmp_path)
    log.stream(tmp_path / "log").close()
    with pytest.raises(errors.BadArgument, match="logpoint 1 of session"):
        other.stream(tmp_path / "log")
    with pytest.raises(errors.BadArgument, match="holds no log"):
        logs.read(tmp_path)

    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["thesis.tex"]


def test_a_folder_takes_no_more_than_it_may(world: World, session: djinn.Session, tmp_path: Path):
    log = session.log_at("every layer", what="tensor")
    session.continue_()
    with pytest.raises(errors.QuotaExceeded, match="more than max_bytes=3000"):
        log.stream(tmp_path / "log", max_bytes=3000).close()

    assert sum(path.stat().st_size for path in (tmp_path / "log").iterdir()) <= 3000
    log.stream(tmp_path / "log").close()
    assert logs.read(tmp_path / "log").frame.equals(log.frame())


def test_records_that_somebody_released_are_missed_by_name(
    world: World, canary: Canary, tmp_path: Path
):
    session = world.launch(max_new_tokens=6)
    log = session.log_at(1)
    session.step_out()
    log.stream(tmp_path / "one", release=True).close()
    session.continue_()
    log.stream(tmp_path / "one", release=True).close()

    assert logs.read(tmp_path / "one").frame["forward"].max() == 5
    log.stream(tmp_path / "two").close()  # what is left of it: nothing
    with world.connect() as other:
        late = other.attach(session.id).breakpoints[0]
        assert isinstance(late, logs.Logpoint) and late.records() == []
