"""The named vectors that the server keeps for you, and how one is made.

Decides how a vector follows from prompts, a stop, a file or an array. The server keeps the numbers
and refuses to use one that was made on another model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as replaced
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from djinn_nb.checks import flag, shown
from djinn_nb.directions import METHODS, check_pairs, mean_difference, paired_pca
from djinn_nb.progress import Progress
from djinn_nb.runs import ended, rows_at, told
from djinn_nb.selectors import value_array
from djinn_nb.stopped import Stopped
from djinn_nb.vectors import Vector, note_of, vector_line
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BadArgument, DjinnError
from kernel_server.protocol.location import parse_location

if TYPE_CHECKING:
    import pandas as pd

    from djinn_nb.client import Client
    from djinn_nb.server import Server

#: Prompts up to so many bytes of JSON are kept whole in the provenance, longer ones as a hash.
MAX_KEPT_PROMPTS = 32 << 10


class VectorStore(Mapping[str, Vector]):
    """Your named vectors on this server: `server.vectors`.

    server.vectors                               # a table
    server.vectors.from_prompts("joy", positive=good, negative=bad, location=16)
    server.vectors["joy"].norm
    "joy" in server.vectors
    del server.vectors["joy"]
    """

    def __init__(self, server: Server, client: Client) -> None:
        self.server = server
        self._client = client

    # -- what there is --------------------------------------------------------------------

    def __getitem__(self, name: str) -> Vector:
        """The vector of this name. Raises UnknownVector, BrokenVector."""
        reply = self._client.call(m.ReadVector(name=_name(name)), m.VectorReply)
        assert reply.value is not None
        return Vector(self, reply.vector, np.array(reply.value.numpy(), np.float32))

    def __delitem__(self, name: str) -> None:
        """Remove it from the server; edits and breakpoints made with it keep their numbers."""
        self._client.call(m.RemoveVector(name=_name(name)), m.Vectors)

    def __iter__(self) -> Iterator[str]:
        return iter([info.name for info in self._infos()])

    def __len__(self) -> int:
        return len(self._infos())

    def __contains__(self, name: object) -> bool:
        return name in [info.name for info in self._infos()]

    def _ipython_key_completions_(self) -> list[str]:
        try:
            return list(self)
        except DjinnError:  # completion is not the place to tell of a lost connection
            return []

    def frame(self) -> pd.DataFrame:
        """All of them, one row each, indexed by name."""
        import pandas as pd

        columns = ["name", "width", "norm", "location", "method", "model", "usable", "date", "note"]
        rows = [
            {
                "name": info.name,
                "width": info.width,
                "norm": info.norm,
                "location": info.location,
                "method": str(info.provenance.get("method", "")),
                "model": info.model,
                "usable": info.broken is None and info.weights == self.weights,
                "date": str(info.provenance.get("date", "")),
                "note": note_of(info, self.weights),
            }
            for info in self._infos()
        ]
        return pd.DataFrame(rows, columns=columns).set_index("name")

    def _infos(self) -> tuple[m.VectorInfo, ...]:
        return self._client.call(m.ListVectors(), m.Vectors).vectors

    @property
    def model(self) -> str:
        """Name of the model served."""
        return self._client.model.name

    @property
    def weights(self) -> str:
        """Hash of the weights served, which a vector must have been made on."""
        return str(self._client.model.fingerprint.get("weights", ""))

    def place(self, location: int | str) -> str:
        """The canonical name of a location of this model."""
        return str(parse_location(location, self._client.model.num_layers))

    # -- making one -----------------------------------------------------------------------

    def from_prompts(
        self,
        name: str,
        positive: Sequence[Any],
        negative: Sequence[Any],
        *,
        location: int | str,
        method: str = "mean_difference",
        tokens: object = -1,
        replace: bool = False,
    ) -> Vector:
        """The direction from the negative prompts to the positive ones, at `location`.

        positive, negative: texts or lists of token ids; each is run to the location once. method:
        "mean_difference", or "pca" of the differences of pairs. tokens: whose values count, in each
        prompt: -1 for the last token, "all", positions, a text, or a list of texts of which any
        will do. The values of several tokens of a prompt are averaged first.

        Raises BadArgument, BadPrompt, BadSelector, UnknownLocation, QuotaExceeded; then no vector
        is kept.

            server.vectors.from_prompts("joy", positive=good, negative=bad, location=16)
        """
        if method not in METHODS:
            raise BadArgument(f"method is one of {', '.join(METHODS)}, not {shown(method)}")
        place = self.place(location)
        sides = {
            "positive": _prompts(positive, "positive"),
            "negative": _prompts(negative, "negative"),
        }
        if method == "pca":
            check_pairs(*map(len, sides.values()))
        self._check_free(name, replace)
        rows: dict[str, list[npt.NDArray[np.float64]]] = {"positive": [], "negative": []}
        total, done = len(positive) + len(negative), 0
        with Progress(f"prompts at {place}", unit="prompt") as progress:
            for side, prompts in sides.items():
                for index, prompt in enumerate(prompts):
                    try:
                        rows[side].append(self._mean_row(prompt, place, tokens))
                    except DjinnError as error:
                        raise told(error, f"{side}[{index}]") from error
                    done += 1
                    progress.at(done, total)
        provenance: dict[str, Any] = {"method": method, "tokens": _plain(tokens)}
        if method == "pca":
            array, share = paired_pca(rows["positive"], rows["negative"])
            provenance["share_of_squares"] = share
        else:
            array = mean_difference(rows["positive"], rows["negative"])
        provenance |= {side: _kept(prompts) for side, prompts in sides.items()}
        return self._keep(name, array, place, provenance, replace=replace)

    def _mean_row(self, prompt: Any, place: str, tokens: object) -> npt.NDArray[np.float64]:
        with ended(self.server.launch(prompt, max_new_tokens=1)) as session:
            stop = session.run_to(place)
            assert isinstance(stop, Stopped)
            return np.asarray(rows_at(stop, tokens).mean(0, dtype=np.float64))

    def from_stop(
        self, name: str, stop: Stopped, *, tokens: object = -1, replace: bool = False
    ) -> Vector:
        """The values at a stop: of one token, or the mean over several (selected as above).

        server.vectors.from_stop("here", stop, tokens=" Mary")
        """
        if not isinstance(stop, Stopped):
            raise BadArgument(f"from_stop takes a stop, not {shown(stop)}")
        self._check_free(name, replace)
        rows = rows_at(stop, tokens)
        provenance = {
            "method": "stop",
            "tokens": _plain(tokens),
            "rows": len(rows),
            "forward": stop.forward,
            "prompt": _kept([list(stop.session.newest.tokens)]),
        }
        array = rows.mean(0, dtype=np.float64)
        return self._keep(name, array, stop.location, provenance, replace=replace)

    def from_array(
        self, name: str, array: object, *, location: int | str, replace: bool = False
    ) -> Vector:
        """Numbers of yours `[channels]`, said to be a direction at `location` of this model.

        server.vectors.from_array("joy", direction, location=16)
        """
        values = value_array(array, name="array").numpy()
        provenance = {"method": "array"}
        return self._keep(name, values, self.place(location), provenance, replace=replace)

    def from_file(
        self,
        name: str,
        path: str | Path,
        *,
        location: int | str | None = None,
        replace: bool = False,
    ) -> Vector:
        """A vector from a file: one of `vector.save()`, or any .safetensors or .npy of one vector.

        A saved one keeps how it was made, and on which model. Of another file the location has to
        be said; its numbers are taken to be of this model.

            server.vectors.from_file("joy", "joy.safetensors")
        """
        from djinn_nb.vector_files import read

        array, info = read(Path(path).expanduser(), name)
        if info is None:
            if location is None:
                raise BadArgument(
                    f"{Path(path).name} does not say where its vector belongs: pass location="
                )
            provenance = {"method": "file", "file": Path(path).name}
            return self._keep(name, array, self.place(location), provenance, replace=replace)
        if location is not None and self.place(location) != info.location:
            info = replaced(
                info,
                location=self.place(location),
                provenance={**info.provenance, "made_at": info.location},
            )
        return self._send(info, array, replace)

    def _keep(
        self,
        name: str,
        array: npt.NDArray[Any],
        location: str,
        provenance: dict[str, Any],
        *,
        replace: bool,
    ) -> Vector:
        from djinn_nb import __version__

        made = {
            **provenance,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "djinn": __version__,
            "dtype": self._client.model.dtype,
        }
        info = m.VectorInfo(
            name=_name(name),
            width=array.size,
            norm=0.0,
            location=location,
            model=self.model,
            weights=self.weights,
            provenance=made,
        )
        width = self._width(location)
        if width is not None and array.size != width:
            raise BadArgument(
                f"vector {name!r} has {array.size} numbers, {location} of {self.model} has {width}"
                " channels"
            )
        return self._send(info, array, flag(replace, "replace"))

    def _send(self, info: m.VectorInfo, array: npt.NDArray[Any], replace: bool) -> Vector:
        with np.errstate(over="ignore"):  # the server refuses what float32 cannot hold
            numbers = np.asarray(array).astype(np.float32)
        message = m.StoreVector(
            name=info.name,
            value=Array.from_numpy(numbers),
            location=info.location,
            model=info.model,
            weights=info.weights,
            provenance=info.provenance,
            replace=replace,
        )
        kept = self._client.call(message, m.VectorReply).vector
        return Vector(self, kept, numbers)

    def _check_free(self, name: object, replace: bool) -> None:
        """Refused before prompts are run for it. The server judges the name when it is kept."""
        if not flag(replace, "replace") and _name(name) in self:
            raise BadArgument(
                f"you have a vector named {name!r} already: pass replace=True, or take another name"
            )

    def _width(self, location: str) -> int | None:
        """Channels at a location, heads flattened; None where they depend on the prompt."""
        info = self._client.model
        if location == "logits":
            return info.vocab_size
        prefix, _, rest = location.partition(".")
        if prefix != "layers":
            return None if location == "final_norm" else info.hidden_size
        layer, _, site = rest.partition(".")
        for layout in info.sites[int(layer)] if info.sites else ():
            if layout.site == site:
                return layout.width * (layout.heads or 1) or None
        return info.hidden_size if site in ("input", "output") else None

    def __repr__(self) -> str:
        infos = self._infos()
        if not infos:
            return "no named vectors yet: server.vectors.from_prompts(…) makes one"
        return "\n".join(vector_line(info, self.weights) for info in infos)

    def _repr_html_(self) -> str:
        return str(self.frame().to_html(max_rows=60))


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise BadArgument(f"a vector is named by a text, not {shown(name)}")
    return name


def _prompts(prompts: object, side: str) -> list[Any]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise BadArgument(f"{side} is a list of prompts, not {shown(prompts)}")
    if not prompts:
        raise BadArgument(f"{side} is empty: give at least one prompt")
    return list(prompts)


def _kept(prompts: list[Any]) -> Any:
    """Prompts as provenance keeps them: whole, or, when they are long, their number and hash."""
    plain = [one if isinstance(one, str) else [int(i) for i in one] for one in prompts]
    text = json.dumps(plain)
    if len(text) <= MAX_KEPT_PROMPTS:
        return plain
    return {"count": len(plain), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _plain(tokens: object) -> Any:
    """A selector as provenance keeps it."""
    if isinstance(tokens, (str, int)):
        return tokens
    if isinstance(tokens, (set, frozenset)):
        return sorted(map(str, tokens))
    return [str(one) for one in tokens] if isinstance(tokens, (list, tuple)) else str(tokens)
