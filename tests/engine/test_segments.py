"""Stopping anywhere and going on gives the bits of not stopping; edits flow on; hooks count."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from kernel_server.engine.attention import PagedAttentionRoute
from kernel_server.engine.segments import ForwardState
from kernel_server.models.recording import same_call, storages
from kernel_server.models.resumable import ResumableModel
from kernel_server.protocol.errors import ServerFault
from tests.engine.bookkeeper import Books, same_logits, walk
from tests.models import tiny

torch.set_num_threads(1)

CHUNK, PROMPT, FORWARDS = 6, 21, 4  # a prompt of three and a half chunks


def resumable(name: str, dtype: torch.dtype = torch.float32) -> ResumableModel:
    return ResumableModel(tiny.family(name, dtype), PagedAttentionRoute())


@pytest.fixture(scope="module")
def llama() -> ResumableModel:
    return resumable("llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*tiny.REQUIRED, "qwen3-sliding", "gpt_oss", "deepseek_v3"])
def test_stops_forks_moves_and_company_change_no_bit(name: str, dtype: torch.dtype) -> None:
    model = resumable(name, dtype)
    books, different = walk(model, range(model.num_layers + 3), CHUNK, PROMPT, FORWARDS)

    assert different == []
    assert books.copied > 0
    assert len(books.free) == len(books.owners)


@pytest.mark.parametrize("name", tiny.REQUIRED)
def test_tokens_are_those_of_stock_generate(name: str) -> None:
    stock = tiny.family(name)
    model = ResumableModel(copy.deepcopy(stock), PagedAttentionRoute())
    books = Books(model, chunk=CHUNK)
    prompt = model.sample_ids(PROMPT)
    session = books.generate(books.launch(prompt), 12)
    stock.generation_config.eos_token_id = None
    stock.generation_config.pad_token_id = 0

    generated = stock.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, attention_mask=None
    )

    assert session.tokens == generated[0].tolist()


@pytest.mark.parametrize("forward", [0, 2], ids=["prefill", "decode"])
def test_hooks_on_stock_layers_fire_for_the_layers_passed_and_no_other(forward: int) -> None:
    stock = tiny.family("llama")
    model = ResumableModel(stock, PagedAttentionRoute())
    fired: set[int] = set()
    for index, layer in enumerate(stock.model.layers):
        layer.register_forward_hook(lambda *_, index=index: fired.add(index))
    books = Books(model, chunk=CHUNK)
    counts = []
    for layer in range(model.num_layers):
        session = books.generate(books.launch(model.sample_ids(PROMPT)), forward)
        fired.clear()
        books.run(session, stop=layer + 1)
        counts.append(sorted(fired))

    assert counts == [list(range(layer + 1)) for layer in range(model.num_layers)]


def test_until_and_a_stop_from_on_point_reach_the_same_state(llama: ResumableModel) -> None:
    books = Books(llama, chunk=CHUNK)
    first, second = (books.launch(llama.sample_ids(4)) for _ in range(2))
    books.run(first, until=3)
    books.run(second, stop=3)

    assert first.forward.point == second.forward.point == 3
    assert torch.equal(first.forward.residual[0], second.forward.residual[0])


def test_every_point_is_announced_once_and_in_order(llama: ResumableModel) -> None:
    books = Books(llama, chunk=CHUNK)
    for tokens in (4, PROMPT):
        session = books.launch(llama.sample_ids(tokens))
        session.forward = books.segments.begin(session.tokens, 0)
        books._own(session)
        seen: list[int] = []
        for until in (2, 2, 5, books.last):
            books.segments.advance(
                session.forward, until, session.tables, lambda p, _, seen=seen: seen.append(p)
            )

        assert seen == list(range(books.last + 1))


def test_values_at_stops_are_never_written_to(llama: ResumableModel) -> None:
    books = Books(llama, chunk=CHUNK)
    session = books.launch(llama.sample_ids(PROMPT))
    kept = []
    for point in range(books.last):
        books.run(session, until=point)
        value = books.segments.value(session.forward)
        kept += [(chunk, chunk.clone()) for chunk in value]
    books.generate(session, 3)

    assert all(torch.equal(value, copied) for value, copied in kept)


@pytest.mark.parametrize("tokens", [4, PROMPT], ids=["one pass", "chunks"])
def test_a_value_put_in_place_flows_on_from_every_point(llama: ResumableModel, tokens: int) -> None:
    books = Books(llama, chunk=CHUNK)
    prompt = llama.sample_ids(tokens)
    plain = books.generate(books.launch(prompt), 1).logits[0]

    def change(state: ForwardState, factor: float) -> None:
        value = books.segments.value(state)
        books.segments.set_value(state, [chunk * factor for chunk in value])

    def run(point: int, factor: float, standing: bool) -> torch.Tensor:
        """The logits with the value at `point` scaled, in passing or standing there."""
        session = books.launch(prompt)
        state = session.forward = books.segments.begin(session.tokens, 0)
        books._own(session)

        def edit(at: int, state: ForwardState) -> bool:
            if at == point and not standing:
                change(state, factor)
            return standing and at == point

        books.segments.advance(state, books.last, session.tables, edit)
        if standing:
            change(state, factor)
            books.segments.advance(state, books.last, session.tables, edit)
        books.drop(session)
        return state.logits

    for point in range(books.last + 1):
        assert torch.equal(run(point, 1.0, False), plain)
        assert torch.equal(run(point, 1.0, True), plain)
        assert torch.equal(run(point, 1.5, False), run(point, 1.5, True))
        assert not torch.equal(run(point, 1.5, True), plain)


def test_a_value_of_another_shape_or_dtype_is_refused_and_changes_nothing(
    llama: ResumableModel,
) -> None:
    books = Books(llama, chunk=CHUNK)
    session = books.launch(llama.sample_ids(PROMPT))
    books.run(session, until=2)
    before = list(session.forward.residual)
    for wrong in ([before[0]], [c[:, :1] for c in before], [c.double() for c in before]):
        with pytest.raises(ServerFault, match="point 2"):
            books.segments.set_value(session.forward, wrong)

    assert all(a is b for a, b in zip(before, session.forward.residual, strict=True))


def test_a_layer_that_raises_leaves_the_forward_at_the_last_point_reached(
    llama: ResumableModel,
) -> None:
    books = Books(llama, chunk=CHUNK)
    prompt = llama.sample_ids(4)
    reference = books.generate(books.launch(prompt), 1)

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    for tokens in (prompt, llama.sample_ids(PROMPT)):
        session = books.launch(tokens)
        hook = llama.layers[3].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="planted"):
            books.run(session)
        hook.remove()

        assert session.forward.point == 3
    again = books.launch(prompt)
    hook = llama.layers[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        books.run(again)
    hook.remove()
    books.generate(again, 1)

    assert same_logits(again, reference)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "phi3-longrope"])
def test_recorded_calls_are_rebuilt_bit_for_bit(name: str) -> None:
    model = resumable(name)
    books = Books(model, chunk=CHUNK)
    session = books.launch(model.sample_ids(4))
    books.run(session, stop=0)
    (embedding,) = session.forward.residual
    books.run(session, stop=2)
    passed = session.forward.recording
    model.record(*model.inputs(model.sample_ids(30, seed=2), 0))
    rebuilt = model.record(*model.inputs(session.forward.token_ids, 0))

    assert passed is not None and len(passed.calls) == model.num_layers
    assert all(map(same_call, passed.calls, rebuilt.calls))
    assert torch.equal(embedding, rebuilt.embedding)


def test_a_long_rope_prompt_is_recorded_whole() -> None:
    stock = tiny.family("phi3-longrope")  # its rotary changes beyond 12 tokens
    model = ResumableModel(copy.deepcopy(stock), PagedAttentionRoute())
    books = Books(model, chunk=CHUNK)
    prompt = model.sample_ids(PROMPT)
    session = books.generate(books.launch(prompt), 1)
    with torch.no_grad():
        expected = stock(torch.tensor([prompt])).logits[0, -1]

    torch.testing.assert_close(session.logits[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_prompts_at_the_edges_of_chunks_and_pages_agree_with_stock(name: str) -> None:
    stock = tiny.family(name)
    model = ResumableModel(copy.deepcopy(stock), PagedAttentionRoute())
    books = Books(model, chunk=CHUNK)
    for tokens in (1, 2, 4, 5, 6, 7, 12, 13, 24):
        session = books.generate(books.launch(model.sample_ids(tokens)), 2)
        books.drop(session)
        for count, logits in enumerate(session.logits):
            with torch.no_grad():
                expected = stock(torch.tensor([session.tokens[: tokens + count]])).logits[0, -1]

            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("again", [False, True], ids=["as run", "recorded again"])
@pytest.mark.parametrize("tokens", [CHUNK, PROMPT])
def test_a_prompt_keeps_its_residual_once(llama: ResumableModel, tokens: int, again: bool) -> None:
    books = Books(llama, chunk=CHUNK)
    session = books.launch(llama.sample_ids(tokens))
    for point in (0, 3):
        books.run(session, until=point)
        if again:
            session.forward.drop_cache()
            books.run(session, until=point + 1)
        recording = session.forward.recording

        assert session.forward.nbytes == tokens * tiny.HIDDEN * 4
        assert recording.embedding is None and recording.preamble == {}
        arguments = storages(recording.tensors(), llama.weights)
        row = tiny.HIDDEN * 4
        assert sum(storages(session.forward.residual, arguments).values()) == tokens * row
        assert max(arguments.values()) < tokens * row


def test_two_engines_in_one_process_do_not_meet() -> None:
    random.seed(0)
    models = [resumable("llama"), resumable("gpt2"), resumable("llama", torch.bfloat16)]
    prompts = [model.sample_ids(PROMPT) for model in models]
    expected = []
    for model, prompt in zip(models, prompts, strict=True):
        books = Books(model, chunk=CHUNK)
        expected.append(books.generate(books.launch(prompt), 3))
    books = [Books(model, chunk=CHUNK) for model in models]
    sessions = [b.launch(prompt) for b, prompt in zip(books, prompts, strict=True)]
    while any(len(s.logits) < 3 for s in sessions):
        index = random.randrange(3)
        if len(sessions[index].logits) < 3:
            books[index].run(sessions[index], stop=random.randrange(books[index].last))

    assert all(map(same_logits, sessions, expected))


def test_work_may_be_done_between_two_layers(llama: ResumableModel) -> None:
    """Reading the lens of one session while another is in the middle of a pass disturbs neither."""
    books = Books(llama, chunk=CHUNK)
    prompt = llama.sample_ids(4)
    reference = books.generate(books.launch(prompt), 2)
    session = books.launch(prompt)
    while len(session.logits) < 2:
        session.forward = books.segments.begin(session.tokens[session.computed :], session.computed)
        books._own(session)

        def look(point: int, state) -> bool:
            books.segments.lens(torch.ones(3, tiny.HIDDEN))
            books.segments.value(state)
            return False

        books.segments.advance(session.forward, books.last, session.tables, look)
        books.run(session)

    assert same_logits(session, reference)


def test_the_lens_at_the_last_layer_is_the_model_s_own_logits(llama: ResumableModel) -> None:
    books = Books(llama, chunk=CHUNK)
    session = books.launch(llama.sample_ids(PROMPT))
    books.run(session, until=llama.num_layers)
    rows = torch.cat(books.segments.value(session.forward), 1)[0]
    lens = books.segments.lens(rows)
    books.run(session, until=llama.num_layers + 1)
    normed = torch.cat(books.segments.value(session.forward), 1)[0]
    books.run(session)

    torch.testing.assert_close(lens[-1], session.logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(books.segments.lens(normed, normed=True), lens)


def test_chunks_are_cut_at_multiples_counted_from_the_first_token(llama: ResumableModel) -> None:
    segments = Books(llama, chunk=CHUNK).segments

    assert segments.begin(range(13), 0).bounds == ((0, 6), (6, 12), (12, 13))
    assert segments.begin(range(6), 0).bounds == ((0, 6),)
    assert segments.begin(range(5), 4).bounds == ((0, 2), (2, 5))
    assert segments.begin([1], 12).bounds == ((0, 1),)


def test_a_model_called_outside_the_engine_says_so(llama: ResumableModel) -> None:
    with pytest.raises(ServerFault, match="outside the engine"):
        llama.model(torch.tensor([[5, 6]]))
