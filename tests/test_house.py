"""The rules of the house, read from the imports."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "raybooth"
LAYERS = [
    {"__main__", "__init__"}, {"cli", "options", "api", "bench", "minibench", "demo", "doctor"}, {"exporting", "importing"}, {"verbs"},
    {"card", "reporting", "serving"},
    {"evaluation", "plots"}, {"verdict"}, {"stages", "planning"}, {"selection", "instance_images"},
    {"features", "encoder_files"}, {"drawing", "base_model", "naming"}, {"loading"},
    {"session", "jobs", "finetune_job", "log"}, {"restore"}, {"flops"}, {"method"}, {"cluster"},
    {"train", "sample", "score", "encoders", "lpips", "checkpoint"}, {"teacher"},
    {"families", "dataset", "loss", "noise", "dropout", "optim", "dreambench", "photos", "pictures", "sources", "hub", "tables"},
    {"config", "workspace", "stage", "mirror", "extras"}, {"sections"},
    {"disk", "remote", "config_layers", "clock", "manifest", "background"}, {"files"}, {"errors", "prompts", "complaints"},
]  # fmt: skip
HEAVY = {"torch", "ray", "diffusers", "transformers"}
LIGHT = {
    "config", "sections", "clock", "complaints", "config_layers", "workspace", "stage", "mirror", "files", "manifest", "reporting", "cli", "options", "errors",
    "__init__", "__main__",
}  # fmt: skip


def unit(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def imports(path: Path, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = sorted(SOURCE.rglob("*.py"))


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def ours(path: Path) -> set[str]:
    return {i.split(".")[1] for i in imports(path) if i.startswith("raybooth.")} - {"__version__"}


def test_the_rules_name_the_modules_that_there_are():
    there = {unit(path) for path in MODULES}
    assert {name for names in LAYERS for name in names} == there - {"mini"}
    assert there >= LIGHT


def test_the_design_tells_where_everything_is():
    said = (SOURCE.parents[1] / "docs" / "design.md").read_text()
    assert not [name for name in {unit(path) for path in MODULES} - {"__init__", "__main__"} if f"`{name}.py`" not in said and f"`{name}/`" not in said]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path):
    mine = unit(path)
    if mine == "mini":
        assert ours(path) <= {"mini"}
        return
    for other in ours(path) - {mine}:
        if other == "mini":
            assert mine in ("families", "minibench", "demo", "doctor")
        elif other in {n for names in LAYERS for n in names}:
            assert layer(other) >= layer(mine), f"{mine} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_heavy_libraries_stay_where_they_belong(path: Path):
    mine, roots = unit(path), {i.split(".")[0] for i in imports(path)}
    if mine != "cluster":
        assert "ray" not in roots
    if mine not in ("families", "encoders", "mini"):
        assert not roots & {"diffusers", "transformers"}
    if mine in LIGHT:
        assert not roots & HEAVY


def test_pickle_never_reads_weights():
    for path in MODULES:
        text = path.read_text()
        assert "torch.load" not in text
        assert "torch.save" not in text


def test_files_stay_small():
    assert not [(p.name, n) for p in MODULES if (n := len(p.read_text().splitlines())) > 360]


def test_help_is_quick_and_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "raybooth", "--help"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 5  # a bound against torch or Ray creeping in, not a measurement
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & (HEAVY | {"pydantic", "numpy", "PIL"})
    assert all(verb in done.stdout for verb in ("prepare", "class-images", "encode", "finetune", "generate", "run", "demo", "doctor"))


def test_importing_raybooth_touches_nothing(tmp_path: Path):
    code = "import sys, raybooth; assert not set(sys.modules) & {'torch', 'ray', 'diffusers'}; raybooth.Config"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": "/usr/bin"})
    assert not list(tmp_path.iterdir())
