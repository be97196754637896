"""The harness of the evaluation notebooks: records, criteria, controls, verdict, figures."""

from notebooks.harness.run import Run
from notebooks.harness.verdict import VerdictFailed

__all__ = ["Run", "VerdictFailed"]
