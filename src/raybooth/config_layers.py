"""The layers of a configuration, as plain dictionaries: files, `--set section.key=value`, one on top of the other."""

import json
import tomllib
from collections.abc import Container
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raybooth.errors import RayboothError


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, section by section. Of a section that is a model, the fields that were set go over a dictionary; else it stays as it is."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, BaseModel) and isinstance(below, dict):
            value = {**below, **value.model_dump(by_alias=True, exclude_unset=True)}
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def setting(layer: dict[str, Any], section: str, key: str) -> Any:
    """The value that a layer gives a setting, or None, whether its sections are dictionaries or models."""
    held = layer.get(section)
    return held.get(key) if isinstance(held, dict) else getattr(held, key, None)


def read_file(path: Path) -> dict[str, Any]:
    """The content of a TOML file, or of a JSON file as a storage keeps it.

    Raises:
        RayboothError: if it cannot be read, or is neither.
    """
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8-sig")  # as Windows' editors write it
        held = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except FileNotFoundError:
        raise RayboothError(f"There is no configuration file {path}: give the path of a TOML file, such as examples/dog.toml.") from None
    except IsADirectoryError:
        raise RayboothError(f"{path} is a folder and no configuration file: name a storage with --storage {path}, photographs with --photos {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RayboothError(f"{path} cannot be read as a configuration: {error}.") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and brackets nested too deep
        raise RayboothError(f"{path} is not valid {kind}: {error}.") from None
    if not isinstance(held, dict):
        raise RayboothError(f"{path} is not a configuration: it holds {text.strip()[:20]!r}, where a JSON object of sections should be.")
    return held


def parsed_override(text: str, texts: Container[str] = ()) -> dict[str, Any]:
    """`section.key=value` as the dictionary that it adds. The settings `texts` are text or lists of texts, even if they look like numbers.

    Raises:
        RayboothError: if it is not of that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() and part.isprintable() for part in key.split(".")):
        raise RayboothError(f"--set {text} is not of the form section.key=value, as in --set finetune.steps=200.")
    is_text = key.strip() in texts
    try:
        held = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        if value.lstrip().startswith(tuple("['\"" if is_text else "[{'\"")):  # a prompt may begin with {subject}
            raise RayboothError(
                f"--set {text[:100]} begins like a TOML {'list' if value.lstrip()[0] == '[' else 'value'} and is none: put texts in quotes, and all of it "
                "in others, as in --set 'generate.prompts=[\"{subject} at night\"]'."
            ) from None
        held = {"value": value}  # a bare word is a string
    if len(held) > 1:
        raise RayboothError(f"--set {text} holds more than one setting: give each a --set of its own.")
    parsed = held["value"]
    if is_text and not isinstance(parsed, str | list | dict):
        parsed = value.strip()
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return parsed
