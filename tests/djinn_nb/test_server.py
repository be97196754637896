"""What a server shows of itself, and what happens when it is not there."""

from __future__ import annotations

import gc
import threading
import time

import pytest

import djinn_nb as djinn
from djinn_nb import errors
from tests.djinn_nb.conftest import (
    HIDDEN,
    LONG,
    NUM_LAYERS,
    VOCABULARY,
    Process,
    make_model,
)


def test_the_model_is_described_without_weights(server):
    model = server.model

    assert (model.num_layers, model.hidden_size, model.vocab_size) == (
        NUM_LAYERS, HIDDEN, VOCABULARY,
    )  # fmt: skip
    assert model.config["num_hidden_layers"] == NUM_LAYERS
    assert model.architecture == "LlamaForCausalLM"
    assert model.locations[0] == "embedding"
    assert any("q_proj" in path for path in model.modules)
    assert "q_proj" in repr(model.modules)
    assert model.name in repr(server)


def test_the_tokenizer_works_without_transformers_here(server):
    tokenizer = server.model.tokenizer

    ids = tokenizer.encode("Mary went to the store")

    assert tokenizer.decode(ids) == "Mary went to the store"
    assert tokenizer.tokens(ids)[1].startswith(" ")
    spelt_by_several_tokens = "Zoë 日本 😀"
    assert tokenizer.decode(tokenizer.encode(spelt_by_several_tokens)) == spelt_by_several_tokens
    with pytest.raises(errors.BadArgument):
        tokenizer.encode(7)
    with pytest.raises(errors.BadArgument):
        tokenizer.decode([VOCABULARY])


def test_sessions_are_a_table(server):
    assert server.sessions().empty
    first = server.launch([1, 2, 3], max_new_tokens=2, name="first")
    first.run_to(1)
    child = first.fork()

    table = server.sessions()

    assert table.index.tolist() == [first.id, child.id]
    row = table.loc[first.id]
    assert (row["name"], row.status, row.location) == ("first", "stopped", "layers.1.output")
    assert table.loc[child.id, "parent"] == first.id


def test_memory_is_a_table(server):
    server.launch([1, 2, 3], max_new_tokens=2).run_to(1)

    table = server.memory()

    assert table.loc["weights", "bytes"] > 0
    assert table.loc["KV pages in use", "bytes"] > 0


def test_attach_takes_an_id_or_a_name(server):
    made = server.launch([1, 2, 3], max_new_tokens=2, name="mine")

    assert server.attach(made.id).id == made.id
    assert server.attach("mine").id == made.id
    server.launch([1], max_new_tokens=1, name="mine")
    with pytest.raises(errors.UnknownSession, match=f"2 sessions have the name 'mine'.*{made.id}"):
        server.attach("mine")
    for bad, error in (("nobody", errors.UnknownSession), (7, errors.BadArgument)):
        with pytest.raises(error):
            server.attach(bad)


def test_a_closed_server_says_connect_again(process: Process):
    with djinn.connect(process.address) as server:
        session = server.launch([1], max_new_tokens=1)
        session.terminate()
    server.close()

    with pytest.raises(errors.ConnectionLost, match=r"connect\(\)"):
        server.sessions()
    assert "disconnected" in repr(server)


def _new_threads(before: set[threading.Thread]) -> set[threading.Thread]:
    """Those that have come since: others of before may be about to end."""
    return set(threading.enumerate()) - before


def test_no_threads_are_left_behind(process: Process, eventually):
    before = set(threading.enumerate())
    server = djinn.connect(process.address)
    assert _new_threads(before)

    server.close()

    eventually(lambda: not _new_threads(before))


def test_a_connection_that_nobody_holds_any_more_is_closed(process: Process, eventually):
    before = set(threading.enumerate())
    server = djinn.connect(process.address)
    session = server.launch([1], max_new_tokens=1)
    del server
    gc.collect()
    session.terminate()  # a session alone keeps its connection
    assert _new_threads(before)

    del session

    # again: what a thread of its own held at one collection goes at the next
    eventually(lambda: gc.collect() >= 0 and not _new_threads(before))


@pytest.mark.parametrize(
    ("address", "wishes", "error"),
    [
        ("127.0.0.1:1", {}, errors.NoServer),
        ("unix:/nowhere/at/all.sock", {}, errors.NoServer),
        ("unix:relative", {}, errors.BadArgument),
        ("host:port", {}, errors.BadArgument),
        (7, {}, errors.BadArgument),
    ],
)
def test_a_bad_address_is_refused_in_one_line(process, address, wishes, error):
    with pytest.raises(error) as caught:
        djinn.connect(address, **wishes)

    assert "\n" not in str(caught.value)


def test_a_wrong_token_is_refused(process: Process):
    with pytest.raises(errors.AccessDenied):
        djinn.connect(process.address, token="not-the-token-of-anyone")


def test_with_an_address_wishes_are_checked(process: Process, model_folder):
    djinn.connect(process.address, model=model_folder, dtype="float32", device="cpu").close()

    for wishes in (
        {"model": "gpt2"},
        {"dtype": "bfloat16"},
        {"device": "cuda:0"},
        {"prefill_chunk": 4},
    ):
        with pytest.raises(errors.BadArgument):
            djinn.connect(process.address, **wishes)


def test_a_model_without_a_tokenizer_is_debugged_by_ids(tmp_path):
    folder = make_model(tmp_path / "bare", tokenizer=False, dtype="bfloat16")
    process = Process(tmp_path / "run", "--model", str(folder), "--dtype", "bfloat16")
    try:
        with process.connect() as server:
            with pytest.raises(errors.NoTokenizer, match="token ids"):
                server.launch("text", max_new_tokens=1)
            bare = server.launch([1, 2, 3], max_new_tokens=2)
            with pytest.raises(errors.NoTokenizer, match="positions"):
                bare.run_to(1).edit(scale=2, tokens=" Mary")
            with pytest.raises(errors.NoTokenizer, match="token_id"):
                bare.break_at(1, condition='token == " Mary"')
            session = server.launch([1, 2, 3], max_new_tokens=2)
            stop = session.run_to(1)

            assert stop.hidden_states.dtype == "bfloat16"
            values = stop.hidden_states.numpy()
            # every value is a bfloat16: its lower 16 bits are empty
            assert values.dtype == "float32"
            assert not (values.view("uint32") & 0xFFFF).any()
            assert "ids [1, 2, 3]" in repr(stop)
            for ask in (lambda: session.text, lambda: server.model.tokenizer):
                with pytest.raises(errors.NoTokenizer):
                    ask()
    finally:
        process.end()


@pytest.mark.slow
def test_a_server_that_dies_in_a_call_is_told_and_a_new_one_is_found(
    model_folder, tmp_path, eventually
):
    process = Process(tmp_path / "run", "--no-journal", "--model", str(model_folder))
    try:
        server = process.connect()
        session = server.launch([1, 2, 3], max_new_tokens=LONG)

        def kill() -> None:
            eventually(lambda: session.newest.status == "running")
            process.process.kill()

        killing = threading.Thread(target=kill)
        killing.start()
        began = time.monotonic()

        with pytest.raises(errors.ConnectionFailed) as caught:
            session.continue_()

        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 60
        assert server.address in str(caught.value)
        assert session.id in repr(session)
        killing.join()
        process.process.wait()
        again = Process(tmp_path / "run", "--no-journal", "--model", str(model_folder))
        try:
            again.connect().close()
            with pytest.raises(errors.UnknownSession):
                session.status  # noqa: B018
            fresh = server.launch([1, 2, 3], max_new_tokens=2)
            assert isinstance(fresh.continue_(), djinn.Finished)
            server.close()
        finally:
            again.end()
    finally:
        process.end()
