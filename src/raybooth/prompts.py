"""Words in braces in a prompt: {subject}, {token} and {class}. Nothing else in braces means anything, as prompts come from anybody."""

import re

_WORD = re.compile(r"\{(subject|token|class)\}")
_LIKE_ONE = re.compile(r"\{[A-Za-z_]\w*(?:[.\[!:][^{}]*)?\}")

_UNCLOSED = re.compile(r"\{(?:subject|token|class)\b(?![^{}]*\})")


def asks_for_subject(prompt: str) -> bool:
    """Whether there is something to fill in."""
    return _WORD.search(prompt) is not None


def filled(prompt: str, token: str, class_name: str) -> str:
    """`prompt` with the words filled in."""
    words = {"subject": f"{token} {class_name}", "token": token, "class": class_name}
    return _WORD.sub(lambda found: words[found[1]], prompt)


def unknown_words(prompt: str) -> list[str]:
    """What looks like such a word and is none: in a configuration a slip of the pen."""
    return [word for word in _LIKE_ONE.findall(prompt) if not _WORD.fullmatch(word)] + _UNCLOSED.findall(prompt)
