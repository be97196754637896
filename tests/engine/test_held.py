"""What is captured of a forward, and what a fork shares."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kernel_server.engine.held import KEEP_ROWS, SessionTensors, reduce_points
from kernel_server.engine.segments import ForwardState
from kernel_server.state import tensor_bytes


def _forward(tokens: int, point: int, chunk: int = 8) -> ForwardState:
    cuts = [*range(0, tokens, chunk), tokens]
    bounds = tuple(itertools.pairwise(cuts))
    state = ForwardState(tuple(range(tokens)), 0, bounds)
    _reach(state, point)
    return state


def _reach(state: ForwardState, point: int) -> None:
    state.point = point
    state.residual = [torch.randn(1, b - a, 6) for a, b in state.bounds]


def test_the_state_knows_which_forwards_are_kept_whole() -> None:
    assert tensor_bytes.KEPT_ROWS == KEEP_ROWS


def test_a_kept_stop_has_its_own_forward_and_the_figures_of_its_line() -> None:
    held = SessionTensors()
    for _ in range(2):
        state = _forward(2, 0)
        held.begin(state)
        held.note_value(state, num_layers=4)
        held.finish(torch.zeros(3))
    held.begin(_forward(2, 0))
    held.keep(7)
    line = SessionTensors(history=[*held.history, held.history[0]])
    here, kept = held.standing(), held.stops[7]

    assert kept.history == [] and kept.num_finished == 2
    found = held.at_stop(7, line)
    assert all(a is b for a, b in zip(found.history, held.history, strict=True))
    assert found.standing() is not here and found.standing().residual[0] is here.residual[0]
    assert found.stops is held.stops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_are_those_of_the_values(dtype: torch.dtype) -> None:
    values = torch.randn(3, 4, 6).to(dtype)

    found = reduce_points(values, first_token=7)

    assert torch.allclose(found.norm, values.float().norm(dim=-1))
    assert torch.equal(found.largest, values.float().abs().amax(-1))
    assert found.num_nan.tolist() == [0, 0, 0]
    assert found.first_token == 7


def test_every_nan_is_counted_at_its_point() -> None:
    values = torch.randn(3, 4, 6)
    values[1, 2, :2] = math.nan
    values[1, 0, 5] = math.nan
    values[2, 3, 0] = math.inf

    found = reduce_points(values, 0)

    assert found.num_nan.tolist() == [0, 3, 0]
    assert found.norm[1].isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize("tokens", [1, KEEP_ROWS, KEEP_ROWS + 5])
def test_short_and_long_forwards_capture_the_same(tokens: int) -> None:
    held = SessionTensors()
    state = _forward(tokens, 0)
    held.begin(state)
    expected = []
    for point in range(3):
        _reach(state, point)
        expected.append(torch.cat(state.residual, 1)[0])
        held.note_value(state, num_layers=4)

    found = held.captured()
    assert found is not None
    assert torch.allclose(found.norm, torch.stack(expected).norm(dim=-1))
    rows = held.last_rows()
    assert len(rows) == 3
    assert all(torch.equal(row, whole[-1]) for row, whole in zip(rows, expected, strict=True))


def test_noting_a_point_again_replaces_it() -> None:
    held = SessionTensors()
    state = _forward(2, 0)
    held.begin(state)
    held.note_value(state, num_layers=4)
    _reach(state, 0)
    held.note_value(state, num_layers=4)

    found = held.captured()
    assert found is not None
    assert torch.allclose(found.norm, state.residual[0].norm(dim=-1))


def test_a_fork_goes_its_own_way() -> None:
    held = SessionTensors()
    state = _forward(2, 0)
    held.begin(state)
    held.note_value(state, num_layers=4)
    child = held.fork()
    child_state = child.standing()
    _reach(child_state, 1)
    child.note_value(child_state, num_layers=4)
    child.finish(torch.zeros(3))

    assert held.standing().point == 0
    found = held.captured()
    assert found is not None
    assert found.norm.shape == (1, 2)
    assert held.history == []
    assert held.last_logits is None
