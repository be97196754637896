"""How bytes become frames: caps, deadlines, no compression; what a frame means is not known here.

The layout is rpyc's own (length, a compression flag that must be 0, body, newline), so a stock
rpyc peer can be pointed at it by the attack tests. What differs from the stock channel:

- the length is compared with `FRAME_CAP` before the body is read, and nothing is decompressed;
- a frame that has begun must arrive, or be taken, at a least rate: a peer that stalls inside one
  is dropped, while an idle peer between frames may stay;
- a payload is written from where it lies: the stock stream copies what remains after every
  64 kB, which makes large frames quadratic.
"""

from __future__ import annotations

import socket
import time

from rpyc.core.channel import Channel
from rpyc.core.stream import SocketStream

#: Longest frame body accepted or sent, bytes.
FRAME_CAP = 8 * 2**20
#: Longest payload of one call, bytes; the rest of the frame is the envelope around it.
PAYLOAD_CAP = FRAME_CAP - 256
#: A frame that has begun gets this long, and a second more per `MIN_RATE` bytes of its body.
FRAME_S = 10.0
MIN_RATE = 64 * 2**10
#: How often a blocked read or write looks at its deadline, seconds.
TICK_S = 0.25


class BrokenFrame(EOFError):
    """The peer sent something this channel does not carry, or too slowly; the connection is over.

    An EOFError, because that is what makes rpyc's serve loop close the connection.
    """


class GuardedStream(SocketStream):
    """A socket whose reads and writes end at a deadline, and which counts what passes."""

    __slots__ = ("bytes_received", "bytes_sent", "deadline", "frame_s")

    def __init__(self, sock: socket.socket, frame_s: float = FRAME_S) -> None:
        super().__init__(sock)
        sock.settimeout(TICK_S)
        self.frame_s = frame_s
        #: An absolute end (time.monotonic) a caller may set for everything it reads.
        self.deadline: float | None = None
        self.bytes_sent = 0
        self.bytes_received = 0

    def frame_deadline(self) -> float:
        return time.monotonic() + self.frame_s

    def read_until(self, count: int, deadline: float) -> memoryview:
        """Read exactly `count` bytes before `deadline`, or close and raise `BrokenFrame`."""
        if self.deadline is not None:
            deadline = min(deadline, self.deadline)
        data = bytearray(count)
        view = memoryview(data)
        done = 0
        while done < count:
            try:
                received = self.sock.recv_into(view[done:])
            except TimeoutError:
                received = -1
            except OSError as error:
                self.close()
                raise EOFError(str(error)) from error
            if received == 0:
                self.close()
                raise EOFError("the peer closed the connection")
            if received > 0:
                done += received
            if done < count and time.monotonic() > deadline:
                self.close()
                raise BrokenFrame(f"a frame stalled: {done} of {count} bytes came in time")
        self.bytes_received += count
        return view

    def write_until(self, parts: list[bytes], deadline: float) -> None:
        """Write all of `parts` before `deadline`, or close and raise `BrokenFrame`."""
        views = [memoryview(part) for part in parts]
        while views:
            try:
                sent = self.sock.sendmsg(views)
            except TimeoutError:
                sent = 0
            except OSError as error:
                self.close()
                raise EOFError(str(error)) from error
            self.bytes_sent += sent
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if not views:
                return
            views[0] = views[0][sent:]
            if time.monotonic() > deadline:
                self.close()
                raise BrokenFrame("the peer does not take its frame")

    def interrupt(self) -> None:
        """Wake whoever waits on the socket, from any thread; its owner then closes it."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except (OSError, EOFError):  # already closed, by either side
            return


class FrameChannel(Channel):
    """Frames of at most `FRAME_CAP` bytes over a `GuardedStream`, never compressed."""

    __slots__ = ()

    def __init__(self, stream: GuardedStream) -> None:
        super().__init__(stream, compress=False)

    def recv(self) -> memoryview:
        deadline = self.stream.frame_deadline()
        header = self.stream.read_until(self.FRAME_HEADER.size, deadline)
        length, compressed = self.FRAME_HEADER.unpack(header)
        if compressed:
            self.close()
            raise BrokenFrame("the peer sent a compressed frame; this channel carries none")
        if length > FRAME_CAP:
            self.close()
            raise BrokenFrame(f"the peer announced {length} bytes; a frame holds {FRAME_CAP}")
        deadline += length / MIN_RATE
        body = self.stream.read_until(length + len(self.FLUSHER), deadline)
        if body[length:] != self.FLUSHER:
            self.close()
            raise BrokenFrame("a frame does not end where its header says")
        return body[:length]

    def send(self, *parts: bytes) -> None:
        """Send the concatenation of `parts` as one frame."""
        length = sum(map(len, parts))
        if length > FRAME_CAP:
            raise ValueError(f"{length} bytes do not fit a frame of {FRAME_CAP}")
        deadline = self.stream.frame_deadline() + length / MIN_RATE
        head = self.FRAME_HEADER.pack(length, 0) + parts[0]
        self.stream.write_until([head, *parts[1:], self.FLUSHER], deadline)
