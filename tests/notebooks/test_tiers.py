"""What the notebooks about tiers measure is there: checksums see a bit, clocks see the work."""

from __future__ import annotations

import pytest
import torch

from djinn_nb import Session
from notebooks.harness import capacity, latency, pressure, tier_watch, tiny
from notebooks.harness.exactness import Prompt, random_ids, reference_run, watching
from notebooks.harness.inprocess import local_kernel
from notebooks.harness.latency import Bench, Offload

PROMPT = Prompt(random_ids(20, 320, seed=1), new_tokens=5)


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


def held_and_resumed(local, reference, between=lambda held: None, forward=1):
    with watching(local) as watch:
        held = pressure.hold(local, PROMPT, reference, 2, forward)
        between(held)
        return held, pressure.resume(local, watch, held)


@pytest.mark.parametrize("forward", [0, 1])
def test_a_session_that_is_evicted_meanwhile_is_found_to_be_as_it_was(local, reference, forward):
    held, end = held_and_resumed(
        local, reference, lambda held: pressure.evict(held.session), forward
    )

    assert (end.differ, end.torn) == (0, 0)
    assert end.new_tokens == PROMPT.new_tokens - forward
    rows = (20 + forward) * 3 + (20 * forward) * (local.num_layers - 3)  # computed at the stop
    assert held.sums.nbytes == rows * 2 * local.cache.shape.row * 4


def test_a_page_zeroed_in_the_hosts_memory_is_found_in_pages_and_in_logits(local, reference):
    def zero(held):
        pressure.evict(held.session)
        assert pressure.zero_host_page(local, held.session) > 0

    _, end = held_and_resumed(local, reference, zero)

    assert end.torn >= 1 and end.differ > 0


def test_a_checksum_sees_one_bit_of_one_computed_row_and_no_other_row(local, reference):
    with watching(local) as watch:
        held = pressure.hold(local, PROMPT, reference, 2, 1)
        tier_watch.wait_until_settled(local)
        table = local.kernel.state.sessions[held.session.id].tables[0]
        page = local.cache.pool[local.kernel.state.residency.device_slot(table[-1])]
        words = page.view(torch.int32)  # of positions 16 … 31, of which 16 … 20 are computed
        found = []
        for row in (4, 5):
            words[0, 1, row, 3] ^= 1
            sums = pressure.checksums(local, held.session.id, held.extent)
            found.append(sums.differ_from(held.sums))
            words[0, 1, row, 3] ^= 1
        end = pressure.resume(local, watch, held)

    assert found == [1, 0] and end.torn == 0


def test_every_copy_and_every_page_that_leaves_is_seen_and_told(local, reference):
    def evicted_and_seen(held):
        pressure.evict(held.session)
        samples.another()

    tier_watch.wait_until_settled(local)  # slots of pages that are gone, but are still being copied
    with tier_watch.watching_moves(local) as moves, tier_watch.sampling(local, 0.001) as samples:
        held, _ = held_and_resumed(local, reference, evicted_and_seen)
        tier_watch.wait_until_settled(local)
        untold = moves.untold()

    page = local.cache.page_bytes
    assert moves.left == held.num_pages
    assert moves.nbytes("host-device") == held.num_pages * page and untold == 0
    assert max(samples.pages["host"]) == held.num_pages and samples.source == "count"
    assert "copies_done" not in vars(local.kernel.state)
    assert "drop" not in vars(local.kernel.state.residency)


@pytest.mark.parametrize("forward", [0, 1])
def test_stopped_sessions_hold_beside_their_pages_what_one_of_them_does(forward):
    """Stopped in a prefill of one chunk: little more than the residual stream."""
    prompts = [Prompt(random_ids(300, 320, seed=i), new_tokens=3) for i in range(6)]
    with (
        local_kernel(dtype="float32", device="cpu", prefill_chunk=512) as local,
        watching(local, layers=False) as watch,
    ):
        references = [reference_run(local, watch, prompt) for prompt in prompts]
        tier_watch.wait_until_nothing_is_held(local)
        held = [pressure.hold(local, prompts[0], references[0], 12, forward)]
        one = tier_watch.held_bytes(local)
        for prompt, reference in zip(prompts[1:], references[1:], strict=True):
            held.append(pressure.hold(local, prompt, reference, 12, forward))
        # a tensor that all share, such as a table of angles, counts once
        assert 0.9 * len(held) * one < tier_watch.held_bytes(local) <= len(held) * one
        if forward == 0:
            residual = held[0].activation_bytes
            assert residual == 300 * local.server.model.hidden_size * 4
            assert residual < one < 1.6 * residual
        for session in held:
            end = pressure.resume(local, watch, session)
            assert (end.differ, end.torn) == (0, 0)
        tier_watch.wait_until_nothing_is_held(local)


def test_why_a_session_left_is_what_its_events_say(local, reference):
    def evicted(held):
        pressure.evict(held.session)
        ours = [held.session]
        assert tier_watch.left_because(local, ours, "asked for", 30.0) == 1
        assert tier_watch.left_because(local, ours, "left alone", 0.0) == 0

    held_and_resumed(local, reference, evicted)


def test_whoever_waits_for_copies_made_beforehand_waits_for_all(local, reference, monkeypatch):
    with watching(local) as watch:
        monkeypatch.setattr(local.kernel.state, "write_behind", lambda: None)
        held = pressure.hold(local, PROMPT, reference, 2, 1)
        tier_watch.wait_until_settled(local)
        with pytest.raises(TimeoutError, match="wait to be copied"):
            tier_watch.wait_until_copied(local, 0.05)
        monkeypatch.undo()
        tier_watch.wait_until_copied(local)
        residency = local.kernel.state.residency
        tables = local.kernel.state.sessions[held.session.id].tables
        places = [residency.place(page) for table in tables for page in table]
        assert all(place.device is not None and place.host is not None for place in places)
        assert pressure.resume(local, watch, held).differ == 0


@pytest.mark.parametrize(("demand", "verdict"), [(1.37, "a test"), (1.0, "not a test")])
def test_what_fits_is_not_a_test(demand, verdict):
    assert pressure.is_a_test(demand) == verdict


def test_plain_eager_holds_what_there_is_room_for(local):
    row = 2 * local.num_layers * local.cache.shape.row * 4  # bytes of one token

    count, nbytes = capacity.plain_eager(local, [PROMPT] * 4, [5] * 4, room_bytes=60 * row)

    assert (count, nbytes) == (2, 2 * 21 * row)


@pytest.fixture
def bench(local):
    prompt = Prompt(PROMPT.ids, Bench.FORWARDS * 3 + 1)  # two repetitions, and one that is watched
    with watching(local, layers=False) as watch:
        reference = reference_run(local, watch, prompt)
    with watching(local) as watch:
        yield Bench(local, watch, prompt, reference, Offload.of(local, 20 + prompt.new_tokens))


@pytest.mark.parametrize("where", ["in_decode", "in_prefill"])
def test_a_timed_resumption_runs_what_is_left_and_brings_what_that_needs(bench, where):
    found = getattr(bench, where)(1, 2)

    assert found.unlike == 0
    for way in (found.device, found.host):
        assert (way.unlike, way.misplaced, way.surplus_pages) == (0, 0, 0)
        assert len(way.client_ms) == len(way.before_ms) == len(found.whole_ms) == 2
        assert all(0 < s < c for s, c in zip(way.server_ms, way.client_ms, strict=True))
        assert all(w > c for w, c in zip(way.work_ms, way.client_ms, strict=True))
    assert len(found.at_once_ms) == 2 and min(found.at_once_ms) > 0
    by_hand, rerun = (2, 0) if where == "in_decode" else (0, 2)
    assert (len(found.by_hand_ms), len(found.rerun_ms)) == (by_hand, rerun)
    assert all(r > w > 0 for r, w in zip(found.rerun_ms, found.whole_ms, strict=False))


def test_the_ways_through_a_decode_are_taken_by_turns_in_one_session(bench, monkeypatch):
    """Each repetition in the reverse order of the one before, all pages there for each way."""
    asked, absent = [], []
    run_to, launch = Session.run_to, Prompt.launch

    def noted(session, location, *given):
        asked.append(str(location))
        info = session.refresh()
        absent.append(info.num_pages - info.device_pages)
        return run_to(session, location, *given)

    launched = []
    monkeypatch.setattr(Session, "run_to", noted)
    monkeypatch.setattr(Prompt, "launch", lambda *given: launched.append(1) or launch(*given))
    bench.in_decode(1, 2)

    stop = "layers.1.output"
    one_way = ["logits", stop, "logits", stop, stop, stop]
    back = [stop, stop, stop, stop, "logits", "logits"]
    assert asked == ["logits", *back, *one_way, *back] and len(launched) == 1
    assert absent == [0] * len(asked)


def test_ratios_are_of_neighbours():
    assert latency.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError):
        latency.ratios([2.0], [1.0, 3.0])


def test_an_offload_by_hand_moves_the_bytes_it_is_asked_for(local):
    offload = Offload.of(local, 20)
    shape = local.cache.shape
    assert offload.away.nbytes == offload.here.nbytes
    assert offload.away.nbytes == shape.num_groups * shape.pages_for(20) * shape.page_bytes
    offload.away.fill_(7)
    offload.here.zero_()

    offload.bring(shape.page_bytes)

    latency.synchronize(local)
    assert int((offload.here == 7).sum()) == shape.page_bytes


def test_a_rerun_from_token_0_makes_more_calls_than_are_left(bench, local):
    assert bench.rerun_calls() == local.num_layers * (3 + 1)  # three chunks, a decode
    assert bench.calls_left(1, 1) == local.num_layers - 2
    assert bench.calls_left(1, 0) == 3 * (local.num_layers - 2)


def test_spans_have_every_byte_that_was_evicted_and_restored(local, reference):
    def there_and_back(held):
        pressure.evict(held.session)
        pressure.restore(held.session)

    with latency.copy_spans(local) as spans:
        held, _ = held_and_resumed(local, reference, there_and_back)
        tier_watch.wait_until_settled(local)

    back = sum(nbytes for way, nbytes, _, _ in spans.copies if way == "host-device")
    assert back == held.num_pages * local.cache.page_bytes
    assert spans.rate("host-device") > 0 and spans.rate("device-host") > 0


def test_a_plain_copy_has_a_rate_each_way():
    rates = latency.plain_copies("cpu", 1 << 20, 2)

    assert set(rates) == {"device-host", "host-device"}
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
