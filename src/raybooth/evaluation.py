"""The scores of a run: what the base model draws beside what the fine-tuned one does, as features, as numbers."""

import json
from dataclasses import asdict
from pathlib import Path

from raybooth.drawing import class_rows, draw, output_rows
from raybooth.features import features, prepare_encoders, scored_prompt
from raybooth.photos import contact_sheet, png
from raybooth.score import Array, Score, among, diversity, scored, to_prompt, to_subject, variety
from raybooth.session import Run
from raybooth.workspace import write_atomically

KINDS = ("instance", "before", "output", "class-before", "class-after")
SCORES = "scores.json"
CLASS_PICTURES = 24
NAMES = {
    "dino": "DINO    looks like the subject",
    "clip_i": "CLIP-I  looks like the photographs",
    "clip_t": "CLIP-T  shows what the prompt says",
    "pres": "PRES    'a {class}' looks like the subject (lower is better)",
    "div": "DIV     pictures of one prompt differ",
    "class_div": "DIV     pictures of 'a {class}' differ",
}


def evaluate(run: Run) -> None:
    """DINO, CLIP-I, CLIP-T, PRES and DIV (of the subject's pictures, and of the class's), each with its interval, the base model's and the photographs' own."""
    prepare_encoders(run)  # first: what cannot be fetched shows before anything is drawn
    _draw_comparisons(run)
    found = measured(run)
    drawn = {kind: [run.outputs(stage)[n] for n in names] for kind, (stage, names) in pictures(run).items()}
    stage = run.workspace.stage("scores", {"encoders": run.model_digest("encoders"), "pictures": drawn, "scores": list(NAMES)})
    if not stage.done():
        stage.write(SCORES, json.dumps({name: asdict(score) for name, score in _scores(run, found).items()}, indent=1).encode())
        stage.finish()
    run.say(table(run))


def _draw_comparisons(run: Run) -> None:
    """By the base model, the prompts and the class; by the fine-tuned one the class: the same seeds before and after."""
    how, config = run.config.generate, run.config
    draw(run, "before-images", "base-model", how, output_rows(run), {"seed": config.seed})
    rows = class_rows(run, min(CLASS_PICTURES, config.prior.drawn or CLASS_PICTURES))
    of_class = {"prompt": config.class_prompt, "seed": config.seed}
    if not config.prior.drawn:
        draw(run, "class-before-images", "base-model", config.prior, rows, of_class)
    draw(run, "class-after-images", "fine-tuned-model", config.prior, rows, of_class)


def pictures(run: Run) -> dict[str, tuple[str, list[str]]]:
    """Stage and files of each of KINDS. What the base draws of the class are the class images, where there are any."""
    stages = {kind: f"{kind}-images" for kind in KINDS}
    if run.config.prior.drawn:
        stages["class-before"] = "class-images"
    return {kind: (stage, run.facts(stage)["pictures"][: CLASS_PICTURES if "class" in kind else None]) for kind, stage in stages.items()}


def measured(run: Run) -> dict[str, dict[str, Array]]:
    """The features of all pictures, by kind, and of the prompts."""
    return features(run, "features", pictures(run), [scored_prompt(run, r["prompt"]) for r in output_rows(run)])


def _scores(run: Run, found: dict[str, dict[str, Array]]) -> dict[str, Score]:
    photographs, before, after, class_before, class_after = (found[k] for k in KINDS)
    texts, each = found["prompts"]["clip"], run.config.generate.images_per_prompt
    several = len(photographs["dino"]) > 1
    own = {k: float(among(photographs[k]).mean()) if several else None for k in ("dino", "clip")}

    def similar(drawn: dict[str, Array], base: dict[str, Array], by: str) -> Score:
        return scored(to_subject(drawn[by], photographs[by]), float(to_subject(base[by], photographs[by]).mean()), own[by])

    def by_prompt(drawn: dict[str, Array]) -> list[Array]:
        patches = drawn["patches"]
        return [patches[i : i + each] for i in range(0, len(patches), each)]

    scores = {
        "dino": similar(after, before, "dino"),
        "clip_i": similar(after, before, "clip"),
        "clip_t": scored(to_prompt(after["clip"], texts), float(to_prompt(before["clip"], texts).mean())),
        "pres": similar(class_after, class_before, "dino"),
    }
    if len(class_after["patches"]) > 1:
        scores["class_div"] = scored(variety(class_after["patches"]), float(variety(class_before["patches"]).mean()))
    if each > 1:
        alike = float(diversity([photographs["patches"]])[0]) if several else None
        scores["div"] = scored(diversity(by_prompt(after)), float(diversity(by_prompt(before)).mean()), alike)
    return scores


def read(run: Run) -> dict[str, Score]:
    """The scores of a run that was evaluated.

    Raises:
        RayboothError: if it was not.
    """
    run.workspace.manifest("scores")
    return {k: Score(**v) for k, v in json.loads((run.workspace.root / "scores" / SCORES).read_text()).items()}


def table(run: Run) -> str:
    """A line a score, for people."""
    lines = [f"{'':<62}{'now':>7}  {'95% interval':>14}  {'base':>6}  {'photographs':>11}"]
    for name, score in read(run).items():
        base, own = (f"{x:.3f}" if x is not None else "-" for x in (score.floor, score.ceiling))
        text = NAMES[name].replace("{class}", run.config.subject.class_name)
        lines.append(f"{text:<62}{score.value:>7.3f}  {f'{score.low:.3f}-{score.high:.3f}':>14}  {base:>6}  {own:>11}")
    return "\n".join(lines)


def before_after(run: Run) -> Path:
    """`before-after.png`: the photographs; prompts and seeds before and after; class pictures before and after."""
    images = {kind: run.images(stage)[: len(names)] for kind, (stage, names) in pictures(run).items()}
    each, rows = run.config.generate.images_per_prompt, output_rows(run)
    lines = [("the photographs", images["instance"])]
    for i in range(0, len(rows), each):
        lines += [(f"{rows[i]['prompt']}: {when}", images[kind][i : i + each]) for when, kind in (("before", "before"), ("after", "output"))]
    lines += [(f"{run.config.class_prompt}: {when}", images[f"class-{when}"][:8]) for when in ("before", "after")]
    path = run.workspace.root / "before-after.png"
    write_atomically(path, png(contact_sheet(lines)))
    run.workspace.push(path.name)
    return path
