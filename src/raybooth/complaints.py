"""What is wrong with a configuration, in one sentence."""

import difflib
from collections.abc import Sequence
from datetime import date, time
from typing import Any

from pydantic import ValidationError


def sentence(error: ValidationError, known: Sequence[str]) -> str:
    """The first of pydantic's complaints, naming the field. `known` are all settings, as `section.key`."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"][:2])  # deeper ones are pydantic's own names
    if problem["type"] == "extra_forbidden":
        inside = problem["input"] if isinstance(problem["input"], dict) else {}
        where = ".".join([where, *list(inside)[:1]])  # of an unknown section, its first setting
        return f"{where} is not a known setting{_nearest(where, known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if not where:
        return f"{message}."
    return f"{where} = {_shown(problem['input'])} is not possible: {message[0].lower()}{message[1:]}."


def _shown(given: Any) -> str:
    try:
        text = str(given) if isinstance(given, date | time) else repr(given)
    except RecursionError:  # endlessly nested keys
        text = "settings in settings"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _nearest(name: str, known: Sequence[str]) -> str:
    """The end of the sentence: the nearest known setting, by its own name first, then with its section's."""
    if name in known:
        return ": it stands under a quoted name, write it without the quotes."
    own = name.lower().rpartition(".")[2]
    alike = difflib.get_close_matches(own, {k.rpartition(".")[2] for k in known}, 1, 0.75)
    if sum(k.endswith(f".{own}") for k in known) > 1 and "." not in name:  # a setting of several sections
        return f"; did you mean {' or '.join(k for k in known if k.endswith(f'.{own}'))}?"
    near = [k for k in known if k.rpartition(".")[2] in alike] or difflib.get_close_matches(name.lower(), known, 1, 0.5)
    best = difflib.get_close_matches(name.lower(), near, 1, 0)
    return f"; did you mean {best[0]}?" if best else f": the sections are {', '.join(dict.fromkeys(k.partition('.')[0] for k in known))}."
