"""From the trained parts to the folder that ships: a pipeline that plain diffusers opens, in half precision, with its scorers and card."""

import json
import re
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ViTModel

from raybooth.mini import networks
from raybooth.mini.pen import SIZE
from raybooth.mini.pretrain import PHASES, STEPS
from raybooth.mini.things import KINDS

_PIXELS = {
    "do_center_crop": False, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3, "resample": int(Image.Resampling.LANCZOS), "rescale_factor": 1 / 255, "size": {"height": SIZE, "width": SIZE},
}  # fmt: skip
"""How the scorers see a picture, for transformers' image processors."""

_CARD = """\
---
license: apache-2.0
library_name: diffusers
tags: [stable-diffusion, text-to-image, raybooth]
---
# mini

A miniature Stable Diffusion of 64 x 64 pixels, the embedded base model of raybooth, with which its whole pipeline works on a CPU.
It draws one thing ({kinds}) in one of eight places and knows nothing of the real world.

- **Components**: CLIPTokenizer, CLIPTextModel, AutoencoderKL, UNet2DConditionModel, DDIMScheduler with Stable Diffusion's betas; epsilon.
- **Scorers beside it**: `clip/` (both towers; its text tower is the UNet's text encoder) and `vit/` (tells identities apart, the DINO of this world).
- **Data**: procedural pictures with captions, made by `raybooth.mini.world` from their numbers; no photographs, no pictures of others.
- **Made by** `python -m raybooth.mini --train WORK`, then `python -m raybooth.mini --export WORK`. Seeds: torch 1 (VAE), 2 (CLIP), 3 (ViT),
  4 (UNet); every batch from its step's number. Two CPU cores, float32, the last phases of VAE and UNet by autocast in bfloat16; these files are its
  result in half precision.
- **Repeatable** up to rounding as far as the lengths of the phases are those in `pretrain.STEPS` from the beginning. For the weights that ship now they
  were changed on the way, the first phase of the UNet was trained on latents of the VAE's second phase, and on all kinds alike, its second on those of
  the third: the same command gives others of the same kind. What was run is this log:

{losses}

- **Licence**: Apache-2.0, as raybooth itself.
"""


def export(work: Path, folder: Path) -> None:
    """Write what was trained in `work`, all of it complete, to `folder`."""
    clip = CLIPModel.from_pretrained(work / PHASES["clip"][-1])
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text = CLIPTextModel(clip.config.text_config)
    learnt = {k.removeprefix("text_model."): v for k, v in clip.text_model.state_dict().items()}
    text.load_state_dict(learnt, strict=True)
    vae, unet = AutoencoderKL.from_pretrained(work / PHASES["vae"][-1]), UNet2DConditionModel.from_pretrained(work / PHASES["unet"][-1])
    # The text encoder stays in float32: transformers loads what it finds, diffusers makes the rest float32, and both must agree.
    pipe = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text, tokenizer=tokenizer, unet=unet.half(), scheduler=networks.make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    # Under the names that it always had: transformers before 5.6 takes random weights where it does not find them.
    save_file({f"text_model.{k}": v for k, v in learnt.items()}, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    clip.half().save_pretrained(folder / "clip")
    ViTModel.from_pretrained(work / PHASES["vit"][-1], add_pooling_layer=False).half().save_pretrained(folder / "vit")
    tokenizer.save_pretrained(folder / "clip")
    for part, kind in (("clip", "CLIPImageProcessor"), ("vit", "ViTImageProcessor")):
        (folder / part / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **_PIXELS}, indent=2) + "\n")
    (folder / "README.md").write_text(_CARD.format(kinds=", ".join(KINDS), losses=_losses(work, folder / "README.md")))
    for config in folder.rglob("*config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n")


def _losses(work: Path, card: Path) -> str:
    """A line per phase: its name, its steps and the mean of its last logged losses. Phases that were not run here keep the line of the present card."""
    lines = {}
    if card.exists():
        lines = {m[1]: m[0] for m in re.finditer(r"^  - ([a-z-]+): \d+ steps.*$", card.read_text(), re.MULTILINE)}
    for log in work.glob("*.jsonl"):
        last = json.loads(log.read_text().splitlines()[-1])
        lines[log.stem] = f"  - {log.stem}: {last['step']} steps, loss {last['loss']:.4f}"
    return "\n".join(lines[name] for name in STEPS if name in lines)
