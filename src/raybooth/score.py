"""Scores on features whose rows have length 1 (Ruiz et al. 2023, sections 4.2 and 4.3)."""

from torch import Tensor


def subject_similarity(drawn: Tensor, photographs: Tensor) -> float:
    """DINO and CLIP-I: mean cosine of all pairs of a drawn picture (n, d) and a photograph (m, d)."""
    return float((drawn @ photographs.T).mean())


def similarity_among(pictures: Tensor) -> float:
    """Mean cosine of all pairs of different pictures: the photographs' own is the ceiling of subject_similarity."""
    n = len(pictures)
    return float(((pictures @ pictures.T).sum() - n) / (n * (n - 1)))


def distance_among(pictures: Tensor) -> float:
    """Mean cosine distance of all pairs of different pictures: how various they are."""
    return 1 - similarity_among(pictures)


def prompt_fidelity(drawn: Tensor, prompts: Tensor) -> float:
    """CLIP-T: mean cosine of each picture (n, d) and its own prompt (n, d)."""
    return float((drawn * prompts).sum(-1).mean())
