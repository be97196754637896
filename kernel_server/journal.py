"""The journal: what determines the sessions of a server, on disk, so that they outlive it.

One file, appended to: frames of a number, a length, a hash and the bytes of one message
(`protocol.messages.records`). A frame is the whole newest state of a session, an array that such
frames name, or the head. A thread of its own writes and syncs; what is to be told only after that
is told by it then, in order. What is recorded and when is decided in the state; what counts as
good when it is read, in `journal_frames`.

A full disk loses nothing that is there: what could not be written is tried again every second, and
sessions go on meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kernel_server.journal_frames import Contents, frame, read
from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BrokenJournal, JournalInUse
from kernel_server.state.instructions import WriteJournal

log = logging.getLogger(__name__)

FILE, LOCK = "journal", "lock"
#: A file so much larger than what is alive in it is written anew, and at least so large.
COMPACT_FACTOR, COMPACT_BYTES = 4, 16 << 20
#: How often writing is tried again while it fails, seconds.
RETRY_S = 1.0
#: Longest wait for another process that is about to end, seconds.
LOCK_S = 10.0

Action = Callable[[], None]


class Journal:
    """The journal in a folder, locked for this process.

    Raises JournalInUse while another process holds it, BrokenJournal for a folder or file that
    cannot be used.

        journal = Journal(folder)
        journal.start(told)
        journal.write(instruction)
        journal.after(answer)
    """

    def __init__(self, folder: Path, *, wait_s: float = LOCK_S) -> None:
        self.folder, self.path = folder, folder / FILE
        #: session -> the bytes of its newest state, and the keys of its arrays
        self._sessions: dict[str, tuple[bytes, tuple[str, ...]]] = {}
        self._arrays: dict[str, Array] = {}
        #: id of an array -> it, and its key: hashing takes a while
        self._keys: dict[int, tuple[Array, str]] = {}
        #: keys of arrays in the file, and of those written since the last sync
        self._there: set[str] = set()
        self._fresh: set[str] = set()
        self._file = -1
        #: bytes of the file, frames in it, and both at the last sync
        self._end = self._count = 0
        self._synced = (0, 0)
        #: nothing of the file counts any more: it is to be written anew
        self._spoilt = False
        self._wake = threading.Condition()
        self._queue: list[WriteJournal | Action] = []
        self._busy = self._closing = False
        #: what is not on disk yet, by session
        self._behind: dict[str, WriteJournal] = {}
        #: why a session's newest state cannot be written at all, by session
        self._unwritable: dict[str, str] = {}
        self._trouble = ""
        self._told: Callable[[str], None] = lambda text: None
        self._recorded: Callable[[str, float], None] = lambda session_id, seconds: None
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        try:
            _make(folder)
            self._lock = _locked(folder / LOCK, wait_s)
            try:
                self.contents = self._open()
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise BrokenJournal(
                f"the journal in {folder} cannot be opened ({error.strerror or error}): make room,"
                " name another folder with --state-dir, or start with --no-journal"
            ) from error

    # -- opening --------------------------------------------------------------------------------

    def _open(self) -> Contents:
        for draft in self.folder.glob(f".{FILE}.*"):
            draft.unlink()
        data = self.path.read_bytes() if self.path.exists() else b""
        found = read(data, str(self.path)) if data else Contents(identity=secrets.token_hex(8))
        self.identity, self.number = found.identity, found.number
        self._arrays = dict(found.arrays)
        self._keys = {id(value): (value, key) for key, value in found.arrays.items()}
        for session_id, (_, _, keys, payload) in found.sessions.items():
            self._sessions[session_id] = (payload, keys)
        if found.damage:
            aside = self.folder / f"{FILE}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
            with contextlib.suppress(FileExistsError):
                os.link(self.path, aside)  # takes no room
            log.error(
                "the journal %s is damaged in %d places (%d bytes); it is kept as %s",
                self.path, len(found.damage), sum(b - a for a, b in found.damage), aside,
            )  # fmt: skip
        if found.torn_bytes:
            log.warning("%d torn bytes at the end of %s are cut", found.torn_bytes, self.path)
        try:
            self._begin_anew()
        except OSError as error:
            if not data:
                raise
            log.warning("the journal could not be written anew, and is gone on with: %s", error)
            self._file = os.open(self.path, os.O_WRONLY)
            os.ftruncate(self._file, found.end)
            os.lseek(self._file, found.end, os.SEEK_SET)
            self._end, self._count = found.end, found.count
            self._synced, self._there = (self._end, self._count), set(found.arrays)
        return found

    # -- for the loop ---------------------------------------------------------------------------

    def start(
        self,
        told: Callable[[str], None],
        recorded: Callable[[str, float], None] | None = None,
    ) -> None:
        """Begin to write. told: called with why nothing is durable, or '' when all is again.
        recorded: with each session that was written, and the thread's own time it took, seconds."""
        self._told = told
        self._recorded = recorded or self._recorded
        self._thread.start()

    @property
    def trouble(self) -> str:
        """Why nothing is made durable at present; empty while it is."""
        return self._trouble

    @property
    def nbytes(self) -> int:
        """Size of its file."""
        return self._end

    def write(self, instruction: WriteJournal, told: Callable[[str], None] | None = None) -> None:
        """Have a session's state written; `after` says when it is on disk.

        told: called on the journal's thread once that was tried, with why it is not, or ''."""
        with self._wake:
            self._queue.append(instruction)
            if told is not None:
                session_id = instruction.session_id
                self._queue.append(lambda: told(self._lacks(session_id)))
            self._wake.notify_all()

    def after(self, action: Action) -> None:
        """Do something once all that was given to `write` is on disk: now, if it is; else on the
        journal's thread, in order. It is not kept waiting by a disk that cannot be written."""
        with self._wake:
            if self._queue or self._busy:
                self._queue.append(action)
                self._wake.notify_all()
                return
        action()

    def close(self) -> None:
        """Write what is left, and let others have the journal."""
        with self._wake:
            if self._closing:
                return
            self._closing = True
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout=30.0)
        os.close(self._file)
        os.close(self._lock)

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._queue or self._closing):
                    if not self._wake.wait(RETRY_S if self._behind else None):
                        break
                items, self._queue = self._queue, []
                self._busy = bool(items)
                ending = self._closing and not items
            for item in items:
                if isinstance(item, WriteJournal):
                    self._behind[item.session_id] = item
            if self._behind:
                self._try_to_write()
            for item in items:
                if not isinstance(item, WriteJournal):
                    _do(item)
            with self._wake:
                self._busy = False
                if ending and not self._queue:
                    return

    def _try_to_write(self) -> None:
        try:
            if self._spoilt:
                self._begin_anew()
            for instruction in self._behind.values():
                began = time.thread_time()
                self._append_or_tell(instruction)
                self._recorded(instruction.session_id, time.thread_time() - began)
            self._sync()
        except OSError as error:
            self._undo()
            self._report(
                f"the journal {self.path} cannot be written ({error.strerror or error}): sessions"
                " go on, but what they do from now on is lost if the server ends; make room there,"
                " it is tried again every second"
            )
            return
        self._behind.clear()
        self._report("; ".join(self._unwritable.values()))
        if self._end > max(COMPACT_BYTES, COMPACT_FACTOR * self._live_bytes()):
            try:
                self._begin_anew()
            except OSError as error:
                log.warning("the journal could not be compacted, and is gone on with: %s", error)

    def _lacks(self, session_id: str) -> str:
        """Why the newest state of a session is not on disk; empty: it is."""
        if session_id in self._behind:
            return self._trouble
        return self._unwritable.get(session_id, "")

    def _report(self, text: str) -> None:
        if text == self._trouble:
            return
        self._trouble = text
        if text:
            log.error("%s", text)
        else:
            log.warning("the journal %s is written again", self.path)
        _do(lambda: self._told(text))

    # -- the file -------------------------------------------------------------------------------

    def _append_or_tell(self, instruction: WriteJournal) -> None:
        """Write a session's state; one that has none in bytes, a fault of ours, leaves the others
        and this thread as they are."""
        session_id = instruction.session_id
        try:
            self._append(instruction)
        except OSError:
            raise
        except Exception as error:
            log.exception("session %s cannot be recorded", session_id)
            self._unwritable[session_id] = (
                f"session {session_id} cannot be recorded ({type(error).__name__}: {error}), so"
                " what it does from now on is lost if the server ends; please report it"
            )
        else:
            self._unwritable.pop(session_id, None)

    def _append(self, instruction: WriteJournal) -> None:
        """Write a session's arrays that are not there yet, then its record."""
        self.number = max(self.number, instruction.number)
        keys = tuple(map(self._key, instruction.arrays))
        message = m.JournalSession(
            identity=self.identity,
            session_id=instruction.session_id,
            number=self.number,
            record=instruction.record,
            arrays=keys,
        )
        payload = codec.encode(message)
        if instruction.record is None:
            self._sessions.pop(instruction.session_id, None)
        else:
            self._sessions[instruction.session_id] = (payload, keys)
        for key in keys:
            if key not in self._there:
                self._put(codec.encode(m.JournalArray(key=key, value=self._arrays[key])))
                self._there.add(key)
                self._fresh.add(key)
        self._put(payload)

    def _key(self, array: Array) -> str:
        known = self._keys.get(id(array))
        if known is None:
            found = hashlib.blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
            found.update(array.data)
            known = self._keys[id(array)] = (array, found.hexdigest())
        self._arrays.setdefault(known[1], array)
        return known[1]

    def _put(self, payload: bytes) -> None:
        data = memoryview(frame(self._count + 1, payload))
        while data:
            written = os.write(self._file, data)
            self._end += written
            data = data[written:]
        self._count += 1

    def _sync(self) -> None:
        try:
            os.fdatasync(self._file)
        except OSError:
            # what the system held of it may be gone: nothing of the file counts any more
            self._spoilt = True
            raise
        self._synced = (self._end, self._count)
        self._fresh.clear()

    def _undo(self) -> None:
        """Take back what was written and not synced; that needs no room."""
        self._there -= self._fresh
        self._fresh.clear()
        self._end, self._count = self._synced
        try:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
        except OSError:
            self._spoilt = True

    def _live_bytes(self) -> int:
        live = {key for _, keys in self._sessions.values() for key in keys}
        arrays = sum(self._arrays[key].nbytes for key in live)
        return arrays + sum(len(payload) for payload, _ in self._sessions.values())

    def _begin_anew(self) -> None:
        """Write what is alive into a new file, and put it in the place of the old one."""
        live = {key for _, keys in self._sessions.values() for key in keys}
        self._arrays = {key: self._arrays[key] for key in live if key in self._arrays}
        self._keys = {i: pair for i, pair in self._keys.items() if pair[1] in self._arrays}
        draft = self.folder / f".{FILE}.{os.getpid()}"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        before = self._file, self._end, self._count
        self._file, self._end, self._count = handle, 0, 0
        try:
            self._put(codec.encode(m.JournalHead(identity=self.identity, number=self.number)))
            for key, value in self._arrays.items():
                self._put(codec.encode(m.JournalArray(key=key, value=value)))
            for payload, _ in self._sessions.values():
                self._put(payload)
            os.fsync(handle)
            draft.replace(self.path)
        except OSError:
            self._file, self._end, self._count = before
            os.close(handle)
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
        if before[0] >= 0:
            os.close(before[0])
        self._synced, self._spoilt = (self._end, self._count), False
        self._there, self._fresh = set(self._arrays), set()
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name is on disk too
        finally:
            os.close(folder)


def _do(action: Action) -> None:
    try:
        action()
    except Exception:
        log.exception("telling what has become durable failed")


def _make(folder: Path) -> None:
    """Make the folder for its owner only, or refuse one that others can read."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BrokenJournal(
            f"{folder} is open to others (mode {found.st_mode & 0o777:04o}), and prompts are"
            f" written there: `chmod 700 {folder}`, or name another with --state-dir"
        )


def _locked(file: Path, wait_s: float) -> int:
    """A lock on the journal that goes with this process; raises JournalInUse."""
    import fcntl

    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                raise JournalInUse(
                    f"another server writes the journal in {file.parent}: end it, or give this one"
                    " another with --state-dir"
                ) from None
            time.sleep(0.05)
