"""The glossary has an entry for every word of the contract, and one only."""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path

import pytest

from kernel_server.protocol import conditions, location, messages

FOLDER = Path(messages.__file__).parent
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
    """The classes of the requests' part of messages.py."""
    source = (FOLDER / "messages.py").read_text(encoding="utf-8")
    first = source[: source.index("# --- requests")].count("\n")
    last = source[: source.index("# --- responses")].count("\n")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes if first < node.lineno <= last]


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
            location.LAYER_SITES + location.PLANNED_SITES + location.OUTER_SITES,
        ),
        ("Requests", tuple(request_names())),
        ("Events", event_kinds()),
        ("Values and edits", messages.EDIT_KINDS),
        ("Variables of a condition", (*conditions.NAMES, *conditions.PLANNED_NAMES)),
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


def test_what_is_planned_is_marked_and_what_is_there_is_not():
    rows = [line for line in GLOSSARY.splitlines() if line.startswith("| `")]
    marked = {
        word
        for row in rows
        if "*Planned.*" in row
        for word in re.findall("`(.+?)`", row.split("|")[1])
    }

    assert marked == {
        *location.PLANNED_SITES,
        *conditions.PLANNED_NAMES,
        "data breakpoint",
    }


def test_a_word_is_explained_once_under_a_heading():
    for heading in entries():
        words = words_under(heading)

        assert len(words) == len(set(words)), heading


def test_every_row_explains_its_words():
    for line in GLOSSARY.splitlines():
        if line.startswith("| ") and "---" not in line and not line.endswith("| meaning |"):
            assert re.search(r"[.*)] \|$", line), line


def test_the_words_we_do_not_use_are_not_used():
    # vLLM's word for a page
    assert not re.search(r"\bblock(s|ed)?\b", re.sub("`.+?`", "", GLOSSARY), re.IGNORECASE)
