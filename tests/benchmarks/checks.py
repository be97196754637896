"""What an armed breakpoint that does not hit costs a decode: four checks of one token, 20 µs.

One token of the bundled model's width and of a 13B model's; conditions on token, position, forward
and norm, none of which holds. Beside it its parts: the norm alone, and one condition alone.
`python -m tests.benchmarks.checks` prints the record as JSON, and fails where a median is twice its
limit: a busy machine is slower, a mistake is slower still.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from kernel_server.engine.checks import evaluate_checks
from kernel_server.engine.variables import token_norms
from kernel_server.protocol.conditions import parse_condition
from kernel_server.state.instructions import Check

CONDITIONS = ('token == " to"', "position > 100000", "forward == 3", "norm > 1e9")
WIDTHS = {"bundled float32": (384, torch.float32), "13B bfloat16": (5120, torch.bfloat16)}
LIMITS_US = {"four checks": 20.0, "norm": 5.0, "condition": 2.0}
REPETITIONS = 30
CALLS = 500

Arm = Callable[[], object]


def measure(repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Time every arm `repetitions` times, alternating; microseconds per call."""
    torch.set_num_threads(1)
    arms = {
        f"{name}, {width}": arm for width in WIDTHS for name, arm in _arms(*WIDTHS[width]).items()
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    with torch.inference_mode():
        for _ in range(repetitions):
            for name, arm in arms.items():
                times[name].append(_per_call_us(arm))
    return {
        "repetitions": repetitions,
        "limits_us": LIMITS_US,
        "us": {name: _spread(each) for name, each in times.items()},
    }


def _arms(width: int, dtype: torch.dtype) -> dict[str, Arm]:
    chunks = [torch.randn(1, 1, width).to(dtype)]
    parsed = [parse_condition(text) for text in CONDITIONS]
    checks = [
        Check(breakpoint_id=index, point=21, names=one.names, holds=one.holds, hits=0)
        for index, one in enumerate(parsed)
    ]
    one = parse_condition('token == " to" and norm > 30')
    values = {"token": " to", "norm": 31.5}
    return {
        "four checks": lambda: evaluate_checks(checks, chunks, (5,), lambda _: " a", 140, 12),
        "norm": lambda: token_norms(chunks),
        "condition": lambda: one.holds(values),
    }


def _per_call_us(arm: Arm) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        arm()
    return (time.perf_counter() - start) / CALLS * 1e6


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}


def over_limit(record: dict[str, Any]) -> list[str]:
    """A line for each arm whose median is more than twice its limit."""
    return [
        f"{name}: {spread['median']} µs, limit {limit} µs"
        for name, spread in record["us"].items()
        if spread["median"] > 2 * (limit := LIMITS_US[name.split(",")[0]])
    ]


if __name__ == "__main__":
    found = measure()
    print(json.dumps(found, indent=2))
    sys.exit("\n".join(over_limit(found)) or None)
