"""Places in a forward: every accepted spelling, the order of points, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_server.protocol.errors import NotSupported, UnknownLocation
from kernel_server.protocol.location import (
    INNER_SITES,
    NOT_STARTED,
    Location,
    final_norm_point,
    is_inner,
    known_names,
    layer_of,
    layers_begun,
    layers_executed,
    location_at,
    logits_point,
    parse_location,
    sampled_point,
    site_of,
)

LAYERS = 24

SPELLINGS = [
    (20, "layers.20.output"),
    ("20", "layers.20.output"),
    (" 20 ", "layers.20.output"),
    (-1, "layers.23.output"),
    (-24, "layers.0.output"),
    ("layers.20", "layers.20.output"),
    ("layers.20.output", "layers.20.output"),
    ("layers.-2.output", "layers.22.output"),
    ("layers.21.input", "layers.20.output"),
    ("layers.0.input", "embedding"),
    ("model.layers.20", "layers.20.output"),
    ("model.decoder.layers.20", "layers.20.output"),
    ("transformer.h.20", "layers.20.output"),
    ("h.3.output", "layers.3.output"),
    ("gpt_neox.layers.7", "layers.7.output"),
    ("embedding", "embedding"),
    ("final_norm", "final_norm"),
    ("logits", "logits"),
    # Hugging Face: the embedding first, the normed one last
    ("hidden_states[0]", "embedding"),
    ("hidden_states[21]", "layers.20.output"),
    ("hidden_states[23]", "layers.22.output"),
    ("hidden_states[24]", "final_norm"),
    ("hidden_states[-1]", "final_norm"),
    ("hidden_states[-2]", "layers.22.output"),
    ("hidden_states[-25]", "embedding"),
    # TransformerLens
    ("blocks.20.hook_resid_post", "layers.20.output"),
    ("blocks.20.hook_resid_pre", "layers.19.output"),
    ("blocks.0.hook_resid_pre", "embedding"),
    ("ln_final.hook_normalized", "final_norm"),
    ("blocks.20.hook_resid_mid", "layers.20.middle"),
    ("blocks.20.hook_attn_out", "layers.20.attention.output"),
    ("blocks.20.attn.hook_z", "layers.20.attention.heads"),
    ("blocks.20.attn.hook_rot_q", "layers.20.attention.q"),
    ("blocks.20.mlp.hook_post", "layers.20.mlp.neurons"),
    ("layers.-1.mlp.output", "layers.23.mlp.output"),
    (Location(20, "output"), "layers.20.output"),
    (Location(20, "input"), "layers.19.output"),
    (Location(None, "logits"), "logits"),
]


@pytest.mark.parametrize(("spec", "name"), SPELLINGS)
def test_a_place_is_known_under_its_names(spec, name):
    assert str(parse_location(spec, LAYERS)) == name


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (24, "24 layers, numbered 0 to 23"),
        (99, "24 layers, numbered 0 to 23"),
        (-25, "numbered 0 to 23"),
        ("layers.24.output", "numbered 0 to 23"),
        (10**30, "unknown location 'that number'"),
        ("9" * 5000, "unknown location"),
        ("layers." + "9" * 5000, "unknown location"),
        ("hidden_states[25]", "indexes 0 to 24"),
        ("hidden_states[-26]", "indexes 0 to 24"),
        ("layers.3.ouput", "did you mean 'layers.3.output'?"),
        ("embeding", "did you mean 'embedding'?"),
        ("layers.3.output.more", "unknown location"),
        ("layers.x", "unknown location"),
        ("layers.3.output\n", None),
        ("", "unknown location ''"),
        ("lm_head", "unknown location"),
        (True, "not True"),
        (None, "not None"),
        (2.0, "not 2.0"),
        (b"3", "not b'3'"),
        ([3], r"not [3]"),
    ],
)
def test_what_is_no_place_is_refused_with_the_way_to_name_one(spec, said):
    if said is None:
        assert parse_location(spec, LAYERS) == Location(3, "output")
        return
    with pytest.raises(UnknownLocation) as caught:
        parse_location(spec, LAYERS)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["blocks.3.attn.hook_q", "blocks.3.mlp.hook_pre"])
def test_another_tool_s_name_for_another_tensor_is_refused_with_what_comes_near(name):
    with pytest.raises(NotSupported, match=r"'(attention.q|mlp.neurons)'"):
        parse_location(name, LAYERS)


@pytest.mark.parametrize("num_layers", [1, 24])
def test_the_sites_of_a_layer_lie_in_order_between_its_input_and_its_output(num_layers):
    layer = num_layers - 1
    points = [
        parse_location(f"layers.{layer}.{s}", num_layers).point(num_layers) for s in INNER_SITES
    ]

    assert points == sorted(set(points))
    assert layer < points[0] and points[-1] < layer + 1
    for site, point in zip(INNER_SITES, points, strict=True):
        assert location_at(point, num_layers) == Location(layer, site)
        assert is_inner(point) and not is_inner(layer)
        assert (layer_of(point), site_of(point)) == (layer, site)
        assert layers_executed(point, num_layers) == layer
        assert layers_begun(point, num_layers) == layer + 1


@pytest.mark.parametrize("num_layers", [1, 2, 24])
def test_points_number_the_places_in_the_order_they_are_reached(num_layers):
    names = [str(location_at(point, num_layers)) for point in range(num_layers + 3)]
    layers = [f"layers.{layer}.output" for layer in range(num_layers)]

    assert names == ["embedding", *layers, "final_norm", "logits"]
    for point, name in enumerate(names):
        assert parse_location(name, num_layers).point(num_layers) == point
    assert final_norm_point(num_layers) == num_layers + 1
    assert logits_point(num_layers) == num_layers + 2
    assert sampled_point(num_layers) == num_layers + 3


@pytest.mark.parametrize("point", [-1, LAYERS + 3])
def test_no_place_lies_outside_a_forward(point):
    with pytest.raises(ValueError, match="lies outside a forward"):
        location_at(point, LAYERS)


def test_layers_executed_counts_the_layers_finished():
    finished = {
        NOT_STARTED: 0,
        0: 0,
        1: 1,
        21: 21,
        LAYERS: LAYERS,
        final_norm_point(LAYERS): LAYERS,
        logits_point(LAYERS): LAYERS,
        sampled_point(LAYERS): LAYERS,
    }

    assert {point: layers_executed(point, LAYERS) for point in finished} == finished


def test_every_name_offered_is_understood_and_says_where_it_is():
    for name in known_names(LAYERS):
        place = parse_location(name, LAYERS)

        assert parse_location(place, LAYERS) == place
        if not name.endswith(".input"):
            assert str(place) == name


@given(st.text(max_size=100) | st.integers() | st.from_regex(r"(layers|h|blocks)\.-?\d+(\.\w+)?"))
def test_anything_is_a_place_or_refused(spec):
    try:
        place = parse_location(spec, LAYERS)
    except (UnknownLocation, NotSupported) as error:
        assert error.message
        return

    assert 0 <= place.point(LAYERS) <= logits_point(LAYERS)
