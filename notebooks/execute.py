"""`python -m notebooks.execute` (make notebook): runs the guide anew and writes what its cells show into it, without the noise."""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

GUIDE = Path(__file__).with_name("dreambooth.ipynb")
BAR = re.compile(r"\d+%\|.*\||^\s*$")


def executed(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run every cell in `folder`, by this interpreter, whatever kernels the machine has.

    Raises:
        nbclient.exceptions.CellExecutionError: if one fails.
    """
    with tempfile.TemporaryDirectory() as kernels:
        write_kernel_spec(Path(kernels) / "raybooth")
        manager = AsyncKernelManager(kernel_name="raybooth", kernel_spec_manager=KernelSpecManager(kernel_dirs=[kernels]))
        client = NotebookClient(notebook, km=manager, timeout=1800, record_timing=False, resources={"metadata": {"path": str(folder)}})
        return client.execute()


def tidy(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Each picture once, as PNG; of what was printed neither progress bars nor this machine's paths."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in map(_tidied, cell.outputs) if o]
            for output in cell.outputs:
                if "text" in output:
                    output.text = output.text.replace(f"{folder}/", "")


def _tidied(output: Any) -> Any:
    output.get("data", {}).pop("image/jpeg", None)
    if output.output_type == "stream":
        lines = [line.rpartition("\r")[2] for line in output.text.splitlines()]
        output.text = "".join(f"{line}\n" for line in lines if not BAR.search(line))
    return output if output.get("text", True) else None


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
