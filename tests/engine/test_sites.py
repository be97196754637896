"""Stops inside a layer: what has run there, that going on changes no bit, and that edits arrive."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kernel_server.engine import segments as segments_module
from kernel_server.engine.attention import PagedAttentionRoute
from kernel_server.engine.segments import ForwardState
from kernel_server.models.resumable import ResumableModel
from kernel_server.protocol.errors import NotSupported, OutOfDeviceMemory
from kernel_server.protocol.location import INNER_SITES, inner_point
from tests.engine.bookkeeper import Books, Session
from tests.models import tiny

torch.set_num_threads(1)

CHUNK, PROMPT = 6, 15  # two and a half chunks
FAMILIES = [
    *tiny.REQUIRED,
    *("qwen3-sliding", "gpt_oss", "phi3-longrope", "qwen2_moe", "qwen3_moe", "olmo2", "granite"),
    *("smollm3", "starcoder2", "cohere", "cohere2", "glm4", "phi", "gpt_bigcode", "deepseek_v3"),
    *("jetmoe", "exaone4", "bitnet", "biogpt", "bert-decoder"),
]


def resumable(name: str, dtype: torch.dtype = torch.float32) -> ResumableModel:
    return ResumableModel(tiny.family(name, dtype), PagedAttentionRoute())


@pytest.fixture(scope="module")
def llama() -> ResumableModel:
    return resumable("llama")


def stopped(books: Books, prompt: list[int], forward: int, point: float) -> Session:
    """A session that stands at `point` of this forward."""
    session = books.generate(books.launch(prompt), forward)
    assert not books.run(session, until=point)
    assert session.forward.point == point
    return session


def put(books: Books, session: Session, change: Callable[[Tensor], Tensor]) -> None:
    value = books.segments.value(session.forward)
    books.segments.set_value(session.forward, [change(chunk) for chunk in value])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stop_at_any_site_and_a_copy_put_there_change_no_bit(name: str) -> None:
    model = resumable(name)
    books, prompt = Books(model, chunk=CHUNK), model.sample_ids(PROMPT)
    reference = books.generate(books.launch(prompt), 2)
    different = []
    for site in INNER_SITES:
        for layer in (0, 3):
            if site not in model.sites[layer].layouts:
                continue
            for forward in (0, 1):
                session = stopped(books, prompt, forward, inner_point(layer, site))
                child = books.fork(session)
                session.forward.drop_cache()
                books.run(session)
                if site != "attention.pattern":
                    put(books, child, torch.clone)
                books.run(child)
                for one in (session, child):
                    if not torch.equal(one.logits[forward], reference.logits[forward]):
                        different.append((site, layer, forward))
                    books.drop(one)

    assert different == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "gpt_oss"])
def test_stops_inside_layers_change_no_bit_in_bf16(name: str) -> None:
    model = resumable(name, torch.bfloat16)
    books, prompt = Books(model, chunk=CHUNK), model.sample_ids(PROMPT)
    reference = books.generate(books.launch(prompt), 2)
    for site in model.sites[2].layouts:
        session = stopped(books, prompt, 1, inner_point(2, site))
        books.move(session)
        if site != "attention.pattern":
            put(books, session, torch.clone)
        books.run(session)

        assert torch.equal(session.logits[1], reference.logits[1]), site
        books.drop(session)


LACKS = {
    "mixtral": {"mlp.neurons": "mixture of experts"},
    "gpt_neox": {"middle": "does not read"},
    "phi": {"middle": "does not read"},
    "cohere2": {"middle": "does not read"},
    "bert-decoder": dict.fromkeys(
        ("attention.output", "middle", "mlp.neurons", "mlp.output"), "normed"
    ),
}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "olmo2", "glm4", *LACKS])
def test_a_family_has_the_sites_its_structure_allows(name: str) -> None:
    model, lacks = resumable(name), LACKS.get(name, {})

    for sites in model.sites:
        assert list(sites.layouts) == [s for s in INNER_SITES if s in sites.layouts]
        assert set(sites.layouts) == set(INNER_SITES) - set(lacks)
        assert all(reason in sites.off[site] for site, reason in lacks.items())


def test_neurons_are_there_in_dense_layers_alone() -> None:
    sites = resumable("deepseek_v3").sites

    assert ["mlp.neurons" in layer.layouts for layer in sites] == [True] * 2 + [False] * 4


def test_layouts_name_heads_and_widths(llama: ResumableModel) -> None:
    layouts = llama.sites[0].layouts
    shapes = {site: (layout.heads, layout.width) for site, layout in layouts.items()}

    assert shapes == {
        "attention.q": (4, 16),
        "attention.k": (2, 16),
        "attention.v": (2, 16),
        "attention.pattern": (4, 0),
        "attention.heads": (4, 16),
        "attention.output": (None, 64),
        "middle": (None, 64),
        "mlp.neurons": (None, 96),
        "mlp.output": (None, 64),
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere2", "bitnet", "jetmoe"])
def test_the_output_projection_maps_heads_to_what_attention_adds(name: str) -> None:
    model = resumable(name)
    projection = model.sites[1].output_projection
    if name in ("bitnet", "jetmoe"):  # a norm, and a mixture of experts, stand between
        assert projection is None
        return
    books, prompt = Books(model, chunk=CHUNK), model.sample_ids(PROMPT)
    parts = []
    for site in ("attention.heads", "attention.output"):
        session = stopped(books, prompt, 1, inner_point(1, site))
        parts.append(books.segments.value(session.forward)[0][0, 0])
    with torch.no_grad():
        mapped = projection.matrix @ parts[0]
        if projection.bias is not None:
            mapped = mapped + projection.bias

    torch.testing.assert_close(mapped, parts[1], atol=1e-5, rtol=1e-4)


# -- nothing runs past a stop ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "site", "ran", "not_yet"),
    [
        ("llama", "attention.q", "self_attn.q_proj", "self_attn.o_proj"),
        ("llama", "attention.heads", "self_attn.v_proj", "self_attn.o_proj"),
        ("llama", "attention.output", "self_attn.o_proj", "post_attention_layernorm"),
        ("llama", "middle", "self_attn", "post_attention_layernorm"),
        ("llama", "mlp.neurons", "mlp.act_fn", "mlp.down_proj"),
        ("gemma2", "attention.output", "post_attention_layernorm", "pre_feedforward_layernorm"),
        ("gemma2", "mlp.output", "post_feedforward_layernorm", None),
        ("gpt_neox", "attention.output", "attention.query_key_value", "mlp"),
        ("phi", "attention.output", "self_attn.q_proj", "mlp"),
        ("cohere", "attention.output", "self_attn.q_proj", "mlp"),
        ("gpt2", "mlp.neurons", "mlp.act", "mlp.c_proj"),
    ],
)
@pytest.mark.parametrize("tokens", [4, PROMPT], ids=["one pass", "chunks"])
def test_of_the_layer_only_what_precedes_the_site_has_run(
    name: str, site: str, ran: str, not_yet: str | None, tokens: int
) -> None:
    model = resumable(name)
    fired: list[str] = []
    layers = dict(enumerate(model.layers))
    for index, layer in layers.items():
        layer.register_forward_hook(lambda *_, index=index: fired.append(str(index)))
    for path in filter(None, (ran, not_yet)):
        module = layers[2].get_submodule(path)
        module.register_forward_hook(lambda *_, path=path: fired.append(path))
    books = Books(model, chunk=CHUNK)
    stopped(books, model.sample_ids(tokens), 0, inner_point(2, site))

    assert ran in fired
    assert not_yet not in fired
    assert {name for name in fired if name.isdigit()} == {"0", "1"}


def test_points_inside_layers_are_announced_once_and_in_order(llama: ResumableModel) -> None:
    books = Books(llama, chunk=CHUNK)
    visits = [inner_point(1, "attention.k"), inner_point(1, "middle"), inner_point(4, "mlp.output")]
    for tokens in (4, PROMPT):
        session = books.launch(llama.sample_ids(tokens))
        state = session.forward = books.segments.begin(session.tokens, 0)
        books._own(session)
        seen: list[float] = []

        def note(point: float, state: ForwardState, seen: list[float] = seen) -> bool:
            seen.append(point)
            assert point == books.last or len(books.segments.value(state)) == len(state.bounds)
            return False

        books.segments.advance(state, visits[1], session.tables, note, visits)
        books.segments.advance(state, books.last, session.tables, note, visits)

        assert seen == sorted([*range(books.last + 1), *visits])
        assert state.layer_runs == llama.num_layers + 3


def test_a_stop_from_on_point_inside_a_layer_is_the_same_state(llama: ResumableModel) -> None:
    books, point = Books(llama, chunk=CHUNK), inner_point(2, "mlp.neurons")
    for tokens in (4, PROMPT):
        prompt = llama.sample_ids(tokens)
        asked = stopped(books, prompt, 0, point).forward
        session = books.launch(prompt)
        state = session.forward = books.segments.begin(session.tokens, 0)
        books._own(session)
        books.segments.advance(state, books.last, session.tables, lambda p, _: p == point, [point])

        assert state.point == asked.point == point
        assert all(map(torch.equal, state.site_value, asked.site_value))


# -- edits -----------------------------------------------------------------------------------------


class ByHand(NamedTuple):
    """How a site is changed in the stock model: on the input or output of a module of the layer.

    channels: where head 1, or everything, lies there.
    """

    module: str
    at_input: bool
    channels: slice = slice(None)


def _heads(begin: int, width: int = tiny.HEAD_DIM) -> slice:
    return slice(begin, begin + width)


_LLAMA = {
    "attention.q": ByHand("self_attn.q_proj", False, _heads(16)),
    "attention.k": ByHand("self_attn.k_proj", False, _heads(16)),
    "attention.v": ByHand("self_attn.v_proj", False, _heads(16)),
    "attention.pattern": ByHand("self_attn.o_proj", True, _heads(16)),
    "attention.heads": ByHand("self_attn.o_proj", True, _heads(16)),
    "attention.output": ByHand("self_attn.o_proj", False),
    "mlp.neurons": ByHand("mlp.down_proj", True),
    "mlp.output": ByHand("mlp.down_proj", False),
}
HANDS: dict[str, dict[str, ByHand]] = {
    "llama": _LLAMA,
    "gemma2": {
        **_LLAMA,
        "attention.output": ByHand("post_attention_layernorm", False),
        "mlp.output": ByHand("post_feedforward_layernorm", False),
    },
    "gpt2": {
        "attention.q": ByHand("attn.c_attn", False, _heads(16)),
        "attention.k": ByHand("attn.c_attn", False, _heads(64 + 16)),
        "attention.v": ByHand("attn.c_attn", False, _heads(128 + 16)),
        "attention.pattern": ByHand("attn.c_proj", True, _heads(16)),
        "attention.heads": ByHand("attn.c_proj", True, _heads(16)),
        "attention.output": ByHand("attn.c_proj", False),
        "mlp.neurons": ByHand("mlp.c_proj", True),
        "mlp.output": ByHand("mlp.c_proj", False),
    },
    "gpt_neox": {
        "attention.q": ByHand("attention.query_key_value", False, _heads(48)),
        "attention.k": ByHand("attention.query_key_value", False, _heads(48 + 16)),
        "attention.v": ByHand("attention.query_key_value", False, _heads(48 + 32)),
        "attention.pattern": ByHand("attention.dense", True, _heads(16)),
        "attention.heads": ByHand("attention.dense", True, _heads(16)),
        "attention.output": ByHand("attention.dense", False),
        "mlp.neurons": ByHand("mlp.dense_4h_to_h", True),
        "mlp.output": ByHand("mlp.dense_4h_to_h", False),
    },
}
LAYER, FACTOR = 2, 4.0


def by_hand(module: nn.Module, hand: ByHand, first: int) -> RemovableHandle:
    """Multiply the channels from token `first` on, with a plain hook."""

    def change(value: Tensor) -> Tensor:
        changed = value.clone()
        rows = changed if value.dim() == 2 else changed[0]
        rows[first:, hand.channels] *= FACTOR
        return changed

    if hand.at_input:
        return module.register_forward_pre_hook(lambda _, args: (change(args[0]),))
    return module.register_forward_hook(lambda _, args, output: change(output))


@pytest.mark.parametrize("forward", [0, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", HANDS)
def test_an_edit_at_a_site_is_the_same_edit_by_hand_in_the_stock_model(
    name: str, forward: int
) -> None:
    stock = tiny.family(name)
    model = ResumableModel(copy.deepcopy(stock), PagedAttentionRoute())
    books, prompt = Books(model, chunk=CHUNK), model.sample_ids(PROMPT)
    layers = stock.get_submodule(model.anatomy.layers_path)
    for site, hand in HANDS[name].items():
        session = stopped(books, prompt, forward, inner_point(LAYER, site))
        layout = model.sites[LAYER].layouts[site]

        def ours(chunk: Tensor, site: str = site, heads: int | None = layout.heads) -> Tensor:
            changed = chunk.clone()
            if heads is None:
                return changed.mul_(FACTOR)
            changed.unflatten(-1, (heads, -1))[:, :, 1] *= FACTOR
            return changed

        put(books, session, ours)
        books.run(session)
        logits = session.logits[forward]
        tokens = session.tokens[: PROMPT + forward]
        module = layers[LAYER].get_submodule(hand.module)
        hook = by_hand(module, hand, PROMPT if forward else 0)
        with torch.no_grad():
            expected = stock(torch.tensor([tokens])).logits[0, -1]
        hook.remove()
        with torch.no_grad():
            plain = stock(torch.tensor([tokens])).logits[0, -1]

        moved = float((expected - plain).abs().max())
        assert float((logits - expected).abs().max()) < max(moved / 20, 1e-5), site
        assert moved > 5e-5, site
        books.drop(session)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_an_edit_of_the_middle_is_the_same_edit_of_what_attention_adds(name: str) -> None:
    model = resumable(name)
    books, prompt = Books(model, chunk=CHUNK), model.sample_ids(PROMPT)
    vector, results = torch.linspace(-1, 1, tiny.HIDDEN), []
    for site in ("attention.output", "middle"):
        session = stopped(books, prompt, 0, inner_point(LAYER, site))
        put(books, session, lambda chunk: chunk + vector)
        results.append(books.generate(session, 2).logits[1])

    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-4)


def test_an_edited_key_is_what_later_tokens_attend_to(llama: ResumableModel) -> None:
    books, prompt = Books(llama, chunk=CHUNK), llama.sample_ids(PROMPT)
    plain = books.generate(books.launch(prompt), 2)
    session = stopped(books, prompt, 0, inner_point(LAYER, "attention.v"))
    first = [True]

    def change(chunk: Tensor) -> Tensor:
        changed = chunk.clone()
        if first.pop() if first else False:
            changed[:, 2] += 3.0
        return changed

    put(books, session, change)
    books.run(session)
    session.tokens[-1] = plain.tokens[PROMPT]
    books.run(session)

    assert not torch.equal(session.logits[1], plain.logits[1])


@pytest.mark.parametrize("tokens", [4, PROMPT], ids=["one pass", "chunks"])
def test_undone_edits_leave_the_ordinary_path(llama: ResumableModel, tokens: int) -> None:
    books, prompt = Books(llama, chunk=CHUNK), llama.sample_ids(tokens)
    reference = books.generate(books.launch(prompt), 1)
    session = stopped(books, prompt, 0, inner_point(3, "attention.pattern"))
    before = books.segments.value(session.forward)
    put(books, session, lambda chunk: chunk * 0.5)
    assert session.forward.injected
    books.segments.set_value(session.forward, before)

    assert session.forward.injected == {}
    books.run(session)
    assert torch.equal(session.logits[0], reference.logits[0])


def test_edits_at_two_sites_of_a_layer_are_both_there_however_they_are_reached(
    llama: ResumableModel,
) -> None:
    books, prompt = Books(llama, chunk=CHUNK), llama.sample_ids(PROMPT)
    q, neurons = inner_point(2, "attention.q"), inner_point(2, "mlp.neurons")

    def change(state: ForwardState) -> None:
        value = books.segments.value(state)
        books.segments.set_value(state, [chunk * 1.5 for chunk in value])

    session = stopped(books, prompt, 0, q)
    change(session.forward)
    child = books.fork(session)
    child.forward.drop_cache()
    for one in (session, child):
        books.run(one, until=neurons)
        change(one.forward)
    child.forward.drop_cache()
    books.run(session)
    books.run(child)
    passing = books.launch(prompt)
    state = passing.forward = books.segments.begin(passing.tokens, 0)
    books._own(passing)

    def edit(point: float, state: ForwardState) -> bool:
        if point in (q, neurons):
            change(state)
        return False

    books.segments.advance(state, books.last, passing.tables, edit, [q, neurons])
    only = stopped(books, prompt, 0, neurons)
    change(only.forward)
    books.run(only)

    assert torch.equal(session.logits[0], child.logits[0])
    assert torch.equal(session.logits[0], state.logits)
    assert not torch.equal(session.logits[0], only.logits[0])


def test_a_fork_s_edit_is_its_own(llama: ResumableModel) -> None:
    books, prompt = Books(llama, chunk=CHUNK), llama.sample_ids(PROMPT)
    reference = books.generate(books.launch(prompt), 2)
    session = stopped(books, prompt, 1, inner_point(2, "attention.v"))
    child = books.fork(session)
    put(books, child, lambda chunk: chunk * 2)
    books.run(child)
    books.run(session)

    assert torch.equal(session.logits[1], reference.logits[1])
    assert not torch.equal(child.logits[1], reference.logits[1])


@pytest.mark.parametrize("site", ["attention.k", "attention.pattern", "mlp.neurons"])
def test_an_edit_of_a_long_prompt_does_not_depend_on_its_chunks(
    llama: ResumableModel, site: str
) -> None:
    prompt, logits = llama.sample_ids(PROMPT), []
    for chunk in (CHUNK, 100):
        books = Books(llama, chunk=chunk)
        session = stopped(books, prompt, 0, inner_point(2, site))
        put(books, session, lambda value: value * torch.linspace(0.5, 1.5, value.shape[-1]))
        books.run(session)
        logits.append(session.logits[0])

    torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=1e-4)


def test_weights_are_as_wide_as_the_forward_in_every_chunk(llama: ResumableModel) -> None:
    books, prompt = Books(llama, chunk=CHUNK), llama.sample_ids(PROMPT)
    session = stopped(books, prompt, 0, inner_point(2, "attention.pattern"))
    chunks = books.segments.value(session.forward)
    weights = torch.cat(chunks, 1)[0].unflatten(1, (4, -1))
    later = torch.ones(PROMPT, PROMPT).triu(1).bool()

    assert weights.shape == (PROMPT, 4, PROMPT)
    torch.testing.assert_close(weights.sum(-1), torch.ones(PROMPT, 4))
    assert bool((weights.transpose(0, 1)[:, later] == 0).all())


def test_what_the_mask_hides_gets_no_weight(llama: ResumableModel) -> None:
    books, prompt = Books(llama, chunk=CHUNK), llama.sample_ids(PROMPT)
    results = []
    for hidden in (0.0, 5.0):
        session = stopped(books, prompt, 0, inner_point(2, "attention.pattern"))
        start = [0]

        def change(chunk: Tensor, hidden: float = hidden, start: list[int] = start) -> Tensor:
            rows = torch.arange(start[0], start[0] + chunk.shape[1])[:, None, None]
            start[0] += chunk.shape[1]
            weights = chunk[0].unflatten(1, (4, -1)) * 0.5
            weights = weights + hidden * (torch.arange(PROMPT) > rows)
            return weights.flatten(1)[None]

        put(books, session, change)
        books.run(session)
        results.append(session.logits[0])

    assert torch.equal(results[0], results[1])


# -- refusals and bookkeeping --------------------------------------------------------------------


def test_a_site_the_model_lacks_is_refused_with_the_reason_and_nothing_moves() -> None:
    model = resumable("mixtral")
    books = Books(model, chunk=CHUNK)
    session = stopped(books, model.sample_ids(PROMPT), 0, 1)
    with pytest.raises(NotSupported, match=r"layers\.3\.mlp\.neurons.*mixture of experts"):
        books.run(session, until=inner_point(3, "mlp.neurons"))

    assert session.forward.point == 1
    assert session.forward.layer_runs == 1


def test_a_pattern_too_large_to_keep_is_refused_before_anything_runs(
    llama: ResumableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments_module, "MAX_PATTERN_BYTES", 1000)
    books = Books(llama, chunk=CHUNK)
    session = stopped(books, llama.sample_ids(PROMPT), 0, 1)
    with pytest.raises(OutOfDeviceMemory, match=r"15 tokens takes 3,600 bytes.*1,000"):
        books.run(session, until=inner_point(3, "attention.pattern"))

    assert session.forward.point == 1


def test_values_inside_a_layer_are_weighed_and_gone_after_it(llama: ResumableModel) -> None:
    books = Books(llama, chunk=CHUNK)
    session = stopped(books, llama.sample_ids(PROMPT), 0, inner_point(2, "mlp.neurons"))
    state = session.forward
    residual, neurons = PROMPT * 64 * 4, PROMPT * 96 * 4

    assert state.nbytes == residual + neurons
    put(books, session, lambda chunk: chunk * 2)
    assert state.nbytes == residual + 2 * neurons
    books.run(session, until=3)
    assert state.nbytes == residual
    assert (state.site_value, state.injected) == (None, {})


def test_work_that_never_stops_inside_a_layer_never_enters_a_visit(
    llama: ResumableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking costs nothing where nobody looks: neither a visit nor a mode is made."""
    monkeypatch.setattr(ResumableModel, "visit_layer", None)
    books = Books(llama, chunk=CHUNK)
    session = books.generate(books.launch(llama.sample_ids(PROMPT)), 2)

    assert len(session.logits) == 2


# -- routers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss"]
)
@pytest.mark.parametrize("forward", [0, 1], ids=["prefill", "decode"])
def test_a_router_s_choice_is_read_as_stock_makes_it(name: str, forward: int) -> None:
    stock = tiny.family(name)
    model = ResumableModel(copy.deepcopy(stock), PagedAttentionRoute())
    if name == "granitemoe" and model.sites[3].router is None:
        pytest.skip("this version of transformers returns Granite's choice in another form")
    books, prompt = Books(model, chunk=CHUNK), model.sample_ids(PROMPT)
    reference = books.generate(books.launch(prompt), 2)
    session = stopped(books, prompt, forward, 3)
    reading = books.segments.router(session.forward, 3, session.tables)
    books.run(session)
    seen: list[tuple[Tensor, ...]] = []
    path = next(n for n, m in model.layers[3].named_modules() if m is model.sites[3].router)
    layer = stock.get_submodule(model.anatomy.layers_path)[3]
    layer.get_submodule(path).register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.no_grad():
        stock(torch.tensor([session.tokens[: PROMPT + forward]]))
    logits, weights, experts = (t[-reading.logits.shape[0] :] for t in seen[0])

    assert reading.logits.shape == (1 if forward else PROMPT, 4)
    torch.testing.assert_close(reading.logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(reading.weights, weights, atol=1e-5, rtol=1e-4)
    assert torch.equal(reading.experts, experts)
    assert torch.equal(session.logits[forward], reference.logits[forward])


def test_a_router_inside_an_edited_layer_sees_the_edit() -> None:
    model = resumable("mixtral")
    books, prompt = Books(model, chunk=CHUNK), model.sample_ids(PROMPT)
    session = stopped(books, prompt, 0, inner_point(3, "middle"))
    before = books.segments.router(session.forward, 3, session.tables)
    put(books, session, lambda chunk: chunk + torch.linspace(-1, 1, 64))
    after = books.segments.router(session.forward, 3, session.tables)

    assert not torch.equal(before.logits, after.logits)


@pytest.mark.parametrize("name", ["llama", "jetmoe"])
def test_a_layer_without_a_readable_router_is_refused_by_name(name: str) -> None:
    model = resumable(name)
    books = Books(model, chunk=CHUNK)
    session = stopped(books, model.sample_ids(PROMPT), 0, 3)
    with pytest.raises(NotSupported, match=f"layer 3 of this {name} model has no router"):
        books.segments.router(session.forward, 3, session.tables)
