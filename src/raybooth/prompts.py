"""What a prompt says about the subject: the words in braces, {subject}, {token} and {class}, and the subject's name when they are filled in.

Nothing else in braces means anything, as prompts come from anybody.
"""

import re

_WORD = re.compile(r"\{(subject|token|class)\}")
_LIKE_ONE = re.compile(r"\{\s*(?:\w[\w\s-]*)?(?:[.\[!:][^{}]*)?\}")
_UNCLOSED = re.compile(r"\{\s*(?:subject|token|class)\b(?![^{}]*\})")
_DOUBLE = re.compile(r"\{\{\s*(?:subject|token|class)\s*\}\}")
_ARTICLE = re.compile(r"\b([Aa])n?(?=\s+\{class\})")
_AN = re.compile(r"(?!eu|uku|uni|use|ute)[aeiou]|hour", re.IGNORECASE)


_LINKS = """
about above across after against along alongside among and are around as at be before behind below beneath beside besides between beyond by carrying chasing
containing depicting down driving during featuring feeding following for from holding hugging in including inside into is like near of off on onto opposite or
out outside over past petting plus riding round seeing showing than through to toward towards under underneath unlike until up upon versus via vs was washing
watching wearing were with within without
"""
TAKES_ARTICLE = frozenset(["", *_LINKS.split()])
"""Words after which a noun needs its article; "" is the beginning of a prompt or of a part of it."""
_WITHOUT_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\ua000-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef"
"""Letters of scripts that do not separate words: Thai, Lao, Burmese, Khmer, Chinese, Japanese, Yi; and Korean, which writes endings onto them."""


def asks_for_subject(prompt: str) -> bool:
    """Whether a prompt has a word in braces to fill in."""
    return _WORD.search(prompt) is not None


def article(noun: str) -> str:
    """'a' or 'an', by how the noun begins."""
    return "an" if _AN.match(noun) else "a"


def filled(prompt: str, token: str, class_name: str) -> str:
    """`prompt` with the words filled in: "a {class}" becomes "an owl"."""
    words = {"subject": f"{token} {class_name}", "token": token, "class": class_name}
    return _WORD.sub(lambda found: words[found[1]], _ARTICLE.sub(lambda found: f"{found[1]}{article(class_name)[1:]}", prompt))


def unknown_words(prompt: str) -> list[str]:
    """What looks like a word in braces to fill in but is none: in a configuration a slip of the pen."""
    single = [word for word in _LIKE_ONE.findall(prompt) if not _WORD.fullmatch(word)]
    return single + _UNCLOSED.findall(prompt) + _DOUBLE.findall(prompt)


def names_subject(prompt: str, token: str, class_name: str) -> bool:
    """Whether a filled-in prompt names the subject."""
    return _name(token, class_name).search(prompt) is not None


def without_token(prompt: str, token: str, class_name: str) -> str:
    """The prompt without the token, for a model that has not learnt it. The class stays, or takes the place of a token that stood alone.

    "a unqtkn dog", "photo of unqtkn dog" and "photo of unqtkn dogs" become "a dog", "photo of a dog" and "photo of dogs".
    """
    noun, its_own = class_name, article(class_name)

    def replaced(found: re.Match[str]) -> str:
        if found["plural"]:
            return found["plural"]
        if found["article"]:  # it was the token's
            return f"{found['article'][0]}{its_own[1:]} {noun}"
        before = re.split(r"\W", prompt[: found.start()].rstrip())[-1]
        return f"{its_own} {noun}" if before.lower() in TAKES_ARTICLE else noun

    return _name(token, class_name).sub(replaced, prompt)


def _name(token: str, class_name: str) -> re.Pattern[str]:
    """A pattern for the subject in a prompt: the token, with "a" or "an" right before it and the class or its plural behind it, if they are there."""
    token, noun = re.escape(token), r"[\s-]+".join(map(re.escape, class_name.split()))
    near = rf"[^\W_{_WITHOUT_BLANKS}]"  # a letter that would continue the word
    plural = f"{noun}e?s" + (f"|{noun[:-1]}ies" if noun[-1] in "yY" else "")
    return re.compile(rf"(?:\b(?P<article>an?)\s+)?(?<!{near}){token}(?:[\s-]+(?:(?P<plural>{plural})|{noun})(?!{near}))?(?!{near})", re.IGNORECASE)
