"""What a stop shows and how it is edited, against the model run by stock transformers."""

from __future__ import annotations

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import client as client_module
from djinn_nb import errors
from tests.djinn_nb.conftest import HIDDEN, NUM_LAYERS, PROMPT, VOCABULARY


@pytest.fixture(scope="module")
def stock(model_folder):
    """Hidden states of the prompt, by stock transformers: `[layers + 1, tokens, hidden]`."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    ids = AutoTokenizer.from_pretrained(model_folder)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
    return torch.cat(found.hidden_states).numpy()


@pytest.fixture
def stop(session) -> djinn.Stopped:
    return session.run_to(3)


def test_hidden_states_are_those_of_stock_transformers(stop, stock):
    values = stop.hidden_states.numpy()

    assert values.shape == stop.hidden_states.shape == stock[4].shape
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, stock[4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "key",
    [
        -1,
        0,
        slice(3, 7),
        slice(None, None, -1),
        slice(1, None, 3),
        [5, 2, 2],
        np.array([True] + [False] * 4 + [True] * 3),
        (slice(3, 7), slice(None, 8)),
        (-1, 3),
        (slice(None), -1),
        (Ellipsis, slice(0, 4)),
        ([0, 1], [3, 2, 2]),
        slice(4, 4),
    ],
    ids=str,
)
def test_slices_are_numpys_and_only_they_are_fetched(stop, key):
    whole = stop.hidden_states.numpy()
    expected_key = key
    if isinstance(key, np.ndarray):
        key = np.resize(key, len(whole))
        expected_key = key
    if isinstance(key, tuple) and all(isinstance(k, list) for k in key):
        expected_key = np.ix_(*key)  # rows and channels are chosen apart

    part = stop.hidden_states[key]

    np.testing.assert_array_equal(part.numpy(), whole[expected_key])
    assert part.shape == whole[expected_key].shape


def test_slices_of_slices_and_rows_by_text(stop):
    whole = stop.hidden_states.numpy()
    texts = [token.text for token in stop.tokens]

    twice = stop.hidden_states[2:9][1:3, ::2]
    johns = stop.hidden_states[" John"]

    np.testing.assert_array_equal(twice.numpy(), whole[3:5, ::2])
    rows = [i for i, text in enumerate(texts) if text == " John"]
    assert len(rows) == 2
    np.testing.assert_array_equal(johns.numpy(), whole[rows])


def test_a_variable_becomes_a_numpy_array_and_a_number(stop):
    whole = stop.hidden_states.numpy()

    assert np.array_equal(np.asarray(stop.hidden_states), whole)
    assert float(stop.hidden_states[2, 5]) == whole[2, 5]
    assert len(stop.hidden_states) == len(stop.tokens)


def test_a_part_shows_its_own_shape_and_iterates_as_numpy_would(stop):
    row, rows = stop.hidden_states[-1], list(stop.hidden_states)

    assert f"[{HIDDEN}]" in repr(row)
    assert row.summary().shape == row.shape == row.numpy().shape
    assert "[]" in repr(row[0]) and row[0].shape == ()
    assert len(rows) == len(stop.tokens)
    assert rows[-1].shape == (HIDDEN,)


def test_in_decode_rows_are_counted_from_the_tokens_fed(session):
    session.run_to("logits")
    stop = session.run_to(2)

    assert stop.forward == 1
    assert len(stop.tokens) == 1
    assert stop.tokens[0].position == len(session.tokens) - 1
    assert stop.hidden_states.shape == (1, HIDDEN)
    np.testing.assert_array_equal(stop.hidden_states[0].numpy(), stop.hidden_states.numpy()[0])


@pytest.mark.parametrize("key", [99, -99, (0, 99), "nowhere", (0, 0, 0), 1.5, None, [[0, 1]]])
def test_a_bad_index_is_refused_by_name(stop, key):
    with pytest.raises(errors.BadSelector):
        stop.hidden_states[key].numpy()


def test_the_summary_says_what_the_values_say(stop):
    whole = stop.hidden_states.numpy()

    summary = stop.hidden_states.summary()

    assert summary.shape == whole.shape
    assert summary.dtype == stop.hidden_states.dtype == "float32"
    assert summary.minimum == whole.min()
    assert summary.maximum == whole.max()
    assert summary.norm == pytest.approx(np.linalg.norm(whole), rel=1e-5)
    assert (summary.num_nan, summary.num_inf) == (0, 0)
    np.testing.assert_allclose(summary.norm_per_token, np.linalg.norm(whole, axis=1), rtol=1e-5)
    assert repr(summary) in repr(stop.hidden_states)


def test_repr_asks_the_server_once(stop):
    calls = stop.session.client.transport.traffic["control"]
    first = repr(stop.hidden_states)
    asked = calls.calls

    assert repr(stop.hidden_states) == first
    assert repr(stop)
    assert repr(stop.session)
    assert calls.calls == asked


def test_large_tensors_come_and_go_in_chunks(server, monkeypatch):
    monkeypatch.setattr(client_module, "CHUNK_BYTES", 10_000)
    session = server.launch([1, 2, 3] * 400, max_new_tokens=1)
    stop = session.run_to(1)
    bulk = session.client.transport.traffic["bulk"]
    whole = stop.hidden_states.numpy()
    chunks_down = bulk.calls

    stop.edit(set=whole * 2)

    np.testing.assert_array_equal(stop.hidden_states.numpy(), whole * 2)
    assert chunks_down >= whole.nbytes / 10_000


def test_an_interrupted_transfer_is_cancelled_on_the_server(server, monkeypatch, eventually):
    monkeypatch.setattr(client_module, "CHUNK_BYTES", 10_000)
    stop = server.launch([1, 2, 3] * 400, max_new_tokens=1).run_to(1)
    times = []

    def interrupt(self, done, total, text=""):
        times.append(done)
        if len(times) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(client_module.Progress, "at", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stop.hidden_states.numpy()
    monkeypatch.undo()

    eventually(lambda: server.memory().loc["transfers", "bytes"] == 0)
    assert stop.hidden_states.numpy().shape == (1200, HIDDEN)


# -- edits ----------------------------------------------------------------------------------------


def test_scale_changes_the_tokens_chosen_and_says_how_much(stop):
    before = stop.hidden_states.numpy()

    edit = stop.edit(scale=0.5, tokens=-1)

    after = stop.hidden_states.numpy()
    np.testing.assert_array_equal(after[-1], before[-1] * np.float32(0.5))
    np.testing.assert_array_equal(after[:-1], before[:-1])
    assert edit.elements_changed == HIDDEN
    assert edit.norm_before == pytest.approx(np.linalg.norm(before[-1]), rel=1e-5)
    assert edit.norm_after == pytest.approx(edit.norm_before / 2, rel=1e-5)
    assert edit.tokens_matched == [len(before) - 1]


def test_add_set_and_zero_on_channels(stop):
    before = stop.hidden_states.numpy()
    vector = np.linspace(-1, 1, HIDDEN, dtype=np.float32)

    stop.edit(add=vector, alpha=2, tokens=[0, 1])
    stop.edit(set=7, tokens=2, channels=slice(0, 4))
    stop.edit(zero=True, tokens=3, channels=[0, -1])

    after = stop.hidden_states.numpy()
    np.testing.assert_allclose(after[:2], before[:2] + 2 * vector, rtol=1e-6)
    assert (after[2, :4] == 7).all()
    assert after[3, 0] == after[3, -1] == 0
    np.testing.assert_array_equal(after[2, 4:], before[2, 4:])
    np.testing.assert_array_equal(after[4:], before[4:])
    assert [edit.kind for edit in stop.session.edits] == ["add", "set", "zero"]


def test_torch_tensors_are_values_bfloat16_included(stop):
    import torch

    before = stop.hidden_states.numpy()
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16, requires_grad=True)

    stop.edit(add=ones, tokens=0)

    np.testing.assert_allclose(stop.hidden_states[0].numpy(), before[0] + 1, rtol=1e-6)


def test_a_variable_can_be_patched_into_another_session(server, stop):
    other = server.launch("Mary went to the park", max_new_tokens=2).run_to(3)

    stop.edit(set=other.hidden_states[-1], tokens=-1)

    np.testing.assert_array_equal(stop.hidden_states[-1].numpy(), other.hidden_states[-1].numpy())


def test_text_that_occurs_twice_selects_both_and_says_so(stop):
    edit = stop.edit(scale=2, tokens=" John")

    assert len(edit.tokens_matched) == 2
    assert edit.note


def test_undo_disable_enable_and_remove_are_exact_at_the_stop(stop):
    before = stop.hidden_states.numpy()
    first = stop.edit(scale=3)
    tripled = stop.hidden_states.numpy()
    stop.edit(zero=True)

    stop.undo()
    np.testing.assert_array_equal(stop.hidden_states.numpy(), tripled)
    first.disable()
    np.testing.assert_array_equal(stop.hidden_states.numpy(), before)
    first.enable()
    np.testing.assert_array_equal(stop.hidden_states.numpy(), tripled)
    first.undo()

    np.testing.assert_array_equal(stop.hidden_states.numpy(), before)
    assert stop.session.edits == []
    assert "removed" in repr(first)


def test_undoing_after_the_session_has_moved_is_refused(stop):
    edit = stop.edit(scale=2)
    stop.session.next()

    with pytest.raises(errors.UndoRefused, match="launch anew") as caught:
        edit.undo()
    assert "disable()" not in str(caught.value)  # which would be refused too
    with pytest.raises(errors.UndoRefused):
        edit.remove()


def test_what_a_stop_has_is_refused_by_name_once_the_session_is_finished(session):
    end = session.continue_()

    for name in ("edit", "lens", "hidden_states", "attention"):
        with pytest.raises(errors.NotStopped, match=rf"finished after 6 tokens.*\.{name}"):
            getattr(end, name)
    with pytest.raises(AttributeError):
        end.edti  # noqa: B018
    assert not hasattr(end, "_ipython_display_")


def test_an_edit_decides_what_is_generated(server):
    def generated(vector: object) -> list[int]:
        session = server.launch(PROMPT, max_new_tokens=4)
        stop = session.run_to(NUM_LAYERS - 1)
        if vector is not None:
            stop.edit(add=vector, alpha=50, tokens=-1)
        return session.continue_().generated_tokens

    vector = np.random.default_rng(0).standard_normal(HIDDEN)

    assert generated(None) == generated(None)
    assert generated(vector) == generated(vector)
    assert generated(vector)[0] != generated(None)[0]


def test_a_sticky_edit_steers_later_forwards_without_stopping(server):
    session = server.launch(PROMPT, max_new_tokens=5)
    edit = session.run_to(2).edit(scale=0.5, tokens="generated", sticky=True)

    session.continue_()

    assert edit.forwards_matched == 4
    assert "sticky" in repr(edit)


def test_an_edit_ahead_applies_when_its_location_is_reached(stop):
    edit = stop.edit(set=1.5, location=4)
    assert edit.elements_changed is None

    reached = stop.session.run_to(4)

    assert (reached.hidden_states.numpy() == 1.5).all()
    assert edit.elements_changed == reached.hidden_states.numpy().size


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        ({}, errors.BadEdit),
        ({"scale": 2, "zero": True}, errors.BadEdit),
        ({"zero": "yes"}, errors.BadEdit),
        ({"scale": float("nan")}, errors.BadEdit),
        ({"scale": "big"}, errors.BadEdit),
        ({"scale": [1, 2]}, errors.BadEdit),
        ({"scale": 2, "alpha": 3}, errors.BadEdit),
        ({"add": np.ones(HIDDEN + 1)}, errors.BadEdit),
        ({"add": [float("inf")] * HIDDEN}, errors.BadEdit),
        ({"add": 1, "alpha": float("nan")}, errors.BadEdit),
        ({"set": np.ones((2, HIDDEN))}, errors.BadEdit),
        ({"set": []}, errors.BadEdit),
        ({"set": [[1], [1, 2]]}, errors.BadEdit),
        ({"set": np.ones((1, 1, HIDDEN))}, errors.BadEdit),
        ({"set": 1 + 2j}, errors.BadEdit),
        ({"scale": 2, "tokens": 999}, errors.BadSelector),
        ({"scale": 2, "tokens": -999}, errors.BadSelector),
        ({"scale": 2, "tokens": []}, errors.BadSelector),
        ({"scale": 2, "tokens": 1.5}, errors.BadSelector),
        ({"scale": 2, "tokens": True}, errors.BadSelector),
        ({"scale": 2, "tokens": "zyzzyva"}, errors.BadSelector),
        ({"scale": 2, "tokens": ""}, errors.BadSelector),
        ({"scale": 2, "channels": 999}, errors.BadSelector),
        ({"scale": 2, "channels": "prompt"}, errors.BadSelector),
        ({"scale": 2, "location": 99}, errors.UnknownLocation),
        ({"scale": 2, "location": 1}, errors.RequestError),
    ],
    ids=str,
)
def test_a_bad_edit_is_refused_in_one_line_and_changes_nothing(stop, wishes, error):
    before = stop.hidden_states.numpy()

    with pytest.raises(error) as caught:
        stop.edit(**wishes)

    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(stop.hidden_states.numpy(), before)
    assert stop.session.edits == []


# -- lens and capture ---------------------------------------------------------------------------


def test_the_lens_is_final_norm_and_head_of_the_stream(stop, model_folder):
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        stream = torch.tensor(stop.hidden_states[-1].numpy())
        expected = model.lm_head(model.model.norm(stream)).softmax(-1).topk(5)

    found = stop.lens(top_k=5)

    assert found.token_id.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(found.probability, expected.values, rtol=1e-4)
    assert found.text.tolist() == stop.session.client.token_texts(found.token_id)
    assert set(found.position) == {len(stop.tokens) - 1}
    assert found["rank"].tolist() == [1, 2, 3, 4, 5]


def test_the_lens_over_layers_reads_the_points_reached(stop):
    every = stop.lens(layers="all", top_k=1)
    chosen = stop.lens(layers=["embedding", 2 - NUM_LAYERS], top_k=2)

    names = ["embedding", *(f"layers.{i}.output" for i in range(4))]
    assert every.location.tolist() == names
    assert chosen.location.tolist() == ["embedding"] * 2 + ["layers.2.output"] * 2
    assert stop.lens(tokens="prompt", top_k=1).position.tolist() == list(range(len(stop.tokens)))
    with pytest.raises(errors.RequestError, match="has not run"):
        stop.lens(layers=[-1])  # the last layer, as everywhere


@pytest.mark.parametrize(
    "wishes", [{"top_k": 0}, {"top_k": "x"}, {"layers": "some"}, {"layers": [0], "tokens": 0},
               {"layers": [99]}, {"layers": ["final_norm"]}, {"tokens": 999}, {"layers": ["a"]}],
    ids=str,
)  # fmt: skip
def test_a_bad_lens_is_refused(stop, wishes):
    with pytest.raises(errors.RequestError):
        stop.lens(**wishes)


def test_the_lens_at_logits_is_the_distribution_sampled_from(session):
    stop = session.step_out()

    found = stop.lens(top_k=VOCABULARY)

    assert found.probability.sum() == pytest.approx(1, abs=1e-4)
    assert found.token_id[0] == int(stop.value.numpy().argmax())


def test_capture_holds_the_norms_of_all_layers_run(stop, stock):
    capture = stop.capture()

    assert capture.norm.shape == (5, len(stop.tokens))
    np.testing.assert_allclose(
        capture.norm.to_numpy(), np.linalg.norm(stock[:5], axis=2), rtol=1e-4
    )
    np.testing.assert_allclose(capture.largest.to_numpy(), np.abs(stock[:5]).max(2), rtol=1e-4)
    assert capture.num_nan.sum() == 0


# -- breakpoints --------------------------------------------------------------------------------


def test_a_condition_stops_at_the_tokens_that_hold(session):
    session.break_at(2, condition='token == " John"')

    stop = session.continue_()

    assert [token.text for token in stop.tokens if token.position in stop.hit_tokens] == [
        " John",
        " John",
    ]


def test_breakpoints_are_counted_ignored_disabled_and_removed(server):
    session = server.launch(PROMPT, max_new_tokens=6)
    point = session.break_at(1, when="decode", ignore=2)
    other = session.break_at("logits", once=True)

    assert session.continue_().location == "logits"
    third = session.continue_()
    assert (third.location, third.forward) == ("layers.1.output", 3)
    assert third.hit_breakpoints == [point.id]
    assert (point.hits, point.stops) == (3, 1)
    assert not other.enabled
    point.disable()
    assert not point.enabled
    point.enable()
    assert session.continue_().forward == 4
    point.remove()

    assert [p.id for p in session.breakpoints] == [other.id]
    assert "removed" in repr(point)
    with pytest.raises(errors.UnknownBreakpoint):
        point.remove()
    assert isinstance(session.continue_(), djinn.Finished)
