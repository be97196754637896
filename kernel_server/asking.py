"""What `status` and `sessions` ask a running server, and how they print it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import DjinnError, NoServer
from kernel_server.wire import Address, PlainConnection, connect, find_token

ANSWER_S = 30.0


class Asking:
    """One authenticated connection to a server, for a few questions."""

    def __init__(self, connection: PlainConnection, address: Address) -> None:
        self._connection = connection
        self.address = address

    @classmethod
    def at(cls, host: str, port: int, socket: Path | None) -> Asking:
        """Connect to host and port, or to a Unix socket.

        Raises NoServer, AccessDenied.
        """
        address = Address(path=str(socket)) if socket else Address(host=host, port=port)
        token = find_token()
        try:
            return cls(connect(address, token), address)
        except DjinnError:  # some of them are OSErrors too
            raise
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise NoServer(
                f"no server answers at {address} ({reason}): name another with --port or --socket,"
                " or start one with `python -m kernel_server serve`"
            ) from error

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()

    def ask(self, message: Any) -> Any:
        """The server's answer; its errors are raised."""
        answer = codec.decode(self._connection.call(codec.encode(message), ANSWER_S))
        if isinstance(answer, m.ErrorReply):
            codec.raise_error(answer.error)
        return answer

    def status_lines(self) -> list[str]:
        """Where the server is, what it serves, and where its bytes are."""
        hello: m.Initialized = self.ask(m.Initialize(client="cli"))
        lines = [f"server    {hello.server_id} at {self.address}, djinn-nb {hello.version}"]
        if hello.phase == "loading":
            return [*lines, f"model     loading: {hello.progress}, {hello.fraction:.0%}"]
        if hello.error is not None:
            return [*lines, f"model     failed to load: {hello.error.message}"]
        model: m.ModelInfo = self.ask(m.DescribeModel()).model
        lines += [
            f"model     {model.name} ({model.architecture}){_random(model)}",
            f"          {model.num_layers} layers, hidden {model.hidden_size},"
            f" {model.num_parameters / 1e6:.1f} M parameters, {model.dtype} on {model.device}",
        ]
        rows = self.ask(m.DescribeMemory()).rows
        lines += ["memory"]
        lines += [f"  {kind:<22} {size / 2**20:>10.1f} MiB  {note}" for kind, size, note in rows]
        sessions = self.ask(m.ListSessions()).sessions
        rest = sum(session.lease_ended for session in sessions)
        back = sum(session.dormant for session in sessions) - rest
        note = f", {back} came back after a restart" if back else ""
        note += f", {rest} at rest on disk since their lease ended" if rest else ""
        lines.append(f"sessions  {len(sessions)}{note}")
        return [*lines, f"NOT DURABLE: {hello.not_durable}"] if hello.not_durable else lines

    def session_lines(self) -> list[str]:
        """A table of the sessions of this owner."""
        sessions = self.ask(m.ListSessions()).sessions
        if not sessions:
            return ["no sessions"]
        model: m.ModelInfo = self.ask(m.DescribeModel()).model
        title = f"{model.name}{_random(model)}"
        rows = [("id", "name", "status", "at", "forward", "tokens", "KV MiB", "owner")]
        for s in sessions:
            rows.append(
                (
                    s.id,
                    s.name,
                    s.status + (f" ({s.stop.reason})" if s.stop else "") + _came_back(s),
                    s.location or "-",
                    str(s.forward),
                    f"{s.num_prompt_tokens}+{len(s.tokens) - s.num_prompt_tokens}",
                    f"{s.kv_bytes / 2**20:.1f}",
                    s.owner,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return [title] + [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
        ]


def _came_back(session: m.SessionInfo) -> str:
    notes = [
        word
        for word, holds in (
            ("dormant", session.dormant),
            ("its lease ended", session.lease_ended),
            ("refused", session.refused is not None),
            ("inexact", session.inexact),
        )
        if holds
    ]
    return f" [{', '.join(notes)}]" if notes else ""


def _random(model: m.ModelInfo) -> str:
    return " · random weights" if model.random_weights else ""
