"""Edits by hand are edits, their planted faults are faults, and neither leaves anything behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from notebooks.harness import by_hand, edit_faults, exactness, stock, tiny
from notebooks.harness.by_hand import ByHand
from notebooks.harness.exactness import Prompt, different, random_ids, watching
from notebooks.harness.inprocess import local_kernel

PROMPT = Prompt(random_ids(20, 320, seed=1), new_tokens=3)
VECTOR = np.linspace(-1, 1, 64, dtype=np.float32)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tiny.make_folder("llama", tmp_path_factory.mktemp("tiny"))
    with local_kernel(model=folder, dtype="float32", device="cpu", prefill_chunk=8) as made:
        yield made


def run(local, *edits):
    with watching(local) as watch:
        session = PROMPT.launch(local)
        stop = session.run_to("embedding")
        for edit in edits:
            stop.edit(**edit)
        session.continue_()
        return exactness.finish(watch, session, len(PROMPT.ids))


BOTH = {
    "add": (
        {"add": VECTOR, "alpha": 2.0, "location": 2, "sticky": True},
        ByHand(2, by_hand.added(VECTOR, 2.0)),
    ),
    "scale": ({"scale": 0.5, "location": 1, "sticky": True}, ByHand(1, by_hand.scaled(0.5))),
    "project out": (
        {"project_out": VECTOR, "location": 2, "sticky": True},
        ByHand(2, by_hand.without(VECTOR)),
    ),
    "head": (
        {"zero": True, "heads": 2, "location": "layers.3.attention.heads", "sticky": True},
        ByHand(3, by_hand.without_head(2, 16), "attention.heads"),
    ),
    "one token": (
        {"zero": True, "tokens": 19, "location": 1},
        ByHand(1, by_hand.put({19: 0.0})),
    ),
}


@pytest.mark.parametrize("name", BOTH)
def test_an_edit_and_its_hook_give_the_same_logits_and_other_ones_than_none(local, name):
    edit, hook = BOTH[name]
    trace, plain = run(local, edit), run(local)

    logits = by_hand.logits_of(local, local.model.stock(), PROMPT.ids, trace.tokens, hook)
    found = by_hand.compare(trace, logits, "float32")

    assert max(found.distance) <= stock.TOLERANCE["float32"] and found.differ == 0
    assert stock.distance(plain.logits[:1], logits[:1])[0] > 10 * stock.TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (edit_faults.one_layer_late, "add"),
        (edit_faults.prompt_only, "scale"),
        (edit_faults.wrong_position, "one token"),
    ],
)
def test_a_fault_in_the_way_of_an_edit_is_seen_and_is_gone_when_its_context_ends(
    local, fault, name
):
    edit, hook = BOTH[name]
    healthy = run(local, edit)
    with fault(local):
        broken = run(local, edit)
    after = run(local, edit)

    logits = by_hand.logits_of(local, local.model.stock(), PROMPT.ids, broken.tokens, hook)

    assert different(broken.logits, healthy.logits) > 0
    far = by_hand.compare(broken, logits, "float32").distance
    assert max(far) > 10 * stock.TOLERANCE["float32"]
    assert after.differs_from(healthy) == 0 and "submit" not in vars(local.kernel.engine)


def test_hooks_are_taken_off_again(local):
    oracle = local.model.stock()
    before = stock.forced_logits(oracle, PROMPT.ids, [5])

    changed = by_hand.logits_of(local, oracle, PROMPT.ids, [5], BOTH["add"][1])

    assert different(changed, before) > 0
    assert different(stock.forced_logits(oracle, PROMPT.ids, [5]), before) == 0


def test_a_change_knows_the_positions_it_sees(local):
    seen: list[tuple[int, int]] = []

    def note(x, first):
        seen.append((first, len(x)))
        return x

    by_hand.logits_of(local, local.model.stock(), PROMPT.ids, [5, 6, 7], ByHand(2, note))

    assert seen == [(0, 20), (20, 1), (21, 1)]


def test_rows_put_elsewhere_than_in_this_forward_change_nothing():
    change, x = by_hand.put({3: torch.ones(4), 9: 2.0}), torch.zeros(2, 4)

    assert change(x, 0).abs().sum() == 0
    assert change(x, 3).tolist() == [[1.0] * 4, [0.0] * 4]
    assert change(x, 8)[1].tolist() == [2.0] * 4


def test_vectors_of_a_kernel_of_a_notebook_end_with_it(local, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    local.server.vectors.from_array("joy", VECTOR, location=2)

    assert "joy" in local.server.vectors and not any(tmp_path.rglob("*"))
