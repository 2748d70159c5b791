"""The scores of a run: pictures by the base model and by the fine-tuned one, their features, and the numbers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raybooth.drawing import by_prompt, class_inputs, class_rows, draw, drawing, output_rows, photographs
from raybooth.encoder_files import prepare_encoders
from raybooth.errors import RayboothError
from raybooth.features import features, lpips_distances
from raybooth.files import write_atomically
from raybooth.pictures import contact_sheet, png
from raybooth.score import Array, Distances, Score, distances, diversity, pairwise_cosines, scored, scored_pairs, to_prompt, to_subject
from raybooth.session import Run
from raybooth.stages import generate
from raybooth.verdict import verdicts

KINDS = ("instance", "before", "plain", "output", "class-before", "class-after")
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
UNSHOWN = "No prompt of generate.prompts has {subject} or {token} in it: how alike the pictures are to the subject (DINO, CLIP-I) is not scored."
ALONE = "generate.images_per_prompt is 1: whether pictures of one prompt differ (DIV) is not scored."


def evaluate(run: Run) -> None:
    """Score a run: DINO, CLIP-I, CLIP-T, PRES and DIV (of the subject and of the class), each with its interval, the base model's and the photographs' own."""
    for needed in ("instance-images", "fine-tuned-model"):
        run.outputs(needed)  # first: what is not there, or cannot be fetched, shows before anything is drawn
    prepare_encoders(run)
    generate(run)  # what there is may be of an earlier model, or of other prompts
    _draw_comparisons(run)
    found = measured(run)
    apart = _apart(run, found)
    inputs = {
        "encoders": run.model_digest("encoders"),
        "pictures": {kind: list(map(run.outputs(stage).__getitem__, names)) for kind, (stage, names) in pictures(run).items()},
        "prompts": _texts(run),
        "subject": _shows_subject(run),
        "scores": [*NAMES, "intervals over pictures", "changes", "plain words"],  # what was scored in another way is scored again
    }
    stage = run.workspace.stage("scores", inputs)
    if not stage.done():
        stage.write(SCORES, json.dumps({name: asdict(score) for name, score in _scores(run, found, apart).items()}, indent=1).encode())
        stage.finish()
    run.say(table(run))
    for line in [*unscored(run), "", *verdicts(read(run))]:
        run.say(str(line))


def _draw_comparisons(run: Run) -> None:
    """Draw with the base model the prompts, these in plain words, and the class; with the fine-tuned one the class. Seeds are the same before and after."""
    config, rows, before = run.config, _class_rows(run), class_before(run)
    draw(run, "before-images", "base-model", config.generate, output_rows(run), {"seed": config.seed})
    draw(run, "plain-images", "base-model", config.generate, _plain_rows(run), {"seed": config.seed})
    if before != "class-images":
        draw(run, before, "base-model", config.prior, rows, class_inputs(run))
    draw(run, "class-after-images", "fine-tuned-model", config.prior, rows, class_inputs(run))


def _plain_rows(run: Run) -> list[dict[str, Any]]:
    """Rows for the text that CLIP is asked about each output picture. The base model can draw it too: the token, which it has never met, is left out."""
    return output_rows(run, prompts=[run.config.without_token(prompt) for prompt in by_prompt(run, "output-images")])


def _class_rows(run: Run) -> list[dict[str, Any]]:
    few = min(CLASS_PICTURES, run.config.prior.drawn or CLASS_PICTURES)
    return class_rows(run, run.config.evaluate.class_images or few)


def class_before(run: Run) -> str:
    """The stage that holds the base model's pictures of the class: the class images, if they are those of this configuration."""
    stage = drawing(run, "class-images", "base-model", run.config.prior, class_inputs(run))
    return "class-images" if stage.done(r["name"] for r in _class_rows(run)) else "class-before-images"


def pictures(run: Run) -> dict[str, tuple[str, list[str]]]:
    """The stage and the file names of each of KINDS."""
    of_class = [r["name"] for r in _class_rows(run)]
    return {
        "instance": ("instance-images", photographs(run)),
        **{kind: (f"{kind}-images", run.facts(f"{kind}-images")["pictures"]) for kind in ("before", "output")},
        "plain": ("plain-images", [r["name"] for r in _plain_rows(run)]),
        "class-before": (class_before(run), of_class),
        "class-after": ("class-after-images", of_class),
    }


def _prompts(run: Run) -> list[str]:
    """The prompt of each output picture."""
    return [prompt for prompt, names in by_prompt(run, "output-images").items() for _ in names]


def _texts(run: Run) -> list[str]:
    """The text that CLIP is asked about each output picture."""
    return [run.config.without_token(prompt) for prompt in _prompts(run)]


def _shows_subject(run: Run) -> list[bool]:
    """Whether each output picture is to show the subject."""
    return [run.config.shows_subject(prompt) for prompt in _prompts(run)]


def measured(run: Run) -> dict[str, dict[str, Array]]:
    """The features of all pictures, by kind, and of the prompts."""
    return features(run, "features", pictures(run), _texts(run))


def _apart(run: Run, found: dict[str, dict[str, Array]]) -> dict[str, list[Distances]]:
    """Distances between the pictures of each prompt, by kind: LPIPS if `evaluate.lpips` is given, else by the ViT's patches."""
    shown, each = {kind: of for kind, of in pictures(run).items() if kind != "plain"}, run.config.generate.images_per_prompt
    parts = {}
    for kind, (_, names) in shown.items():
        size = each if kind in ("before", "output") else len(names)
        parts[kind] = [slice(i, i + size) for i in range(0, len(names), size)]
    if run.config.evaluate.lpips:
        return lpips_distances(run, {kind: [(stage, names[part]) for part in parts[kind]] for kind, (stage, names) in shown.items()})
    return {kind: [distances(found[kind]["patches"][part]) for part in parts[kind]] for kind in shown}


def _scores(run: Run, found: dict[str, dict[str, Array]], apart: dict[str, list[Distances]]) -> dict[str, Score]:
    subject, before, plain, after, of_class, of_class_after = (found[k] for k in KINDS)
    texts = found["prompts"]["clip"]
    several = len(subject["dino"]) > 1
    own = {k: float(pairwise_cosines(subject[k]).mean()) if several else None for k in ("dino", "clip")}

    def similar(drawn: dict[str, Array], base: dict[str, Array], by: str) -> Score:
        return scored(to_subject(drawn[by], subject[by]), to_subject(base[by], subject[by]), own[by])

    shown = np.array(_shows_subject(run))
    drawn, base = ({k: v[shown] for k, v in of.items()} for of in (after, before))
    scores = {"dino": similar(drawn, base, "dino"), "clip_i": similar(drawn, base, "clip")} if shown.any() else {}
    scores |= {
        "clip_t": scored(to_prompt(after["clip"], texts), to_prompt(before["clip"], texts), float(to_prompt(plain["clip"], texts).mean())),
        "pres": similar(of_class_after, of_class, "dino"),
    }
    if len(of_class_after["dino"]) > 1:
        scores["class_div"] = scored_pairs(apart["class-after"][0], apart["class-before"][0])
    if run.config.generate.images_per_prompt > 1:
        alike, one_prompt = float(diversity(apart["instance"])[0]) if several else None, len(apart["output"]) == 1
        scores["div"] = (
            scored_pairs(apart["output"][0], apart["before"][0], alike) if one_prompt else scored(diversity(apart["output"]), diversity(apart["before"]), alike)
        )
    return scores


def read(run: Run) -> dict[str, Score]:
    """The scores of a run that was evaluated.

    Raises:
        RayboothError: if it was not.
    """
    run.workspace.manifest("scores")
    held = json.loads((run.workspace.root / "scores" / SCORES).read_text())
    return {k: Score(**v | {"changed": v["changed"] and tuple(v["changed"])}) for k, v in held.items()}


def unscored(run: Run) -> list[str]:
    """Why scores are missing, one sentence for each."""
    scores = read(run)
    return ([] if "dino" in scores else [UNSHOWN]) + ([] if "div" in scores else [ALONE])


def table(run: Run) -> str:
    """The scores as a text table, one line each, with the signed change since the base model."""
    scores = read(run)
    texts = {name: run.config.fill(text) for name, text in NAMES.items()}
    width = max(len(texts[name]) for name in scores)
    lines = [f"{'':<{width}}{'now':>8}  {'95% interval':>16}  {'base':>6}  {'change since, 95%':>17}  {'ceiling':>7}"]
    for name, score in scores.items():
        ceiling = score.ceiling if name in ("dino", "clip_i", "clip_t") else None  # the photographs' own PRES and DIV are nothing to reach for
        base, own = (f"{x:.3f}" if x is not None else "-" for x in (score.floor, ceiling))
        interval = "-" if score.low is None else f"{score.low:.3f} to {score.high:.3f}"
        changed = "-" if score.changed is None else "{:+.3f} to {:+.3f}".format(*score.changed)
        lines.append(f"{texts[name]:<{width}}{score.value:>8.3f}  {interval:>16}  {base:>6}  {changed:>17}  {own:>7}")
    return "\n".join(lines)


def before_after(run: Run) -> Path:
    """Write `before-after.png` and return its path: the photographs; prompts and seeds before and after; class pictures before and after.

    Raises:
        RayboothError: if the run was not evaluated since it was last drawn with.
    """
    shown, drawn = pictures(run), by_prompt(run, "output-images")
    if not set(shown["output"][1]) <= set(shown["before"][1]):
        raise RayboothError(f"The base model has not drawn what {run.config.storage} holds in output-images: {run.workspace.first('evaluate')}.")

    def opened(kind: str, names: list[str] | None = None) -> list[Image.Image]:
        stage, own = shown[kind]
        return [Image.open(run.workspace.root / stage / name).convert("RGB") for name in names or own]

    lines = [("the photographs", opened("instance"))]
    for prompt, names in drawn.items():
        lines += [(f"{prompt}: {when}", opened(kind, names)) for when, kind in (("before", "before"), ("after", "output"))]
    lines += [(f"{run.config.class_prompt}: {when}", opened(f"class-{when}")[:8]) for when in ("before", "after")]
    path = run.workspace.root / "before-after.png"
    write_atomically(path, png(contact_sheet(lines)))
    run.workspace.push(path.name)
    return path
