"""Pages that are made of something else when the site is built: all settings of the configuration's models, the guide of the notebook."""

import base64
import json
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from raybooth.config import MINI_DEFAULTS, Config

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "dreambooth.ipynb"
SETTINGS = """# All settings

A setting stands in a TOML file under its section, after `--set` as in `--set finetune.steps=800`, or in Python as
`raybooth.Config(finetune={"steps": 800})`. Later ones win: the defaults, mini's own where `base.model` is `mini`, the file, `--set`.
A setting that does not exist or is out of its bounds is refused in one sentence.
"""
BOUNDS = {
    "minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}", "multipleOf": "a multiple of {}",
    "minLength": "at least {} character", "maxLength": "at most {} characters", "minItems": "at least {}", "pattern": "like <code>{}</code>",
}  # fmt: skip
"""JSON Schema's keys in words."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs' hook: the pages it did not find in docs/."""
    for name, content in {"settings.md": settings(), **guide(nbformat.read(NOTEBOOK, 4))}.items():
        files.append(File.generated(config, name, content=content))
    return files


def settings() -> str:
    """Every field of the configuration, section by section, from pydantic's own JSON Schema."""
    schema = Config.model_json_schema()
    sections = {name: schema["$defs"][f["$ref"].rpartition("/")[2]] for name, f in schema["properties"].items() if "$ref" in f}
    whole = {name: f for name, f in schema["properties"].items() if name not in sections}
    parts = [SETTINGS, _table("", whole, {})]
    for name, section in sections.items():
        parts += [f"## {name}\n\n{section['description']}\n", _table(f"{name}.", section["properties"], MINI_DEFAULTS.get(name, {}))]
    return "\n".join(parts)


def _table(prefix: str, fields: dict[str, Any], mini: dict[str, Any]) -> str:
    lines = ["| setting | values | default | what it is |", "|---|---|---|---|"]
    for key, field in fields.items():
        default = _written(field.get("default"))
        if key in mini:
            default += f"<br>mini: {_written(mini[key])}"
        name = f"{prefix}{key}"
        lines.append(f"| `{name}`{{ #{name} }} | {_values(field)} | {default} | {field['description']} |")
    return "\n".join(lines) + "\n"


def _values(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_values(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return ", ".join(map(_written, field["enum"]))
    kind = {"array": "list", "string": "text", "boolean": "true or false"}.get(field["type"], field["type"])
    if "items" in field:
        kind += f" of {_values(field['items'])}"
    return ", ".join([kind, *(text.format(field[key]) for key, text in BOUNDS.items() if key in field)])


def _written(value: Any) -> str:
    """As it stands in a file; nothing for a default that the description explains."""
    if value is None:
        return ""
    if isinstance(value, list) and value:
        return "<br>".join(map(_written, value))
    return f"`{json.dumps(value).replace('e-0', 'e-')}`"


def guide(notebook: nbformat.NotebookNode) -> dict[str, str | bytes]:
    """guide.md and its pictures: what the notebook's cells say, hold and show. Solutions are folded."""
    files: dict[str, str | bytes] = {"dreambooth.ipynb": NOTEBOOK.read_bytes()}
    parts = []
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source.replace("](../docs/", "]("))
            continue
        code = f"```python\n{cell.source}\n```"
        parts.append(_folded(code) if "solution" in cell.metadata.get("tags", []) else code)
        for k, output in enumerate(cell.outputs):
            data = output.get("data", {})
            if "image/png" in data:
                files[f"guide/{i}-{k}.png"] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above shows](guide/{i}-{k}.png)")
            elif text := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{text.rstrip()}\n```")
    title, *rest = parts
    return {**files, "guide.md": "\n\n".join([title, "This page is a notebook: [dreambooth.ipynb](dreambooth.ipynb).", *rest])}


def _folded(code: str) -> str:
    return '??? success "Solution"\n\n' + "\n".join(f"    {line}".rstrip() for line in code.splitlines())
