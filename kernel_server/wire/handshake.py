"""Who is there: both sides prove they hold the same token, and the token itself never travels.

    server → client   MAGIC, nonce
    client → server   MAGIC, nonce, HMAC(token, "client", both nonces)
    server → client   verdict, HMAC(token, "server", both nonces)

All messages have a fixed length, so nothing is allocated by a length that was sent, and the whole
exchange has one deadline. Fresh nonces from both sides make a recorded exchange worthless. Nothing
is encrypted: outside loopback the way to the server is an SSH tunnel.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from collections.abc import Callable, Mapping

from kernel_server.protocol.errors import AccessDenied, NoServer, QuotaExceeded

#: Name and version of the wire; a peer that opens differently is not ours.
MAGIC = b"djinn\x00\x00\x01"
NONCE_BYTES = 32
PROOF_BYTES = 32
HANDSHAKE_S = 3.0

WELCOME, WRONG_TOKEN, FULL, WRONG_VERSION = b"+", b"t", b"f", b"v"


class HandshakeFailed(Exception):
    """The peer of the server was not let in; says why, for the log."""


def admit_client(
    sock: socket.socket,
    tokens: Mapping[str, str],
    admit: Callable[[str], bool],
    timeout_s: float = HANDSHAKE_S,
) -> str:
    """Challenge the client on `sock`; return its owner's name or raise `HandshakeFailed`.

    admit: told the owner once the token is proven; False turns the client away as one too many.
    """
    deadline = time.monotonic() + timeout_s
    ours = secrets.token_bytes(NONCE_BYTES)
    _send(sock, MAGIC + ours, deadline)
    opening = _receive(sock, len(MAGIC) + NONCE_BYTES + PROOF_BYTES, deadline)
    magic, rest = opening[: len(MAGIC)], opening[len(MAGIC) :]
    theirs, proof = rest[:NONCE_BYTES], rest[NONCE_BYTES:]
    if magic != MAGIC:
        _send(sock, WRONG_VERSION + bytes(PROOF_BYTES), deadline)
        raise HandshakeFailed("the client speaks another version of the wire")
    owner = None
    for name, token in tokens.items():  # every one, whichever matches: equal time
        if hmac.compare_digest(_proof(token, b"client", ours, theirs), proof):
            owner = name
    if owner is None:
        _send(sock, WRONG_TOKEN + bytes(PROOF_BYTES), deadline)
        raise HandshakeFailed("wrong access token")
    if not admit(owner):
        _send(sock, FULL + bytes(PROOF_BYTES), deadline)
        raise HandshakeFailed(f"{owner} has too many connections")
    _send(sock, WELCOME + _proof(tokens[owner], b"server", ours, theirs), deadline)
    return owner


def join_server(
    sock: socket.socket, token: str, address: str, timeout_s: float = HANDSHAKE_S
) -> None:
    """Prove `token` to the server on `sock`, and have it prove the same.

    Raises AccessDenied, QuotaExceeded, or NoServer when what answers is no Djinn server.
    """
    deadline = time.monotonic() + timeout_s
    stranger = NoServer(
        f"what answers at {address} is no Djinn server of this version; check the address"
    )
    try:
        opening = _receive(sock, len(MAGIC) + NONCE_BYTES, deadline)
        if opening[: len(MAGIC)] != MAGIC:
            raise stranger
        theirs = opening[len(MAGIC) :]
        ours = secrets.token_bytes(NONCE_BYTES)
        _send(sock, MAGIC + ours + _proof(token, b"client", theirs, ours), deadline)
        verdict = _receive(sock, 1 + PROOF_BYTES, deadline)
    except TimeoutError as error:
        raise NoServer(
            f"{address} accepts connections but did not say hello within {timeout_s:g} s; "
            "it is busy or no Djinn server: try again, or check the address"
        ) from error
    kind, proof = verdict[:1], verdict[1:]
    if kind == WRONG_TOKEN:
        raise AccessDenied(
            f"the server at {address} does not know this access token; pass token=, set "
            "DJINN_TOKEN, or copy the server's token file (its path is printed at start)"
        )
    if kind == FULL:
        raise QuotaExceeded(
            f"too many connections to {address} under this token; close a notebook and try again"
        )
    if kind != WELCOME:
        raise stranger
    if not hmac.compare_digest(_proof(token, b"server", theirs, ours), proof):
        raise AccessDenied(
            f"the server at {address} cannot prove that it holds your access token; "
            "nothing was sent to it: check who listens there"
        )


def _proof(token: str, role: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    message = MAGIC + role + server_nonce + client_nonce
    return hmac.digest(token.encode(), message, "sha256")


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    sock.settimeout(_remaining(deadline))
    sock.sendall(data)


def _receive(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        sock.settimeout(_remaining(deadline))
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionResetError("the peer closed the connection during the handshake")
        data += more
    return data


def _remaining(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the handshake took too long")
    return left
