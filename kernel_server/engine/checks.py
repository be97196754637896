"""Judges conditions at a point: the variables of each token, computed when they are asked for.

Figures of the tensor are computed for all tokens when the first condition asks; the logit lens, at
the price of the model's head, for those tokens alone of which a condition asks. Which breakpoints
are judged where, and what follows, is decided by the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernel_server.engine.lens_values import NO_TOKEN, Lens
from kernel_server.engine.variables import row_norms, token_norms
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.conditions import LENS_NAMES
from kernel_server.state.instructions import Check


class _LensAsked(Exception):
    """A condition came to a name of the lens, which is not computed yet for this token."""


class _Values(dict[Any, Any]):
    """The variables of one token; figures of the tensor are computed when a condition asks."""

    #: the row of the tensor, and how many rows of the forward lie before its first
    row = 0
    skipped = 0
    #: the one that is being judged
    check: Check | None = None

    def __init__(
        self, chunks: Sequence[Tensor], texts: Callable[[int], str], lens: Lens | None
    ) -> None:
        # every decode with an armed breakpoint makes one: nothing here that is not needed
        self.chunks = chunks
        self.texts = texts
        self.lens = lens
        #: figures of all rows, by name
        self.columns: dict[Any, list[Any]] = {}

    def __missing__(self, name: Any) -> Any:
        """Computed for all tokens when the first asks, but for the lens, which costs the head."""
        if name in LENS_NAMES or name[0] == "prob":
            return self.through_lens(name)
        if name[0] == "cosine":
            return self.cosine(name[1])
        column = self.columns.get(name)
        if column is None:
            column = self.columns[name] = self.column(name)
        self[name] = value = column[self.row]
        return value

    def column(self, name: Any) -> list[Any]:
        match name:
            case "norm":
                return token_norms(self.chunks)
            case "num_nan":
                return self.counts(torch.isnan)
            case "num_inf":
                return self.counts(torch.isinf)
        raise KeyError(name)

    def counts(self, is_one: Callable[[Tensor], Tensor]) -> list[int]:
        """Elements of each token's vector that are NaN, or infinite.

        A finite norm has seen neither; on a CPU looking at it first is cheaper than to count.
        """
        if self.chunks[0].device.type == "cpu":
            norms = self.columns.get("norm")
            if norms is None:
                norms = self.columns["norm"] = token_norms(self.chunks)
            if all(map(math.isfinite, norms)):
                return [0] * len(norms)
        return torch.cat([is_one(chunk).sum(-1).flatten() for chunk in self.chunks]).tolist()

    def cosine(self, name: str) -> float:
        """With the vector that the check knows by this name; another check may know another."""
        assert self.check is not None and self.check.lookup is not None
        value = self.check.lookup.vectors[name]
        column = self.columns.get(id(value))
        if column is None:
            column = self.columns[id(value)] = self.cosines(value)
        found: float = column[self.row]
        return found

    def cosines(self, value: Array) -> list[float]:
        """Cosine of each token's vector with a named one, float32; NaN beside a zero vector."""
        assert self.lens is not None
        vector = self.lens.vector(value)
        # a product for each row, whose bits do not depend on the other rows
        rows = [chunk.flatten(0, -2).float() for chunk in self.chunks]
        dots = torch.cat([(part * vector).sum(-1) for part in rows])
        norms = torch.cat([row_norms(part) for part in rows])
        return (dots / (norms * row_norms(vector))).tolist()

    # -- the lens -------------------------------------------------------------------------------

    def through_lens(self, name: Any) -> Any:
        assert self.lens is not None and self.check is not None
        lens, row = self.lens.here(), self.skipped + self.row
        if name == "top_token":
            return self.text_of(lens.top(row))
        if name == "top_token_changed":
            before = self.lens.before(self.check.breakpoint_id)
            return before is not None and before.has(row) and before.top(row) != lens.top(row)
        return lens.of(row)[name]

    def text_of(self, token_id: int) -> str:
        return "" if token_id == NO_TOKEN else self.texts(token_id)


class _FirstLook(_Values):
    """As `_Values`, for finding out of which tokens the lens is asked at all."""

    def through_lens(self, name: Any) -> Any:
        raise _LensAsked


class _OneToken(_Values):
    """The variables of a decode's token: the lens is computed when a condition asks."""

    #: all that are judged at the point: what one asks of the head is computed for the others too
    checks: Sequence[Check]

    def __missing__(self, name: Any) -> Any:
        if name == "norm":
            self[name] = norm = row_norms(self.chunks[0]).item()
            return norm
        if name in ("num_nan", "num_inf") and math.isfinite(self["norm"]):
            # the usual answer, without a second look at the tensor
            self[name] = 0
            return 0
        return super().__missing__(name)

    def counts(self, is_one: Callable[[Tensor], Tensor]) -> list[int]:
        return [int(is_one(self.chunks[0]).sum())]

    def through_lens(self, name: Any) -> Any:
        assert self.lens is not None
        if _needs_figures(self.checks):
            self.lens.here().load([0], _asked(self.checks))
        return super().through_lens(name)


def evaluate_checks(
    checks: Sequence[Check],
    chunks: Sequence[Tensor],
    token_ids: Sequence[int],
    texts: Callable[[int], str],
    first_token: int,
    forward: int,
    lens: Lens | None = None,
) -> dict[int, tuple[int, ...]]:
    """Absolute positions at which each check holds, by breakpoint id; those that hold nowhere are
    left out.

    chunks: the tensor at the point, `[1, tokens, width]` each. It may hold the last rows only
    (logits): then only their tokens are judged. token_ids: those fed in this forward, the first at
    position `first_token`. lens: needed where a check asks for it or for a named vector.

    Raises `BadCondition` when a condition cannot be computed (division by zero).
    """
    if len(token_ids) == 1:
        return _judge_one(checks, chunks, token_ids[0], texts, first_token, forward, lens)
    num_rows = sum(chunk.shape[-2] for chunk in chunks)
    skipped = len(token_ids) - num_rows
    positions: dict[int, list[int]] = {}
    judged: list[tuple[Check, frozenset[int] | None]] = []
    for check in checks:
        if check.holds is None:
            rows = range(len(token_ids)) if check.rows is None else check.rows
            positions[check.breakpoint_id] = [first_token + r for r in rows if r >= skipped]
        else:
            judged.append((check, None if check.rows is None else frozenset(check.rows)))
    values = _FirstLook(chunks, texts, lens)
    values["forward"] = forward
    needs_text = any("token" in check.names for check in checks)
    #: check -> the rows of the forward at which it came to the lens
    asking: dict[int, list[int]] = {}
    for row in range(num_rows) if judged else ():
        _put_token(values, row, skipped, token_ids, first_token, needs_text)
        for index, (check, only) in enumerate(judged):
            if only is not None and skipped + row not in only:
                continue
            try:
                if _holds(check, values):
                    positions.setdefault(check.breakpoint_id, []).append(
                        first_token + skipped + row
                    )
            except _LensAsked:
                asking.setdefault(index, []).append(skipped + row)
    if asking:
        again = [(judged[index][0], rows) for index, rows in asking.items()]
        _judge_by_lens(again, positions, values, token_ids, first_token, skipped)
    return {key: tuple(sorted(found)) for key, found in positions.items() if found}


def _judge_by_lens(
    asking: Sequence[tuple[Check, list[int]]],
    positions: dict[int, list[int]],
    looked: _Values,
    token_ids: Sequence[int],
    first_token: int,
    skipped: int,
) -> None:
    """Judge the tokens that came to the lens: all of them through the head together."""
    assert looked.lens is not None
    rows = sorted({row for _, rows in asking for row in rows})
    checks = [check for check, _ in asking]
    here = looked.lens.here()
    if _needs_figures(checks):
        here.load(rows, _asked(checks))
    else:
        here.load_tops(rows)
    values = _Values(looked.chunks, looked.texts, looked.lens)
    values["forward"], values.columns = looked["forward"], looked.columns
    values.skipped = skipped
    needs_text = any("token" in check.names for check in checks)
    for check, own in asking:
        before = looked.lens.before(check.breakpoint_id)
        if "top_token_changed" in check.names and before is not None:
            before.load_tops(row for row in own if before.has(row))
        for row in own:
            _put_token(values, row - skipped, skipped, token_ids, first_token, needs_text)
            if _holds(check, values):
                positions.setdefault(check.breakpoint_id, []).append(first_token + row)


def _put_token(
    values: _Values,
    row: int,
    skipped: int,
    token_ids: Sequence[int],
    first_token: int,
    needs_text: bool,
) -> None:
    """Let `values` be about a row of the tensor."""
    for name in values.columns:
        values.pop(name, None)
    token_id = token_ids[skipped + row]
    values.row = row
    values["position"] = first_token + skipped + row
    values["token_id"] = token_id
    if needs_text:
        values["token"] = values.texts(token_id)


def _holds(check: Check, values: _Values) -> bool:
    assert check.holds is not None
    values.check = check
    values["hits"] = check.hits
    return check.holds(values)


def _needs_figures(checks: Sequence[Check]) -> bool:
    """Whether more than the top token is wanted of the lens."""
    return any("entropy" in check.names or "prob" in check.names for check in checks)


def _asked(checks: Sequence[Check]) -> dict[tuple[str, str], tuple[int, ...]]:
    """The probabilities that any of the checks asks for."""
    return {
        ("prob", text): ids
        for check in checks
        if check.lookup is not None
        for text, ids in check.lookup.token_ids.items()
    }


def _judge_one(
    checks: Sequence[Check],
    chunks: Sequence[Tensor],
    token_id: int,
    texts: Callable[[int], str],
    position: int,
    forward: int,
    lens: Lens | None,
) -> dict[int, tuple[int, ...]]:
    """`evaluate_checks` for a single token: every decode with an armed breakpoint pays this."""
    values = _OneToken(chunks, texts, lens)
    values.checks = checks
    values["forward"], values["position"], values["token_id"] = forward, position, token_id
    held: dict[int, tuple[int, ...]] = {}
    for check in checks:
        if check.holds is not None:
            if "token" in check.names:
                values["token"] = texts(token_id)
            values["hits"] = check.hits
            values.check = check
            if not check.holds(values):
                continue
        held[check.breakpoint_id] = (position,)
    return held
