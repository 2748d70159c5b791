"""DINO, CLIP-I, CLIP-T, PRES and DIV (Ruiz et al. 2023, sections 4.2 and 4.3), on features whose rows have length 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Distances = NDArray[np.float64]


def to_subject(drawn: Array, photographs: Array) -> Array:
    """DINO, CLIP-I, PRES: the mean cosine of each drawn picture (n, d) to the photographs (m, d): (n,)."""
    return (drawn @ photographs.T).mean(axis=1)


def to_prompt(drawn: Array, prompts: Array) -> Array:
    """CLIP-T: the cosine of each picture (n, d) to its own prompt (n, d): (n,)."""
    return (drawn * prompts).sum(axis=1)


def pairwise_cosines(pictures: Array) -> Array:
    """Cosines of all pairs of different pictures (n, d): (n (n - 1) / 2,). The photographs' own mean is the ceiling of DINO and CLIP-I."""
    first, second = np.triu_indices(len(pictures), k=1)
    return (pictures[first] * pictures[second]).sum(axis=1)


def distances(patches: Array) -> Distances:
    """Distances of pictures from one another (n, n), by their patches (n, p, d).

    The distance is LPIPS's (Zhang et al. 2018, equation 1) on the last layer of the ViT, unweighted: the squared distance of
    unit-length features at each place, averaged over the places. It lies in [0, 4].
    """
    flat = patches.reshape(len(patches), -1).astype(np.float64)
    squares = (flat**2).sum(axis=1)
    found = np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0) / patches.shape[1]
    np.fill_diagonal(found, 0)
    return found


def diversity(prompts: Sequence[Distances]) -> Array:
    """DIV: the mean distance of each prompt's pairs of pictures, from their distances (n, n): (prompts,). Prompts with one picture are left out."""
    return np.array([one.sum() / (len(one) * (len(one) - 1)) for one in prompts if len(one) > 1], dtype=np.float32)


def share(value: float, anchor: float) -> float:
    """`value` as a share of `anchor`, 1 being all. An anchor of nought or less has no shares: then what is missing is taken from 1."""
    return value / anchor if anchor > 0 else 1 + value - anchor


@dataclass(frozen=True)
class Score:
    """A mean with its bootstrap 95% interval (None for a single value).

    `floor` is the base model's before fine-tuning, and `changed` the interval of the change since: over pairs of pictures of the same prompt and
    seed, which vary together, so that it is much narrower than the two means' own. `ceiling` is the best that can be expected of DINO, CLIP-I and
    CLIP-T; of PRES and DIV, what the photographs have.
    """

    value: float
    low: float | None
    high: float | None
    floor: float | None
    ceiling: float | None
    changed: tuple[float, float] | None = None


def scored(values: Array, base: Array | None = None, ceiling: float | None = None, draws: int = 2000) -> Score:
    """The score of `values`, by percentile bootstrap (Efron 1979) with a fixed seed. `base` are the base model's, in the same order."""
    floor = None if base is None else float(base.mean())
    if len(values) == 1:
        return Score(float(values[0]), None, None, floor, ceiling)
    picked = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    changed = None if base is None else _interval((values - base)[picked].mean(axis=1))
    return Score(float(values.mean()), *_interval(values[picked].mean(axis=1)), floor, ceiling, changed)


def _interval(means: NDArray[Any]) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def scored_pairs(found: Distances, base: Distances | None = None, ceiling: float | None = None, draws: int = 2000) -> Score:
    """DIV of two or more pictures of one prompt, whose distances from one another are (n, n).

    Pictures are resampled, not pairs: these share pictures, and by them the interval would be half as wide. A picture makes no pair with itself.
    """
    n = len(found)
    value, floor = float(diversity([found])[0]), None if base is None else float(diversity([base])[0])
    if n == 2:
        return Score(value, None, None, floor, ceiling)
    times = np.stack([np.bincount(one, minlength=n) for one in np.random.default_rng(0).integers(n, size=(draws, n))])
    pairs = n * n - (times**2).sum(axis=1)
    times, pairs = times[pairs > 0], pairs[pairs > 0]

    def means(of: Distances) -> NDArray[Any]:
        return ((times @ of) * times).sum(axis=1) / pairs

    changed = None if base is None else _interval(means(found) - means(base))
    return Score(value, *_interval(means(found)), floor, ceiling, changed)
