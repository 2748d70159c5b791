"""The configuration of a run: its sections together, and how they are read.

Layers, later ones win: the defaults (for SD 1.x), mini's own when the base is mini, the TOML file, `--set section.key=value`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from raybooth.complaints import sentence
from raybooth.config_layers import merged, parsed_override, read_file, setting
from raybooth.errors import RayboothError
from raybooth.manifest import CONFIG_FILE
from raybooth.prompts import filled, names_subject, unknown_words, without_token
from raybooth.sections import RELATIVE, Base, Cluster, Evaluate, Finetune, Generate, Lora, Prior, Section, Subject

MINI_DEFAULTS: dict[str, dict[str, Any]] = {
    # Without guidance: what is to be kept is what the model draws by itself. Taught by guided pictures and drawn with guidance again, the class narrows.
    # Half the paper's weight: at 1, four subjects were 5% less like themselves, and nothing was gained for the class (docs/dreambench.md).
    "prior": {"images": 64, "steps": 10, "guidance": 1.0, "weight": 0.5, "distill": True},
    "finetune": {"steps": 400, "batch": 4, "lr": 2e-4, "text_encoder_lr": 1e-4, "schedule": "cosine"},
    "generate": {"steps": 20, "guidance": 2.0},  # at 3 the subject is no more alike, and pictures of one prompt are more so
    "cluster": {"sample_batch": 4},
    "evaluate": {"dino": "mini", "clip": "mini"},
}
"""mini's own defaults: a model forty times smaller than SD learns in larger steps and needs fewer of them."""


class Config(Section):
    """A run of raybooth."""

    subject: Subject = Subject()
    base: Base = Base()
    prior: Prior = Prior()
    finetune: Finetune = Finetune()
    lora: Lora = Lora()
    generate: Generate = Generate()
    evaluate: Evaluate = Evaluate()
    cluster: Cluster = Cluster()
    storage: str = Field("raybooth-run", min_length=1, description="folder, or URI such as s3://bucket/run")
    seed: int = Field(0, ge=0, lt=2**63, description="of every random draw in the run")

    def __init__(self, /, **values: Any):  # a setting may be called self
        _check_sections(values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RayboothError(sentence(error, field_names())) from None

    @model_validator(mode="before")
    @classmethod
    def _mini_brings_its_own(cls, values: Any) -> Any:
        if not isinstance(values, dict) or setting(values, "base", "model") != "mini":
            return values
        own, optimizer = MINI_DEFAULTS, setting(values, "finetune", "optimizer")
        if optimizer == "prodigy":  # its lr is a factor, not one of mini's rates
            own = {**own, "finetune": {k: v for k, v in own["finetune"].items() if not k.endswith("lr")}}
        if optimizer == "adafactor":
            times = RELATIVE["lora" if setting(values, "finetune", "method") == "lora" else "full"]
            own = {**own, "finetune": {k: v * times if k.endswith("lr") else v for k, v in own["finetune"].items()}}
        return merged(own, values)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        subject = self.subject
        if not subject.class_name:
            raise ValueError("subject.class is empty: say what the subject is an instance of, as in --class dog")
        if subject.token.casefold() == subject.class_name.casefold():
            raise ValueError(f"subject.token equals subject.class ('{subject.token}'): choose a rare word for the token, such as unqtkn")
        if subject.token.casefold() in ("a", "an", "the"):
            raise ValueError(f"subject.token is '{subject.token}', a word of every prompt: choose a rare one, such as unqtkn")
        if self.prior.method == "base-prediction" and self.finetune.method != "lora":
            raise ValueError("prior.method = 'base-prediction' needs finetune.method = 'lora': only then is the base model still there to ask")
        least, at_most = self.cluster.worker_range
        if least > at_most:
            raise ValueError(f"cluster.workers = '{self.cluster.workers}' has more workers at least than at most: write it as '1-4'")
        if self.finetune.batch < least:
            raise ValueError(f"finetune.batch is {self.finetune.batch} for {least} workers: each needs a row, raise the batch or lower cluster.workers")
        self._check_optimizer()
        each, most = self.cluster.gpus_per_worker or 0, self.workers[1]
        if each % 1 and (each > 1 or most > 1):
            raise ValueError(f"cluster.gpus_per_worker is {each:g} for {most} workers: each needs whole GPUs, only a single worker can do with a part of one")
        for key, prompt in [("prior.prompt", self.prior.prompt), *(("generate.prompts", p) for p in self.generate.prompts)]:
            if not prompt.strip():
                raise ValueError(f"{key} holds an empty prompt: write what the picture shall show")
            if unknown_words(prompt):
                raise ValueError(f"{key} '{prompt}' has a placeholder that is not known: use {{subject}}, {{token}} or {{class}}")
        if any(word in self.prior.prompt for word in ("{subject}", "{token}")) or self.class_prompt.casefold() == subject.prompt.casefold():
            raise ValueError(f"prior.prompt '{self.prior.prompt}' names the subject: it must show the class alone, as 'photo of a {{class}}' does")
        return self

    def _check_optimizer(self) -> None:
        how = self.finetune
        if how.warmup > how.steps:
            raise ValueError(f"finetune.warmup = {how.warmup} is longer than finetune.steps = {how.steps}: the rate would not come to finetune.lr, lower it")
        if how.optimizer == "prodigy" and how.text_encoder and how.text_encoder_lr not in (None, how.lr):
            raise ValueError("finetune.optimizer = 'prodigy' has one learning rate for all: leave finetune.text_encoder_lr out, or set it to finetune.lr")
        if how.optimizer == "adafactor" and how.method == "lora" and self.lora.dora:
            raise ValueError(
                "finetune.optimizer = 'adafactor' does not go with lora.dora, whose magnitudes are large and would be moved as far: leave one of them out"
            )
        if how.method == "full" and self.lora != Lora():
            odd = next(k for k, v in self.lora if v != getattr(Lora(), k))
            raise ValueError(f"lora.{odd} is for finetune.method = 'lora', and this run trains the weights themselves: set that, or leave it out")
        if how.compile and how.method == "lora" and self.lora.dropout:
            raise ValueError("finetune.compile does not go with lora.dropout, whose masks are drawn outside of what is compiled: leave one of them out")
        if how.optimizer == "adamw8bit" and how.channels_last and how.method == "full":
            raise ValueError("finetune.channels_last does not go with finetune.optimizer = 'adamw8bit', which lays weights out anew: leave one of them out")
        if how.precision == "bf16-weights" and how.method == "full" and how.optimizer != "adamw":
            raise ValueError(f"finetune.precision = 'bf16-weights' goes with finetune.optimizer = 'adamw', not '{how.optimizer}': change one of them")

    def fill(self, prompt: str) -> str:
        """`prompt` with {subject}, {token} and {class} filled in."""
        return filled(prompt, self.subject.token, self.subject.class_name)

    @property
    def class_prompt(self) -> str:
        return self.fill(self.prior.prompt)

    @property
    def output_prompts(self) -> list[str]:
        """The prompts that `generate` draws, filled in, each once."""
        return list(dict.fromkeys(self.fill(p) for p in self.generate.prompts))

    def shows_subject(self, prompt: str) -> bool:
        """Whether a filled-in prompt names the subject."""
        return names_subject(prompt, self.subject.token, self.subject.class_name)

    def without_token(self, prompt: str) -> str:
        """A filled-in prompt for models that do not know the token: CLIP, and the base model."""
        return without_token(prompt, self.subject.token, self.subject.class_name)

    @property
    def workers(self) -> tuple[int, int]:
        """Fewest and most workers that fine-tune together. Each needs a row of every batch, so an elastic group grows no larger than the batch."""
        fewest, most = self.cluster.worker_range
        return fewest, min(most, self.finetune.batch)


def load(path: Path | None = None, overrides: Iterable[str] = (), **values: Any) -> Config:
    """The configuration in a TOML file, or the JSON that a storage keeps (or neither), with `values` (sections) and then the `overrides` on top.

    Raises:
        RayboothError: naming the field, what is wrong with it and what to do.
    """
    layers = [values, *map(override, overrides)]
    below = read_file(path) if path else {}
    if path and path.suffix == ".json":
        below = _for_layers(_where_it_lies(below, path), layers)
    data: dict[str, Any] = {}
    for layer in (below, *layers):
        _check_sections(layer)
        if setting(layer, "subject", "class_name") is not None:  # the field's name in Python only
            raise RayboothError("subject.class_name is not a known setting; did you mean subject.class?")
        data = merged(data, layer)
    return Config(**data)


def override(text: str) -> dict[str, Any]:
    """`section.key=value` as the dictionary that it adds.

    Raises:
        RayboothError: if it is not of that form.
    """
    return parsed_override(text, [name for name, field in _fields() if _is_text(field.annotation)])


def _is_text(annotation: Any) -> bool:
    """Whether a setting of this type is text or a list of texts, optional or not."""
    inner = [a for a in get_args(annotation) if isinstance(a, type) or get_args(a)]
    return annotation in (str, NoneType) or (bool(inner) and all(map(_is_text, inner)))


def _where_it_lies(kept: dict[str, Any], path: Path) -> dict[str, Any]:
    """`kept` with the folder of its config.json as the storage, wherever that was moved; unchanged for a URI, whose config.json lies in a mirror."""
    storage = kept.get("storage")
    here = path.name == CONFIG_FILE and isinstance(storage, str) and "://" not in storage
    return {**kept, "storage": str(path.absolute().parent)} if here else kept


def _for_layers(kept: dict[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """`kept`, which names every setting, without those defaults that change with the base, method or optimizer of `layers`."""
    before, after = _usual(kept), _usual(kept, *layers)
    moved = {(k, n) for k, own in before.items() if isinstance(own, dict) for n in own if own[n] != after[k][n]}
    return {k: {n: v for n, v in of.items() if (k, n) not in moved or v != before[k][n]} if isinstance(of, dict) else of for k, of in kept.items()}


def _usual(*layers: dict[str, Any]) -> dict[str, Any]:
    """Every setting's default for the base, method and optimizer that `layers` name."""
    named: dict[str, Any] = {"subject": {"class": "thing"}}
    for section, key in (("base", "model"), ("finetune", "method"), ("finetune", "optimizer")):
        chosen = [value for layer in layers if (value := setting(layer, section, key))]
        named = merged(named, {section: {key: chosen[-1]}} if chosen else {})
    return Config(**named).model_dump(by_alias=True, mode="json")


def _check_sections(layer: dict[str, Any]) -> None:
    """Refuse a value in place of a section, in each layer by itself: a section in a later one would hide the mistake."""
    for key, value in layer.items():
        keys = [name.partition(".")[2] for name in field_names() if name.startswith(f"{key}.")]
        if keys and not isinstance(value, dict | Section):
            raise RayboothError(f"{key} = {value!r} is not possible: it is a section of settings such as {key}.{keys[0]}.")


def field_names() -> list[str]:
    """Every setting, as `section.key`."""
    return [name for name, _ in _fields()]


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for section, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from ((f"{section}.{f.alias or k}", f) for k, f in field.annotation.model_fields.items())
        else:
            yield section, field
