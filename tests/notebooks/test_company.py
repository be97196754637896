"""What the notebooks about company measure is there: tokens timed, copies made, bytes counted."""

from __future__ import annotations

import contextlib
import time

import pytest

from djinn_nb import Stopped
from kernel_server.pacing import BURST_S
from kernel_server.state.events import Ticked
from notebooks.harness import checkpoint, company, forks, standing, tier_watch, tiny
from notebooks.harness.exactness import Prompt, random_ids, reference_run, watching
from notebooks.harness.inprocess import OWNER, local_kernel
from notebooks.harness.other_client import OWNER as SOMEBODY_ELSE
from notebooks.harness.other_client import other_client
from notebooks.harness.second_process import second_process

PROMPT = Prompt(random_ids(20, 320, seed=1), new_tokens=9)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tiny.make_folder("llama", tmp_path_factory.mktemp("tiny"))
    with local_kernel(
        model=folder, dtype="float32", device="cpu", prefill_chunk=8,
        kv_memory_bytes=400 << 10, host_memory_bytes=800 << 10,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def reference(local):
    with watching(local) as watch:
        return reference_run(local, watch, PROMPT)


def test_the_time_between_tokens_is_that_of_a_run_after_its_beginning(local, reference):
    times, tokens = company.run_alone(local, PROMPT)

    assert tokens == reference.tokens
    assert len(times) == PROMPT.new_tokens - company.WARM - 1 and min(times) > 0
    assert "handle" not in vars(local.kernel.state)


def test_somebody_else_swaps_a_session_of_their_own(local, reference):
    with other_client(local, PROMPT, 2) as other:
        assert local.kernel.state.sessions[other.session_id].owner != OWNER
        for _ in range(2):
            with tier_watch.watching_moves(local) as moves, other.swapping() as done:
                _, tokens = company.run_alone(local, PROMPT)
            assert done[0] >= 1 and tokens == reference.tokens
            assert moves.left > 0 and moves.nbytes("host-device") > 0
        other.swap_until_held()
        assert local.kernel.gateway.pacer.left_s(SOMEBODY_ELSE) < BURST_S / 4
        assert other.finish() == reference.tokens
    tier_watch.wait_until_settled(local)
    assert other.session_id not in local.kernel.state.sessions


def test_stopped_sessions_are_copied_beforehand_beside_decodes_and_at_no_other_time(
    local, reference
):
    victims = company.stopped_for_copying(local, PROMPT, 2, 0)
    tier_watch.wait_until_copied(local)
    state = local.kernel.state
    with tier_watch.watching_moves(local) as moves, company.writing_behind(local, victims) as done:
        assert not any(victim.refresh().num_pages == 0 for victim in victims)
        local.kernel.loop.dispatch(Ticked(now=time.time()))
        assert not moves.copies and not done[0]
        _, tokens = company.run_alone(local, PROMPT)
        tier_watch.wait_until_settled(local)
        beside = moves.nbytes("device-host")
    pages = sum(victim.refresh().num_pages for victim in victims)

    assert tokens == reference.tokens
    assert 0 < beside <= pages * local.cache.page_bytes and 0 < done[0] <= len(victims)
    assert all(one.session_id is None for one in moves.copies)
    assert "write_behind" not in vars(state)
    tier_watch.wait_until_copied(local)
    for victim in victims:
        assert tuple(victim.continue_().session.tokens[20:]) == reference.tokens
        victim.terminate()


def test_a_lock_of_the_engine_keeps_others_from_running(local, reference):
    with company.engine_lock(local) as lock:
        other = PROMPT.launch(local)
        with lock:
            assert company.tokens_within(local, other, 0.2) == 0
        end = other.wait()
    assert tuple(end.session.tokens[20:]) == reference.tokens
    other.terminate()
    free = PROMPT.launch(local)
    assert company.tokens_within(local, free, 120.0) == PROMPT.new_tokens
    free.terminate()


def test_bytes_of_messages_are_counted_both_ways(local):
    session = PROMPT.launch(local)
    with company.counting_bytes(local) as wire:
        stop = session.run_to("logits")
        before = wire.received
        assert isinstance(stop, Stopped)
        stop.value.numpy()

    assert wire.received - before >= 4 * local.server.model.vocab_size
    assert wire.sent > 0 and wire.calls >= 2
    assert len(company.control_call_us(session, 5)) == 5
    session.terminate()


def test_out_and_back_is_timed_in_parts_and_exact(local, reference):
    with watching(local) as watch:
        cost = checkpoint.out_and_back(local, watch, PROMPT, reference, 2, 1, repetitions=2)

    held = checkpoint.stop_at(local, PROMPT, 2, 1)
    assert cost.unlike == 0 and cost.nbytes == held.refresh().kv_bytes
    held.terminate()
    for times in (cost.dispatch_ms, cost.evict_ms, cost.restore_ms, cost.restore_gb_s):
        assert len(times) == 2 and min(times) > 0


def test_a_page_that_is_not_copied_beforehand_is_counted(local):
    assert checkpoint.uncopied_pages(local, PROMPT, 2) == 0
    with checkpoint.no_write_behind(local):
        assert checkpoint.uncopied_pages(local, PROMPT, 2) > 0


def test_moving_tensor_by_tensor_takes_time_both_ways():
    found = checkpoint.by_tensor("cpu", 1 << 20, 8, 2)

    assert all(len(times) == 2 and min(times) > 0 for times in found.values())


def test_a_second_process_decodes_as_many_tokens_and_says_what_it_holds():
    with second_process(geometry=None, dtype="float32", device="cpu") as other:
        other.start_decoding([5, 6, 7], 4)
        times = other.answer()

    assert len(times) == 3 and min(times) > 0
    assert other.held_bytes > 10 << 20
    assert other._process.ended


def test_a_run_beside_something_says_what_was_done_and_how_many_bytes_moved(local, reference):
    with other_client(local, PROMPT, 2) as other:
        swapped = company.run_beside(local, PROMPT, other.swapping)
        quiet = company.run_beside(local, PROMPT, lambda: contextlib.nullcontext([0]))

    assert swapped.tokens == quiet.tokens == reference.tokens
    assert swapped.done >= 1 and swapped.nbytes >= local.cache.page_bytes
    assert quiet.done == 0
    assert min(quiet.between_ms) > 0 and quiet.seconds * 1e3 > sum(quiet.between_ms)
    assert "copies_done" not in vars(local.kernel.state)


def test_many_stand_still_that_share_no_page_once_each_has_run_on(local):
    prompts = [Prompt(random_ids(4, 320, seed=seed), new_tokens=3) for seed in (3, 4)]
    with watching(local) as watch:
        references = [reference_run(local, watch, prompt) for prompt in prompts]
    before = forks.pages_in_use(local)
    still = standing.Standing(local, prompts, 2)
    for count in (3, 7, 2):
        still.become(count)
        assert len(still.sessions) == count and still.shared_pages() == 0
    groups = local.cache.shape.num_groups

    assert forks.pages_in_use(local) - before == 2 * groups
    assert still.forked == 1 + 2 and still.shared_before >= 3
    for session, kind in still.sessions:
        end = session.continue_()
        assert tuple(end.session.tokens[4:]) == references[kind].tokens
    still.become(0)
    assert forks.pages_in_use(local) == before


def test_sessions_longer_than_a_page_do_share_pages(local):
    prompt = Prompt(random_ids(local.cache.shape.page_tokens + 1, 320, seed=5), new_tokens=3)
    still = standing.Standing(local, [prompt], 2)
    still.become(2)

    assert still.shared_pages() >= 1
    still.become(0)
