"""Token ids as their bytes: they read as the tuple they stand for, and cross without being read."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadMessage
from kernel_server.protocol.token_list import TokenList

_ids = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=90)
_cuts = st.none() | st.integers(-100, 100)


def info(tokens: TokenList) -> m.SessionInfo:
    """A description of a session with these tokens."""
    return m.SessionInfo(
        id="s1", name="s1", owner="ada", status="waiting", tokens=tokens, num_prompt_tokens=1,
        max_new_tokens=1, temperature=0.0, top_p=1.0, seed=0, forward=0, location=None,
        layers_executed=0, layers_replayed=0, stop_number=0, stop=None, finish_reason=None,
        error=None, parent=None, num_pages=0, kv_bytes=0, revision=0, event_seq=0,
    )  # fmt: skip


@given(_ids, _ids, _cuts, _cuts, st.sampled_from([None, 1, 2, -1]))
def test_it_reads_as_the_tuple_it_stands_for(
    ids: list[int], more: list[int], start: int | None, stop: int | None, step: int | None
) -> None:
    made, wanted = TokenList(ids), tuple(ids)

    assert made == wanted and wanted == made and hash(made) == hash(wanted)
    assert tuple(made) == wanted and len(made) == len(wanted) and bool(made) == bool(wanted)
    assert made[start:stop:step] == wanted[start:stop:step]
    assert isinstance(made[start:stop], tuple)
    assert [made[i] for i in range(len(ids))] == ids
    assert made + more == (*ids, *more)
    assert TokenList.of_bytes(made.packed) == made
    assert pickle.loads(pickle.dumps(made)) == made == copy.deepcopy(made)
    assert (made == TokenList(more)) == (ids == more)
    assert made != [*ids, 1] and made != (*ids, 1)


def test_numbers_that_are_no_int64_are_refused() -> None:
    with pytest.raises(OverflowError):
        TokenList([2**63])
    with pytest.raises(IndexError):
        TokenList([1])[1]
    with pytest.raises(TypeError):
        TokenList(["1"])  # type: ignore[list-item]


@given(_ids)
def test_it_crosses_as_bytes_and_the_frame_is_let_go(ids: list[int]) -> None:
    frame = bytearray(codec.encode(info(TokenList(ids))))
    found = codec.decode(frame)

    assert found.tokens == tuple(ids)
    frame[:] = bytes(len(frame))  # neither kept alive nor read again
    assert found.tokens == tuple(ids)


def test_what_sends_it_twice_reads_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = codec.decode(codec.encode(info(TokenList(range(8000))))).tokens

    def read(self: TokenList) -> None:
        raise AssertionError("a number was read")

    monkeypatch.setattr(TokenList, "__iter__", read)
    monkeypatch.setattr(TokenList, "__getitem__", read)
    twice = codec.decode(codec.encode(info(tokens)))
    assert twice == info(tokens) and len(twice.tokens) == 8000


@pytest.mark.parametrize(
    "sent", [[1, 2.0], [2**63], ["1"], "12", {"$ints": 2}, {"$ints": -1}, {"$ints": "1"}, None]
)
def test_what_is_no_list_of_ids_is_refused(sent: object) -> None:
    tree = codec.plain(info(TokenList()))
    assert tree["body"]["tokens"] == []
    tree["body"]["tokens"] = sent
    header = json.dumps(tree).encode()

    with pytest.raises(BadMessage):
        codec.decode(b"DJN1" + len(header).to_bytes(4, "little") + header)


def test_a_list_written_out_is_read_too() -> None:
    tree = codec.plain(info(TokenList([7, 8])))
    assert tree["body"]["tokens"] == [7, 8]
    header = json.dumps(tree).encode()

    found = codec.decode(b"DJN1" + len(header).to_bytes(4, "little") + header)
    assert found.tokens == (7, 8)
