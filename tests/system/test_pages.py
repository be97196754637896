"""A page pool too small for everybody: who finds no room is told, rests, and goes on later."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import djinn_nb as djinn
from djinn_nb import errors
from tests.djinn_nb.conftest import Process


@pytest.fixture(scope="module")
def small(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[djinn.Server]:
    """A server with a pool for about 600 tokens."""
    folder = tmp_path_factory.mktemp("small") / "run"
    process = Process(
        folder, "--model", str(model_folder), "--prefill-chunk", "64", "--check",
        "--kv-memory", "512KiB",
    )  # fmt: skip
    try:
        with process.connect() as server:
            yield server
        log = (folder / "log").read_text()
        assert "Traceback" not in log, log[-3000:]
        assert "internal error" not in log, log[-3000:]
    finally:
        process.end()


@pytest.fixture
def server(small: djinn.Server) -> Iterator[djinn.Server]:
    yield small
    for session_id in small.sessions().index:
        small.attach(session_id).terminate()
    assert small.memory().loc["KV pages in use", "bytes"] == 0


def pages(server: djinn.Server) -> tuple[int, int]:
    used, total = re.match(
        r"(\d+) of (\d+)", server.memory().loc["KV pages in use", "note"]
    ).groups()
    return int(used), int(total)


def prompt_for(server: djinn.Server, share: float) -> list[int]:
    """A prompt that fills a share of the pool."""
    probe = server.launch([1], max_new_tokens=1)
    probe.run_to("logits")
    per_page_column, total = pages(server)
    probe.terminate()
    groups = per_page_column
    tokens_per_page = 16
    return [1 + i % 200 for i in range(int(share * total / groups) * tokens_per_page)]


def test_a_prompt_larger_than_the_pool_is_refused_at_launch(server):
    with pytest.raises(errors.PromptTooLong, match=r"\d+ pages.*--kv-memory") as refused:
        server.launch(prompt_for(server, 1.2), max_new_tokens=1)

    assert "\n" not in str(refused.value)
    assert server.sessions().empty


def test_a_prefill_without_room_is_refused_and_goes_on_when_there_is(server):
    prompt = prompt_for(server, 0.6)
    reference = server.launch(prompt, max_new_tokens=4)
    expected = reference.continue_().tokens
    reference.terminate()
    first = server.launch(prompt, max_new_tokens=4)
    first.run_to("logits")
    second = server.launch(prompt, max_new_tokens=4)
    before = second.refresh()

    with pytest.raises(errors.OutOfPages) as refused:
        second.continue_()

    assert "\n" not in str(refused.value)
    assert len(re.findall(r"\d+", str(refused.value))) >= 2
    assert second.refresh() == before
    assert second.status == "waiting"
    assert first.continue_().tokens == expected
    first.terminate()
    assert second.continue_().tokens == expected


def test_sessions_that_outgrow_the_pool_stop_and_go_on_exactly(server):
    prompt = prompt_for(server, 0.25)
    new = len(prompt)
    reference = server.launch(prompt, max_new_tokens=new)
    expected = reference.continue_().tokens
    reference.terminate()
    sessions = [server.launch(prompt, max_new_tokens=new) for _ in range(3)]
    running, finished, refused = [], [], []
    for session in sessions:
        try:
            session.continue_(timeout=0)
        except errors.StillRunning:
            running.append(session)
        except errors.OutOfPages as error:  # those before it have taken much already
            refused.append((session, error))
    assert running
    for session in running:
        try:
            finished.append((session, session.wait()))
        except errors.OutOfPages as error:
            refused.append((session, error))

    assert refused
    assert all("\n" not in str(error) for _, error in refused)
    for session, end in finished:
        assert end.tokens == expected
        session.terminate()
    for session, _ in refused:
        assert session.status in ("waiting", "stopped")
    while refused:
        session, _ = refused.pop(0)
        try:
            assert session.continue_().tokens == expected
            session.terminate()
        except errors.OutOfPages:
            refused.append((session, None))
            refused[0][0].terminate()  # somebody has to give way
            refused.pop(0)


def test_a_fork_that_cannot_have_its_own_page_leaves_its_parent_alone(server):
    parent = server.launch(prompt_for(server, 0.9), max_new_tokens=3)
    parent.run_to("logits")
    expected = None
    children = [parent.fork() for _ in range(8)]
    assert pages(server)[0] <= pages(server)[1]
    refused = 0
    for child in children:
        try:
            tokens = child.continue_().tokens
            expected = expected or tokens
            assert tokens == expected
        except errors.OutOfPages as error:
            assert "\n" not in str(error)
            refused += 1
    for child in children:
        child.terminate()

    assert parent.continue_().tokens == expected
