"""Mistakes of the kind that other tools let pass in silence, each as a short script of a user.

Every script is written twice, with the mistake and as it was meant, and what it returns is the last
line of a notebook's cell, which the notebook shows. `peer` is a thread of another project that
tells of the like: a value, a hook or a setting that silently was not what its user meant (TL is
TransformerLens).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

import djinn_nb as djinn
from djinn_nb.metrics import LogitDifference, Probability
from tests.djinn_nb.conftest import HIDDEN, NUM_LAYERS, PROMPT

#: As many tokens as PROMPT, with other names; and a prompt of fewer tokens.
OTHER, SHORT = PROMPT.replace("Mary", "John", 1), "Mary went to the store"
PUSH = np.linspace(-1, 1, HIDDEN, dtype=np.float32)


class Desk:
    """What a user has at hand: a server, and sessions by the line."""

    def __init__(self, server: djinn.Server) -> None:
        self.server = server

    def launch(self, prompt: Any = PROMPT, *, max_new_tokens: int = 4, **wishes: Any) -> Any:
        return self.server.launch(prompt, max_new_tokens=max_new_tokens, **wishes)

    def at(self, location: int | str = 2, prompt: Any = PROMPT, **wishes: Any) -> Any:
        """A stop of a new session, in its prefill."""
        return self.launch(prompt, **wishes).run_to(location)

    def decoding(self, location: int | str = 2) -> Any:
        """A stop of a new session, in its first decode."""
        session = self.at(location).session
        return session.run_to(location)

    def edited(self, *, max_new_tokens: int = 4, **edit: Any) -> Any:
        """The end of a session that was edited at its first stop."""
        stop = self.at(max_new_tokens=max_new_tokens)
        stop.edit(**edit)
        return stop.session.continue_()

    def moved_on(self) -> Any:
        """A stop whose session stands elsewhere by now."""
        stop = self.at()
        stop.session.next()
        return stop

    def vector(self, name: str = "joy", location: int = 2) -> djinn.Vector:
        return self.server.vectors.from_array(name, PUSH, location=location, replace=True)

    def foreign_vector(self) -> djinn.Vector:
        """One that another model's weights made."""
        vectors = self.server.vectors
        info = replace(self.vector().info, name="foreign", model="other", weights="0123456789ab")
        vectors._send(info, PUSH, replace=True)
        return vectors["foreign"]

    def logged(self, max_bytes: int) -> Any:
        session = self.launch()
        session.log_at("every layer", what="tensor", max_bytes=max_bytes)
        return session.continue_()


Script: TypeAlias = Callable[[Desk], Any]


@dataclass(frozen=True)
class Mistake:
    """A script with a mistake, the one that was meant, and the words that tell of it."""

    name: str
    peer: str
    told: str
    wrong: Script
    right: Script

    def is_told_by(self, said: list[str]) -> bool:
        return any(re.search(self.told, one) for one in said)


def what_is_said(script: Script, desk: Desk) -> list[str]:
    """What a user sees of a script without asking: its error, its warnings, its last line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            said = repr(script(desk))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    return [said, *(f"{one.category.__name__}: {one.message}" for one in caught)]


# --- scripts of more than a line --------------------------------------------------------------


def breakpoint_set_at(location: int) -> Script:
    def script(desk: Desk) -> Any:
        session = desk.at(3, max_new_tokens=1).session
        session.break_at(location)
        return session.continue_()

    return script


def breakpoint_with(**wishes: Any) -> Script:
    def script(desk: Desk) -> Any:
        session = desk.launch(max_new_tokens=1)
        session.break_at(1, **wishes)
        return session.continue_()

    return script


def log_of(tokens: int) -> Script:
    def script(desk: Desk) -> Any:
        session = desk.launch(max_new_tokens=2)
        session.log_at(3, tokens=tokens)
        return session.continue_()

    return script


def list_watched_above(limit: float) -> Script:
    def script(desk: Desk) -> Any:
        sessions = desk.launch([SHORT, PROMPT])
        sessions.break_when(norm_above=limit)
        return sessions.continue_()

    return script


def list_edited_at(token: int) -> Script:
    def script(desk: Desk) -> Any:
        sessions = desk.launch(["Mary went", PROMPT], max_new_tokens=1)
        sessions.edit(scale=2, tokens=token, location=2)
        return sessions.continue_()

    return script


def values_kept(moves: int) -> Script:
    def script(desk: Desk) -> Any:
        stop = desk.at()
        kept = stop.hidden_states
        for _ in range(moves):
            stop.session.next()
        return kept

    return script


def previewed(moves: int) -> Script:
    def script(desk: Desk) -> Any:
        stop = desk.at()
        found = stop.preview(scale=2)
        for _ in range(moves):
            stop.session.next()
        return found.logits_after

    return script


def patched_from_a_session_that_made(moves: int) -> Script:
    def script(desk: Desk) -> Any:
        other = desk.at(prompt=OTHER)
        for _ in range(moves):
            other.session.next()
        return desk.at().edit(patch=other.hidden_states[-1], tokens=-1)

    return script


def undone_after(moves: int) -> Script:
    def script(desk: Desk) -> Any:
        stop = desk.at()
        edit = stop.edit(scale=2)
        for _ in range(moves):
            stop.session.next()
        return edit.undo()

    return script


def vector_used_at(location: int) -> Script:
    def script(desk: Desk) -> Any:
        desk.vector("joy", location=2)
        return desk.at(location).edit(add="joy")

    return script


def vector_stored_twice(name: str) -> Script:
    def script(desk: Desk) -> Any:
        desk.vector("joy")
        if name != "joy" and name in desk.server.vectors:
            del desk.server.vectors[name]
        return desk.server.vectors.from_array(name, PUSH, location=3)

    return script


def half_precision(size: float) -> Script:
    def script(desk: Desk) -> Any:
        with np.errstate(over="ignore"):
            vector = np.full(HIDDEN, size, np.float16) * np.float16(2)
        return desk.at().edit(add=vector)

    return script


def pair_of(corrupt: str) -> Script:
    def script(desk: Desk) -> Any:
        return djinn.Pair(PROMPT, corrupt, Probability(" to")).measure(desk.server)

    return script


def attributed_after(factor: float) -> Script:
    def script(desk: Desk) -> Any:
        stop = desk.at()
        stop.edit(scale=factor, tokens=-1)
        return stop.attribution()

    return script


def metric_of(*tokens: str) -> Script:
    def script(desk: Desk) -> Any:
        metric = LogitDifference(*tokens) if len(tokens) == 2 else Probability(*tokens)
        return desk.at("logits").preview(scale=0.5, metric=metric)

    return script


# --- the table --------------------------------------------------------------------------------

TOKENS = [
    Mistake(
        "a position the session never feeds", "TL PR 1256", "BadSelector: token 40 lies",
        lambda d: d.at().edit(scale=2, tokens=40),
        lambda d: d.at().edit(scale=2, tokens=13),
    ),
    Mistake(
        "a token of the cached prefix", "TL 776", "BadEdit: token 3 was fed in forw",
        lambda d: d.decoding().edit(scale=2, tokens=3),
        lambda d: d.decoding().edit(scale=2, tokens=-1),
    ),
    Mistake(
        "a slice that reaches into the cached prefix", "TL 776",
        "14 more tokens selected were fed in earlier forwards",
        lambda d: d.decoding().edit(scale=2, tokens=slice(0, None)),
        lambda d: d.decoding().edit(scale=2, tokens=slice(14, None)),
    ),
    Mistake(
        "a text that stands there twice", "steering-vectors 50", "occurs 2 times: positions 3, 9",
        lambda d: d.at().edit(scale=2, tokens=" John"),
        lambda d: d.at().edit(scale=2, tokens=" Mary"),
    ),
    Mistake(
        "a text that is two tokens", "TL PR 1256", "no token has the text ' Marx'",
        lambda d: d.at().edit(scale=2, tokens=" Marx"),
        lambda d: d.at().edit(scale=2, tokens=" Mary"),
    ),
    Mistake(
        "a text without its leading space", "TL PR 1256", "BadEdit: no token of forward",
        lambda d: d.at().edit(scale=2, tokens="Mary"),
        lambda d: d.at().edit(scale=2, tokens=" Mary"),
    ),
    Mistake(
        "steering that reaches the prompt only", "SAE-Reasoning 3", "in forward 0 only: sticky",
        lambda d: d.edited(add=PUSH, alpha=4),
        lambda d: d.edited(add=PUSH, alpha=4, sticky=True),
    ),
    Mistake(
        "a sticky edit that no decode applies", "vllm-lens 28", "edit 1 .*never applied: 3 forw",
        lambda d: d.edited(scale=2, tokens=" Mary", location=1, sticky=True),
        lambda d: d.edited(scale=2, tokens="generated", location=1, sticky=True),
    ),
    Mistake(
        "an edit of tokens that will not come", "nnsight 595", "the edit could never match",
        lambda d: d.at(max_new_tokens=1).edit(scale=2, tokens="generated", sticky=True),
        lambda d: d.at(max_new_tokens=2).edit(scale=2, tokens="generated", sticky=True),
    ),
    Mistake(
        "an edit that changes no number", "nnsight 510", "0 numbers changed: it does nothing",
        lambda d: d.at().edit(add=PUSH, alpha=0),
        lambda d: d.at().edit(add=PUSH, alpha=1),
    ),
    Mistake(
        "an ablation that changes no number", "nnsight 510", "edit 1 .*changed nothing",
        lambda d: d.edited(scale=1, tokens=-1),
        lambda d: d.edited(scale=0, tokens=-1),
    ),
    Mistake(
        "the mean over one token", "nnsight 145", "its own mean: nothing changes",
        lambda d: d.at().edit(mean=True, tokens=-1),
        lambda d: d.at().edit(mean=True, tokens="prompt"),
    ),
    Mistake(
        "a swap of three tokens", "nnsight 145", "BadEdit: swap takes exactly two tokens, and 3",
        lambda d: d.at().edit(swap=True, tokens=[1, 2, 3]),
        lambda d: d.at().edit(swap=True, tokens=[1, 3]),
    ),
    Mistake(
        "logits edited for earlier tokens", "TL PR 1191", "only the last has logits: 13",
        lambda d: d.at("logits").edit(ban=5, tokens="prompt"),
        lambda d: d.at("logits").edit(ban=5, tokens=-1),
    ),
]  # fmt: skip

PLACES = [
    Mistake(
        "a layer name that matches nothing", "TL PR 1256", "UnknownLocation: .*did you",
        lambda d: d.launch().break_at("layers.3.attention.out"),
        lambda d: d.launch().break_at("layers.3.attention.output"),
    ),
    Mistake(
        "a layer beyond the last", "TL PR 1256", "UnknownLocation",
        lambda d: d.launch().break_at(NUM_LAYERS),
        lambda d: d.launch().break_at(NUM_LAYERS - 1),
    ),
    Mistake(
        "hidden_states[3] taken for layer 3", "nnsight PR 718", r"layers\.2\.output",
        lambda d: d.launch().break_at("hidden_states[3]"),
        lambda d: d.launch().break_at("hidden_states[4]"),
    ),
    Mistake(
        "the last hidden_states taken for the last layer", "TL PR 1673", "final_norm",
        lambda d: d.launch().break_at(f"hidden_states[{NUM_LAYERS}]"),
        lambda d: d.launch().break_at(-1),
    ),
    Mistake(
        "a part that is added taken for the residual stream", "vLLM-Hook PR 11",
        "NotSupported: .*what is added to the residual stream",
        lambda d: d.at("layers.2.mlp.output").hidden_states,
        lambda d: d.at("layers.2.output").hidden_states,
    ),
    Mistake(
        "an edit behind the place the session stands at", "nnsight PR 718", "BadEdit: .*has passed",
        lambda d: d.at(2).edit(scale=2, location=0),
        lambda d: d.at(2).edit(scale=2, location=4),
    ),
    Mistake(
        "a head that does not exist", "TL PR 1256", "head 9 lies outside the tensor's 4",
        lambda d: d.at().ablate(layer=4, heads=9),
        lambda d: d.at().ablate(layer=4, heads=3),
    ),
    Mistake(
        "a query head where keys have fewer", "TL PR 1673", "head 3 lies outside .* 2 h",
        lambda d: d.at("layers.2.attention.k").edit(zero=True, heads=3),
        lambda d: d.at("layers.2.attention.q").edit(zero=True, heads=3),
    ),
    Mistake(
        "an ablation of a layer that has run", "nnsight PR 718", "BadEdit: .*has passed",
        lambda d: d.at(2).ablate(layer=1, heads=0),
        lambda d: d.at(2).ablate(layer=3, heads=0),
    ),
]  # fmt: skip

WATCHES = [
    Mistake(
        "a breakpoint that the run does not come to", "nnsight 595", "breakpoint 1 .*never reached",
        breakpoint_set_at(1), breakpoint_set_at(4),
    ),
    Mistake(
        "a run to a place that has passed", "nnsight 399", r"run_to\(1\) was never reached",
        lambda d: d.at(3, max_new_tokens=1).session.run_to(1),
        lambda d: d.at(3, max_new_tokens=2).session.run_to(1),
    ),
    Mistake(
        "a breakpoint in decodes of a run that has none", "nnsight 595", "there was no decode",
        breakpoint_with(when="decode"), breakpoint_with(when="prefill"),
    ),
    Mistake(
        "a condition that is never true", "nnsight 145", "never held in 1 hit: norm > 1e9",
        breakpoint_with(condition="norm > 1e9"), breakpoint_with(condition="norm > 1e-9"),
    ),
    Mistake(
        "an ignore count that swallows every hit", "nnsight 145", "held once and never stopped",
        breakpoint_with(ignore=5), breakpoint_with(ignore=0),
    ),
    Mistake(
        "a condition on a text that is no token", "vllm-lens 28", "BadCondition",
        lambda d: d.launch().break_at(2, condition='token == " Marx"'),
        lambda d: d.launch().break_at(2, condition='token == " Mary"'),
    ),
    Mistake(
        "a log of tokens that are never fed", "nnsight 595", "noted nothing: none of its tokens",
        log_of(15), log_of(14),
    ),
    Mistake(
        "a log that overflows", "TL 746", "UserWarning: logpoint 1 .*has lost",
        lambda d: d.logged(4096), lambda d: d.logged(1 << 20),
    ),
    Mistake(
        "a watch that holds for none of a list", "nnsight 399", r"never held .*\(in 2 of 2\)",
        list_watched_above(1e9), list_watched_above(0),
    ),
    Mistake(
        "an edit that one prompt of a list refuses", "nnsight 399", "1 with an error",
        list_edited_at(5), list_edited_at(1),
    ),
]  # fmt: skip

STOPS = [
    Mistake(
        "an edit at a stop that is over", "nnsight 399", "StaleStop: .*has moved on",
        lambda d: d.moved_on().edit(scale=2),
        lambda d: d.moved_on().session.stop.edit(scale=2),
    ),
    Mistake(
        "values kept from a stop that is over", "nnsight 595", "layers.2.output: .*has moved on",
        values_kept(moves=1), values_kept(moves=0),
    ),
    Mistake(
        "a patch from a stop that is over", "nnsight 399", "StaleStop: .*has moved on",
        patched_from_a_session_that_made(moves=1), patched_from_a_session_that_made(moves=0),
    ),
    Mistake(
        "a preview read after moving on", "nnsight 399", "StaleStop: .*has moved on",
        previewed(moves=1), previewed(moves=0),
    ),
    Mistake(
        "a capture of a forward that has passed", "TL 697", "StaleStop: .*has moved",
        lambda d: d.moved_on().capture(), lambda d: d.moved_on().session.stop.capture(),
    ),
    Mistake(
        "an edit undone too late", "TL PR 156", "UndoRefused: edit 1 was made at a",
        undone_after(moves=1), undone_after(moves=0),
    ),
]  # fmt: skip

VALUES = [
    Mistake(
        "an edit that leaves the range of the dtype", "vllm-lens 7", "would become infinite or NaN",
        lambda d: d.at().edit(scale=3e38), lambda d: d.at().edit(scale=3),
    ),
    Mistake(
        "values whose square leaves the range", "vllm-lens 15", "its square|square overflows",
        lambda d: d.edited(set=3e35, channels=0), lambda d: d.edited(set=3e5, channels=0),
    ),
    Mistake(
        "a vector that overflowed in half precision", "vllm-lens 7", "32 numbers are NaN or infin",
        half_precision(60000), half_precision(6),
    ),
    Mistake(
        "a vector of another width", "TL 642", r"BadEdit: .*\[64\].*32 channels",
        lambda d: d.at().edit(add=np.ones(2 * HIDDEN)),
        lambda d: d.at().edit(add=np.ones(HIDDEN)),
    ),
    Mistake(
        "a vector of another model", "TL 642", "WrongModel: .*made on other",
        lambda d: d.foreign_vector().apply(d.launch()),
        lambda d: d.vector().apply(d.launch()),
    ),
    Mistake(
        "a vector of another layer", "steering-vectors 50", r"made at layers\.2\.output",
        vector_used_at(4), vector_used_at(2),
    ),
    Mistake(
        "a vector stored under a name in use", "vllm-lens 28", "a vector named 'joy' already",
        vector_stored_twice("joy"), vector_stored_twice("joy of layer 3"),
    ),
    Mistake(
        "a patch of another length", "TL PR 1191", r"patch has shape \[5, 32\], and 14",
        lambda d: d.at().edit(patch=d.at(prompt=SHORT).hidden_states),
        lambda d: d.at().edit(patch=d.at(prompt=OTHER).hidden_states),
    ),
    Mistake(
        "a patch from another layer", "nnsight PR 718", r"from layers\.3\.output",
        lambda d: d.at(2).edit(patch=d.at(3, OTHER).hidden_states),
        lambda d: d.at(2).edit(patch=d.at(2, OTHER).hidden_states),
    ),
    Mistake(
        "numbers assigned to a tensor", "nnsight 145", "not assigned to: stop.edit",
        lambda d: d.at().hidden_states.__setitem__(-1, 0),
        lambda d: d.at().edit(set=0, tokens=-1),
    ),
]  # fmt: skip

RUNS = [
    Mistake(
        "a seed that has no part in the run", "llama.cpp PR 1472", "UserWarning: .*seed=7 has no",
        lambda d: d.launch(seed=7), lambda d: d.launch(seed=7, temperature=0.8),
    ),
    Mistake(
        "a fork with another seed that draws nothing", "llama.cpp PR 1472", "UserWarning: .*seed=8",
        lambda d: d.launch().fork(seed=8), lambda d: d.launch().fork(seed=8, temperature=0.8),
    ),
    Mistake(
        "two prompts compared that are of different lengths", "nnsight 399",
        "the lengths differ: 11 tokens have no counterpart",
        pair_of(SHORT), pair_of(OTHER),
    ),
    Mistake(
        "an attribution of a stream that was edited between its parts", "TL PR 1191",
        "the parts are not the whole logit",
        attributed_after(2), attributed_after(1),
    ),
    Mistake(
        "a metric of a text that is several tokens", "TL PR 1256", "is 3 tokens of tiny",
        metric_of(" Marx"), metric_of(" Mary"),
    ),
    Mistake(
        "a metric of a token and itself", "nnsight 145", "0 everywhere: both are token",
        metric_of(" Mary", " Mary"), metric_of(" Mary", " John"),
    ),
]  # fmt: skip

MISTAKES = [*TOKENS, *PLACES, *WATCHES, *STOPS, *VALUES, *RUNS]
