"""An rpyc connection with everything taken away but one call: bytes in, bytes out.

Both sides use it. Strict configuration alone is not enough (a peer's reference that is merely
copied or formatted can run the peer's code), so references are refused in both directions by the
code below, and no request but PING, CLOSE and the call is known. Errors cross as (code, text);
no exception class is ever chosen by a name the peer sent.

`_dispatch`, `_box`, `_unbox`, `_send` and `_request_handlers` are private to rpyc: the version is
pinned, and tests/wire attacks the result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from rpyc.core import consts
from rpyc.core.protocol import Connection
from rpyc.core.service import VoidService

from kernel_server.protocol.errors import ERRORS, DjinnError, ServerFault

from . import plain
from .frames import PAYLOAD_CAP, BrokenFrame, FrameChannel

log = logging.getLogger(__name__)

#: Longest text of an error that crosses, characters.
ERROR_TEXT_CAP = 4000

STRICT_CONFIG: dict[str, Any] = {
    "allow_safe_attrs": False,
    "allow_exposed_attrs": False,
    "allow_public_attrs": False,
    "allow_all_attrs": False,
    "safe_attrs": set(),
    "allow_getattr": False,
    "allow_setattr": False,
    "allow_delattr": False,
    "allow_pickle": False,
    "include_local_traceback": False,
    "include_local_version": False,
    "instantiate_custom_exceptions": False,
    "import_custom_exceptions": False,
    "propagate_SystemExit_locally": False,
    "propagate_KeyboardInterrupt_locally": False,
    "bind_threads": False,
    "logger": None,
}


class PlainConnection(Connection):
    """One authenticated connection: `call` on the client, `serve_all` on the server.

    handler: carries out a call; None on a client, which then refuses every call of the server.
    """

    _closed = True  # what __del__ finds when __init__ did not get far

    def __init__(
        self, channel: FrameChannel, handler: Callable[[bytes], bytes] | None = None
    ) -> None:
        self._handler = handler
        super().__init__(VoidService(), channel, STRICT_CONFIG)

    def call(self, payload: bytes, timeout_s: float) -> bytes:
        """Send `payload` and wait for the answer; anything but a DjinnError ends the connection.

        Raises the peer's DjinnError, TimeoutError, or EOFError when the connection is over.
        """
        if len(payload) > PAYLOAD_CAP:
            raise ValueError(f"{len(payload)} bytes do not fit a call of {PAYLOAD_CAP}")
        self._channel.stream.deadline = time.monotonic() + timeout_s
        try:
            reply = self.async_request(consts.HANDLE_CALL, payload, timeout=timeout_s).value
        except DjinnError:
            raise
        except BaseException:
            self.close()
            raise
        if type(reply) is not bytes:
            self.close()
            raise BrokenFrame(f"the answer is {type(reply).__name__}, not bytes")
        return reply

    @property
    def idle_and_open(self) -> bool:
        """Whether a call can be sent: between calls a healthy peer says nothing."""
        if self._closed:
            return False
        try:
            return not self._channel.poll(0)
        except (OSError, EOFError, ValueError):
            return False

    def wait_for_message(self) -> None:
        """Return when there is something to read; EOFError when the connection is over."""
        self._channel.poll(None)

    def serve_one(self) -> None:
        """Read one message and carry it out; EOFError when the connection is over."""
        self.serve(None)

    def interrupt(self) -> None:
        """Make the thread that serves or waits on this connection stop; safe from any thread."""
        self._channel.stream.interrupt()

    def close(self) -> None:
        """Close the socket, without rpyc's farewell: a busy peer would keep us waiting for it."""
        if self._closed:
            return
        self._closed = True
        self._channel.close()
        self._request_callbacks.clear()

    def _cleanup(self, _anyway: bool = True) -> None:
        self.close()

    @classmethod
    def _request_handlers(cls) -> dict[int, Callable[..., Any]]:
        return {consts.HANDLE_PING: cls._handle_ping, consts.HANDLE_CALL: cls._handle_call}

    def _handle_ping(self, data: Any) -> Any:
        return data

    def _handle_call(self, *args: Any) -> bytes:
        if self._handler is None:
            raise _Refused("this side answers no calls")
        if len(args) != 1 or type(args[0]) is not bytes:
            raise _Refused("a call takes one value, bytes")
        reply = self._handler(args[0])
        if type(reply) is not bytes:
            raise TypeError(f"the handler answered {type(reply).__name__}, not bytes")
        if len(reply) > PAYLOAD_CAP:
            raise ServerFault(
                f"the answer has {len(reply)} bytes, a frame holds {PAYLOAD_CAP}; ask in chunks"
            )
        return reply

    def _box(self, value: Any) -> tuple[int, Any]:
        if not plain.is_plain(value):
            raise TypeError(f"only plain values cross, not {type(value).__name__}")
        return consts.LABEL_VALUE, value

    def _unbox(self, package: Any) -> Any:
        if type(package) is not tuple or len(package) != 2:
            raise _Refused("a value without a label")
        label, value = package
        if label != consts.LABEL_VALUE:
            raise _Refused("references do not cross, in either direction")
        return value

    def _netref_factory(self, id_pack: Any) -> Any:
        raise _Refused("references do not cross, in either direction")

    def _send(self, msg: int, seq: int, args: Any) -> None:
        head, payload = plain.dump(msg, seq, args)
        with self._sendlock:
            self._channel.send(head, payload)

    def _dispatch(self, data: memoryview) -> None:
        try:
            message, sequence, value = plain.load(data)
        except BrokenFrame:
            self.close()
            raise
        if message == consts.MSG_REQUEST:
            self._recvlock.release()
            self._dispatch_request(sequence, value)
            return
        try:
            answer = self._answer(message, value)
        except (_Refused, BrokenFrame) as error:
            self.close()
            raise BrokenFrame(str(error)) from error
        self._seq_request_callback(message, sequence, message != consts.MSG_REPLY, answer)
        self._recvlock.release()

    def _answer(self, message: int, value: Any) -> Any:
        if message == consts.MSG_REPLY:
            return self._unbox(value)
        if message != consts.MSG_EXCEPTION:
            raise BrokenFrame(f"a message of unknown kind {message}")
        if type(value) is not tuple or [type(item) for item in value] != [str, str]:
            raise BrokenFrame("an error that is not a code and a text")
        code, text = value
        # Our own registry decides; a code it does not hold is the other side's fault, by name.
        return ERRORS.get(code, ServerFault)(text[:ERROR_TEXT_CAP])

    def _dispatch_request(self, seq: int, raw_args: Any) -> None:
        try:
            reply = self._box(self._carry_out(raw_args))
        except _Refused as error:
            failure = ("BadMessage", f"refused: {error}")
        except EOFError:
            raise
        except DjinnError as error:
            failure = (error.code, str(error))
        except BaseException as error:  # SystemExit too: a handler never ends the server
            log.exception("a call failed")
            failure = (ServerFault.code, f"{type(error).__name__}: {error}")
        else:
            self._send(consts.MSG_REPLY, seq, reply)
            return
        code, text = failure
        one_line = " ".join(text[:ERROR_TEXT_CAP].split())
        self._send(consts.MSG_EXCEPTION, seq, (code, one_line))

    def _carry_out(self, raw_args: Any) -> Any:
        if type(raw_args) is not tuple or len(raw_args) != 2:
            raise _Refused("a request without a handler")
        handler, package = raw_args
        if handler == consts.HANDLE_CLOSE:
            self.close()
            raise EOFError("the peer said goodbye")
        serve = self._HANDLERS.get(handler)
        if serve is None:
            raise _Refused("only bytes cross here: PING, CLOSE and one call")
        args = self._unbox(package)
        if type(args) is not tuple:
            raise _Refused("arguments are not a tuple")
        return serve(self, *args)


class _Refused(Exception):
    """A well-formed request for something this connection does not do."""
