"""Whatever is asked in vain is refused by name, in one line, and changes nothing.

One table: what is done, to what, and the error it must get. A condition's message points at the
mistake with a caret, which takes lines of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import djinn_nb as djinn
from djinn_nb import errors as e
from djinn_nb import metrics
from kernel_server.protocol.messages import Selector
from tests.djinn_nb.conftest import CONTEXT, HIDDEN, NUM_LAYERS, VOCABULARY
from tests.system.conftest import Canary, World

HUGE = 10**400
LAST = NUM_LAYERS - 1
NAN, INF = math.nan, math.inf
MANY = 9  # more than the session has tokens

#: name -> (call, error). `x` is a session stopped at `s`, in forward 0, with 5 prompt tokens.
Cases = dict[str, tuple[Callable[[Any], Any], type[djinn.DjinnError]]]

LOCATIONS: Cases = {
    f"{where!r:.30}": (lambda o, where=where: o.x.break_at(where), error)
    for where, error in [
        (99, e.UnknownLocation),
        (NUM_LAYERS, e.UnknownLocation),
        (-NUM_LAYERS - 1, e.UnknownLocation),
        (10**30, e.UnknownLocation),
        (HUGE, e.UnknownLocation),
        (2.0, e.UnknownLocation),
        (np.float64(2), e.UnknownLocation),
        (True, e.UnknownLocation),
        (None, e.UnknownLocation),
        ([1], e.UnknownLocation),
        (b"logits", e.UnknownLocation),
        ("", e.UnknownLocation),
        ("layers", e.UnknownLocation),
        ("layers.1.nose", e.UnknownLocation),
        ("layers.99.output", e.UnknownLocation),
        ("layers.1\noutput", e.UnknownLocation),
        ("layers.1.output\x00", e.UnknownLocation),
        ("x" * 100_000, e.UnknownLocation),
        ("\ud800", e.BadMessage),
        ("layers.1.attention.pattrn", e.UnknownLocation),
        ("blocks.1.attn.hook_attn_scores", e.NotSupported),
    ]
}

CONDITIONS: Cases = {
    f"condition {text!r:.40}": (lambda o, text=text: o.x.break_at(1, condition=text), error)
    for text, error in [
        ("", e.BadCondition),
        ("   ", e.BadCondition),
        ("norm", e.BadCondition),
        ("norm >", e.BadCondition),
        ("norm > 1 1", e.BadCondition),
        ("norm = 1", e.BadCondition),
        ("norm > 1e999", e.BadCondition),
        ("token > 3", e.BadCondition),
        ("token == ' nowhere'", e.BadCondition),
        ('token == "zzzzqq"', e.BadCondition),
        ("nrom > 1", e.BadCondition),
        ("__import__('os').system('true') == 0", e.BadCondition),
        ("norm.__class__ == 1", e.BadCondition),
        ("(lambda: 1)() > 0", e.BadCondition),
        ("[norm for norm in token]", e.BadCondition),
        ("(norm := 3) > 1", e.BadCondition),
        ("9**9**9 > 1", e.BadCondition),
        ("(" * 900 + "norm > 1" + ")" * 900, e.BadCondition),
        ("not " * 400 + "norm > 1", e.BadCondition),
        ("norm > 1 and " * 200_000 + "norm > 1", e.BadCondition),
        ('token == "\ud800"', e.BadMessage),
        ('prob(" Mary")', e.BadCondition),
        (b"norm > 1", e.BadArgument),
        (7, e.BadArgument),
    ]
}

BREAKPOINTS: Cases = {
    "when": (lambda o: o.x.break_at(1, when="sometimes"), e.BadArgument),
    "when None": (lambda o: o.x.break_at(1, when=None), e.BadArgument),
    "when list": (lambda o: o.x.break_at(1, when=[]), e.BadArgument),
    "ignore -1": (lambda o: o.x.break_at(1, ignore=-1), e.BadArgument),
    "ignore bool": (lambda o: o.x.break_at(1, ignore=True), e.BadArgument),
    "ignore float": (lambda o: o.x.break_at(1, ignore=1.0), e.BadArgument),
    "ignore huge": (lambda o: o.x.break_at(1, ignore=HUGE), e.BadArgument),
    "once text": (lambda o: o.x.break_at(1, once="no"), e.BadArgument),
    "once None": (lambda o: o.x.break_at(1, once=None), e.BadArgument),
    "run_to 99": (lambda o: o.x.run_to(99), e.UnknownLocation),
    "run_to None": (lambda o: o.x.run_to(None), e.UnknownLocation),
    "run_to site": (lambda o: o.x.run_to("blocks.5.mlp.hook_pre"), e.NotSupported),
    "removed": (lambda o: o.gone_breakpoint.remove(), e.UnknownBreakpoint),
    "removed, enabled": (lambda o: o.gone_breakpoint.enable(), e.UnknownBreakpoint),
}


def launch(**wishes: Any) -> Callable[[Any], Any]:
    wishes = {"max_new_tokens": 4} | wishes
    prompt = wishes.pop("prompt", "Mary went")
    return lambda o: o.server.launch(prompt, **wishes)


PROMPTS: Cases = {
    f"prompt {what!r:.30}": (launch(prompt=what), error)
    for what, error in [
        ("", e.BadPrompt),
        ([], e.BadPrompt),
        (np.array([], int), e.BadPrompt),
        (None, e.BadPrompt),
        (5, e.BadPrompt),
        (b"Mary", e.BadPrompt),
        ({1, 2}, e.BadPrompt),
        ({1: 2}, e.BadPrompt),
        ([None], e.BadPrompt),
        ([True], e.BadPrompt),
        ([1.0], e.BadPrompt),
        (np.array([True]), e.BadPrompt),
        (np.array([1.0]), e.BadPrompt),
        (torch.ones(1, 3, dtype=torch.long), e.BadPrompt),
        (torch.ones(3), e.BadPrompt),
        ([VOCABULARY], e.BadPrompt),
        ([1, 2, -1], e.BadPrompt),
        ([2**70], e.BadPrompt),
        ([HUGE], e.BadPrompt),
        ("\ud800", e.BadMessage),
        ("a " * 5_000_000, e.BadArgument),
        ([1] * (CONTEXT - 3), e.PromptTooLong),
        ([1] * 200_000, e.PromptTooLong),
        ("Mary went to the store and " * (CONTEXT // 5), e.PromptTooLong),
    ]
}

LAUNCHES: Cases = {
    f"launch {name}={value!r:.20}": (launch(**{name: value}), error)
    for name, values, error in [
        ("max_new_tokens", (0, -1, 4.0, None, True, "4", HUGE, np.float64(4)), e.BadArgument),
        ("max_new_tokens", (CONTEXT, 10**9), e.PromptTooLong),
        ("temperature", (NAN, INF, -0.1, None, "1", 1j, True, HUGE), e.BadArgument),
        ("top_p", (0, -1, 1.1, NAN, None, "1", True, HUGE), e.BadArgument),
        ("seed", (-1, 2**63, HUGE, 1.0, "1", True), e.BadArgument),
        ("stop_on_entry", ("no", None, 1), e.BadArgument),
        ("add_special_tokens", ("no", None, 1), e.BadArgument),
        ("name", ("", "n" * 201, "a\nb", 7, "n" * 10_000_000), e.BadArgument),
        ("name", ("\ud800",), e.BadMessage),
    ]
    for value in values
}

SESSIONS: Cases = {
    "attach None": (lambda o: o.server.attach(None), e.BadArgument),
    "attach empty": (lambda o: o.server.attach(""), e.UnknownSession),
    "attach long": (lambda o: o.server.attach("x" * 100_000), e.UnknownSession),
    "attach lines": (lambda o: o.server.attach("a\nb"), e.UnknownSession),
    "fork seed -1": (lambda o: o.x.fork(seed=-1), e.BadArgument),
    "fork seed huge": (lambda o: o.x.fork(seed=HUGE), e.BadArgument),
    "fork name": (lambda o: o.x.fork(name=""), e.BadArgument),
    "fork name 7": (lambda o: o.x.fork(name=7), e.BadArgument),
    **{
        f"timeout {t!r:.20}": (lambda o, t=t: o.x.continue_(timeout=t), e.BadArgument)
        for t in (NAN, -1, -INF, True, "1", HUGE, [1])
    },
    "wait timeout": (lambda o: o.x.wait(timeout=NAN), e.BadArgument),
    "save over": (lambda o: o.x.save("/tmp"), e.BadArgument),
    "save nowhere": (lambda o: o.x.save("/proc/none/x"), e.BadArgument),
    "rewind ahead": (lambda o: o.x.rewind(99, 0), e.BadArgument),
    "rewind -1": (lambda o: o.x.rewind(-1, 0), e.BadArgument),
    "rewind huge": (lambda o: o.x.rewind(HUGE, 0), e.BadArgument),
    "rewind nowhere": (lambda o: o.x.rewind(0, "nowhere"), e.UnknownLocation),
    "go_to 99": (lambda o: o.x.go_to(99), e.UnknownNode),
    "go_to huge": (lambda o: o.x.go_to(HUGE), e.BadArgument),
    "go_to text": (lambda o: o.x.go_to("first"), e.BadArgument),
    "prune 99": (lambda o: o.x.prune(99), e.UnknownNode),
    "prune the start": (lambda o: o.x.prune(0), e.BadArgument),
    "load nothing": (lambda o: o.server.load("/nowhere"), e.BrokenCheckpoint),
    "load a folder": (lambda o: o.server.load("/tmp"), e.BrokenCheckpoint),
    "decode": (lambda o: o.server.model.tokenizer.decode([VOCABULARY]), e.BadArgument),
    "decode -1": (lambda o: o.server.model.tokenizer.decode([-1]), e.BadArgument),
    "decode float": (lambda o: o.server.model.tokenizer.decode([1.0]), e.BadArgument),
    "encode None": (lambda o: o.server.model.tokenizer.encode(None), e.BadArgument),
}


def edit(**wishes: Any) -> Callable[[Any], Any]:
    return lambda o: o.s.edit(**wishes)


EDITS: Cases = {
    f"edit {wishes!r:.60}": (edit(**wishes), e.BadEdit)
    for wishes in [
        {},
        {"scale": 1, "add": 1},
        {"scale": 2, "zero": True},
        {"zero": False},
        {"zero": 1},
        {"zero": np.array([1, 2])},
        {"scale": NAN},
        {"scale": INF},
        {"scale": "2"},
        {"scale": True},
        {"scale": [1, 2]},
        {"scale": HUGE},
        {"scale": 1e39},
        {"scale": 1j},
        {"scale": 1, "alpha": 2},
        {"scale": 1, "alpha": np.ones(3)},
        {"add": np.full(HIDDEN, NAN)},
        {"add": np.ones(HIDDEN + 1)},
        {"add": np.ones((MANY, HIDDEN))},
        {"add": np.ones((1, 1, HIDDEN))},
        {"add": []},
        {"add": [[1], [1, 2]]},
        {"add": object()},
        {"add": {}},
        {"add": [None] * HIDDEN},
        {"add": torch.ones(HIDDEN, dtype=torch.complex64)},
        {"add": 1, "alpha": NAN},
        {"add": 1, "alpha": None},
        {"add": 1, "alpha": [1, 2]},
        {"add": 3e38, "alpha": 3e38},
        {"set": np.ones((300_000, 2))},
        {"scale": 2, "location": 0},
        {"scale": 2, "tokens": "generated"},
        {"scale": 2, "tokens": " park"},
        {"scale": 2, "tokens": slice(99, 120)},
        {"set": np.ones(HIDDEN), "location": "logits"},
    ]
} | {
    f"edit {wishes!r:.60}": (edit(scale=2, **wishes), error)
    for error, every in {
        e.BadSelector: [
            {"tokens": 99},
            {"tokens": -99},
            {"tokens": 10**30},
            {"tokens": 1.0},
            {"tokens": True},
            {"tokens": []},
            {"tokens": [0, 0]},
            {"tokens": [0, -5]},
            {"tokens": [[0]]},
            {"tokens": np.array([True, False])},
            {"tokens": ""},
            {"tokens": "zzzz"},
            {"tokens": slice(0, 5, 0)},
            {"tokens": slice(0, 5.0)},
            {"tokens": object()},
            {"channels": HIDDEN},
            {"channels": -HIDDEN - 1},
            {"channels": []},
            {"channels": [1, 1]},
            {"channels": "prompt"},
            {"channels": slice(90, 95)},
            {"channels": Selector(kind="text", text="a")},
        ],
        e.UnknownLocation: [{"location": 99}, {"location": True}, {"location": 1.5}],
        e.NotSupported: [{"location": "blocks.5.mlp.hook_pre"}],
        e.BadArgument: [{"sticky": "no"}, {"sticky": None}],
        e.BadMessage: [{"tokens": "\ud800"}],
    }.items()
    for wishes in every
}
EDITS |= {
    "edit by no vector": (edit(add="vector"), e.UnknownVector),
    "edit sparse": (edit(add=torch.ones(HIDDEN).to_sparse()), e.BadArgument),
    "edit meta": (edit(add=torch.ones(HIDDEN, device="meta")), e.BadArgument),
    "undo without edits": (lambda o: o.s.undo(), e.UndoRefused),
    "edit of an old stop": (lambda o: o.old_stop.edit(scale=2), e.StaleStop),
    "undo at an old stop": (lambda o: o.old_stop.undo(), e.StaleStop),
    "undo after moving on": (lambda o: o.old_edit.undo(), e.UndoRefused),
    "disable after moving on": (lambda o: o.old_edit.disable(), e.UndoRefused),
    "remove after moving on": (lambda o: o.old_edit.remove(), e.UndoRefused),
    "old values": (lambda o: o.old_stop.hidden_states.numpy(), e.StaleStop),
    "old summary": (lambda o: o.old_stop.hidden_states.summary(), e.StaleStop),
    "old lens": (lambda o: o.old_stop.lens(), e.StaleStop),
    "old capture": (lambda o: o.old_stop.capture(), e.StaleStop),
}

READS: Cases = {
    f"lens {wishes!r:.40}": (lambda o, wishes=wishes: o.s.lens(**wishes), error)
    for error, every in {
        e.BadArgument: [
            {"top_k": 0},
            {"top_k": 5.0},
            {"top_k": True},
            {"top_k": 10**9},
            {"top_k": HUGE},
            {"layers": []},
            {"layers": [-2]},
            {"layers": [LAST]},
            {"layers": [1, 1]},
            {"layers": [0] * 1_000_000},
            {"layers": "some"},
            {"layers": "all", "tokens": 0},
        ],
        e.UnknownLocation: [
            {"layers": [99]},
            {"layers": ["logits"]},
            {"layers": [1.5]},
            {"layers": [True]},
            {"layers": 5},
            {"layers": [HUGE]},
        ],
        e.BadSelector: [{"tokens": 99}, {"tokens": []}, {"tokens": "zzzz"}],
    }.items()
    for wishes in every
} | {
    f"index {key!r:.30}": (lambda o, key=key: o.s.hidden_states[key].numpy(), e.BadSelector)
    for key in (99, 1.5, "zzzz", True, None, (0, 0, 0), 10**30, (0, HIDDEN), [[0]])
}

LOOKS: Cases = (
    {
        f"preview {wishes!r:.60}": (lambda o, wishes=wishes: o.s.preview(**wishes), error)
        for error, every in {
            e.BadEdit: [
                {},
                {"scale": NAN},
                {"scale": 2, "zero": True},
                {"scale": 2, "location": 0},
                {"add": np.ones(HIDDEN + 1)},
                {"force": " Mary", "location": 3},
            ],
            e.BadSelector: [
                {"scale": 2, "tokens": 99},
                {"scale": 2, "heads": 0},
                {"zero": True, "location": "layers.4.attention.heads", "heads": 4},
            ],
            e.BadArgument: [
                {"scale": 2, "top_k": 0},
                {"scale": 2, "top_k": 10**9},
                {"scale": 2, "top_k": 2.0},
                {"scale": 2, "metric": 3},
                {"scale": 2, "metric": metrics.Probability("zzzz")},
                {"scale": 2, "metric": metrics.OnText(len, name="length")},
                {"scale": 2, "nose": 1},
            ],
            e.UnknownLocation: [{"scale": 2, "location": 99}],
        }.items()
        for wishes in every
    }
    | {
        f"attention {wishes!r:.40}": (lambda o, wishes=wishes: o.s.attention(**wishes), error)
        for error, every in {
            e.UnknownLocation: [{"layer": 99}, {"layer": -NUM_LAYERS - 1}, {"layer": 10**12}],
            e.BadArgument: [{"layer": 1.0}, {"layer": True}, {"layer": "1"}, {"layer": HUGE}],
            e.BadSelector: [
                {"head": 4},
                {"head": -5},
                {"head": []},
                {"head": [1, 1]},
                {"head": "first"},
                {"head": 1.5},
                {"tokens": 99},
                {"tokens": "zzzz"},
                {"tokens": "generated"},
            ],
        }.items()
        for wishes in every
    }
    | {
        f"attribution {wishes!r:.40}": (lambda o, wishes=wishes: o.s.attribution(*wishes), error)
        for error, every in {
            e.BadArgument: [
                (VOCABULARY,),
                (-1,),
                (1.5,),
                (True,),
                (HUGE,),
                ("zzzz",),
                ("",),
                (" Mary", " Mary"),
                (1, 1),
                (None, "zzzz"),
                (b"Mary",),
            ],
            e.BadMessage: [("\ud800",)],
        }.items()
        for wishes in every
    }
    | {
        f"capture {wishes!r:.40}": (lambda o, wishes=wishes: o.x.capture(*wishes), error)
        for error, every in {
            e.UnknownLocation: [(99,), (None,), (1.5,), ([0, 99],), ("nose",), ([True],)],
            e.BadArgument: [
                ([],),
                ([1, "layers.1.output"],),
                (1, "everything"),
                (1, None),
                (1, True),
            ],
            e.BadSelector: [(1, "tensor", 99), (1, "tensor", "zzzz"), ("logits", "tensor", 0)],
        }.items()
        for wishes in every
    }
    | {
        "capture where nothing runs": (lambda o: o.waiting.capture(1), e.NotStopped),
        "router of a layer without": (lambda o: o.s.router(), e.NotSupported),
        "router of no layer": (lambda o: o.s.router(99), e.UnknownLocation),
        "old router": (lambda o: o.old_stop.router(), e.StaleStop),
        "old preview": (lambda o: o.old_stop.preview(scale=2), e.StaleStop),
        "old attention": (lambda o: o.old_stop.attention(), e.StaleStop),
        "old attribution": (lambda o: o.old_stop.attribution(), e.StaleStop),
        "logits of an old preview": (lambda o: o.old_preview.logits_after, e.StaleStop),
        "preview of a list": (lambda o: o.s.preview([1]), e.BadEdit),
        "head not read": (lambda o: o.s.attention(head=1).frame(0), e.BadArgument),
        "metric not asked for": (lambda o: o.s.preview(scale=2).metric, e.BadArgument),
        "top 0": (lambda o: o.s.attribution().top(0), e.BadArgument),
        "four indexes": (lambda o: o.inside.value[0, 0, 0, 0], e.BadSelector),
        "head outside": (lambda o: o.inside.value[0, 4].numpy(), e.BadSelector),
        "hidden states of heads": (lambda o: o.inside.hidden_states, e.NotSupported),
        "lens of heads": (lambda o: o.inside.lens(), e.NotSupported),
        "step in, timeout": (lambda o: o.x.step_in(timeout=NAN), e.BadArgument),
    }
)

TABLE: Cases = (
    LOCATIONS | CONDITIONS | BREAKPOINTS | PROMPTS | LAUNCHES | SESSIONS | EDITS | READS | LOOKS
)


@pytest.fixture(scope="module")
def objects(world: World) -> SimpleNamespace:
    session = world.launch("Mary went to the store")
    stop = session.run_to(2)
    other = world.launch("Mary went to the store")
    gone = other.break_at(1)
    gone.remove()
    old_stop = other.run_to(1)
    old_edit = old_stop.edit(scale=0.5, tokens=-1)
    old_preview = old_stop.preview(scale=2)
    other.next()
    waiting = world.launch("Mary went")
    inside = world.launch("Mary went to the store").run_to("layers.2.attention.heads")
    return SimpleNamespace(
        server=world.server, x=session, s=stop, other=other, old_stop=old_stop,
        old_edit=old_edit, old_preview=old_preview, gone_breakpoint=gone, waiting=waiting,
        inside=inside,
    )  # fmt: skip


def test_bad_input_is_refused_by_name_and_changes_nothing(world, objects):
    canary = Canary(world)
    wrong = []
    for index, (name, (call, error)) in enumerate(TABLE.items()):
        before = world.infos()
        told = _told(call, objects, error)
        after = world.infos()
        if told is not None:
            wrong.append(f"{name}: {told}")
        if before != after:
            wrong.append(f"{name}: something changed")
        if index % 20 == 0:
            canary.step()
    canary.step()
    values = objects.s.hidden_states.numpy()

    assert not wrong, "\n".join(wrong)
    assert len(TABLE) > 200
    fresh = world.launch("Mary went to the store")
    np.testing.assert_array_equal(fresh.run_to(2).hidden_states.numpy(), values)
    assert objects.x.continue_().tokens == fresh.continue_().tokens
    world.terminate_all()
    assert world.server.memory().loc["KV pages in use", "bytes"] == 0
    world.require_sound()


def _told(call: Callable[[Any], Any], objects: Any, error: type[djinn.DjinnError]) -> str | None:
    """What is wrong with how a call was refused; None when nothing is."""
    try:
        answer = call(objects)
    except djinn.DjinnError as raised:
        if type(raised) is not error:
            return f"{raised.code} instead of {error.code}: {raised!s:.200}"
        pointed = " condition" in f" {raised.code}".lower() or "\n  " in str(raised)
        if "\n" in str(raised) and not pointed:
            return f"several lines: {raised!s:.200}"
        if len(str(raised)) > 600 and not pointed:
            return f"{len(str(raised))} characters"
        return None
    except Exception as raised:
        return f"untyped {type(raised).__name__}: {raised!s:.200}"
    return f"was not refused: {answer!r:.100}"
