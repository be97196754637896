"""The variables and functions of a condition: what each is, and what it is computed from.

What they mean together is decided in `conditions`; their values are supplied by whoever judges.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["text", "number", "truth value"]
#: how a value is asked for: a variable by its name, a function by its name and its text
Key = str | tuple[str, str]

#: name -> what it is, for every variable of a condition
NAMES: dict[str, Kind] = {
    "token": "text",
    "token_id": "number",
    "position": "number",
    "forward": "number",
    "norm": "number",
    "hits": "number",
    "num_nan": "number",
    "num_inf": "number",
    "top_token": "text",
    "top_token_changed": "truth value",
    "entropy": "number",
}
#: name -> what it gives, for every function; each takes one text
FUNCTIONS: dict[str, Kind] = {"prob": "number", "cosine": "number"}
#: how a function is written, for messages
CALLS = {"prob": 'prob(" Mary")', "cosine": 'cosine("joy")'}

#: read off the logit lens, so only where the tensor is as wide as the residual stream
LENS_NAMES = frozenset({"top_token", "top_token_changed", "entropy", "prob"})
#: variables that hold the text of a token
TOKEN_NAMES = ("token", "top_token")
