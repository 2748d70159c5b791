"""Imported by Ray's workers when they start: the slow imports, done before there is work."""

import diffusers.models.unets.unet_2d_condition  # noqa: F401
import torch  # noqa: F401
