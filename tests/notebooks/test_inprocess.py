"""A kernel inside the notebook's process is reached by the client's own calls, and no other way."""

from __future__ import annotations

import inspect

import pytest

from djinn_nb.transport import Transport
from notebooks.harness import faults, tiny
from notebooks.harness.exactness import (
    Prompt,
    different,
    random_ids,
    reference_run,
    stopped_run,
    watching,
)
from notebooks.harness.inprocess import InProcessTransport, local_kernel


@pytest.mark.parametrize("name", ["request", "listen", "greet", "close"])
def test_it_takes_the_calls_of_the_clients_transport(name):
    ours, theirs = getattr(InProcessTransport, name), getattr(Transport, name)

    assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tiny.make_folder("llama", tmp_path_factory.mktemp("tiny"))
    with local_kernel(model=folder, dtype="float32", device="cpu", prefill_chunk=8) as made:
        yield made


def test_hooks_see_one_call_per_layer_and_chunk_and_the_logits_of_every_forward(local):
    prompt = Prompt(random_ids(20, 320, seed=1), new_tokens=3)

    with watching(local) as watch:
        trace = stopped_run(local, watch, prompt, 2)

    assert trace.layers.count(0) == 3 + 2  # three chunks of the prompt, then two decodes
    assert [stop[:2] for stop in trace.stops] == [(f, "layers.2.output") for f in range(3)]
    assert trace.logits.shape == (3, 320) and different(trace.logits[-1], trace.last) == 0


def test_nothing_of_a_watch_is_left_behind(local):
    with watching(local):
        pass

    assert all(not layer._forward_hooks for layer in local.model.layers)
    assert "head" not in vars(local.model)


@pytest.mark.parametrize(
    "fault",
    [
        faults.eager_attention,
        faults.other_chunks,
        faults.no_final_norm,
        faults.one_layer_late,
        faults.zeroed_page,
    ],
)
def test_a_planted_fault_is_gone_when_its_context_ends(local, fault):
    prompt = Prompt(random_ids(20, 320, seed=1), new_tokens=3)
    with watching(local) as watch:
        before = reference_run(local, watch, prompt)
        session = prompt.launch(local)
        session.break_at(2)
        session.continue_()
        with fault(local, 2):
            session.step_out()
        session.terminate()
        after = stopped_run(local, watch, prompt, 2)

    assert after.differs_from(before) == 0
    assert "norm" not in vars(local.model) and "call_layer" not in vars(local.model)
    assert "_layer" not in vars(local.segments)


@pytest.mark.parametrize(
    ("left", "right", "count"),
    [([1.0, 2.0], [1.0, 2.0], 0), ([0.0], [-0.0], 1), ([1.0], [1.0, 2.0], 2)],
)
def test_values_are_compared_bit_by_bit(left, right, count):
    assert different(left, right) == count
