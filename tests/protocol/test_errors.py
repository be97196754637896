"""The tree of errors: one class per code, documented, drawn, and whole after every journey."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from kernel_server.protocol import errors
from kernel_server.protocol.codec import decode, encode, raise_error
from kernel_server.protocol.errors import ERRORS, DjinnError
from kernel_server.protocol.messages import error_info

CLASSES = sorted(ERRORS.items())
BRANCHES = {
    errors.RequestError,
    errors.CapacityError,
    errors.ConnectionFailed,
    errors.SessionFailed,
    errors.ServerFault,
}


def drawn_tree() -> dict[str, str]:
    """class -> branch, as drawn in the module's docstring."""
    found: dict[str, str] = {}
    branch = ""
    for line in (errors.__doc__ or "").splitlines():
        if top := re.match(r"\s*[├└]── (\w+)", line):
            branch = top[1]
            found[branch] = "DjinnError"
        elif inner := re.match(r"\s*│?\s+[├└]── (.+)", line):
            found |= {name.strip(): branch for name in inner[1].split(",")}
    return found


def test_the_tree_drawn_is_the_tree_there_is():
    real = {
        code: next(base.__name__ for base in cls.__mro__[1:] if issubclass(base, DjinnError))
        for code, cls in CLASSES
        if cls is not DjinnError
    }

    assert drawn_tree() == real


def test_every_class_of_the_module_is_registered_under_its_name():
    defined = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, DjinnError)
    }

    assert defined == ERRORS
    assert all(cls.code == code == cls.__name__ for code, cls in CLASSES)


def test_every_class_but_the_base_belongs_to_one_branch():
    for code, cls in CLASSES:
        if cls is not DjinnError:
            assert sum(issubclass(cls, branch) for branch in BRANCHES) == 1, code


@pytest.mark.parametrize(("code", "cls"), CLASSES)
def test_every_class_says_in_a_sentence_when_it_is_raised(code, cls):
    own = cls.__dict__["__doc__"]

    assert own.endswith(".")
    assert 20 < len(own.splitlines()[0]) < 100


@pytest.mark.parametrize(("code", "cls"), CLASSES)
def test_an_error_is_its_line_and_its_values(code, cls):
    error = cls("needs 12 pages, 3 are free", needed=12, free=3)

    assert str(error) == error.message == "needs 12 pages, 3 are free"
    assert error.details == {"needed": 12, "free": 3}
    assert error.server_traceback is None


@pytest.mark.parametrize(("code", "cls"), CLASSES)
@pytest.mark.parametrize(
    "carry", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy]
)
def test_an_error_survives_pickle_and_copy(code, cls, carry):
    error = cls("a line", message_="x", numbers=[1, 2])
    error.details["message"] = "also a detail"
    error.server_traceback = "a trace"
    again = carry(error)

    assert type(again) is cls
    assert (str(again), again.details) == (str(error), error.details)
    assert again.server_traceback == "a trace"


@pytest.mark.parametrize(("code", "cls"), CLASSES)
def test_an_error_crosses_the_wire_and_is_caught_by_its_class(code, cls):
    info = decode(encode(error_info(cls("a line", free=3), traceback="a trace")))

    with pytest.raises(cls, match="a line") as caught:
        raise_error(info)

    assert type(caught.value) is cls
    assert caught.value.details == {"free": 3}
    assert caught.value.server_traceback == "a trace"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ZeroDivisionError("division by zero"),
            "internal error: ZeroDivisionError: division by zero",
        ),
        (KeyError(), "internal error: KeyError"),
        (RuntimeError("first\nsecond"), "internal error: RuntimeError: first"),
    ],
)
def test_what_is_not_ours_is_a_fault_of_the_server_in_one_line(error, line):
    info = error_info(error)

    assert (info.code, info.message, info.details) == ("ServerFault", line, {})


@pytest.mark.parametrize(
    ("ours", "builtin"),
    [
        (errors.UnknownLocation, ValueError),
        (errors.UnknownSession, LookupError),
        (errors.NotSupported, NotImplementedError),
        (errors.ModelNotFound, FileNotFoundError),
        (errors.OutOfPages, MemoryError),
        (errors.StillRunning, TimeoutError),
        (errors.ConnectionLost, ConnectionError),
        (errors.AccessDenied, PermissionError),
    ],
)
def test_who_knows_only_the_builtin_errors_catches_ours(ours, builtin):
    with pytest.raises(builtin):
        raise ours("a line")
