"""Long random walks through the same rules as `test_random`, weighted towards a working day.

Hypothesis likes short and simple examples, which is good for finding and shrinking a fault; these
walks fill the pool, fork forks and edit in the middle of everything.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from kernel_server.protocol import messages as m
from tests.state.test_random import ARGUMENTS, OWNERS, Clients

STEPS = 400
PLACES = ["embedding", "layers.0.output", "layers.2.output", "layers.4.output", "final_norm"]
PLACES += ["logits", "layers.0.attention.q", "layers.3.mlp.output", "layers.4.middle"]


class Walk:
    """One seed's way through the rules."""

    def __init__(self, seed: int) -> None:
        self.any = random.Random(seed)
        self.clients = Clients()
        self.clients.start()

    def step(self) -> None:
        clients, pick = self.clients, self.any.randrange(22)
        busy, running = clients.busy(), clients.busy() and clients.world.engine.interrupted
        ways = [
            (
                10,
                lambda: clients.run_on(
                    pick, self.one([m.Continue, m.Continue, m.Next, m.StepIn, m.StepOut])
                ),
            ),
            (2, lambda: clients.run_to(pick, self.one(PLACES))),
            (1, lambda: clients.run_on_too_late(pick, m.Continue)),
            (4, lambda: clients.pause(pick)),
            (1, lambda: clients.go_back(pick, self.digit() % 4, self.one(PLACES))),
            (1, lambda: clients.climb_about(pick, self.any.randrange(31), self.chance(0.2))),
            (4, lambda: clients.set_breakpoint(pick, **self.breakpoint())),
            (1, lambda: clients.watch(pick, **self.watch())),
            (2, lambda: clients.read_log(pick, self.small(), self.small(), self.chance(0.5))),
            (
                2,
                lambda: clients.change_breakpoint(
                    pick, self.small(), self.one([None, True, False])
                ),
            ),
            (7, lambda: clients.add_edit(pick, self.edit(), self.chance(0.6))),
            (3, lambda: clients.change_edit(pick, self.small(), self.one([None, True, False]))),
            (2, lambda: clients.undo(pick)),
            (1, lambda: clients.read(pick, self.selector(), self.chance(0.5))),
            (25 * busy, lambda: clients.come_to_the_end(self.chance(0.5), self.digit(), 1)),
            (30 * running, lambda: clients.be_cut_short(self.digit(), self.chance(0.5))),
            (1 * busy, lambda: clients.break_down(self.digit(), self.digit() % 5, 3)),
            (9 * bool(clients.world.errands), lambda: clients.apply_edits(self.digit() % 5)),
        ]
        if clients.room():
            ways += [
                (5, lambda: clients.launch(**self.prompt())),
                (7, lambda: clients.fork(pick, None)),
            ]
        else:
            ways += [(8, lambda: clients.terminate(pick, "ada"))]
        self.any.choices([way for _, way in ways], [weight for weight, _ in ways])[0]()

    def one(self, of: list[Any]) -> Any:
        return self.any.choice(of)

    def chance(self, of: float) -> bool:
        return self.any.random() < of

    def digit(self) -> int:
        return self.any.randrange(10)

    def small(self) -> int:
        return self.any.randint(1, 4)

    def prompt(self) -> dict[str, Any]:
        tokens = [self.any.randrange(6) for _ in range(self.small() * 2)]
        return {"owner": self.one(list(OWNERS)), "prompt": tokens, "new": 4, "entry": False}

    def breakpoint(self) -> dict[str, Any]:
        return {
            "location": self.one(PLACES),
            "when": self.one(["any", "any", "prefill", "decode"]),
            "condition": self.one([None, "norm > 3"]),
            "ignore": self.one([0, 0, 1, 2]),
            "once": self.chance(0.3),
        }

    def watch(self) -> dict[str, Any]:
        return {
            "places": [self.one(PLACES) for _ in range(self.small())],
            "kind": self.one(["data breakpoint", "logpoint"]),
            "when": self.one(["any", "any", "prefill", "decode"]),
            "condition": self.one(["norm > 3", None]),
            "tokens": self.selector(),
            "on_full": self.one(["drop", "drop", "drop", "stop"]),
        }

    def selector(self) -> m.Selector:
        return self.one(
            [
                m.ALL,
                m.ALL,
                m.Selector(kind="generated"),
                m.Selector(kind="indices", indices=(-1,)),
                m.Selector(kind="slice", start=-3),
                m.Selector(kind="text", text="a", token_ids=(1, 2, 3)),
            ]
        )

    def edit(self) -> m.EditSpec:
        kind, location = self.one(["zero", "zero", *m.EDIT_KINDS]), self.one(PLACES)
        if kind in ("force", "ban", "replace") and self.chance(0.8):
            location = "logits"
        return m.EditSpec(
            kind=kind,
            location=location,
            tokens=self.selector(),
            sticky=self.chance(0.5),
            **ARGUMENTS[kind],
        )


@pytest.mark.parametrize("seed", range(12))
def test_a_long_day_breaks_no_invariant(seed: int):
    walk = Walk(seed)
    for _ in range(STEPS):
        walk.step()
    kinds = Counter(e.kind for log in walk.clients.world.events.values() for e in log)
    walk.clients.teardown()

    assert kinds["stopped"] > 10 and kinds["finished"] and kinds["continued"] > 20
