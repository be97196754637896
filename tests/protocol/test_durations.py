"""Durations as people write them."""

from __future__ import annotations

import pytest

from kernel_server.protocol.durations import in_words, parse_seconds
from kernel_server.protocol.errors import BadArgument


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("8h", 28800), ("90min", 5400), ("30s", 30), ("30", 30), (" 1.5 h ", 5400), ("2d", 172800)],
)
def test_a_duration_is_a_number_and_a_unit(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "h", "8 hours", "-8h", "inf", "nan", "1e3s", "8m", "8h 30min"]
)
def test_what_is_none_is_refused(text):
    with pytest.raises(BadArgument, match="is no duration: write 8h, 90min, 30s"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(28800, "8 h"), (5400, "90 min"), (3600, "60 min"), (100, "100 s"), (2.96, "2.96 s"),
     (172800, "2 d"), (3.24, "3.24 s"), (119.99, "120 s")],
)  # fmt: skip
def test_it_is_told_in_the_largest_unit_of_which_it_is_two(seconds, text):
    assert in_words(seconds) == text
