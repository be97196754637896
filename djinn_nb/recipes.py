"""A session as a recipe: what was done, with a hash of what was seen at each stop.

Anyone who replays it on a server of the same model is told whether they see the same, bit for bit,
and if not, at which stop it differs first. A recipe is a checkpoint with these hashes in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from djinn_nb import checkpoints
from djinn_nb.progress import Progress
from djinn_nb.stopped import Stopped
from kernel_server.protocol.errors import BrokenCheckpoint

if TYPE_CHECKING:
    from djinn_nb.server import Server
    from djinn_nb.session import Session

_STOPS = "stops"


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen at one stop: `sha256` of the value there, float32 or as it is."""

    node: int
    forward: int
    location: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A session and what was seen at its stops, made by `session.recipe()`.

    recipe = session.recipe()
    recipe.save("mary.djinn")
    server.replay(djinn_nb.recipes.read("mary.djinn")).first_difference
    """

    checkpoint: checkpoints.Checkpoint
    stops: tuple[Seen, ...]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as a folder, in one step; `server.load(path)` takes it too.

        Raises BadArgument where something is there already.
        """
        return checkpoints.write(self.checkpoint, path)

    def __repr__(self) -> str:
        record = self.checkpoint.record
        return (
            f"Recipe of {record.name}: {len(record.generated)} tokens, {len(record.edits)} edits,"
            f" {len(self.stops)} stops"
        )


@dataclass(frozen=True, slots=True)
class Replayed:
    """A recipe carried out: the session it made, and where it first differs, None where nowhere."""

    session: Session
    first_difference: Seen | int | None
    stops: int

    @property
    def same(self) -> bool:
        """Whether every stop and token is the same, bit for bit."""
        return self.first_difference is None

    def __repr__(self) -> str:
        if self.first_difference is None:
            return f"Replayed: {self.stops} stops, all the same bit for bit"
        if isinstance(self.first_difference, int):
            return f"Replayed: the token of forward {self.first_difference} is the first to differ"
        at = self.first_difference
        return f"Replayed: differs first at {at.location} of forward {at.forward}"


def make(session: Session) -> Recipe:
    """The recipe of a session at rest; its stops are looked at on a fork."""
    found = checkpoints.fetch(session)
    numbers = _path(found)
    stops = tuple(_looked_at(session, numbers, "looking at the stops"))
    about = found.about | {_STOPS: [dataclasses.asdict(one) for one in stops]}
    return Recipe(dataclasses.replace(found, about=about), stops)


def read(path: str | os.PathLike[str]) -> Recipe:
    """A recipe from a folder. Raises BrokenCheckpoint where it is not whole or is none."""
    found = checkpoints.read(path)
    listed = found.about.get(_STOPS)
    if listed is None:
        raise BrokenCheckpoint(f"{path} is a checkpoint without hashes: server.load() takes it")
    try:
        stops = tuple(Seen(**one) for one in listed)
    except TypeError as error:
        raise BrokenCheckpoint(f"{path}: its stops do not hold together: {error}") from error
    return Recipe(found, stops)


def replay(server: Server, recipe: Recipe | str | os.PathLike[str]) -> Replayed:
    """Carry a recipe out, and compare what is seen at each stop with what was seen then."""
    from djinn_nb.session import Session

    taken = recipe if isinstance(recipe, Recipe) else read(recipe)
    info = checkpoints.send(server.client, taken.checkpoint, None, inexact=True)
    session = Session(server.client, info)
    now = _looked_at(session, [one.node for one in taken.stops], "comparing the stops")
    drawn = session.refresh().differs_from
    first: Seen | int | None = drawn
    for then, found in zip(taken.stops, now, strict=True):
        if then.sha256 != found.sha256 and (drawn is None or then.forward <= drawn):
            first = then
            break
    return Replayed(session, first, len(now))


def _path(found: checkpoints.Checkpoint) -> list[int]:
    """Numbers of the stops on the way to where it stands, the first one first."""
    nodes = {node.number: node for node in found.record.nodes}
    way: list[int] = []
    number: int | None = found.record.current
    while number is not None:
        if nodes[number].status == "stopped":
            way.append(number)
        number = nodes[number].parent
    return way[::-1]


def _looked_at(session: Session, numbers: list[int], label: str) -> list[Seen]:
    fork = session.fork()
    seen = []
    try:
        with Progress(label, unit="stop") as progress:
            for done, number in enumerate(numbers):
                stop = fork.go_to(number)
                assert isinstance(stop, Stopped)
                value: Any = np.ascontiguousarray(stop.value.numpy())
                digest = hashlib.sha256(value.tobytes()).hexdigest()
                seen.append(Seen(number, stop.forward, stop.location, digest))
                progress.at(done + 1, len(numbers))
    finally:
        fork.terminate()
    return seen
