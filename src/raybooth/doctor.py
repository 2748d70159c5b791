"""What this machine has, and what to expect of it."""

import http.client
import os
import platform
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from raybooth.errors import reason
from raybooth.method import bfloat16_of_cpu
from raybooth.session import version

SHOWN = ("torch", "ray", "diffusers", "transformers", "huggingface_hub", "safetensors", "pillow", "pydantic")


def report() -> str:
    """The report on this machine as plain text, one line per fact."""
    lines = [
        f"python       {platform.python_version()} on {platform.platform(terse=True)}",
        f"versions     {', '.join(f'{name} {version(name)}' for name in SHOWN)}",
        f"processors   {_processors()}",
        f"memory       {_memory()}",
        f"disk         {shutil.disk_usage('.').free / 2**30:.0f} GiB free here",
        f"graphics     {_gpus()}",
        f"ray          {_ray()}",
        f"hub          {_hub()}",
        f"mini         {_mini()}",
        "",
        _expectation(),
    ]
    return "\n".join(lines)


def _processors() -> str:
    kinds = bfloat16_of_cpu()
    faster = f", with {' and '.join(kinds)}: steps are computed in bfloat16" if kinds else ""
    return f"{len(os.sched_getaffinity(0))}{faster}"


def _memory() -> str:
    """The machine's memory, and on Linux what is available of it: more than is free, as cached files give way when memory is needed."""
    total = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    told = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable: +(\d+) kB", told.read_text(), re.MULTILINE) if told.exists() else None
    return f"{total}, {int(found[1]) / 2**20:.0f} GiB available" if found else total


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA GPU that torch can use" + ("" if torch.version.cuda else " (this torch is the CPU build)")
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"{p.name} with {p.total_memory / 2**30:.0f} GiB" for p in found)


def _ray() -> str:
    from raybooth.cluster.session import connected
    from raybooth.errors import RayboothError

    try:
        with connected(None) as have:
            return f"starts here, with {have.cpus} CPUs and {have.gpus} GPUs"
    except RayboothError as error:
        return str(error)


def _hub() -> str:
    from huggingface_hub import constants

    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD", headers={"User-Agent": "raybooth"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return f"{constants.ENDPOINT} answers ({answer.status})"
    except urllib.error.HTTPError as answer:
        return f"{constants.ENDPOINT} answers ({answer.code})"
    except (http.client.HTTPException, OSError, ValueError) as error:  # the last if HF_ENDPOINT is not a URL
        return f"{constants.ENDPOINT} cannot be reached ({reason(getattr(error, 'reason', error))}); local models and mini work without it"


def _mini() -> str:
    from raybooth.mini import FOLDER

    return str(FOLDER) if (FOLDER / "model_index.json").exists() else "its weights are not in this installation"


def _expectation() -> str:
    import torch

    if not torch.cuda.is_available():
        return (
            "Without a GPU: 'raybooth demo' takes a few minutes. Stable Diffusion itself runs here too, but a picture takes minutes "
            "and a fine-tuning of 400 steps many hours."
        )
    most = max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**30
    if most < 20:
        return (
            "SD 1.4 with its text encoder needs 18 GiB to be fine-tuned whole: finetune.method = lora with finetune.lr = 1e-4 needs about 7 GiB. "
            "'raybooth plan' counts it for your settings."
        )
    return "SD 1.4 with its text encoder fits."
