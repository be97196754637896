"""The catalogue of messages: plain frozen data, every field of a kind the codec reads."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal, get_args, get_origin

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.codec import _loader
from kernel_server.protocol.messages import MESSAGES

NAMED = sorted(MESSAGES.items())


@pytest.mark.parametrize(("name", "cls"), NAMED)
def test_a_message_is_frozen_keyword_only_data(name, cls):
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert "__slots__" in vars(cls)
    assert getattr(m, name) is cls


@pytest.mark.parametrize(("name", "cls"), NAMED)
def test_every_field_is_of_a_kind_the_codec_reads(name, cls):
    hints = typing.get_type_hints(cls, vars(m))

    for field in dataclasses.fields(cls):
        _loader(hints[field.name])  # raises TypeError for others


def _names(kind: object) -> tuple[str, ...]:
    return get_args(kind)


def test_the_lists_of_names_are_those_of_the_annotations():
    assert _names(m.Status) == m.STATUSES
    assert _names(m.Reason) == m.REASONS
    assert _names(m.EditKind) == m.EDIT_KINDS


def test_every_choice_of_a_field_is_text():
    for cls in MESSAGES.values():
        for hint in typing.get_type_hints(cls, vars(m)).values():
            if get_origin(hint) is Literal:
                assert all(isinstance(choice, str) for choice in get_args(hint))


def test_what_acts_on_a_stop_carries_the_stop_it_saw():
    acting = [
        "Continue",
        "Next",
        "StepOut",
        "RunTo",
        "AddEdit",
        "UndoEdit",
        "ReadValue",
        "ReadLens",
    ]

    for name in acting:
        assert "seen" in {field.name for field in dataclasses.fields(MESSAGES[name])}, name


def test_builds_that_differ_in_a_message_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    here = m.contract_digest()  # kept from its first call on: that must not be one below

    @dataclasses.dataclass(frozen=True)
    class Pause:
        session_id: int

    monkeypatch.setitem(m.MESSAGES, "Pause", Pause)

    assert m.contract_digest.__wrapped__() != here
    monkeypatch.undo()
    assert m.Initialize(client="x").contract == m.contract_digest.__wrapped__() == here
