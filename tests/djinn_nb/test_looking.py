"""Looking further than a stop's own value: previews, attention, attribution, values anywhere."""

from __future__ import annotations

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors, metrics
from djinn_nb.looking import choices
from djinn_nb.previews import below, probability_text
from djinn_nb.variables import Summary
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from tests.djinn_nb.conftest import HIDDEN, NUM_LAYERS, PROMPT, VOCABULARY

HEADS, WIDTH = 4, HIDDEN // 4
VECTOR = np.linspace(-1, 1, HIDDEN, dtype=np.float32)
#: edits at layers.2.output: here, ahead, inside layers, of the next token, sticky
EDITS = {
    "here": {"scale": 0.5, "tokens": -1},
    "ahead": {"add": VECTOR, "alpha": 4, "location": 4},
    "a head": {"zero": True, "location": "layers.3.attention.heads", "heads": [0, 2]},
    "weights": {"scale": 2, "location": "layers.4.attention.pattern", "heads": 1, "tokens": -1},
    "neurons": {"mean": True, "location": "layers.5.mlp.neurons", "channels": slice(0, 32)},
    "sticky": {"add": VECTOR, "sticky": True, "tokens": "all"},
    "the next token": {"force": " Mary"},
}


@pytest.fixture(scope="module")
def stock(model_folder):
    """The model by stock transformers, with eager attention."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(model_folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def prompt_ids(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)(PROMPT, return_tensors="pt").input_ids


@pytest.fixture
def stop(session) -> djinn.Stopped:
    return session.run_to(2)


# -- previews -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITS)
def test_a_preview_is_what_follows_bit_for_bit(stop, name):
    plain = stop.session.fork().step_out().value.numpy()[0]

    found = stop.preview(**EDITS[name])
    before, after = found.logits_before, found.logits_after
    edit = stop.edit(**EDITS[name])
    follows = stop.session.step_out().value.numpy()[0]

    np.testing.assert_array_equal(before, plain)
    np.testing.assert_array_equal(after, follows)
    assert not np.array_equal(after, before)
    assert found.elements_changed == edit.elements_changed > 0


def test_in_decode_too_with_the_sessions_own_sticky_edits(session):
    session.run_to(1).edit(add=VECTOR, sticky=True)
    session.run_to("logits")
    stop = session.run_to(3)
    assert stop.forward == 1

    found = stop.preview(zero=True, channels=slice(0, 8))
    after, before = found.logits_after, found.logits_before
    plain = session.fork()
    np.testing.assert_array_equal(plain.step_out().value.numpy()[0], before)
    stop.edit(zero=True, channels=slice(0, 8))

    np.testing.assert_array_equal(session.step_out().value.numpy()[0], after)


def test_previewing_changes_nothing(stop):
    session = stop.session
    point = session.break_at(4)
    sampled = session.break_at("logits", condition="hits > 0")
    before, values = session.refresh(), stop.value.numpy()

    stop.preview(zero=True)
    stop.preview(force=" Mary", metric=metrics.Probability(" Mary"))
    after = session.refresh()

    assert after == before  # the revision and the number of the last event included
    assert (point.hits, sampled.hits, session.edits) == (0, 0, [])
    np.testing.assert_array_equal(stop.value.numpy(), values)


def test_a_probability_that_is_not_known_is_below_what_is(stop):
    found = stop.preview(force=" Mary", top_k=1)

    [forced, first] = found._rows()
    floor = found.before.probability.iloc[-1]
    assert forced == ("·Mary", below(floor), "1.000")
    assert float(below(floor)[1:]) >= floor
    assert first[2] == "<1.000"  # of the other arm only the first was asked for


@pytest.mark.parametrize(
    ("bound", "said"), [(0.0, "<0.001"), (1e-7, "<0.001"), (0.001, "<0.001"), (0.0123, "<0.013")]
)
def test_no_probability_is_said_to_be_below_nothing(bound, said):
    assert below(bound) == said
    assert probability_text(0.0004) == "<0.001" and probability_text(0.0005) == "0.001"


def test_a_preview_shows_both_distributions_and_what_changed(stop):
    found = stop.preview(scale=0.5, tokens=-1, top_k=VOCABULARY)

    for table, logits in ((found.before, found.logits_before), (found.after, found.logits_after)):
        expected = np.exp(metrics.log_softmax(logits))
        assert list(table.columns) == ["text", "token_id", "probability"]
        np.testing.assert_allclose(table.probability, expected[table.token_id], rtol=1e-4)
        assert table.probability.is_monotonic_decreasing
    first, second = (metrics.log_softmax(row) for row in (found.logits_before, found.logits_after))
    assert found.kl == pytest.approx((np.exp(second) * (second - first)).sum(), rel=1e-3)
    assert found.elements_changed == HIDDEN
    assert set(found.frame.token_id) == set(range(VOCABULARY))


def test_a_preview_says_the_metric_before_and_after(stop):
    wanted = [metrics.LogitDifference(" Mary", " John"), metrics.Rank(" Mary")]

    found = stop.preview(force=" Mary", metric=wanted)
    one = stop.preview(force=" Mary", metric=wanted[1]).metric

    difference, rank = found.metrics
    mary, john = (stop.session.client.token_texts(range(VOCABULARY)).index(t)
                  for t in (" Mary", " John"))  # fmt: skip
    before = found.logits_before.astype(float)
    assert difference.before == pytest.approx(before[mary] - before[john])
    assert difference.change == difference.after - difference.before > 0
    assert (one.after, one.before) == (rank.after, rank.before) == (1, one.before)
    assert f"{difference.before:.4g} →" in repr(found)
    with pytest.raises(errors.BadArgument, match="2 metrics"):
        found.metric  # noqa: B018


def test_an_edit_that_changes_nothing_says_so(stop):
    found = stop.preview(scale=1.0)

    assert "changes nothing" in repr(found)
    assert (found.elements_changed, found.kl) == (0, 0)
    np.testing.assert_array_equal(found.logits_before, found.logits_after)


def test_several_edits_are_previewed_together(stop):
    edits = [EDITS["here"], EDITS["a head"]]

    found = stop.preview(*edits)
    after = found.logits_after
    for edit in edits:
        stop.edit(**edit)

    assert len(found.changed_by_edit) == 2
    np.testing.assert_array_equal(stop.session.step_out().value.numpy()[0], after)


def test_a_preview_brings_little_until_logits_are_asked_for(stop):
    traffic = stop.session.client.transport.traffic["control"]
    before = traffic.bytes_received

    found = stop.preview(scale=0.5)
    brought = traffic.bytes_received - before
    found.logits_after  # noqa: B018
    both = traffic.bytes_received - before - brought
    found.logits_before  # noqa: B018

    assert brought < 3000
    assert both > 2 * 4 * VOCABULARY
    assert traffic.bytes_received - before == brought + both


def test_a_large_value_is_sent_in_chunks_and_leaves_no_transfer(server, monkeypatch, eventually):
    from djinn_nb import edits

    monkeypatch.setattr(edits, "CHUNK_BYTES", 1000)
    stop = server.launch(PROMPT, max_new_tokens=1).run_to(2)
    values = stop.value.numpy() * 2

    found = stop.preview(set=values)
    doubled = stop.preview(scale=2)

    np.testing.assert_array_equal(found.logits_after, doubled.logits_after)
    eventually(lambda: server.memory().loc["transfers", "bytes"] == 0)


def test_logits_of_a_stop_that_has_passed_are_refused(stop):
    found = stop.preview(scale=0.5)
    stop.session.next()

    with pytest.raises(errors.StaleStop):
        found.logits_after  # noqa: B018
    assert len(found.after) == 10


def test_logits_of_before_an_edit_are_refused_after_it(stop):
    found = stop.preview(scale=0.5)
    stop.edit(zero=True, tokens=0)

    with pytest.raises(errors.StaleStop, match="edited after this preview"):
        found.logits_before  # noqa: B018


# -- attention ------------------------------------------------------------------------------------


def test_attention_is_that_of_stock_transformers_at_every_layer(stop, stock, prompt_ids):
    import torch

    with torch.no_grad():
        expected = torch.cat(stock(prompt_ids, output_attentions=True).attentions).numpy()

    for layer in (0, 2, NUM_LAYERS - 1):  # before, at and after the stop
        found = stop.attention(layer)

        assert found.weights.shape == (len(stop.tokens), HEADS, len(stop.tokens))
        np.testing.assert_allclose(found.weights, expected[layer].transpose(1, 0, 2), atol=1e-5)
        np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-5)


def test_attention_of_a_head_and_a_token(session):
    stop = session.run_to("layers.3.mlp.neurons")
    every = stop.attention()

    found = stop.attention(head=[1, 3], tokens=[0, -1])
    table = found.frame(3)

    assert (found.layer, found.heads) == (3, [1, 3])
    assert found.positions == [0, len(stop.tokens) - 1]
    np.testing.assert_array_equal(found.weights, every.weights[[0, -1]][:, [1, 3]])
    np.testing.assert_array_equal(table.to_numpy(), found.weights[:, 1])
    assert table.columns[1] == (1, stop.tokens[1].text)
    assert "scratch fork" in repr(found)
    with pytest.raises(errors.BadArgument, match="head 0 is not among"):
        found.frame(0)


def test_attention_in_decode_sees_every_key(session):
    session.run_to("logits")
    stop = session.run_to(1)

    found = stop.attention()

    assert found.weights.shape == (1, HEADS, len(session.tokens))
    assert found.layer == 1
    assert (found.weights > 0).all()


def test_an_edit_of_this_forward_is_in_what_is_recomputed(stop):
    before = stop.attention(4).weights

    stop.edit(scale=-3, tokens=0)

    assert np.abs(stop.attention(4).weights - before).max() > 1e-3
    np.testing.assert_array_equal(stop.attention(1).weights.shape, before.shape)


# -- attribution ----------------------------------------------------------------------------------


def test_the_parts_sum_to_the_logit_and_are_what_norm_and_head_make_of_them(stop, stock):
    session = stop.session
    found = stop.attribution(" Mary")
    sites = ["embedding", "layers.1.mlp.output", "layers.3.attention.output"]
    values = session.capture([*sites, NUM_LAYERS - 1], what="tensor", tokens=-1)
    logits = session.fork().step_out().value.numpy()[0]

    assert found.text == " Mary"
    assert found.logit == pytest.approx(logits[found.token_id], abs=1e-5)
    assert abs(found.rest) <= 1e-3
    assert found.total == pytest.approx(found.frame.value.sum())
    stream = values[NUM_LAYERS - 1][0].astype(float)
    scale = 1 / np.sqrt((stream**2).mean() + stock.config.rms_norm_eps)
    gamma = stock.model.norm.weight.detach().numpy()
    row = stock.lm_head.weight.detach().numpy()[found.token_id]
    by_hand = {name: float((values[name][0] * scale * gamma * row).sum()) for name in sites}
    layers, frame = found.by_layer(), found.frame
    assert frame.value[frame.kind == "embedding"].item() == pytest.approx(
        by_hand["embedding"], abs=1e-4
    )
    assert layers.loc[1, "mlp"] == pytest.approx(by_hand[sites[1]], abs=1e-4)
    assert layers.loc[3, "attention"] == pytest.approx(by_hand[sites[2]], abs=1e-4)
    assert layers.total.sum() + by_hand["embedding"] == pytest.approx(found.logit, abs=2e-3)


def test_a_slight_edit_between_the_parts_is_told_too(stop):
    plain = repr(stop.attribution(" Mary"))
    stop.edit(scale=1.02, tokens=-1)
    found = stop.attribution(" Mary")

    assert "not the whole logit" not in plain
    assert 2e-3 < abs(found.rest) / np.abs(found.frame.value).max() < 0.05
    assert "not the whole logit" in repr(found)


def test_the_default_is_the_largest_logit_and_tables_agree(stop):
    found = stop.attribution()

    logits = stop.session.fork().step_out().value.numpy()[0]
    assert found.token_id == int(logits.argmax())
    assert found.heads.shape == (NUM_LAYERS, HEADS)
    frame = found.frame
    assert len(frame) == 2 + NUM_LAYERS * (HEADS + 2)
    assert found.heads.to_numpy().sum() == pytest.approx(frame.value[frame.kind == "head"].sum())
    assert abs(found.top(1).value[0]) == frame.value.abs().max()
    assert len(found.top(3)) == 3


def test_against_another_token_every_part_is_a_difference(stop):
    mary, john = stop.attribution(" Mary"), stop.attribution(" John")

    found = stop.attribution(" Mary", against=john.token_id)

    assert found.logit == pytest.approx(mary.logit - john.logit)
    np.testing.assert_allclose(found.frame.value, mary.frame.value - john.frame.value, atol=1e-6)
    assert "minus that of ' John'" in repr(found)
    with pytest.raises(errors.BadArgument, match="the same token"):
        stop.attribution(" Mary", against=" Mary")


# -- values anywhere ------------------------------------------------------------------------------


def test_a_capture_is_what_stops_there_would_show(server):
    session, other = (server.launch(PROMPT, max_new_tokens=2) for _ in range(2))
    stop = session.run_to("layers.2.mlp.neurons")
    places = ["embedding", "layers.1.attention.heads", 3, "logits"]

    found = session.capture(places, what="tensor")
    summaries = session.capture(places)

    assert list(found) == ["embedding", "layers.1.attention.heads", "layers.3.output", "logits"]
    for place in places:
        there = other.run_to(place).value
        np.testing.assert_allclose(found[place], there.numpy(), atol=1e-5)
        assert isinstance(summaries[place], Summary)
        assert summaries[place].shape == found[place].shape == there.shape
        assert summaries[place].norm == pytest.approx(there.summary().norm, rel=1e-5)
    np.testing.assert_allclose(found.frame().norm, summaries.frame().norm, rtol=1e-4)
    last = len(stop.tokens) - 1
    assert found.frame().position.tolist() == [*range(last + 1)] * 3 + [last]
    assert "scratch fork" in repr(found)
    assert "hidden_states[4]" in found
    with pytest.raises(errors.UnknownLocation, match="was not captured"):
        found["layers.0.middle"]


def test_a_capture_of_some_tokens(stop):
    found = stop.session.capture("layers.4.attention.q", what="tensor", tokens=" John")

    johns = [token.position for token in stop.tokens if token.text == " John"]
    assert found.positions == johns
    assert found["layers.4.attention.q"].shape == (2, HEADS, WIDTH)


# -- the lens anywhere ----------------------------------------------------------------------------


def test_the_lens_anywhere_reads_what_it_reads_at_stops_there(server):
    session, other = (server.launch(PROMPT, max_new_tokens=2) for _ in range(2))
    session.run_to(3).edit(scale=0.5, tokens=2)
    other.run_to(3).edit(scale=0.5, tokens=2)
    places = ["final_norm", 1, "layers.3.output", "layers.4.middle"]  # in the order asked for

    table = session.lens(places, tokens=[0, 2, -1], top_k=3)

    names = ["final_norm", "layers.1.output", "layers.3.output", "layers.4.middle"]
    count = len(session.tokens)
    assert table.location.unique().tolist() == names
    assert table.position.unique().tolist() == [0, 2, count - 1]
    assert len(table) == 4 * 3 * 3 and list(table["rank"][:4]) == [1, 2, 3, 1]
    for name in ("layers.3.output", "layers.4.middle", "final_norm"):
        there = other.stop if other.location == name else other.run_to(name)
        expected = there.lens(top_k=3, tokens=[0, 2, -1])
        found = table[table.location == name].reset_index(drop=True)
        assert found.token_id.tolist() == expected.token_id.tolist()
        assert found.text.tolist() == expected.text.tolist()
        np.testing.assert_allclose(found.probability, expected.probability, rtol=1e-4)
        np.testing.assert_allclose(found.entropy_nats, expected.entropy_nats, rtol=1e-4)


def test_the_lens_of_all_tokens_of_a_forward_in_chunks(stop):
    table = stop.session.lens(range(3))
    here = stop.lens(top_k=1, tokens="all")

    mine = table[table.location == "layers.2.output"]
    assert mine.position.tolist() == here.position.tolist() == list(range(len(stop.tokens)))
    assert mine.token_id.tolist() == here.token_id.tolist()
    assert stop.session.lens(2, tokens=" John").position.nunique() == 2


def test_the_lens_of_too_many_places_is_refused_with_the_limit(server):
    session = server.launch([3] * 1500, max_new_tokens=2)
    session.run_to(2)

    with pytest.raises(errors.QuotaExceeded, match=r"1500 tokens at 3 locations .* limit is 4,096"):
        session.lens(range(3))
    with pytest.raises(errors.BadArgument, match="at least one location to read"):
        session.lens([])
    with pytest.raises(errors.NotSupported, match=r"attention\.q is none"):
        session.lens("layers.1.attention.q")
    assert len(session.lens(range(2))) == 3000


def test_a_model_without_experts_has_no_router(stop):
    with pytest.raises(errors.NotSupported, match=r"layer 2 of this .* model has no router"):
        stop.router()


def test_a_routers_choices_are_listed_first_choice_first():
    reply = m.RouterReply(
        first_token=7,
        experts=Array.from_numpy(np.array([[4, 1], [0, 3]])),
        weights=Array.from_numpy(np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)),
        logits=Array.from_numpy(np.zeros((2, 5), np.float32)),
    )

    table = choices(reply, [" a", " b"])

    assert table.position.tolist() == [7, 7, 8, 8]
    assert table.token.tolist() == [" a", " a", " b", " b"]
    assert table["rank"].tolist() == [1, 2, 1, 2]
    assert table.expert.tolist() == [1, 4, 0, 3]
    assert table.weight.tolist() == [0.75, 0.25, 0.5, 0.5]


# -- how they show themselves ---------------------------------------------------------------------


def test_an_edit_inside_a_layer_says_how_the_layer_runs_and_the_stop_is_shown_anew(session):
    stop = session.run_to("layers.2.attention.heads")
    stop.view()
    before = f"norm {stop.value.summary().norm:.4g}"
    assert before in repr(stop)

    edit = stop.edit(zero=True, heads=1)

    assert "layer 2 runs by the replay path" in repr(edit)
    assert before not in repr(stop)  # known only for the value before the edit
    assert f"norm {stop.value.summary().norm:.4g}" in stop._repr_html_()
    assert "replay path" not in repr(stop.edit(scale=2, location=3))


def test_a_headline_names_arrays_by_their_shape(stop):
    shown = [repr(stop.preview(add=one)) for one in (VECTOR, stop.value[-1])]

    assert f"add=ndarray [{HIDDEN}]" in shown[0]
    assert "add=a value of layers.2.output" in shown[1]


def test_what_was_found_shows_itself_without_scripts(stop):
    found = [
        stop.preview(scale=0.5, metric=metrics.Probability(" Mary")),
        stop.attention(1),
        stop.attribution(" Mary", against=" John"),
        stop.session.capture([1, "layers.3.middle"]),
    ]

    for one in found:
        html = one._repr_html_()
        assert "<script" not in html and "http" not in html
        assert html.startswith("<div role='region' aria-label='") and html.endswith("</div>")
    assert all(one.plot().axes for one in found[:3])
    assert len(found[1].plot().axes) == HEADS + 1  # and the colour bar
    assert len(found[1].plot(head=2).axes) == 2
