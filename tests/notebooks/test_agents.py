"""Agents act by turns, every logit is compared, and a wake's parts add up."""

from __future__ import annotations

import dataclasses

import pytest

from notebooks.harness import agents, pressure, tier_watch, tiny
from notebooks.harness.agents import Agent
from notebooks.harness.exactness import Prompt, random_ids, reference_run, watching
from notebooks.harness.inprocess import local_kernel

ACTS = 2


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tiny.make_folder("llama", tmp_path_factory.mktemp("tiny"))
    with local_kernel(
        model=folder, dtype="float32", device="cpu", prefill_chunk=8,
        kv_memory_bytes=200 << 10, host_memory_bytes=800 << 10,
    ) as made:  # fmt: skip
        yield made


def begun(local, count):
    prompts = [Prompt(random_ids(20, 320, seed=i), ACTS + 2) for i in range(count)]
    with watching(local) as watch:
        references = [reference_run(local, watch, prompt) for prompt in prompts]
    pairs = zip(prompts, references, strict=True)
    return [Agent.begin(local, p, r, ACTS, hints=i % 2 == 0) for i, (p, r) in enumerate(pairs)]


def test_more_agents_than_the_device_holds_act_and_all_are_compared(local):
    crowd = begun(local, 8)
    pages = sum(agent.session.refresh().num_pages for agent in crowd)
    assert pressure.is_a_test(pages / local.cache.num_pages) == "a test"
    with agents.watching_wakes(local) as wakes:
        life = agents.live(local, wakes, crowd, lambda any_: any_.uniform(0.0, 0.2))

    assert life.unlike == [0] * (ACTS * len(crowd)) and not life.errors
    assert len(wakes.done) == len(life.unlike) and any(wake.absent for wake in wakes.done)
    for wake in wakes.done:
        parts = wake.queue_ms + wake.restore_ms + wake.compute_ms
        assert parts == pytest.approx(wake.total_ms) and wake.compute_ms > 0
        assert bool(wake.absent) >= (wake.restore_ms > 0)
    assert max(life.resident) < len(crowd) and len(life.seconds) == len(life.resident)
    for agent in crowd:
        agent.session.terminate()
    assert "stop" not in vars(local.kernel.state)


def test_an_agent_that_is_not_as_its_reference_run_is_found(local):
    (agent,) = begun(local, 1)
    wrong = agent.reference.logits.copy()
    wrong[1, 7] += 1e-6
    agent.reference = dataclasses.replace(agent.reference, logits=wrong)
    with agents.watching_wakes(local) as wakes:
        life = agents.live(local, wakes, [agent], lambda any_: 0.0)

    assert life.unlike == [1, 0]
    agent.session.terminate()
    tier_watch.wait_until_settled(local)


def test_an_act_that_is_refused_is_told_and_ends_that_agent_alone(local):
    (second,) = begun(local, 1)
    second.reference = dataclasses.replace(second.reference, logits=second.reference.logits[:2])
    with agents.watching_wakes(local) as wakes:
        life = agents.live(local, wakes, [second], lambda any_: 0.0)

    assert life.unlike == [0] and len(life.errors) == 1 and second.session.id in life.errors[0]
    second.session.terminate()


@pytest.mark.parametrize(("share", "value"), [(0.5, 3), (0.99, 5), (0.0, 1)])
def test_a_percentile_is_one_of_the_values(share, value):
    assert agents.percentile([5, 1, 4, 2, 3], share) == value
