"""Memory as it is drawn: parts add up, colours are named, swaps have a direction."""

from __future__ import annotations

import re

from djinn_nb.panels.memory_model import (
    FREE,
    PALETTE,
    bars_html,
    bars_of,
    moves_of,
    size_text,
    timeline_svg,
)
from kernel_server.protocol.snapshot import MemoryBrief, MemoryRow, SwapBrief

MIB = 1 << 20
ROWS = (
    MemoryRow(kind="weights", tier="device", nbytes=300 * MIB),
    MemoryRow(kind="KV pages in use", tier="device", nbytes=40 * MIB),
    MemoryRow(kind="KV pages free", tier="device", nbytes=60 * MIB),
    MemoryRow(kind="activations", tier="device", nbytes=0),
    MemoryRow(kind="KV pages in use (host)", tier="host", nbytes=10 * MIB),
    MemoryRow(kind="KV pages free (host)", tier="host", nbytes=30 * MIB),
    MemoryRow(kind="rest <of> the process", tier="host", nbytes=200 * MIB),
)
MEMORY = MemoryBrief(
    device_used=40 * MIB, device_total=100 * MIB, host_used=10 * MIB, host_total=40 * MIB,
    disk_used=0, disk_total=0, rows=ROWS,
)  # fmt: skip


def swap(time_s: float, nbytes: int, text: str) -> SwapBrief:
    return SwapBrief(time_s=time_s, session_id="s1", nbytes=nbytes, text=text)


SWAPS = (
    swap(1000.0, 5 * MIB, "5 pages device to host, 1.0 GB/s: room for s2"),
    swap(1001.0, 0, "2 pages left the device, copied before: room for s2"),
    swap(1010.0, 3 * MIB, "3 pages disk to host, 1.0 GB/s: going on"),
    swap(1030.0, 8 * MIB, "8 pages host to device, 1.0 GB/s: going on"),
)


def test_a_bar_holds_every_kind_once_and_they_add_up():
    device, host = bars_of(MEMORY)

    assert (device.tier, host.tier) == ("device", "host")
    assert [part.kind for part in device.parts] == ["KV pages in use", "KV pages free", "weights"]
    assert device.nbytes == sum(row.nbytes for row in ROWS if row.tier == "device")
    assert (device.kv_used, device.kv_total) == (40 * MIB, 100 * MIB)


def test_kinds_are_told_apart_by_colour_and_what_is_free_has_none():
    device, host = bars_of(MEMORY)
    assert device.parts[0].colour == host.parts[0].colour  # one kind, one colour, in every tier
    for bar in (device, host):
        colours = [part.colour for part in bar.parts if part.colour != FREE]
        assert len(set(colours)) == len(colours)
        assert set(colours) <= set(PALETTE)
        assert [part.kind for part in bar.parts if part.colour == FREE] == [
            kind for kind in (part.kind for part in bar.parts) if "free" in kind
        ]


def test_more_kinds_than_colours_are_drawn_too():
    rows = tuple(
        MemoryRow(kind=f"kind {i}", tier="device", nbytes=i + 1) for i in range(3 * len(PALETTE))
    )
    memory = MemoryBrief(
        device_used=0, device_total=0, host_used=0, host_total=0, disk_used=0, disk_total=0,
        rows=rows,
    )  # fmt: skip

    (bar,) = bars_of(memory)

    assert len(bar.parts) == len(rows)


def test_the_bars_say_sizes_with_units_the_budget_and_the_missing_tier():
    drawn = bars_html(MEMORY, "cuda:0")

    assert "device (cuda:0): KV 40.0 MiB of 100.0 MiB" in drawn
    assert "weights 300.0 MiB (75%)" in drawn
    assert drawn.count("KV budget") == 2
    assert "left:25.00%" in drawn  # 100 of 400 MiB
    assert "disk: no such tier on this server" in drawn
    assert "rest &lt;of&gt; the process" in drawn and "<of>" not in drawn
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%;background", drawn)]
    assert abs(sum(widths) - 200) < 0.1


def test_swaps_go_up_or_down_and_those_without_bytes_are_left_to_the_list():
    moves = moves_of(SWAPS)

    assert [(move.up, move.nbytes) for move in moves] == [
        (False, 5 * MIB), (True, 3 * MIB), (True, 8 * MIB),
    ]  # fmt: skip


def test_the_timeline_has_a_mark_per_swap_in_time_and_a_legend_with_units():
    drawn = timeline_svg(SWAPS)

    places = [float(x) for x in re.findall(r"<rect x='([\d.]+)'", drawn)]
    assert places == sorted(places) and len(places) == 3
    assert "11.0 MiB" in drawn and "5.0 MiB" in drawn  # what came up, what went down
    assert "3 swaps from" in drawn
    assert timeline_svg(()) == timeline_svg(SWAPS[1:2]) == ""


def test_sizes_for_people():
    assert [size_text(n) for n in (0, 1023, 1024, 5 * MIB, 3 << 30)] == [
        "0 B", "1023 B", "1.0 KiB", "5.0 MiB", "3.0 GiB",
    ]  # fmt: skip
