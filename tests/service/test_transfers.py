"""Tensors in pieces: repeated, resumed, bounded, and nobody else's."""

from __future__ import annotations

import pytest

from kernel_server.protocol.errors import BadArgument, QuotaExceeded, UnknownTransfer
from kernel_server.transfers import MAX_CHUNK, Transfers


class _Bytes:
    dtype = "uint8"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.shape: tuple[int, ...] = (len(data),)
        self.nbytes = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def test_a_piece_can_be_asked_for_again_until_the_transfer_is_cancelled() -> None:
    transfers = Transfers()
    key = transfers.offer("ann", _Bytes(b"0123456789"))

    assert transfers.read("ann", key, 6, 100) == b"6789"
    assert transfers.read("ann", key, 6, 100) == b"6789"
    transfers.cancel("ann", key)
    with pytest.raises(UnknownTransfer):
        transfers.read("ann", key, 6, 100)


def test_a_piece_is_at_most_one_chunk() -> None:
    transfers = Transfers()
    key = transfers.offer("ann", _Bytes(bytes(3 * MAX_CHUNK)))

    assert len(transfers.read("ann", key, 0, 1 << 40)) == MAX_CHUNK


def test_another_owner_neither_reads_nor_cancels() -> None:
    transfers = Transfers()
    key = transfers.offer("ann", _Bytes(b"secret"))

    with pytest.raises(UnknownTransfer):
        transfers.read("bob", key, 0, 6)
    transfers.cancel("bob", key)
    assert transfers.read("ann", key, 0, 6) == b"secret"


def test_a_piece_sent_twice_counts_once() -> None:
    transfers = Transfers()
    key = transfers.begin("ann", "uint8", (6,))
    transfers.write("ann", key, 0, b"abc")

    assert transfers.write("ann", key, 0, b"abc") == 3
    assert transfers.write("ann", key, 3, b"def") == 6
    assert bytes(transfers.take("ann", key).data) == b"abcdef"


def test_a_gap_or_an_overflow_is_refused_and_changes_nothing() -> None:
    transfers = Transfers()
    key = transfers.begin("ann", "uint8", (6,))

    for offset, data in ((3, b"def"), (0, b"abcdefg")):
        with pytest.raises(BadArgument):
            transfers.write("ann", key, offset, data)
    assert transfers.write("ann", key, 0, b"abcdef") == 6


def test_an_unfinished_upload_is_no_value() -> None:
    transfers = Transfers()
    key = transfers.begin("ann", "float32", (2,))
    transfers.write("ann", key, 0, b"1234")

    with pytest.raises(BadArgument, match="4 of 8 bytes"):
        transfers.take("ann", key)


def test_an_announced_length_takes_no_memory_and_is_bounded() -> None:
    transfers = Transfers(owner_bytes=1000)

    with pytest.raises(QuotaExceeded, match="1000"):
        transfers.begin("ann", "float64", (1 << 50,))
    assert transfers.bytes_open() == 0
    assert transfers.begin("bob", "uint8", (1000,))


def test_an_owner_at_the_limit_is_told_the_numbers_and_the_other_is_served() -> None:
    transfers = Transfers(owner_bytes=1000)
    first = transfers.offer("ann", _Bytes(bytes(600)))

    with pytest.raises(
        QuotaExceeded, match=r"2 transfers of 1001 bytes .* 1000 bytes: finish"
    ) as r:
        transfers.begin("ann", "uint8", (401,))
    assert r.value.details == {"needed": 1001, "limit": 1000}
    transfers.offer("bob", _Bytes(bytes(1000)))
    transfers.cancel("ann", first)
    transfers.begin("ann", "uint8", (1000,))
