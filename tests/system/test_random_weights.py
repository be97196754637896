"""A model with random weights says so wherever it is named: nobody takes its words for trained."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

import djinn_nb as djinn
from kernel_server.cli import main
from tests.djinn_nb.conftest import Process

pytestmark = pytest.mark.slow

WORDS = "random weights"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("random") / "run"
    made = Process(folder, "--geometry", "gpt2", "--seed", "3")
    yield made
    made.end()


@pytest.fixture(scope="module")
def server(process: Process) -> Iterator[djinn.Server]:
    with process.connect() as made:
        yield made


def test_random_weights_are_named_everywhere(server: djinn.Server) -> None:
    session = server.launch([5, 6, 7, 8], max_new_tokens=2)
    stop = session.run_to(3)
    end = session.fork().continue_()

    for shown in (server, server.model, session, stop, end):
        assert WORDS in repr(shown)
    for card in (stop, end):
        assert WORDS in card._repr_html_()
    assert server.sessions().model.str.contains(WORDS).all()
    assert WORDS in server.memory().loc["weights", "note"]


@pytest.mark.parametrize("command", ["status", "sessions"])
def test_the_command_line_names_random_weights(server: djinn.Server, command: str) -> None:
    server.launch([1, 2], max_new_tokens=1)
    printed = io.StringIO()

    with contextlib.redirect_stdout(printed):
        status = main([command, "--socket", str(Path(server.address.removeprefix("unix:")))])

    assert status == 0
    assert WORDS in printed.getvalue()
