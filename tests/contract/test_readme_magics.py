"""The README names every magic, with the line that `%djinn_help` shows for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from djinn_nb.magics import DjinnMagics, _first_line

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SIGNS = {"line": "%", "cell": "%%"}
MAGICS = [(SIGNS[kind] + name, name) for kind in SIGNS for name in DjinnMagics.magics[kind]]


@pytest.mark.parametrize(("shown", "name"), MAGICS, ids=[shown for shown, _ in MAGICS])
def test_every_magic_is_in_the_readme(shown: str, name: str) -> None:
    line = _first_line(getattr(DjinnMagics, name)).replace("|", "\\|")

    assert f"| `{shown}` | {line} |" in README
