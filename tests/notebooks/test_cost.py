"""What the notebook about the cost of leaving measures is there: both ways, slots, forks."""

from __future__ import annotations

import threading

import pytest
import torch

from notebooks.harness import checkpoint, duplex, faults, forks, latency, slots, tier_watch, tiny
from notebooks.harness.exactness import Prompt, random_ids, reference_run, watching
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import local_kernel

LAYER = 2
PROMPT, OTHER = (Prompt(random_ids(20, 320, seed=seed), forks.NEW_TOKENS) for seed in (1, 2))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tiny.make_folder("llama", tmp_path_factory.mktemp("tiny"))
    with local_kernel(
        model=folder, dtype="float32", device="cpu", prefill_chunk=8, check=False,
        kv_memory_bytes=400 << 10, host_memory_bytes=800 << 10,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def references(local):
    with watching(local) as watch:
        return [reference_run(local, watch, prompt) for prompt in (PROMPT, OTHER)]


def changed_places(local, references):
    with watching(local) as watch:
        return duplex.change_places(local, watch, (PROMPT, OTHER), references, LAYER, 1)


def test_two_sessions_change_places_and_go_on_as_if_they_had_not(local, references):
    found = changed_places(local, references)

    pages = local.cache.shape.num_groups * local.cache.shape.pages_for(21)
    assert found.nbytes == 2 * pages * local.cache.page_bytes and found.unlike == 0
    assert len(found.together) == len(found.apart) == len(found.overlap) == 1


def test_copies_both_ways_are_under_way_at_the_same_time(local, references):
    copier = local.kernel.engine._copier
    carry_out, at_once = copier._carry_out, duplex.at_once
    together, both = [], threading.Barrier(2, timeout=60)

    def waiting(*given):
        if together:
            both.wait()  # for the other way: one after the other would wait in vain
        carry_out(*given)

    def noting(*works):
        together.append(works)
        at_once(*works)
        tier_watch.wait_until_settled(local)
        together.clear()

    with instead(copier, "_carry_out", waiting), instead(duplex, "at_once", noting):
        found = changed_places(local, references)

    assert found.unlike == 0 and min(found.overlap) > 0


def test_spans_of_both_ways_are_counted_from_the_first_begin_to_the_last_end():
    copies = [
        ("device-host", 8, 1.0, 3.0),
        ("host-device", 4, 2.0, 6.0),
        ("host-disk", 1, 0.0, 9.0),
    ]
    spans = latency.Spans(copies)

    assert spans.rate_of_all() == pytest.approx(12 / 5 / 1e9)
    assert spans.overlap() == pytest.approx(1 / 5)
    spans.copies[1] = ("host-device", 4, 4.0, 6.0)
    assert spans.overlap() == 0


def test_plain_copies_both_ways_have_a_rate():
    rates = duplex.plain_duplex("cpu", 1 << 20, 2)

    assert len(rates) == 2 and min(rates) > 0


def test_slots_that_a_session_left_are_written_and_it_goes_on_as_before(local, references):
    with watching(local) as watch:
        cost, session, left = slots.clean_evictions(local, PROMPT, LAYER, 2)
        found = slots.taken_by(local, watch, session, left, references[0], OTHER, LAYER)

    assert cost.uncopied == 0 and len(cost.request_ms) == len(cost.decided_ms) == 2
    assert found.slots == found.changed == len(left) > 0 and found.unlike == 0


def test_a_sum_of_a_slot_sees_one_bit(local):
    before = slots.sums_of(local, (0, 1))
    local.cache.pool.view(torch.int32)[1, 0, 1, 4, 3] ^= 1
    after = slots.sums_of(local, (0, 1))

    assert before[0] == after[0] and before[1] != after[1]


def test_forks_cost_no_page_until_they_write_and_disturb_nobody(local, references):
    with watching(local) as watch:
        found = forks.family(local, watch, PROMPT, references[0], LAYER, 12)

    groups = local.cache.shape.num_groups
    assert len(found.fork_ms) == len(found.decided_ms) == 12
    assert all(
        0 < ours < whole for ours, whole in zip(found.decided_ms, found.fork_ms, strict=True)
    )
    assert found.host_bytes > 0
    assert found.unwritten_pages == found.lost_pages == found.unlike == 0
    assert found.decode_pages[0] <= found.decode_pages[1] == groups
    assert found.compared >= 5
    assert found.overtaken.drawn_otherwise > 0
    assert (found.overtaken.changed, found.overtaken.unlike) == (0, 0)


def test_a_fork_that_writes_shared_pages_in_place_is_found_in_its_parents_logits(local, references):
    before = forks.pages_in_use(local)
    with watching(local) as watch:
        parent = checkpoint.stop_at(local, PROMPT, LAYER, 1)
        with faults.shared_pages_written(local, LAYER):
            found = forks.overtaken(local, watch, parent, references[0])
        parent.terminate()
        tier_watch.wait_until_settled(local)

    assert found.drawn_otherwise > 0 and found.changed > 0 and found.unlike > 0
    assert "owners" not in vars(local.kernel.state.pool)
    assert forks.pages_in_use(local) == before
