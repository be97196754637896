"""A token file is made once, private to its user, and found again by the client."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from kernel_server.protocol.errors import AccessDenied, BadArgument
from kernel_server.wire import tokens


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "tokens.json"


def test_the_first_start_makes_a_file_only_its_user_can_read(path: Path) -> None:
    made = tokens.load_or_create_tokens(path)

    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert json.loads(path.read_text()) == made
    assert [len(token) for token in made.values()] == [43]
    assert [file.name for file in path.parent.iterdir()] == ["tokens.json"]


def test_a_later_start_keeps_the_token(path: Path) -> None:
    made = tokens.load_or_create_tokens(path)

    assert tokens.load_or_create_tokens(path) == made
    assert tokens.find_token(path=path) in made.values()


def test_two_servers_starting_at_once_agree(path: Path) -> None:
    found: list[dict[str, str]] = []
    start = threading.Barrier(8)

    def begin() -> None:
        start.wait()
        found.append(tokens.load_or_create_tokens(path))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert all(each == found[0] for each in found)


def test_a_file_that_others_can_read_is_refused(path: Path) -> None:
    tokens.load_or_create_tokens(path)
    path.chmod(0o644)

    with pytest.raises(BadArgument, match="chmod 600"):
        tokens.load_or_create_tokens(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no json",
        "[]",
        "{}",
        '{"me": 5}',
        '{"me": "short"}',
        '{"": "a-long-enough-token"}',
        '{"a": "the-same-long-token", "b": "the-same-long-token"}',
    ],
)
def test_a_malformed_file_is_refused_and_kept(content: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(content)
    path.chmod(0o600)

    with pytest.raises(BadArgument):
        tokens.load_or_create_tokens(path)

    assert path.read_text() == content


def test_a_given_token_comes_before_the_variable_and_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens.load_or_create_tokens(path)
    monkeypatch.setenv(tokens.TOKEN_VARIABLE, "from-the-environment\n")

    assert tokens.find_token(path=path) == "from-the-environment"
    assert tokens.find_token("given", path) == "given"


def test_without_any_token_the_error_says_where_it_looked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tokens.TOKEN_VARIABLE, raising=False)

    with pytest.raises(AccessDenied, match=r"DJINN_TOKEN.*tokens\.json"):
        tokens.find_token(path=path)


def test_of_several_owners_the_client_is_the_one_of_its_user(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_user", lambda: "ann")
    path.parent.mkdir()
    path.write_text(json.dumps({"bob": "b" * 20, "ann": "a" * 20}))
    path.chmod(0o600)

    assert tokens.find_token(path=path) == "a" * 20
    monkeypatch.setattr(tokens, "_user", lambda: "eve")
    with pytest.raises(AccessDenied, match="none of eve"):
        tokens.find_token(path=path)
