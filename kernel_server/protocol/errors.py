"""Every error a user of Djinn can meet: one tree, stable codes, plain data on the wire.

The branches say whose move it is::

    DjinnError
    ├── RequestError            you asked for something that cannot be; nothing was changed
    │   ├── UnknownLocation, UnknownSession, UnknownBreakpoint, UnknownEdit, UnknownTransfer
    │   ├── UnknownNode, UnknownVector, BrokenVector, WrongModel
    │   ├── BadCondition, BadEdit, BadSelector, BadPrompt, PromptTooLong, BadArgument, BadMessage
    │   ├── NotStopped, NotFinished, StaleStop, UndoRefused
    │   ├── NoTokenizer, NotSupported, UnsupportedModel, ModelNotFound, BrokenModel
    │   ├── WrongFingerprint, BrokenCheckpoint, BrokenJournal, JournalInUse
    │   └── AccessDenied, AddressRefused, PortInUse
    ├── CapacityError           not now: try later, or ask for less
    │   ├── OutOfPages, OutOfDeviceMemory, QuotaExceeded, ModelLoading, StillRunning
    │   └── NotRebuilt, ServerRestarted
    ├── ConnectionFailed        the way to the server
    │   └── NoServer, ConnectionLost
    ├── SessionFailed           the session's model run failed; the server goes on
    │   └── TornPage
    └── ServerFault             our bug; carries the session's story

Classes are rebuilt on the client from `code`, so `except djinn_nb.errors.OutOfPages` works there.
"""

from __future__ import annotations

from typing import Any, ClassVar

ERRORS: dict[str, type[DjinnError]] = {}


class DjinnError(Exception):
    """Base of every error Djinn raises on purpose: one line, with numbers and the next move."""

    code: ClassVar[str] = "DjinnError"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.code = cls.__name__
        ERRORS[cls.code] = cls

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        #: Plain values (numbers, strings, lists, dicts) a program may use.
        self.details: dict[str, Any] = details
        #: The server's traceback, when it runs with --debug.
        self.server_traceback: str | None = None

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"details": self.details, "server_traceback": self.server_traceback}
        return (_rebuild, (self.code, self.message), state)


def _rebuild(code: str, message: str) -> DjinnError:
    return ERRORS.get(code, ServerFault)(message)


ERRORS["DjinnError"] = DjinnError


# --- you asked for something that cannot be ---------------------------------------------------


class RequestError(DjinnError):
    """The request cannot be carried out as it stands; nothing was changed."""


class UnknownLocation(RequestError, ValueError):
    """The model has no such location."""


class UnknownSession(RequestError, LookupError):
    """The server holds no session with this id for this owner."""


class UnknownBreakpoint(RequestError, LookupError):
    """The session has no breakpoint with this id."""


class UnknownEdit(RequestError, LookupError):
    """The session has no edit with this id."""


class UnknownNode(RequestError, LookupError):
    """The session has no such node: it was pruned, or never was."""


class UnknownTransfer(RequestError, LookupError):
    """The tensor transfer was finished, cancelled or never begun."""


class UnknownVector(RequestError, LookupError):
    """The owner keeps no named vector of this name."""


class BrokenVector(RequestError, RuntimeError):
    """The file of a named vector is torn or not one of ours."""


class WrongModel(RequestError, ValueError):
    """The named vector, or the session compared with, is of another model than the one served."""


class BadCondition(RequestError, ValueError):
    """A breakpoint condition does not parse or cannot be evaluated there; shown with a caret."""


class BadEdit(RequestError, ValueError):
    """The edit has a wrong shape, a NaN, or can never match."""


class BadSelector(RequestError, ValueError):
    """The token or channel selector selects nothing or lies outside the tensor."""


class BadPrompt(RequestError, ValueError):
    """The prompt is empty or holds token ids outside the vocabulary."""


class PromptTooLong(RequestError, ValueError):
    """Prompt and new tokens exceed the model's context or the whole page pool."""


class BadArgument(RequestError, ValueError):
    """An argument has the wrong type or range."""


class BadMessage(RequestError, ValueError):
    """The bytes received are not a message of this protocol."""


class NotStopped(RequestError, RuntimeError):
    """The session is not stopped, and this needs a stopped session."""


class NotFinished(RequestError, RuntimeError):
    """The session has no finished forward yet."""


class StaleStop(RequestError, RuntimeError):
    """The session has moved on since the stop this call refers to."""


class UndoRefused(RequestError, RuntimeError):
    """The session has moved on since the edit, so undoing it would not be exact."""


class NoTokenizer(RequestError, RuntimeError):
    """The model folder has no tokenizer, so text cannot be turned into token ids."""


class NotSupported(RequestError, NotImplementedError):
    """This server or model does not offer the feature named."""


class UnsupportedModel(RequestError, RuntimeError):
    """The model failed the load check, or is of a kind that cannot be run exactly."""


class ModelNotFound(RequestError, FileNotFoundError):
    """There is no model at this path or under this name."""


class BrokenModel(RequestError, RuntimeError):
    """The model's folder is incomplete or unreadable."""


class WrongFingerprint(RequestError, RuntimeError):
    """The session was run under another execution fingerprint, so it would not go on exactly."""


class BrokenCheckpoint(RequestError, RuntimeError):
    """A checkpoint's files are torn, were changed, or are not a checkpoint's."""


class BrokenJournal(RequestError, RuntimeError):
    """The journal is damaged, or is not one of ours."""


class JournalInUse(RequestError, RuntimeError):
    """Another server writes this journal."""


class AccessDenied(RequestError, PermissionError):
    """The access token was not accepted."""


class AddressRefused(RequestError, ValueError):
    """The server does not listen there: loopback or a Unix socket only."""


class PortInUse(RequestError, OSError):
    """Another process listens on this address."""


# --- not now ----------------------------------------------------------------------------------


class CapacityError(DjinnError):
    """There is no room or time for it now; others are not affected."""


class OutOfPages(CapacityError, MemoryError):
    """The KV page pool has fewer free pages than the session needs."""


class OutOfDeviceMemory(CapacityError, MemoryError):
    """The device ran out of memory."""


class QuotaExceeded(CapacityError, RuntimeError):
    """The owner has reached a limit of this server."""


class ModelLoading(CapacityError, RuntimeError):
    """The server is still loading its model."""


class StillRunning(CapacityError, TimeoutError):
    """The session did not stop within the time given, and goes on running."""


class NotRebuilt(CapacityError, RuntimeError):
    """The session came back after a restart, and is being computed again; ask again then."""


class ServerRestarted(CapacityError, RuntimeError):
    """The server ended while the session ran; it stands at its last place and can go on."""


# --- the way to the server --------------------------------------------------------------------


class ConnectionFailed(DjinnError, ConnectionError):
    """The server could not be reached or was lost."""


class NoServer(ConnectionFailed):
    """Nothing answers at this address."""


class ConnectionLost(ConnectionFailed):
    """The connection broke in the middle of a call; sessions live on in the server."""


# --- faults -----------------------------------------------------------------------------------


class SessionFailed(DjinnError, RuntimeError):
    """The model raised while this session was running; the other sessions go on."""


class TornPage(SessionFailed):
    """Pages read back from the disk are not what was written there."""


class ServerFault(DjinnError, RuntimeError):
    """A bug in Djinn's server; `details["story"]` holds what led to it."""
