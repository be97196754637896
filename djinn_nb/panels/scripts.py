"""Scripts and style of the panels: they travel in the wheel, and are joined here into one module.

A widget's module can import nothing beside it; ours import nothing from a network either.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

STATIC = Path(__file__).parent / "static"
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([a-z_]+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class) )", re.MULTILINE)


@cache
def script(name: str) -> str:
    """A script and what it imports, as one module; what it exports last is what a widget calls.

    >>> script("layers").count("export default")
    1
    """
    return "\n".join(_parts(name, [])[::-1])


def _parts(name: str, seen: list[str]) -> list[str]:
    """The text of a script and of those it imports, each once, the importer first."""
    seen.append(name)
    text = (STATIC / f"{name}.js").read_text(encoding="utf-8")
    found = [_EXPORT.sub("", _IMPORT.sub("", text))]
    for other in _IMPORT.findall(text):
        if other not in seen:
            found += _parts(other, seen)
    return found


@cache
def style() -> str:
    """The style that all of them share."""
    return (STATIC / "view.css").read_text(encoding="utf-8")
