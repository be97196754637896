"""The glossary has an entry for every word of the contract, and one only."""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path

import pytest

from kernel_server.protocol import conditions, location, messages

FOLDER = Path(location.__file__).parent
GLOSSARY = (FOLDER / "GLOSSARY.md").read_text(encoding="utf-8")


def entries() -> dict[str, list[list[str]]]:
    """Heading -> the words of each table row below it (bold or code in the first column)."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in GLOSSARY.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and (
            words := re.findall(r"\*\*(.+?)\*\*|`(.+?)`", line.split("|")[1])
        ):
            found.setdefault(heading, []).append([bold or code for bold, code in words])
    return found


def words_under(heading: str) -> list[str]:
    return [word for row in entries()[heading] for word in row]


def request_names() -> list[str]:
    """The classes of requests.py."""
    source = (FOLDER / "messages" / "requests.py").read_text(encoding="utf-8")
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]


def event_kinds() -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(messages.Event, vars(messages))["kind"])


def test_the_requests_are_found():
    names = request_names()

    assert names[0] == "Initialize"
    assert "Event" not in names
    assert set(names) <= set(messages.MESSAGES)


@pytest.mark.parametrize(
    ("heading", "words"),
    [
        ("Status of a session", messages.STATUSES),
        ("Stops", messages.REASONS),
        (
            "Where: locations",
            location.LAYER_SITES + location.OUTER_SITES,
        ),
        ("Requests", tuple(request_names())),
        ("Events", event_kinds()),
        ("Values and edits", messages.EDIT_KINDS),
        ("Variables of a condition", (*conditions.NAMES, *conditions.FUNCTIONS)),
    ],
)
def test_every_word_of_the_contract_has_an_entry(heading, words):
    missing = sorted(set(words) - set(words_under(heading)))

    assert not missing, f"GLOSSARY.md lacks, under {heading!r}: {', '.join(missing)}"


@pytest.mark.parametrize(
    ("heading", "words"),
    [
        ("Status of a session", messages.STATUSES),
        ("Requests", tuple(request_names())),
        ("Events", event_kinds()),
    ],
)
def test_the_glossary_names_nothing_the_contract_has_not(heading, words):
    named = [word for word in words_under(heading) if word not in words]

    assert not named


def test_nothing_of_the_contract_is_marked_as_planned():
    rows = [line for line in GLOSSARY.splitlines() if line.startswith("| `")]

    assert not [row for row in rows if "*Planned.*" in row]
