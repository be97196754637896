"""Scripts of the panels: complete, of this machine alone, and their helpers right."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from djinn_nb.panels import PANELS
from djinn_nb.panels.scripts import STATIC, script

DRAWN = [name for name in PANELS if (STATIC / f"{name}.js").exists()]
HELPERS = Path(__file__).with_name("scripts.test.mjs")


@pytest.mark.parametrize("name", DRAWN)
def test_a_script_is_one_module_that_imports_nothing(name) -> None:
    text = script(name)

    assert text.count("export default {") == 1 and text.count("export ") == 1
    assert "import " not in text and "import(" not in text
    assert "http:" not in text and "https:" not in text and "fetch(" not in text
    assert text.count("function element(") == 1  # each script once, however often it is imported
    assert text.count("const VIRIDIS =") == ("viridis" in text.lower())


def test_the_style_fetches_nothing_and_takes_colours_from_the_page() -> None:
    style = (STATIC / "view.css").read_text()

    assert "url(" not in style and "@import" not in style
    assert style.count("--jp-") >= 8


def test_the_colours_are_matplotlibs_own() -> None:
    from matplotlib import colormaps

    text = (STATIC / "colours.js").read_text()
    table = "".join(line.strip(' ",') for line in text.splitlines() if line.startswith('  "'))
    expected = "".join(
        f"{round(255 * share):02x}"
        for i in range(256)
        for share in colormaps["viridis"](i)[:3]
    )  # fmt: skip

    assert table == expected


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed here")
def test_the_helpers_of_the_scripts() -> None:
    found = subprocess.run(
        ["node", "--test", str(HELPERS)], capture_output=True, text=True, timeout=120
    )

    assert found.returncode == 0, found.stdout + found.stderr
    assert "# pass 7" in found.stdout
