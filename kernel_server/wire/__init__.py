"""The wire: authenticated connections that carry bytes, for the service and for the client.

Imports the standard library, rpyc, platformdirs and the contract's errors; neither side's logic.
"""

from __future__ import annotations

import contextlib
import time

from .address import CONNECT_S, Address, dial, listen, parse_address
from .connection import PlainConnection
from .frames import FRAME_CAP, PAYLOAD_CAP, BrokenFrame, FrameChannel, GuardedStream
from .handshake import HANDSHAKE_S, join_server
from .tokens import find_token, load_or_create_tokens, new_token, token_file

__all__ = [
    "FRAME_CAP",
    "PAYLOAD_CAP",
    "Address",
    "BrokenFrame",
    "FrameChannel",
    "GuardedStream",
    "PlainConnection",
    "connect",
    "dial",
    "find_token",
    "listen",
    "load_or_create_tokens",
    "new_token",
    "parse_address",
    "token_file",
]


def connect(address: Address, token: str, timeout_s: float = CONNECT_S) -> PlainConnection:
    """Open one authenticated connection.

    Raises the OSError of a failed dial, AccessDenied, QuotaExceeded, or NoServer.
    """
    deadline = time.monotonic() + timeout_s
    sock = dial(address, timeout_s)
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        left = max(deadline - time.monotonic(), 0.05)
        join_server(sock, token, str(address), min(left, HANDSHAKE_S))
        connection = PlainConnection(FrameChannel(GuardedStream(sock)))
        undo.pop_all()
    return connection
