"""`python -m notebooks.execute` (make notebook): runs the guide anew and writes what its cells show into it, without the noise."""

import base64
import io
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from PIL import Image

GUIDE = Path(__file__).with_name("dreambooth.ipynb")
NOISE = re.compile(r"\d+%\|.*\||ipywidgets|autonotebook|^\s*$")
"""Progress bars, and what libraries say of the widgets that they would draw them with."""


def executed(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run every cell in `folder`, by this interpreter, whatever kernels the machine has.

    Raises:
        nbclient.exceptions.CellExecutionError: if one fails.
    """
    with tempfile.TemporaryDirectory() as kernels:
        write_kernel_spec(Path(kernels) / "raybooth")
        manager = AsyncKernelManager(
            kernel_name="raybooth", kernel_spec_manager=KernelSpecManager(kernel_dirs=[kernels]), transport="ipc", ip=f"{kernels}/kernel"
        )  # fmt: skip
        client = NotebookClient(notebook, km=manager, timeout=1800, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(folder)}})
        try:
            return client.execute()
        finally:  # a manager that is brought along is not the client's to end, and the kernel would hold its Ray
            run_sync(manager.shutdown_kernel)()


def tidy(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Each picture once, as a PNG of 256 colours; of what was printed neither noise nor this machine's paths."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data = {"image/png": _small(output.data["image/png"])}
            elif "text" in output:
                lines = [line for line in output.text.splitlines() if not NOISE.search(line)]
                output.text = "\n".join(lines).replace(f"{folder}/", "")
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("text", True)]


def _small(png: str) -> str:
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def main() -> None:
    notebook = nbformat.read(GUIDE, 4)
    with tempfile.TemporaryDirectory() as folder:
        executed(notebook, Path(folder))
        tidy(notebook, Path(folder))
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "language_info": {"name": "python"}}
    nbformat.write(notebook, GUIDE)
    print(f"{GUIDE}: {GUIDE.stat().st_size / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
