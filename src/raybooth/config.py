"""What a run is: every field, its default, its bounds, its one-line help.

Layers, later ones win: the defaults (for SD 1.x), mini's own when the base is mini, the TOML file, `--set section.key=value`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from raybooth.complaints import sentence
from raybooth.errors import RayboothError
from raybooth.layers import merged, parsed_override, read_file, said
from raybooth.prompts import filled, unknown_words

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
SchedulerName = Literal["dpmsolver++", "ddim", "pndm", "euler"]

MINI_DEFAULTS: dict[str, dict[str, Any]] = {
    # Without guidance: what is to be kept is what the model draws of itself. Taught its guided pictures and drawn with guidance again, the class narrows.
    # Half the paper's weight: at 1, four subjects were 5% less like themselves, and nothing was gained for the class (docs/dreambench.md).
    "prior": {"images": 64, "steps": 10, "guidance": 1.0, "weight": 0.5, "distill": True},
    "finetune": {"steps": 400, "batch": 4, "lr": 2e-4, "text_encoder_lr": 1e-4, "schedule": "cosine"},
    "generate": {"steps": 20, "guidance": 2.0},  # at 3 no more of the subject, and pictures of one prompt are more alike
    "cluster": {"sample_batch": 4},
    "evaluate": {"dino": "mini", "clip": "mini"},
}
"""What mini brings of its own: a model forty times smaller than SD learns in larger steps and needs fewer of them."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, str_strip_whitespace=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("it is not a switch that is true or false")  # Python counts with them
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _paths_are_text(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [str(v) if isinstance(v, Path) else v for v in value]
        return str(value) if isinstance(value, Path) else value


class Subject(Section):
    """Who or what is learnt."""

    photos: list[Annotated[str, Field(min_length=1)]] = Field(default=[], description="folders, files, http(s) URLs, or hub datasets as hf://owner/name")
    token: str = Field(
        "unqtkn", min_length=1, max_length=100, description="the rare word that will name the subject; auto: the first that 'raybooth token' proposes"
    )
    class_name: str = Field("", alias="class", max_length=100, description="what it is an instance of, as in 'dog'")
    crops: int = Field(0, ge=0, le=100, description="random crops of each photograph to learn from, beside the centre one")
    flip: bool = Field(False, description="learn from mirror images too; not for a subject with text or a hair parting")

    @field_validator("photos", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [str(value)] if isinstance(value, str | Path) else value  # before or after _paths_are_text

    @property
    def prompt(self) -> str:
        """What every instance image is called."""
        return f"photo of {self.name}"

    @property
    def name(self) -> str:
        return f"{self.token} {self.class_name}"


class Base(Section):
    """The model to start from."""

    model: str = Field("CompVis/stable-diffusion-v1-4", min_length=1, description="hub repository, local folder, .safetensors checkpoint, or 'mini'")
    configuration: str | None = Field(None, description="of a single checkpoint: a folder with the configuration files of its architecture")
    revision: str | None = Field(None, description="commit, tag or branch of a hub repository; SD 1.4 is pinned by default")
    resolution: int | None = Field(None, ge=16, le=4096, multiple_of=8, description="side of a picture in pixels; default: the model's")

    @property
    def pinned_revision(self) -> str | None:
        return self.revision or PINNED_REVISIONS.get(self.model)


PINNED_REVISIONS = {"CompVis/stable-diffusion-v1-4": "b95be7d6f134c3a9e62ee616f310733567f069ce"}


class Prior(Section):
    """Prior preservation: pictures of the class that keep 'a dog' from becoming this dog (Ruiz et al. 2023, section 3.2)."""

    images: int = Field(200, ge=0, le=1_000_000, description="class pictures the base model draws; 0 turns prior preservation by them off")
    weight: NonNegative = Field(1.0, description="weight of a class row in the loss")
    prompt: str = Field("photo of a {class}", min_length=1, description="what the class pictures show")
    method: Literal["class-images", "base-prediction", "none"] = Field(
        "class-images", description="what class rows are taught by: pictures, or (LoRA only, no pictures needed) the base model's own predictions"
    )
    distill: bool = Field(False, description="class rows learn the base's predictions, not the noise itself: keeps the class better by a sixth more work")
    steps: int = Field(25, ge=1, le=999, description="denoising steps a picture")
    guidance: float = Field(7.5, ge=0, allow_inf_nan=False, description="classifier-free guidance scale; 1 or less turns it off")
    scheduler: SchedulerName = Field("dpmsolver++", description="sampler; the 2023 notebook's is pndm at 50 steps")

    @property
    def drawn(self) -> int:
        """Class pictures that are needed."""
        return self.images if self.method == "class-images" else 0

    @property
    def teacher(self) -> bool:
        """Whether the base model's predictions are the targets of class rows."""
        return self.method == "base-prediction" or (self.distill and self.drawn > 0)


class Finetune(Section):
    """The fine-tuning itself."""

    method: Literal["full", "lora"] = Field("full", description="train the weights themselves, or low-rank adapters beside them")
    steps: Count = Field(400, description="optimizer steps")
    batch: Count = Field(2, description="instance rows a step over all workers; as many class rows go with them")
    lr: Positive = Field(5e-6, description="learning rate, the highest that the schedule comes to")
    weight_decay: NonNegative = Field(0.01, description="AdamW's decoupled weight decay")
    max_grad_norm: Positive = Field(1.0, description="bound on the norm of all gradients together")
    text_encoder: bool = Field(True, description="train the text encoder with the UNet")
    text_encoder_lr: Positive | None = Field(None, description="learning rate of the text encoder; default: lr")
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "adafactor"] = Field(
        "adamw",
        description="adamw8bit and prodigy are extras; prodigy finds the rate itself, its lr is a factor on it, by default 1; adafactor's lr is relative "
        "to the size of the weights",
    )
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="of the learning rate after the warm-up")
    warmup: int = Field(0, ge=0, description="steps in which the learning rate rises")
    accumulate: Count = Field(1, description="passes a step: a batch in that many pieces, for less memory")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then what is saved; 0: none")
    min_snr_gamma: NonNegative = Field(0.0, description="min-SNR weighting of the loss, 5 is usual; 0: none")
    noise_offset: NonNegative = Field(0.0, description="noise of whole channels on top, 0.05 to 0.1 for darker darks and brighter lights; 0: none")
    gradient_checkpointing: bool = Field(False, description="less memory, a third slower")
    channels_last: bool = Field(False, description="memory format of the denoiser: faster on GPUs with convolutions in half precision")
    compile: bool = Field(False, description="torch.compile the denoiser: minutes at first, then faster steps on GPUs")
    precision: Literal["auto", "fp32", "bf16", "fp16", "bf16-weights"] = Field(
        "auto",
        description="autocast over fp32 weights (auto: what the family bears on GPUs, bf16 on CPUs that have it), or bf16 weights with stochastic rounding",
    )
    log_every: Count = Field(10, description="read the loss back and show it every so many steps")
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=["tensorboard"], description="where readings go beside metrics.jsonl")
    checkpoint_every: Count = Field(100, description="steps between checkpoints")
    checkpoints: Count = Field(2, description="newest checkpoints that are kept")

    @model_validator(mode="before")
    @classmethod
    def _prodigy_finds_the_rate(cls, values: Any) -> Any:
        return {"lr": 1.0, **values} if isinstance(values, dict) and values.get("optimizer") == "prodigy" else values


class Lora(Section):
    """Low-rank adapters, for finetune.method = "lora"."""

    rank: Count = Field(16, le=4096, description="width of an adapter")
    alpha: Positive | None = Field(None, description="an adapter's output is scaled by alpha / rank; default: rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs that is dropped in training")
    dora: bool = Field(False, description="direction and magnitude of the denoiser's adapters apart (DoRA): better at low ranks, slower")
    targets: list[str] | None = Field(None, description="names of layers; default: the attention's")


class Generate(Section):
    """What is drawn with the result."""

    prompts: list[str] = Field(
        default=["photo of {subject}", "photo of {subject} in the snow", "photo of {subject} on the beach", "photo of {subject} in the city",
                 "photo of {subject} at night", "photo of {subject} in the desert"],
        min_length=1, description="prompts; {subject}, {token} and {class} are filled in",
    )  # fmt: skip
    images_per_prompt: Count = Field(4, le=100_000, description="pictures a prompt")
    steps: int = Field(25, ge=1, le=999, description="denoising steps a picture")
    guidance: float = Field(7.5, ge=0, allow_inf_nan=False, description="classifier-free guidance scale")
    scheduler: SchedulerName = Field("dpmsolver++", description="sampler")

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Evaluate(Section):
    """How the result is scored (Ruiz et al. 2023, section 4.2)."""

    dino: str = Field(
        "facebook/dino-vits16",
        min_length=1,
        description="ViT that tells subjects apart: hub repository (owner/name, owner/name@revision), local folder, or 'mini'",
    )
    clip: str = Field("openai/clip-vit-base-patch32", min_length=1, description="CLIP for pictures and prompts: hub repository, local folder, or 'mini'")
    class_images: Annotated[int, Field(ge=2, le=100_000)] | None = Field(
        None, description="pictures of the class to draw and score, before and after; default: 24, or as many as prior.images where these are fewer"
    )
    select: Literal["balance", "subject", "last"] = Field(
        "last", description="which kept checkpoint becomes the model: the best balance of subject and prompt, the likest to the subject, or simply the last"
    )


@dataclass(frozen=True)
class Sampling:
    """How to denoise. `guidance` is classifier-free guidance's scale (Ho and Salimans 2022); at 1 or less it is off."""

    steps: int
    guidance: float
    scheduler: str
    resolution: int

    def changed(self, steps: int | None, guidance: float | None) -> "Sampling":
        """With what is given in place of its own."""
        return replace(self, steps=self.steps if steps is None else steps, guidance=self.guidance if guidance is None else guidance)


class Cluster(Section):
    """Where the work runs."""

    address: str | None = Field(None, description="of a Ray cluster, 'auto' for the one this machine is in; default: start Ray here")
    workers: Annotated[int, Field(ge=1, le=4096)] | Annotated[str, Field(pattern=r"^[1-9]\d{0,3}-[1-9]\d{0,3}$")] = Field(
        1, description="workers that fine-tune together; as '1-4' the group shrinks and grows with the cluster"
    )
    gpus_per_worker: float | None = Field(None, ge=0, le=16, description="default: 1 where the cluster has GPUs, else 0")
    samplers: int | None = Field(None, ge=1, le=4096, description="workers that draw; default: one a GPU, or one a CPU for small models")
    retries: int = Field(3, ge=0, le=100, description="restarts of the fine-tuning group after it has lost a worker")
    sample_batch: Count = Field(8, le=256, description="pictures in one forward pass; a smaller one needs less memory")

    @property
    def is_demanding(self) -> bool:
        """Whether a machine may not have what is asked for."""
        return self.address is not None or self.worker_range[0] > 1 or bool(self.gpus_per_worker)

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers that fine-tune together."""
        if isinstance(self.workers, int):
            return self.workers, self.workers
        fewest, most = self.workers.split("-")
        return int(fewest), int(most)


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
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RayboothError(sentence(error, field_names())) from None

    @model_validator(mode="before")
    @classmethod
    def _mini_brings_its_own(cls, values: Any) -> Any:
        if not isinstance(values, dict) or said(values, "base", "model") != "mini":
            return values
        own = MINI_DEFAULTS
        if said(values, "finetune", "optimizer") == "prodigy":  # its factor is no rate of mini's
            own = {**own, "finetune": {k: v for k, v in own["finetune"].items() if not k.endswith("lr")}}
        return merged(own, values)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        subject = self.subject
        if not subject.class_name:
            raise ValueError("subject.class is empty: say what the subject is an instance of, as in --class dog")
        if subject.token.casefold() == subject.class_name.casefold():
            raise ValueError(f"subject.token equals subject.class ('{subject.token}'): choose a rare word for the token, such as unqtkn")
        if self.prior.method == "base-prediction" and self.finetune.method != "lora":
            raise ValueError("prior.method = 'base-prediction' needs finetune.method = 'lora': only then is the base model still there to ask")
        fewest, most = self.cluster.worker_range
        if fewest > most:
            raise ValueError(f"cluster.workers = '{self.cluster.workers}' has more workers at least than at most: write it as '1-4'")
        if self.finetune.batch < most:
            raise ValueError(f"finetune.batch is {self.finetune.batch} for {most} workers: each needs a row, raise the batch or lower cluster.workers")
        self._check_optimizer()
        each = self.cluster.gpus_per_worker or 0
        if each % 1 and (each > 1 or most > 1):
            raise ValueError(f"cluster.gpus_per_worker is {each:g} for {most} workers: each needs whole GPUs, only a single worker can do with a part of one")
        for key, prompt in [("prior.prompt", self.prior.prompt), *(("generate.prompts", p) for p in self.generate.prompts)]:
            if not prompt.strip():
                raise ValueError(f"{key} holds an empty prompt: write what the picture shall show")
            if unknown_words(prompt):
                raise ValueError(f"{key} '{prompt}' has a placeholder that is not known: use {{subject}}, {{token}} or {{class}}")
        return self

    def _check_optimizer(self) -> None:
        how = self.finetune
        if how.optimizer == "prodigy" and how.text_encoder and how.text_encoder_lr not in (None, how.lr):
            raise ValueError("finetune.optimizer = 'prodigy' has one learning rate for all: leave finetune.text_encoder_lr out, or set it to finetune.lr")
        if how.precision == "bf16-weights" and how.method == "full" and how.optimizer != "adamw":
            raise ValueError(f"finetune.precision = 'bf16-weights' goes with finetune.optimizer = 'adamw', not '{how.optimizer}': change one of them")

    def fill(self, prompt: str) -> str:
        """`prompt` with {subject}, {token} and {class} filled in."""
        return filled(prompt, self.subject.token, self.subject.class_name)

    @property
    def class_prompt(self) -> str:
        return self.fill(self.prior.prompt)


def load(path: Path | None = None, overrides: Iterable[str] = (), **values: Any) -> Config:
    """The configuration of a TOML file, or of the JSON that a storage keeps, (or none), with `values` (sections) and then `section.key=value` on top.

    Raises:
        RayboothError: naming the field, what is wrong with it and what to do.
    """
    layers = [values, *map(parsed_override, overrides)]
    below = read_file(path) if path else {}
    if path and path.suffix == ".json":
        below = _for_base(below, layers)
    data: dict[str, Any] = {}
    for layer in (below, *layers):
        _check_sections(layer)
        data = merged(data, layer)
    return Config(**data)


def _for_base(kept: dict[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What a storage keeps names every setting, defaults too: those of its base are left out where `layers` go from mini to another base, or to mini."""
    before, *named = [model for layer in (kept, *layers) if (model := said(layer, "base", "model"))] or [""]
    if not named or (named[-1] == "mini") == (before == "mini"):
        return kept
    usual = Config(subject={"class": "thing"}, base={"model": before}).model_dump(by_alias=True, mode="json")
    sections = {k: own for k, own in usual.items() if isinstance(own, dict) and isinstance(kept.get(k), dict)}
    return kept | {k: {n: v for n, v in kept[k].items() if v != own.get(n)} for k, own in sections.items()}


def _check_sections(layer: dict[str, Any]) -> None:
    """Of each layer by itself: a section in a later one would hide the mistake."""
    for key, value in layer.items():
        keys = [name.partition(".")[2] for name in field_names() if name.startswith(f"{key}.")]
        if keys and not isinstance(value, dict | Section):
            raise RayboothError(f"{key} = {value!r} is not possible: it is a section of settings such as {key}.{keys[0]}.")


def field_names() -> list[str]:
    """Every setting, as `section.key`."""
    names = []
    for section, field in Config.model_fields.items():
        inner = field.annotation if isinstance(field.annotation, type) and issubclass(field.annotation, Section) else None
        names += [f"{section}.{f.alias or k}" for k, f in inner.model_fields.items()] if inner else [section]
    return names
