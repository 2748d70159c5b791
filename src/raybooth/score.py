"""DINO, CLIP-I, CLIP-T, PRES and DIV (Ruiz et al. 2023, sections 4.2 and 4.3), on features whose rows have length 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def to_subject(drawn: Array, photographs: Array) -> Array:
    """DINO, CLIP-I, PRES: of each drawn picture (n, d) the mean cosine to the photographs (m, d): (n,)."""
    return (drawn @ photographs.T).mean(axis=1)


def to_prompt(drawn: Array, prompts: Array) -> Array:
    """CLIP-T: of each picture (n, d) the cosine to its own prompt (n, d): (n,)."""
    return (drawn * prompts).sum(axis=1)


def among(pictures: Array) -> Array:
    """Cosines of all pairs of different pictures (n, d): (n (n - 1) / 2,). The photographs' own mean is the ceiling of DINO and CLIP-I."""
    first, second = np.triu_indices(len(pictures), k=1)
    return (pictures[first] * pictures[second]).sum(axis=1)


def diversity(patches: Sequence[Array]) -> Array:
    """DIV: of each prompt, whose pictures' patches are (n, p, d), the mean distance of its pictures' pairs: (prompts,).

    The distance is LPIPS's (Zhang et al. 2018, equation 1) on the last layer of the ViT, unweighted: the squared distance of
    unit-length features at each place, averaged over the places. It lies in [0, 4].
    """
    return np.array([np.mean([_distance(a, b) for a, b in combinations(one, 2)]) for one in patches if len(one) > 1], dtype=np.float32)


def variety(patches: Array) -> Array:
    """DIV of many pictures of one prompt, whose patches are (n, p, d): of each its mean distance to the others, (n,). Two have one distance: (1,)."""
    if len(patches) == 2:
        return diversity([patches])
    return np.array([np.mean([_distance(a, b) for k, b in enumerate(patches) if k != i]) for i, a in enumerate(patches)], dtype=np.float32)


def _distance(a: Array, b: Array) -> float:
    return float(((a - b) ** 2).sum(axis=-1).mean())


def share(value: float, anchor: float) -> float:
    """How much of `anchor` a `value` comes to, 1 being all. There are no parts of an anchor of nought or less: then what is missing is taken from 1."""
    return value / anchor if anchor > 0 else 1 + value - anchor


@dataclass(frozen=True)
class Score:
    """A mean with its bootstrap 95% interval (none of a single value); `floor` is the base model's before fine-tuning, `ceiling` the photographs' own."""

    value: float
    low: float | None
    high: float | None
    floor: float | None
    ceiling: float | None


def scored(values: Array, floor: float | None = None, ceiling: float | None = None, draws: int = 2000) -> Score:
    """Percentile bootstrap (Efron 1979) over `values`, with a fixed seed."""
    if len(values) == 1:
        return Score(float(values[0]), None, None, floor, ceiling)
    picked = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picked].mean(axis=1), [2.5, 97.5])
    return Score(float(values.mean()), float(low), float(high), floor, ceiling)
