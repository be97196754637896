"""Messages to bytes and back: every class whole, and no harm in bytes that are not one."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.codec import (
    MAX_DEPTH,
    decode,
    encode,
    plain,
    raise_error,
    rebuild_error,
)
from kernel_server.protocol.errors import BadMessage, OutOfPages, ServerFault
from kernel_server.protocol.messages import MESSAGES, ErrorInfo
from tests.protocol.instances import any_message, instances, same


def framed(header: Any, buffers: bytes = b"") -> bytes:
    """Bytes of a message with this header, given as JSON's values or as bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return b"DJN1" + struct.pack("<I", len(raw)) + raw + buffers


def body(name: str, **fields: Any) -> bytes:
    return framed({"type": name, "body": fields})


def chunk(dtype: Any, shape: Any, buffers: bytes = b"", **extra: Any) -> bytes:
    array = {"$array": dtype, "shape": shape, **extra}
    return framed({"type": "Chunk", "body": {"offset": 0, "data": array}}, buffers)


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_every_message_comes_back_as_it_was_sent(name):
    @settings(max_examples=25)
    @given(instances(MESSAGES[name]))
    def round_trip(message):
        data = encode(message)

        assert same(decode(data), message)
        assert encode(decode(data)) == data

    round_trip()


def test_values_json_does_not_have_come_back():
    details = {
        "a": [float("nan"), float("inf"), -0.0, 2**64 - 1],
        "$float": {"$dict": {}},
        "": None,
    }
    info = ErrorInfo(code="BadEdit", message="ä\n\U0001f600\x00", details=details)

    assert same(decode(encode(info)), info)


def test_tuples_among_free_values_come_back_as_lists_and_numpy_floats_as_floats():
    info = ErrorInfo(code="BadEdit", message="", details={"a": (1, (2.0,)), "b": np.float64("nan")})
    details = decode(encode(info)).details

    assert details["a"] == [1, [2.0]]
    assert type(details["b"]) is float


def test_arrays_are_views_of_the_bytes_that_came():
    data = encode(m.Chunk(offset=3, data=Array("uint8", (1000,), bytes(1000))))
    array = decode(data).data

    assert isinstance(array.data, memoryview)
    assert array.data.obj is data


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_any_bytes_like_object_is_read(make):
    assert decode(make(encode(m.Pause(session_id="a")))) == m.Pause(session_id="a")


# --- what is not sent -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [object(), {1: object()}, Array("uint8", (), b"a"), m.ALL, {"a": [m.ALL]}, {1, 2}, b"a"],
)
def test_what_would_not_come_back_is_not_sent(value):
    with pytest.raises(TypeError, match="does not cross the wire"):
        encode(ErrorInfo(code="BadEdit", message="", details={"a": value}))


def test_what_is_no_message_is_not_sent():
    with pytest.raises(TypeError, match="is not a message"):
        encode({"type": "Pause"})


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1])
def test_numbers_beyond_64_bits_are_not_sent(number):
    with pytest.raises(BadMessage, match="64-bit"):
        encode(m.TokenIds(token_ids=(1, number)))
    with pytest.raises(BadMessage, match="64-bit"):
        encode(m.Continue(session_id="a", seen=number))


def test_what_is_nested_too_deep_is_not_sent():
    deep: Any = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]

    with pytest.raises(BadMessage, match="nested deeper"):
        encode(ErrorInfo(code="BadEdit", message="", details={"a": deep}))


# --- bytes that are no message ------------------------------------------------------------------

DEEP: Any = []
for _ in range(MAX_DEPTH + 1):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "at least 8 bytes, 0 came"),
        (b"DJN1\x00\x00\x00", "at least 8 bytes, 7 came"),
        (b"HTTP/1.1 200 OK", "wrong magic"),
        (b"DJN1\xff\xff\xff\xff{}", "header of 4294967295 bytes announced, 2 came"),
        (framed(b"\xff\xfe"), "not JSON"),
        (framed('{"type": "Pause"}'.encode("utf-16")), "not JSON"),
        (framed(b"{"), "not JSON"),
        (framed(b"[" * 100_000), "not JSON"),
        (framed(b'{"type": "Pause", "body": {"session_id": NaN}}'), "NaN is not JSON"),
        (framed(b"7"), "no type and body"),
        (framed({"type": "Pause"}), "no type and body"),
        (framed({"type": "Pause", "body": {}, "x": 1}), "no type and body"),
        (framed({"type": "Nope", "body": {}}), "unknown message type 'Nope'"),
        (framed({"type": ["Pause"], "body": {}}), "unknown message type"),
        (framed({"type": "Pause", "body": []}), "expected the fields of Pause"),
        (body("Pause"), "missing field 'session_id'"),
        (body("Pause", session_id="a", more=1), "unknown field 'more'"),
        (body("Pause", session_id=1), "expected str, not int"),
        (body("Pause", session_id=None), "expected str, not NoneType"),
        (body("Continue", session_id="a", seen=True), "expected int, not bool"),
        (body("Continue", session_id="a", seen=1.0), "expected int, not float"),
        (body("Continue", session_id="a", seen=2**64), "64-bit"),
        (framed(b'{"type":"PollEvents","body":{"after":1%s}}' % (b"0" * 5000)), "not JSON"),
        (body("TokenIds", token_ids=[1, 2.0]), "expected integers"),
        (body("TokenIds", token_ids=[1, True]), "expected integers"),
        (body("TokenIds", token_ids=[1, 2**70]), "64-bit"),
        (body("TokenIds", token_ids="12"), "expected a list"),
        (body("Texts", texts=["a", 1]), "expected str"),
        (body("MemoryReply", rows=[["a", 1]]), "expected 3 values, 2 came"),
        (framed(rb'{"type":"Pause","body":{"session_id":"\ud800"}}'), "surrogate"),
        (body("PollEvents", after=1, timeout_s="a"), "expected a number"),
        (body("PollEvents", after=1, timeout_s={"$float": "1"}), "expected a number"),
        (body("PollEvents", after=1, timeout_s=10**400), "too large for a float"),
        (framed(b'{"type":"PollEvents","body":{"after":1,"timeout_s":1e999}}'), "too large"),
        (body("SetBreakpoint", session_id="a", locations=["1"], when="now"), "'now' is not one of"),
        (body("SetBreakpoint", session_id="a", locations=["1"], when=["any"]), "is not one of"),
        (body("ErrorInfo", code="a", message="", details={"$dict": {"a": DEEP}}), "nested deeper"),
        (body("ErrorInfo", code="a", message="", details={"$dict": {"a": {"b": 1}}}), "a number"),
        (framed(rb'{"type":"ErrorInfo","body":{"code":"a","message":"","details":{"$dict":'
                rb'{"\udfff":1}}}}'), "surrogate"),
        (chunk("uint8", [3], b"ab"), "array of 3 bytes announced, 2 came"),
        (chunk("uint8", [2], b"abc"), "1 bytes follow the last array"),
        (chunk("float64", [2**40], b""), "array of 8796093022208 bytes announced"),
        (chunk("float64", [2**70], b""), "announced"),
        (chunk("uint8", [0, 2**70], b""), "too large"),
        (chunk("uint8", [-1], b""), "not a shape"),
        (chunk("uint8", [True], b"a"), "not a shape"),
        (chunk("uint8", [1.0], b"a"), "not a shape"),
        (chunk("uint8", 1, b"a"), "at most 8 dimensions"),
        (chunk("uint8", [1] * 9, b"a"), "at most 8 dimensions"),
        (chunk("object", [1], b"a"), "known dtype"),
        (chunk(["uint8"], [1], b"a"), "known dtype"),
        (chunk("uint8", [1], b"a", more=1), "expected an array"),
        (body("Chunk", offset=0, data=[1, 2]), "expected an array"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_message_are_refused_in_one_line(data, said):
    with pytest.raises(BadMessage) as caught:
        decode(data)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=200) | st.binary(max_size=200).map(framed))
def test_random_bytes_are_refused(data):
    with pytest.raises(BadMessage):
        decode(data)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(["$array", "shape", "$dict", "$float"]),
            part,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.data())
def test_a_message_with_a_changed_part_is_read_or_refused(data):
    message = data.draw(any_message())
    raw = encode(message)
    (size,) = struct.unpack_from("<I", raw, 4)
    tree = json.loads(raw[8 : 8 + size])
    if tree["body"]:
        key = data.draw(st.sampled_from(sorted(tree["body"])))
        tree["body"][key] = data.draw(_json)
    changed = json.dumps(tree).encode()

    try:
        read = decode(b"DJN1" + struct.pack("<I", len(changed)) + changed + raw[8 + size :])
    except BadMessage:
        return
    assert type(read) is type(message)
    assert same(decode(encode(read)), read)


@settings(max_examples=300)
@given(st.data())
def test_a_message_with_flipped_or_cut_bytes_is_read_or_refused(data):
    raw = bytearray(encode(data.draw(any_message())))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(0, len(raw))) :]

    try:
        read = decode(bytes(raw))
    except BadMessage:
        return
    assert type(read).__name__ in MESSAGES


@pytest.mark.parametrize(
    "data",
    [
        b"DJN1\xff\xff\xff\xff" + b" " * 100,
        chunk("float64", [2**31, 2**10]),
        chunk("float64", [2**20, 0]),
        chunk("uint8", [2**40]),
        chunk("uint8", [2**62, 4]),
        body("TensorReply", dtype="float32", shape=[2**40], nbytes=2**42),
        body("ReadChunk", transfer_id="a", offset=0, length=2**60),
    ],
)
def test_nothing_is_allocated_by_a_length_that_was_sent(data):
    tracemalloc.start()
    try:
        try:
            decode(data)
        except BadMessage as error:
            assert error.message
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 200_000


# --- errors -------------------------------------------------------------------------------------


def test_an_error_is_rebuilt_from_its_code_with_its_details():
    info = ErrorInfo(
        code="OutOfPages",
        message="needs 12 pages",
        details={"message": 1, "free": 3},
        traceback="T",
    )

    with pytest.raises(OutOfPages, match="needs 12 pages") as caught:
        raise_error(decode(encode(info)))

    assert caught.value.details == {"message": 1, "free": 3}
    assert caught.value.server_traceback == "T"


def test_an_unknown_code_is_a_fault_of_the_server():
    assert type(rebuild_error(ErrorInfo(code="Newer", message="x"))) is ServerFault


@pytest.mark.parametrize("count", [63, 64, 5000])
def test_long_lists_of_whole_numbers_come_back(count: int):
    ids = tuple(range(-3, count - 3))
    data = encode(m.TokenTexts(token_ids=ids))
    assert decode(data) == m.TokenTexts(token_ids=ids)
    assert (b"$ints" in data) == (count >= 64)
    beyond = (*ids[1:], 2**64 - 1)  # no int64: as text
    assert decode(encode(m.TokenTexts(token_ids=beyond))).token_ids == beyond
    with pytest.raises(BadMessage, match="outside the 64-bit integers"):
        encode(m.TokenTexts(token_ids=(*ids, 2**64)))


@pytest.mark.parametrize("announced", [-1, 2.0, "64", None, 65, 2**62])
def test_whole_numbers_that_did_not_come_are_refused(announced: Any):
    body = {"token_ids": {"$ints": announced}, "joined": False}
    with pytest.raises(BadMessage):
        decode(framed({"type": "TokenTexts", "body": body}, bytes(8 * 64)))


def test_a_plain_message_is_json_alone_however_long_its_lists_are():
    message = m.TokenTexts(token_ids=tuple(range(5000)))
    tree = plain(message)
    assert json.loads(json.dumps(tree)) == tree
    assert decode(framed(tree)) == message
    with pytest.raises(TypeError, match="no plain JSON"):
        plain(m.Chunk(offset=0, data=Array("uint8", (1,), b"x")))
