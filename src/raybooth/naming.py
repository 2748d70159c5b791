"""The rare word for a run's subject, proposed from its base model."""

import json
from dataclasses import asdict
from typing import Any

from raybooth.drawing import draw, picture_seed
from raybooth.session import Run

AUTO = "auto"
FILE = "proposals.json"
PICTURES = 4


def proposals(run: Run) -> list[dict[str, Any]]:
    """Rare words of the run's base model, the weakest first, with what makes them so (families.tokens.Proposal)."""
    stage = run.workspace.stage("token", {"model": run.model_digest("base-model")})
    if not stage.done():
        from raybooth.families import family_of
        from raybooth.families.tokens import propose

        found = [asdict(p) | {"strength": p.strength} for p in propose(family_of(run.base_folder), run.base_folder)]
        stage.write(FILE, json.dumps(found, indent=1).encode())
        stage.finish()
    return json.loads((stage.folder / FILE).read_text())


def settle_token(run: Run) -> None:
    """Put the first proposal in the place of `subject.token = "auto"`; the base model must be in the storage."""
    subject = run.config.subject
    if subject.token == AUTO:
        token = proposals(run)[0]["word"]
        run.config = run.config.model_copy(update={"subject": subject.model_copy(update={"token": token})})
        run.say(f"token: '{token}' names the subject, the rarest word of this base model")


def draw_proposals(run: Run, found: list[dict[str, Any]]) -> None:
    """Draw each word with the base model, into `token-images/`, all with the same seeds: if a word means nothing, the seed alone decides."""
    rows = [
        {"name": f"{p['word']}-{k}.png", "prompt": f"photo of {p['word']}", "seed": picture_seed(run, "token", k)} for p in found for k in range(PICTURES)
    ]  # fmt: skip
    draw(run, "token-images", "base-model", run.config.generate, rows, {"seed": run.config.seed})


def table(found: list[dict[str, Any]]) -> str:
    """The proposals as a text table, one line each."""
    lines = [f"{'word':<10}{'prior':>6}{'norm':>7}  nearest common word"]
    lines += [f"{p['word']:<10}{p['strength']:>6.2f}{p['norm']:>7.2f}  {p['neighbour']} ({p['nearest']:.2f})" for p in found]
    return "\n".join(lines)
