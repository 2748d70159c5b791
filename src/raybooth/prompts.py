"""Words in braces in a prompt: {subject}, {token} and {class}. Nothing else in braces means anything, as prompts come from anybody."""

import re

_WORD = re.compile(r"\{(subject|token|class)\}")
_LIKE_ONE = re.compile(r"\{\s*(?:\w[\w\s-]*)?(?:[.\[!:][^{}]*)?\}")
_UNCLOSED = re.compile(r"\{\s*(?:subject|token|class)\b(?![^{}]*\})")
_DOUBLE = re.compile(r"\{\{\s*(?:subject|token|class)\s*\}\}")
_ARTICLE = re.compile(r"\b([Aa])n?(?=\s+\{class\})")
_AN = re.compile(r"(?!eu|uku|uni|use|ute)[aeiou]|hour", re.IGNORECASE)


def asks_for_subject(prompt: str) -> bool:
    """Whether there is something to fill in."""
    return _WORD.search(prompt) is not None


def article(noun: str) -> str:
    """'a' or 'an', by how the noun begins."""
    return "an" if _AN.match(noun) else "a"


def filled(prompt: str, token: str, class_name: str) -> str:
    """`prompt` with the words filled in: "a {class}" becomes "an owl"."""
    words = {"subject": f"{token} {class_name}", "token": token, "class": class_name}
    return _WORD.sub(lambda found: words[found[1]], _ARTICLE.sub(lambda found: f"{found[1]}{article(class_name)[1:]}", prompt))


def unknown_words(prompt: str) -> list[str]:
    """What looks like such a word and is none: in a configuration a slip of the pen."""
    single = [word for word in _LIKE_ONE.findall(prompt) if not _WORD.fullmatch(word)]
    return single + _UNCLOSED.findall(prompt) + _DOUBLE.findall(prompt)
