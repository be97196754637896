"""One list of versions: constraints.txt pins all that is installed, environment.yml repeats it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def _pins(lines: list[str]) -> dict[str, str]:
    pins = {}
    for line in lines:
        name, separator, version = line.partition("==")
        assert separator, f"{line!r} is not an exact pin"
        assert canonicalize_name(name) not in pins, f"{name} is pinned twice"
        pins[canonicalize_name(name)] = version
    return pins


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return _pins([line for line in lines if line and not line.startswith("#")])


def _environment() -> tuple[list[str], list[str]]:
    """The conda packages and the pip requirements of environment.yml."""
    packages = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))[
        "dependencies"
    ]
    [pip] = [entry["pip"] for entry in packages if isinstance(entry, dict)]
    return [entry for entry in packages if isinstance(entry, str)], pip


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _requirements() -> list[Requirement]:
    project = _project()
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for lines in lists for line in lines]


def test_environment_yml_holds_the_pins_of_constraints_txt():
    _, pip = _environment()
    pinned = _pins([line for line in pip if not line.startswith("-e ")])

    assert pinned == _constraints()


def test_environment_yml_installs_the_package_with_the_extras_of_make_setup():
    conda, pip = _environment()
    [editable] = [line for line in pip if line.startswith("-e ")]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    assert f"'{editable.removeprefix('-e ')}'" in makefile
    assert "python=3.11" in conda


def test_every_requirement_is_pinned_inside_its_range():
    pins = _constraints()
    outside = [
        str(requirement)
        for requirement in _requirements()
        if (version := pins.get(canonicalize_name(requirement.name))) is None
        or Version(version) not in requirement.specifier
    ]

    assert outside == []


def test_the_ranges_that_were_promised_hold():
    ranges = {r.name: {str(s) for s in r.specifier} for r in _requirements()}

    assert _project()["requires-python"] == ">=3.11"
    assert ranges["torch"] == {">=2.11"}
    assert ranges["transformers"] == {">=5.17", "<6"}
    assert ranges["rpyc"] == {">=6.0.2", "<7"}
    assert _constraints()["torch"] == "2.13.0"


def test_no_pin_carries_a_build_tag():
    tagged = [name for name, version in _constraints().items() if re.search(r"[+@]", version)]

    assert tagged == []
