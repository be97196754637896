"""Stopping inside a layer: the client's tensors with heads, against stock transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors, sites
from kernel_server.protocol import messages as m
from kernel_server.protocol.location import INNER_SITES
from tests.djinn_nb.conftest import HIDDEN, NUM_LAYERS, PROMPT
from tests.djinn_nb.test_display import MODEL

HEADS, WIDTH = 4, HIDDEN // 4


@pytest.fixture(scope="module")
def attentions(model_folder):
    """Attention weights of the prompt by stock transformers: `[layers, heads, tokens, keys]`."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(model_folder, attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(model_folder)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model(ids, output_attentions=True)
    return torch.cat(found.attentions).numpy()


@pytest.fixture
def stop(session) -> djinn.Stopped:
    return session.run_to("layers.2.attention.heads")


@pytest.mark.parametrize(
    "key",
    [
        -1,
        (-1, 2),
        (slice(3, 7), [3, 0, 0]),
        (slice(None), 1, slice(0, 4)),
        (Ellipsis, -1),
        (0, Ellipsis, slice(5, 1, -2)),
        (2, 3, 4),
        (slice(None), slice(2, 2)),
    ],
    ids=str,
)
def test_a_tensor_with_heads_is_indexed_as_numpy_would(stop, key):
    whole = stop.value.numpy()
    assert whole.shape == stop.value.shape == (len(stop.tokens), HEADS, WIDTH)

    part = stop.value[key]

    np.testing.assert_array_equal(part.numpy(), whole[key])
    assert part.shape == whole[key].shape


def test_rows_heads_and_channels_are_chosen_apart_and_by_text(stop):
    whole = stop.value.numpy()
    johns = [token.position for token in stop.tokens if token.text == " John"]

    part = stop.value[" John"][:, [2, 0]][..., 1:3]

    np.testing.assert_array_equal(part.numpy(), whole[np.ix_(johns, [2, 0], [1, 2])])
    assert part.summary().shape == (2, 2, 2)


def test_only_what_is_chosen_is_fetched(stop):
    stop.value.summary()
    traffic = stop.session.client.transport.traffic["control"]
    before = traffic.bytes_received

    stop.value[-1, 2].numpy()

    assert traffic.bytes_received - before < 600  # 8 numbers; the whole tensor is 1,792 bytes


def test_a_bad_index_names_its_axis(stop):
    for key, axis in ((99, "token"), ((0, 9), "head"), ((0, 0, 99), "channel")):
        with pytest.raises(errors.BadSelector, match=f"{axis} .*{axis}s"):
            stop.value[key].numpy()
    with pytest.raises(errors.BadSelector, match="4 indexes for a tensor of 3 dimensions"):
        stop.value[0, 0, 0, 0]


def test_the_attention_weights_are_those_of_stock_transformers(session, attentions):
    stop = session.run_to("layers.3.attention.pattern")

    weights = stop.value.numpy()

    assert weights.shape == (len(stop.tokens), HEADS, len(stop.tokens))
    np.testing.assert_allclose(weights, attentions[3].transpose(1, 0, 2), atol=1e-5)
    with pytest.raises(errors.BadSelector, match="key 99 lies outside"):
        stop.value[0, 0, 99]


def test_hidden_states_are_refused_where_the_tensor_is_another(session):
    for location in ("layers.1.attention.q", "layers.1.mlp.neurons", "layers.1.mlp.output"):
        stop = session.run_to(location)
        with pytest.raises(errors.NotSupported, match=r"stop.value; session.run_to\('layers.1.out"):
            stop.hidden_states  # noqa: B018
    assert session.run_to("layers.2.middle").hidden_states.shape == (len(stop.tokens), HIDDEN)


def test_stepping_in_goes_through_every_site_of_a_layer(session):
    session.run_to(1)
    found = [session.step_in() for _ in range(len(INNER_SITES) + 1)]

    assert [stop.location for stop in found] == [
        f"layers.2.{site}" for site in (*INNER_SITES, "output")
    ]
    assert [stop.layers_executed for stop in found] == [2] * len(INNER_SITES) + [3]
    assert session.newest.layers_replayed > 0


def test_a_site_that_a_model_has_not_is_no_location_and_says_why():
    heads = m.SiteLayout(site="attention.heads", heads=4, width=8)
    model = replace(MODEL, num_layers=2, sites=((heads,), ()), sites_off={"middle": "parallel"})

    table = sites.frame(model)

    assert sites.locations(model) == [
        "embedding", "layers.0.input", "layers.0.attention.heads", "layers.0.output",
        "layers.1.input", "layers.1.output", "final_norm", "logits",
    ]  # fmt: skip
    assert table.loc[(0, "middle"), "off"] == "parallel"
    assert table.loc[(0, "attention.heads"), "off"] == ""
    assert table.loc[(1, "attention.heads"), "off"] == "its layers show no such tensor"


def test_the_model_says_which_sites_it_has(server):
    table = server.model.sites

    assert table.loc[(0, "attention.k"), "heads"] == 2
    assert table.loc[(5, "attention.pattern"), "width"] == "keys"
    assert (table.off == "").all()
    assert len(table) == NUM_LAYERS * len(INNER_SITES)
    assert "layers.3.attention.pattern" in server.model.locations
