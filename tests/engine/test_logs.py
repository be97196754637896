"""What logpoints note of a tensor, against torch by hand, and what room they take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernel_server.engine.forward_state import ForwardState
from kernel_server.engine.logs import (
    MAX_RECORD_ROWS,
    RECORD_BYTES,
    REPLY_BYTES,
    ROW_BYTES,
    Log,
    StretchLogs,
)
from kernel_server.protocol import messages as m
from kernel_server.protocol.conditions import parse_condition
from kernel_server.state.events import LogResult
from kernel_server.state.instructions import Check, LogPlan

torch.set_num_threads(1)
LAYERS = 5


def plan(point: float = 3, **changed: Any) -> LogPlan:
    about: dict[str, Any] = {
        "breakpoint_id": 1,
        "check": None,
        "rows": None,
        "what": "summary",
        "room_bytes": 1 << 30,
        "stop_when_full": False,
    }
    return LogPlan(point=point, **(about | changed))


def on_condition(**changed: Any) -> LogPlan:
    parsed = parse_condition("norm > 0")
    check = Check(breakpoint_id=1, point=3, names=parsed.names, holds=parsed.holds, hits=0)
    return plan(check=check, **changed)


def note(
    values: list[list[Tensor]],
    plans: list[LogPlan],
    *,
    tokens: int,
    room: int = 1 << 30,
    held: dict[int, tuple[int, ...]] | None = None,
    logs: dict[int, Log] | None = None,
    first_point: float = 3,
) -> tuple[dict[int, Log], tuple[LogResult, ...], list[bool]]:
    """Write the logs of a forward whose values at successive points are `values`."""
    logs = {} if logs is None else logs
    writer = StretchLogs(logs, plans, room, forward=2, num_layers=LAYERS)
    forward = ForwardState(tuple(range(100, 100 + tokens)), 10, ((0, tokens),))
    stops = []
    for number, chunks in enumerate(values):
        forward.point = first_point + number
        stops.append(writer.note(forward, chunks, held or {}))
    return logs, writer.finish(), stops


def some(tokens: int, width: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, width, generator=generator).to(dtype)


def read(log: Log, after: int = 0, release: bool = False) -> m.LogReply:
    request = m.ReadLog(session_id="s1", breakpoint_id=1, after=after, release=release)
    return log.read(request)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 1), (7, 7), (40, 40), (40, 16)])
def test_a_record_holds_the_figures_and_the_values(tokens, chunk, dtype):
    whole = some(tokens, dtype=dtype)
    whole[0, 0, 2] = math.nan
    logs, _, _ = note([list(whole.split(chunk, 1))], [plan(what="tensor")], tokens=tokens)
    (record,) = read(logs[1]).records

    assert (record.seq, record.forward, record.location) == (1, 2, "layers.2.output")
    assert record.positions == tuple(range(10, 10 + tokens))
    assert record.token_ids == tuple(range(100, 100 + tokens))
    exact = whole[0].double()
    figures = record.per_token.numpy()
    assert math.isnan(figures[0, 0]) and math.isnan(figures[0, 1])
    np.testing.assert_allclose(figures[1:, 0], exact[1:].norm(dim=-1), rtol=1e-5)
    np.testing.assert_array_equal(figures[1:, 1], exact[1:].abs().amax(-1).float())
    assert record.num_nan.numpy().tolist() == [1] + [0] * (tokens - 1)
    assert record.value is not None and record.value.dtype == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(record.value.numpy(), whole[0].float().numpy())


@pytest.mark.parametrize("rows", [(2,), (4, 5, 6), (30, 0, 17), (15, 16, 17, 18)])
def test_the_chosen_rows_are_noted_in_the_order_chosen(rows):
    whole = some(32)
    logs, _, _ = note([list(whole.split(16, 1))], [plan(what="tensor", rows=rows)], tokens=32)
    (record,) = read(logs[1]).records

    assert record.positions == tuple(10 + row for row in rows)
    assert record.value is not None
    np.testing.assert_array_equal(record.value.numpy(), whole[0, list(rows)].numpy())


def test_a_condition_chooses_the_tokens_and_nothing_is_noted_where_it_holds_nowhere():
    values = [[some(5)]]
    logs, results, _ = note(values, [on_condition()], tokens=5, held={1: (11, 14)})
    (record,) = read(logs[1]).records

    assert record.positions == (11, 14)
    logs, results, _ = note(values, [on_condition()], tokens=5, held={})
    assert (logs, results) == ({}, ())


def test_at_the_logits_the_last_token_is_noted():
    logits = some(1, width=50)
    plans = [plan(LAYERS + 2), plan(LAYERS + 2, breakpoint_id=2, rows=(0, 1))]
    logs, _, _ = note([[logits]], plans, tokens=4, first_point=LAYERS + 2)

    assert set(logs) == {1}  # the other's tokens have no logits
    assert read(logs[1]).records[0].positions == (13,)


@pytest.mark.parametrize("tokens", [1, 4])
def test_records_of_one_stretch_are_numbered_on_each_with_its_own_values(tokens):
    values = [[some(tokens, seed=i)] for i in range(4)]
    plans = [plan(3 + i, what="tensor") for i in range(3)]
    logs, _, _ = note(values[:3], plans, tokens=tokens)
    note(values[3:], [plan(what="tensor")], tokens=tokens, logs=logs)
    records = read(logs[1]).records

    assert [record.seq for record in records] == [1, 2, 3, 4]
    assert [record.location[7] for record in records] == ["2", "3", "4", "2"]
    for record, (value,) in zip(records, values, strict=True):
        assert record.value is not None
        np.testing.assert_array_equal(record.value.numpy(), value[0].numpy())
        np.testing.assert_allclose(record.per_token.numpy()[:, 0], value[0].norm(dim=-1), rtol=1e-6)


def test_points_of_other_widths_are_noted_together():
    values = [[some(2, width=6)], [some(2, width=24)], [some(2, width=6, dtype=torch.bfloat16)]]
    logs, _, _ = note(values, [plan(3 + i, what="tensor") for i in range(3)], tokens=2)

    found = [record.value for record in read(logs[1]).records]
    for value, chunks in zip(found, values, strict=True):
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), chunks[0][0].float().numpy())


def test_what_is_changed_afterwards_does_not_change_a_record():
    value = some(3)
    kept = value.clone()
    logs, _, _ = note([[value]], [plan(what="tensor")], tokens=3)
    value.zero_()
    (record,) = read(logs[1]).records

    assert record.value is not None
    np.testing.assert_array_equal(record.value.numpy(), kept[0].numpy())


SIZE = RECORD_BYTES + ROW_BYTES  # of one token's summary


def test_what_finds_no_room_is_dropped_and_counted():
    values = [[some(1)] for _ in range(3)]
    plans = [plan(3 + i, room_bytes=2 * SIZE) for i in range(3)]
    logs, (result,), stops = note(values, plans, tokens=1)

    assert (result.sizes, result.dropped, result.refused_bytes) == ((SIZE, SIZE), 1, None)
    assert (result.held, stops) == (3, [False] * 3)
    assert (len(logs[1].records), logs[1].dropped) == (2, 1)
    assert read(logs[1]).dropped == 1


def test_a_log_that_may_lose_nothing_says_stop():
    plans = [plan(3 + i, room_bytes=SIZE, stop_when_full=True) for i in range(2)]
    _, (result,), stops = note([[some(1)], [some(1)]], plans, tokens=1)

    assert stops == [False, True]
    assert (result.sizes, result.dropped, result.refused_bytes) == ((SIZE,), 1, SIZE)


def test_all_logs_of_a_stretch_share_its_room():
    plans = [plan(breakpoint_id=number) for number in (1, 2, 3)]
    _, results, _ = note([[some(1)]], plans, tokens=1, room=2 * SIZE)

    assert [len(result.sizes) for result in results] == [1, 1, 0]
    assert results[2].dropped == 1


def test_long_prompts_and_wide_tensors_take_several_records():
    tokens = MAX_RECORD_ROWS + 10
    logs, (result,), _ = note([[some(tokens, width=2)]], [plan()], tokens=tokens)
    first, second = read(logs[1]).records

    assert len(result.sizes) == 2 and result.held == 1
    assert first.positions + second.positions == tuple(range(10, 10 + tokens))
    logs, _, _ = note([[some(40, width=30_000)]], [plan(what="tensor")], tokens=40)
    answers, after = [], 0
    while (reply := read(logs[1], after)).records:
        answers.append(reply)
        after = reply.records[-1].seq
        assert sum(len(r.value.data) for r in reply.records if r.value) <= REPLY_BYTES
    assert len(answers) > 2 and after == answers[0].last_seq
    assert sum(len(r.positions) for reply in answers for r in reply.records) == 40


def test_what_is_released_is_gone_and_what_follows_is_not():
    logs, _, _ = note([[some(1)] for _ in range(3)], [plan(3 + i) for i in range(3)], tokens=1)

    assert [r.seq for r in read(logs[1], 1).records] == [2, 3]
    assert [r.seq for r in read(logs[1], 2, release=True).records] == [3]
    assert [r.seq for r in read(logs[1]).records] == [3]
    assert read(logs[1]).last_seq == 3
