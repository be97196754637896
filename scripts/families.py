"""Write `kernel_server/models/FAMILIES.md`: every family of transformers against every site.

`python -m scripts.families`, or with `--check` only say whether the committed file is what this
machine finds. Tiny models are made of the families' own configurations (`tests.models.zoo`), each
is served as any model is, and the load check's verdict becomes its row.
"""

from __future__ import annotations

import argparse
import logging
import sys

import torch
import transformers
from transformers import PreTrainedModel

from kernel_server.engine.loading import resume
from kernel_server.models import family_table
from kernel_server.models.family_table import Row
from kernel_server.protocol.errors import UnsupportedModel
from tests.models import zoo


def row_of(name: str, model: PreTrainedModel) -> Row:
    """What the load check says of one model."""
    try:
        return family_table.row(name, resume(model)[2])
    except UnsupportedModel as refusal:
        return family_table.refused(name, refusal)


def table() -> str:
    """The whole file, made anew."""
    rows, unbuilt = [], {}
    for name in zoo.names():
        try:
            model = zoo.model(name)
        except zoo.CannotBeTiny as error:
            unbuilt[name] = str(error)
            continue
        rows.append(row_of(name, model))
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    versions = f"transformers {transformers.__version__}"
    return family_table.render(rows, versions, unbuilt)


def main() -> int:
    """Write the table, or compare it; 1 if the comparison fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    made = table()
    if not options.check:
        family_table.FILE.write_text(made, encoding="utf-8")
        return 0
    if made != family_table.FILE.read_text(encoding="utf-8"):
        print(f"{family_table.FILE.name} is stale: run python -m scripts.families")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
