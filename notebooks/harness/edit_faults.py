"""Faults planted in the way edits reach the engine, in one running kernel and for one `with` only.

They rewrite the instructions that this kernel's engine is given, so the shipped code has no switch
for them. What each changes is measured by the notebook, not assumed here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from kernel_server.state.instructions import EditPlan, RunStretch
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import Local

Fault = Callable[[Local], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def one_layer_late(local: Local) -> Iterator[None]:
    """Edits still ahead are made one layer too late."""
    with _rewritten(local, lambda stretch, plan: replace(plan, point=plan.point + 1)):
        yield


@contextlib.contextmanager
def prompt_only(local: Local) -> Iterator[None]:
    """Sticky edits are made in the prompt and forgotten in every decode."""
    with _rewritten(local, lambda stretch, plan: None if stretch.forward else plan):
        yield


@contextlib.contextmanager
def wrong_position(local: Local) -> Iterator[None]:
    """Edits of chosen tokens change the token before each of them."""

    def shifted(stretch: RunStretch, plan: EditPlan) -> EditPlan:
        if plan.rows is None:
            return plan
        return replace(plan, rows=tuple(max(row - 1, 0) for row in plan.rows))

    with _rewritten(local, shifted):
        yield


@contextlib.contextmanager
def _rewritten(
    local: Local, change: Callable[[RunStretch, EditPlan], EditPlan | None]
) -> Iterator[None]:
    """Let every stretch of this kernel carry other edits; None: without this one."""
    engine = local.kernel.engine
    submit = engine.submit

    def altered(instruction: Any) -> None:
        if isinstance(instruction, RunStretch):
            plans = [change(instruction, plan) for plan in instruction.edits]
            instruction = replace(instruction, edits=tuple(p for p in plans if p is not None))
        submit(instruction)

    with instead(engine, "submit", altered):
        yield
