"""The DreamBooth paper's protocol (Ruiz et al. 2023, section 4): many subjects, one row of mean scores per recipe."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from raybooth import config as configuration
from raybooth import evaluation
from raybooth.config import Config
from raybooth.dreambench import PUBLISHED, Subject
from raybooth.errors import RayboothError
from raybooth.files import write_atomically
from raybooth.score import Score, scored, share
from raybooth.session import Run
from raybooth.stages import STAGES
from raybooth.verbs import do
from raybooth.workspace import Workspace, link_or_copy

Recipes = Mapping[str, Sequence[str]]
Results = dict[str, dict[str, dict[str, Score]]]
"""recipe -> subject -> name of a score -> score."""

TABLE, SCORES = "table.md", "scores.json"
HEAD = (
    "| | DINO (of the photographs' own) | CLIP-I (same) | CLIP-T (of the base's without the token) | PRES (base's) | DIV (of the base's) "
    "| DIV of the class (same) |"
)
FEWEST = 8
"""Number of subjects below which there is no interval over them: the bootstrap's would be too narrow (of three it holds the mean three times in four)."""
DRIFT = ("pres", "class_div")
"""Scores of the class, which is drawn as each recipe's [prior] says: recipes are compared by what has changed since their own base."""
OF_ALL, OF_A_CLASS, OF_A_RECIPE = ("base-model", "encoders"), ("before-images", "plain-images"), ("class-images", "class-before-images")
"""Stages that do not depend on the subject: shared by all runs, by those of a class, and by those of a class and a recipe."""


def root_of(storage: str) -> Path:
    """The folder for all runs, made if need be.

    Raises:
        RayboothError: if it is not a folder, or cannot be written to.
    """
    if "://" in storage:
        raise RayboothError(f"--storage {storage} is not a folder: the runs of a bench share their files on one machine, give one of its folders.")
    workspace = Workspace(storage)
    workspace.check_writable()
    for name, is_ours in ((TABLE, _is_table), (SCORES, _are_scores)):
        path = workspace.root / name
        if path.exists() and not is_ours(path):
            raise RayboothError(f"{path} is none that a bench has made, and it would write its own there: move that file elsewhere, or give another --storage.")
    return workspace.root


def _is_table(path: Path) -> bool:
    return path.read_bytes().startswith(HEAD.encode()[:20])


def _are_scores(path: Path) -> bool:
    """Whether the file at least looks like results: recipes of subjects of scores."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and all(isinstance(by, dict) and all(isinstance(s, dict) for s in by.values()) for by in found.values())


def bench(
    subjects: Sequence[Subject], recipes: Recipes, root: Path, overrides: Sequence[str], base: str | None = None, known: Callable[[], Results] = dict,
    published: bool = False,
) -> str:  # fmt: skip
    """Run and score every recipe on every subject, as far as not done; writes `table.md` and `scores.json` into the folder `root`, returns the table.

    Each run has a storage of its own, `<subject>/<recipe>`; what does not depend on the subject is shared within a class.

    Args:
        recipes: the settings of each row, by its name.
        overrides: settings of all runs, applied before the recipes' own.
        base: the base model; default: the configuration's.
        known: gives rows of the table that need no runs.
        published: whether to add the paper's rows at the end.
    """
    from raybooth.cluster.session import connected

    configs = {(s.name, r): config_of(s, how, root / s.name / r.replace(" ", "-"), overrides, base) for s in subjects for r, how in recipes.items()}
    results: Results = {recipe: {} for recipe in recipes}
    done: dict[tuple[str, str], Path] = {}
    with connected(next(iter(configs.values())).cluster.address):
        for subject in subjects:  # a photograph that cannot be read shows before days of work
            config = configs[subject.name, next(iter(recipes))]
            for other in [*done.values()][:1]:
                _share(other, Path(config.storage), OF_ALL)
            with Run(config) as run:
                run.say(f"\n{subject.name}: prepare")
                do(run, ["prepare"])
            done[subject.class_name, ""] = Path(config.storage)
        for number, subject in enumerate(subjects, 1):
            for recipe in recipes:
                config = configs[subject.name, recipe]
                for (noun, by), other in done.items():
                    own = noun == subject.class_name
                    _share(other, Path(config.storage), OF_ALL + OF_A_CLASS * own + OF_A_RECIPE * (own and by == recipe))
                with Run(config) as run:
                    run.say(f"\n{subject.name} ({number} of {len(subjects)}): {recipe}")
                    do(run, (*STAGES, "evaluate"))
                    results[recipe][subject.name] = evaluation.read(run)
                done[subject.class_name, recipe] = Path(config.storage)
                write_atomically(root / SCORES, json.dumps(_plain(results), indent=1).encode())
                write_atomically(root / TABLE, table(results, published).encode())  # of what is done so far: the rest may take days
    text = table(results | known(), published)
    write_atomically(root / TABLE, text.encode())
    return text


def config_of(subject: Subject, settings: Sequence[str], storage: Path, overrides: Sequence[str], base: str | None) -> Config:
    """The configuration of one run of a subject, in which the recipe's own `settings` take precedence over the `overrides` of all runs."""
    values: dict[str, Any] = {"base": {"model": base}} if base else {}
    return configuration.load(
        None, [*overrides, *settings], subject={"photos": [str(subject.photos)], "class": subject.class_name},
        generate={"prompts": list(subject.prompts), "images_per_prompt": 4}, storage=str(storage), **values,
    )  # fmt: skip


def _share(other: Path, storage: Path, stages: Sequence[str]) -> None:
    """Link `stages` that another run has made into `storage`; the digests decide whether they hold there."""
    for stage in stages:
        if (other / stage).is_dir() and not (storage / stage).exists():
            shutil.copytree(other / stage, storage / stage, copy_function=link_or_copy)


def _plain(results: Results) -> dict[str, Any]:
    return {recipe: {subject: {k: asdict(s) for k, s in scores.items()} for subject, scores in by.items()} for recipe, by in results.items()}


def table(results: Results, published: bool = False) -> str:
    """The results as a Markdown table: means over the subjects, and beside them the photographs' own or the base model's.

    Below the first row are its bootstrap 95% intervals, below each other row those of its differences from the first, subject by subject. PRES and DIV
    of the class are compared by their change since the base model, whose class pictures each recipe draws with settings of its own.
    """
    lines = [
        HEAD,
        "|---|---|---|---|---|---|---|",
    ]
    first = next(iter(results), "")
    for recipe, by in results.items():
        cells = [_cell([s[name] for s in by.values() if name in s], name) for name in evaluation.NAMES]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
        if len(by) >= FEWEST:
            spread = [_interval(by, name) if recipe == first else _interval(by, name, results[first]) for name in evaluation.NAMES]
            lines.append(f"| {'its' if recipe == first else f'less {first},'} 95% over subjects | {' | '.join(spread)} |")
    for name, scores in PUBLISHED.items() if published else ():
        cells = ["-" if x is None else f"{x:.3f}" for x in (*scores, None, None, None)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(by: Mapping[str, Mapping[str, Score]], name: str, other: Mapping[str, Mapping[str, Score]] | None = None) -> str:
    """The 95% interval, as text, of the mean over the subjects, or of its difference from another recipe's for the same subjects."""
    if other is None:
        values = [s[name].value for s in by.values() if name in s]
    else:
        values = [_compared(s[name], name) - _compared(other[k][name], name) for k, s in by.items() if name in s and name in other.get(k, {})]
    if len(values) < FEWEST:
        return "-"
    found, sign = scored(np.array(values, dtype=np.float32)), "" if other is None else "+"
    return f"{found.low:{sign}.3f} to {found.high:{sign}.3f}"


def _compared(score: Score, name: str) -> float:
    return score.value - score.floor if name in DRIFT and score.floor is not None else score.value


def _cell(scores: list[Score], name: str) -> str:
    if not scores:
        return "-"
    value = _mean([s.value for s in scores])
    anchors = [s.ceiling if name in ("dino", "clip_i", "clip_t") else s.floor for s in scores]
    if any(a is None for a in anchors):
        return f"{value:.3f}"
    anchor = _mean([a for a in anchors if a is not None])
    return f"{value:.3f} ({anchor:.3f})" if name == "pres" else f"{value:.3f} ({share(value, anchor):.0%})"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
