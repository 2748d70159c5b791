"""Rare identifiers for a subject: short sequences of tokens that a base model knows least about (Ruiz et al. 2023, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

from raybooth.errors import RayboothError
from raybooth.families.base import Family
from raybooth.families.parts import load

END = "</w>"  # ends the tokens that end a word, in CLIP's vocabularies
LETTERS = range(3, 7)
POOLS = {1: 2000, 2: 48, 3: 14}  # tokens in a sequence -> how many of the weakest are tried at each place


@dataclass(frozen=True)
class Proposal:
    """A word, its tokens, and how much the model knows of it.

    Attributes:
        norm: the mean norm of the tokens' embeddings over the vocabulary's median; training lengthens those of words that it sees.
        nearest: the largest cosine between their mean and a common word, `neighbour`.
    """

    word: str
    tokens: tuple[str, ...]
    norm: float
    neighbour: str
    nearest: float

    @property
    def strength(self) -> float:
        """The strength of the model's prior for the word: the lower, the freer the word is to name a subject."""
        return self.norm + self.nearest


def propose(family: Family, folder: Path, n: int = 10) -> list[Proposal]:
    """The `n` weakest words of the first text encoder's tokenizer, weakest first.

    Raises:
        RayboothError: if its vocabulary does not say where words end, or holds no whole words to tell rare ones from.
    """
    encoder = family.encoders[0]
    loaded = load(family, folder, (encoder,))
    tokenizer = loaded.tokenizers["tokenizer"]
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    module = loaded.modules[encoder]
    table = module.get_input_embeddings().weight.detach().float()  # type: ignore[operator]
    norms = table.norm(dim=1) / table.norm(dim=1).median()
    tried = [words for words in _sequences(vocabulary, norms) if _is_read_as(tokenizer, words)]
    if not tried:
        raise RayboothError(f"The tokenizer of {folder} has no tokens to make a rare word of: choose subject.token yourself.")
    # Merges are learnt in the order of frequency: the first whole words are the common ones.
    whole = [t for t in sorted(vocabulary, key=vocabulary.__getitem__) if t.endswith(END) and t[: -len(END)].isalpha() and len(t) > len(END) + 2]
    common = whole[: max(1, len(whole) // 4)]
    if not common:
        raise RayboothError(f"The tokenizer of {folder} knows no words of three letters, which rare ones are told from: choose subject.token yourself.")
    ids = torch.tensor([[vocabulary[t] for t in _padded(words)] for words in tried])
    means = F.normalize(table[ids].mean(dim=1), dim=-1)  # padded by repetition: one token keeps its own mean, two tokens nearly theirs
    nearest, index = (means @ F.normalize(table[[vocabulary[t] for t in common]], dim=-1).T).max(dim=1)
    found = [
        Proposal(_word(words), words, float(norms[[vocabulary[t] for t in words]].mean()), common[int(i)].removesuffix(END), float(near))
        for words, near, i in zip(tried, nearest, index, strict=True)
    ]
    return _different(sorted(found, key=lambda p: (p.strength, p.word)))[:n]


def _different(found: Sequence[Proposal]) -> list[Proposal]:
    """`found` without those that share a token with two better ones: a choice, not one word spelt in ten ways."""
    kept: list[Proposal] = []
    for proposal in found:
        if all(sum(token in other.tokens for other in kept) < 2 for token in proposal.tokens):
            kept.append(proposal)
    return kept


def _sequences(vocabulary: dict[str, int], norms: torch.Tensor) -> list[tuple[str, ...]]:
    """Sequences of one to three tokens in plain lower-case letters, made of the weakest tokens for each place."""
    plain = [t for t in vocabulary if t.removesuffix(END).isascii() and t.removesuffix(END).isalpha() and t.islower()]
    weakest = sorted(plain, key=lambda t: float(norms[vocabulary[t]]))
    last, other = [t for t in weakest if t.endswith(END)], [t for t in weakest if not t.endswith(END)]
    made = [words for length, most in POOLS.items() for words in product(*[other[:most]] * (length - 1), last[:most])]
    return [words for words in made if len(_word(words)) in LETTERS and len({w.removesuffix(END) for w in words}) == len(words)]


def _word(tokens: Sequence[str]) -> str:
    return "".join(tokens).removesuffix(END)


def _padded(tokens: tuple[str, ...]) -> tuple[str, ...]:
    return (tokens * 3)[:3]


def _is_read_as(tokenizer: object, tokens: tuple[str, ...]) -> bool:
    return tuple(tokenizer.tokenize(_word(tokens))) == tokens  # type: ignore[attr-defined]
