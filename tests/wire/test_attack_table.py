"""Every test that the table of attacks names is there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_the_table_of_attacks_names_tests_that_exist() -> None:
    named = re.findall(r"`([^`\s]*(?:\.py|::|…)[^`\s]*)`", (HERE / "README.md").read_text())
    defined: set[str] = set()
    lost: list[str] = []
    for path in ROOT.glob("tests/**/test_*.py"):
        defined.update(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    for name in named:
        file, _, test = name.rpartition("::") if "::" in name else ("", "", name)
        if test.endswith(".py"):
            file, test = test, ""
        places = [HERE / file, ROOT / file, *(ROOT / "tests").glob(f"*/{file or 'none'}")]
        if file and not any(place.exists() for place in places):
            lost.append(file)
        part = test.strip("…")
        if part and not any(part in one for one in defined):
            lost.append(name)

    assert len(named) > 50
    assert lost == []
