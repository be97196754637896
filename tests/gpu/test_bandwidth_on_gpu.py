"""The doctor's figures of the device are there, plausible, and timed by the device."""

from __future__ import annotations

import json

import pytest

from kernel_server.doctor.bandwidth import measure

pytestmark = pytest.mark.gpu

MIB = 2**20
CHUNKS = (64 * 2**10, MIB, 16 * MIB, 256 * MIB)


@pytest.fixture(scope="module")
def measured(turn, of_the_run):
    """Several times: whoever uses the bus at the same moment can only make a copy slower. One
    process of a run does it for all."""
    kept = of_the_run / "bandwidth.json"
    with turn():
        if not kept.exists():
            found = [measure("cuda:0", chunks=CHUNKS, repetitions=5) for _ in range(3)]
            kept.write_text(json.dumps(found))
        return json.loads(kept.read_text())


@pytest.fixture(scope="module")
def found(measured):
    return measured[0]


@pytest.fixture(scope="module")
def medians(measured):
    rows = [row for found in measured for row in found["rows"]]
    best = dict.fromkeys(((row["name"], row["chunk_bytes"]) for row in rows), 0.0)
    for row in rows:
        key = row["name"], row["chunk_bytes"]
        best[key] = max(best[key], row["median"])
    return best


def test_every_kind_of_copy_is_measured_at_every_size(found, medians):
    names = (
        "host to device, pinned", "device to host, pinned", "both ways at once, pinned",
        "host to device, pageable", "device to host, pageable", "device copy",
    )  # fmt: skip

    assert {(name, chunk) for name in names for chunk in CHUNKS} <= set(medians)
    assert not [what for what in found["absent"] if "device" in what]


def test_the_hardware_is_named(found):
    hardware = found["hardware"]

    assert hardware["device"] and hardware["driver"] and hardware["cuda"]
    assert hardware["versions"]["torch"]


@pytest.mark.parametrize("way", ["host to device", "device to host"])
def test_pinned_memory_in_large_chunks_is_the_fastest_way_to_the_device(medians, way):
    pinned = medians[f"{way}, pinned", 256 * MIB]

    assert pinned > medians[f"{way}, pageable", 256 * MIB]
    assert pinned > medians[f"{way}, pinned", 64 * 2**10]
    assert 2 < pinned < 500


def test_both_ways_at_once_is_more_than_either(medians):
    both = medians["both ways at once, pinned", 256 * MIB]
    each = [medians[f"{way}, pinned", 256 * MIB] for way in ("host to device", "device to host")]

    assert max(each) < both < 1.1 * sum(each)


def test_the_device_copies_faster_than_the_bus(medians):
    assert medians["device copy", 256 * MIB] > medians["both ways at once, pinned", 256 * MIB]


def test_pinned_and_device_copies_are_timed_by_events_of_the_device(found):
    sources = {one["name"]: one["source"] for one in found["rows"]}

    assert sources["host to device, pinned"] == sources["device copy"] == "CUDA event"
    assert sources["both ways at once, pinned"] == sources["host copy"] == "wall clock"
