"""A file that whoever reads it has to wait for: a model is under way to be loaded for as long as a
test wants to look at that, on any machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class HeldBack:
    """A file in whose place a pipe stands until `give()`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._content = file.read_bytes()
        self._pipe: int | None = None
        file.unlink()
        os.mkfifo(file)

    def is_read(self) -> bool:
        """Whether somebody has opened it, and waits."""
        if self._pipe is None:
            with contextlib.suppress(OSError):  # nobody yet
                self._pipe = os.open(self._file, os.O_WRONLY | os.O_NONBLOCK)
        return self._pipe is not None

    def give(self) -> None:
        """Let whoever waits, and everybody after, have it."""
        assert self._pipe is not None, "nobody waits for it"
        whole = self._file.with_name("whole")
        whole.write_bytes(self._content)
        whole.replace(self._file)
        os.write(self._pipe, self._content)
        self.close()

    def close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


@contextlib.contextmanager
def held_back(file: Path) -> Iterator[HeldBack]:
    """Hold a small file back; at the end nobody is kept waiting."""
    held = HeldBack(file)
    try:
        yield held
    finally:
        held.close()
