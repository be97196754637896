"""The text the bundled model is trained and tested on: pure Python, seeded, no torch.

`documents` yields training text. Test prompts, none of which training text holds, come from
`indirect_cases`, `fact_cases`, `story_cases` and `repeat_cases`; each test, evaluation and
notebook draws from the same functions.
"""

from .documents import MIX, SHARD, documents
from .facts import FactCase
from .facts import cases as fact_cases
from .indirect import CLASSIC, IndirectCase
from .indirect import cases as indirect_cases
from .repeats import cases as repeat_cases
from .stories import TELLING_WORDS, StoryCase, valence_of
from .stories import cases as story_cases

__all__ = [
    "CLASSIC",
    "MIX",
    "SHARD",
    "TELLING_WORDS",
    "FactCase",
    "IndirectCase",
    "StoryCase",
    "documents",
    "fact_cases",
    "indirect_cases",
    "repeat_cases",
    "story_cases",
    "valence_of",
]
