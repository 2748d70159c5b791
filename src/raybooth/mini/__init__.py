"""mini: a miniature Stable Diffusion and its world, on which all of raybooth works on a CPU."""

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
"""The shipped model: a diffusers folder, with mini's scorers in `clip/` and `vit/`."""
