"""The sections of a configuration: every field, its default, its bounds, its one-line help."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Item = TypeVar("Item")
Several = Annotated[list[Item], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""A list; a single text can stand without brackets."""
Guidance = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None
SchedulerName = Literal["dpmsolver++", "ddim", "pndm", "euler"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, str_strip_whitespace=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("it is not a switch that is true or false")  # to Python they are numbers
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _paths_are_text(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [str(v) if isinstance(v, Path) else v for v in value]
        return str(value) if isinstance(value, Path) else value


class Subject(Section):
    """Who or what is learnt."""

    photos: Several[Annotated[str, Field(min_length=1)]] = Field(default=[], description="folders, files, http(s) URLs, or hub datasets as hf://owner/name")
    token: str = Field(
        "unqtkn", min_length=1, max_length=100, description="the rare word that will name the subject; auto: the first that 'raybooth token' proposes"
    )
    class_name: str = Field("", alias="class", max_length=100, description="what it is an instance of, as in 'dog'")
    crops: int = Field(0, ge=0, le=100, description="random crops of each photograph to learn from, beside the centre one")
    flip: bool = Field(False, description="learn from mirror images too; not for a subject with text or a hair parting")

    @field_validator("token", "class_name")
    @classmethod
    def _can_be_said(cls, value: str) -> str:
        if not value.isprintable() or "{" in value or "}" in value:
            raise ValueError("it stands in prompts, where braces and control characters have no place: use plain words")
        return value

    @field_validator("class_name")
    @classmethod
    def _has_no_article(cls, value: str) -> str:
        first, _, noun = value.partition(" ")
        if noun and first.casefold() in ("a", "an", "the"):
            raise ValueError(f"prompts have the article already: write the noun alone, '{noun.strip()}'")
        return value

    @property
    def prompt(self) -> str:
        """The prompt of every instance image."""
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
    weight: float = Field(1.0, ge=0, le=1_000_000, allow_inf_nan=False, description="weight of a class row in the loss")
    prompt: str = Field("photo of a {class}", min_length=1, description="what the class pictures show")
    method: Literal["class-images", "base-prediction", "none"] = Field(
        "class-images", description="what class rows are taught by: pictures, or (LoRA only, no pictures needed) the base model's own predictions"
    )
    distill: bool = Field(False, description="class rows learn the base's predictions, not the noise itself: keeps the class better by a sixth more work")
    steps: int = Field(25, ge=1, le=999, description="denoising steps a picture")
    guidance: Guidance = Field(None, description="classifier-free guidance scale; 1 or less turns it off; default: the model family's own")
    scheduler: SchedulerName = Field("dpmsolver++", description="sampler; the 2023 notebook's is pndm at 50 steps")

    @property
    def drawn(self) -> int:
        """The number of class pictures that are needed."""
        return self.images if self.method == "class-images" else 0

    @property
    def preserves(self) -> bool:
        """Whether there are class rows to learn from."""
        return self.method == "base-prediction" or self.drawn > 0

    @property
    def teacher(self) -> bool:
        """Whether the base model's predictions are the targets of class rows."""
        return self.method == "base-prediction" or (self.distill and self.drawn > 0)


RELATIVE = {"full": 40, "lora": 500}
"""Adafactor's rate over AdamW's, for steps of about the same size: Adafactor multiplies it by the root mean square of the tensor, at least 0.001,
which is about 0.025 for weights, and next to nothing for the half of an adapter that starts at zero."""


class Finetune(Section):
    """The fine-tuning itself."""

    method: Literal["full", "lora"] = Field("full", description="train the weights themselves, or low-rank adapters beside them")
    steps: int = Field(400, ge=1, le=9_999_999, description="optimizer steps")
    batch: int = Field(2, ge=1, le=65_536, description="instance rows a step over all workers; as many class rows go with them")
    lr: Positive = Field(5e-6, description="learning rate, the highest that the schedule comes to; default of lora: 1e-4")
    weight_decay: NonNegative = Field(0.01, description="AdamW's decoupled weight decay")
    max_grad_norm: Positive = Field(1.0, description="bound on the norm of all gradients together")
    text_encoder: bool = Field(True, description="train the text encoder with the UNet")
    text_encoder_lr: Positive | None = Field(None, description="learning rate of the text encoder; default: lr")
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "adafactor"] = Field(
        "adamw",
        description="adamw8bit and prodigy are extras; prodigy finds the rate itself, its lr is a factor on it, by default 1; adafactor's lr is relative "
        "to the size of the weights, by default 40 times adamw's, or 500 times with lora",
    )
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="of the learning rate after the warm-up")
    warmup: int = Field(0, ge=0, le=100_000_000, description="steps in which the learning rate rises")
    accumulate: int = Field(1, ge=1, le=65_536, description="passes a step: a batch in that many pieces, for less memory")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then what is saved; 0: none")
    min_snr_gamma: NonNegative = Field(0.0, description="min-SNR weighting of the loss, 5 is usual; 0: none; not of SD 3 and FLUX")
    noise_offset: NonNegative = Field(0.0, description="noise of whole channels on top, 0.05 to 0.1 for darker darks and brighter lights; 0: none")
    gradient_checkpointing: bool = Field(False, description="less memory, a third slower")
    channels_last: bool = Field(False, description="memory format of the denoiser: faster on GPUs with convolutions in half precision")
    compile: bool = Field(False, description="torch.compile the denoiser: minutes at first, then faster steps on GPUs")
    precision: Literal["auto", "fp32", "bf16", "fp16", "bf16-weights"] = Field(
        "auto",
        description="autocast over fp32 weights (auto: what the family bears on GPUs, bf16 on CPUs that have it), or bf16 weights with stochastic rounding",
    )
    log_every: Count = Field(10, description="read the loss back and show it every so many steps")
    trackers: Several[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=["tensorboard"], description="where readings go beside metrics.jsonl")
    checkpoint_every: Count = Field(100, description="steps between checkpoints")
    checkpoints: Count = Field(2, description="newest checkpoints that are kept")

    @model_validator(mode="after")
    def _rate_of_its_own(self) -> "Finetune":
        """Set the default rate: Prodigy finds its own; adapters start from nothing, and learn next to nothing at that of the weights."""
        if "lr" not in self.model_fields_set:
            usual = 1e-4 if self.method == "lora" else type(self).model_fields["lr"].default
            own = {"prodigy": 1.0, "adafactor": usual * RELATIVE[self.method]}.get(self.optimizer, usual)
            self.__dict__["lr"] = own  # not counted as set: mini's rates take precedence
        return self


class Lora(Section):
    """Low-rank adapters, for finetune.method = "lora"."""

    rank: int = Field(16, ge=1, le=4096, description="width of an adapter")
    alpha: Positive | None = Field(None, description="an adapter's output is scaled by alpha / rank; default: rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs that is dropped in training")
    dora: bool = Field(False, description="direction and magnitude of the denoiser's adapters apart (DoRA): better at low ranks, slower")
    targets: Several[str] | None = Field(None, description="names of layers; default: the attention's")


class Generate(Section):
    """What is drawn with the result."""

    prompts: Several[str] = Field(
        default=["photo of {subject}", "photo of {subject} in the snow", "photo of {subject} on the beach", "photo of {subject} in the city",
                 "photo of {subject} at night", "photo of {subject} in the desert"],
        min_length=1, description="prompts; {subject}, {token} and {class} are filled in",
    )  # fmt: skip
    images_per_prompt: int = Field(4, ge=1, le=100_000, description="pictures a prompt")
    steps: int = Field(25, ge=1, le=999, description="denoising steps a picture")
    guidance: Guidance = Field(None, description="classifier-free guidance scale; default: the model family's own, 7.5 for Stable Diffusion 1.x and 2.x")
    scheduler: SchedulerName = Field("dpmsolver++", description="sampler")


class Evaluate(Section):
    """How the result is scored (Ruiz et al. 2023, section 4.2)."""

    dino: str = Field(
        "facebook/dino-vits16",
        min_length=1,
        description="ViT that tells subjects apart: hub repository (owner/name, owner/name@revision), local folder, or 'mini'",
    )
    clip: str = Field("openai/clip-vit-base-patch32", min_length=1, description="CLIP for pictures and prompts: hub repository, local folder, or 'mini'")
    lpips: str | None = Field(
        None, min_length=1, description="VGG16, by which DIV is then LPIPS: timm/vgg16.tv_in1k or another, or a folder; default: DIV is by the ViT's patches"
    )
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
        """A copy with what is given in place of its own."""
        return replace(self, steps=self.steps if steps is None else steps, guidance=self.guidance if guidance is None else guidance)


class Cluster(Section):
    """Where the work runs."""

    address: str | None = Field(None, description="of a Ray cluster, 'auto' for the one this machine is in; default: start Ray here")
    workers: Annotated[int, Field(ge=1, le=4096)] | Annotated[str, Field(pattern=r"^[1-9]\d{0,3}-[1-9]\d{0,3}$")] = Field(
        1, description="workers that fine-tune together; as '1-4' the group shrinks and grows with the cluster"
    )
    gpus_per_worker: float | None = Field(None, ge=0, le=16, description="default: 1 where the cluster has GPUs, else 0")
    samplers: int | None = Field(None, ge=1, le=4096, description="workers that draw; default: one a GPU, or one a CPU for small models")
    retries: int = Field(3, ge=0, le=100, description="restarts after a worker is lost: of the fine-tuning group, or of the same pictures")
    sample_batch: int = Field(8, ge=1, le=256, description="pictures in one forward pass; a smaller one needs less memory")

    @property
    def is_demanding(self) -> bool:
        """Whether it asks for what a machine may not have."""
        return self.address is not None or self.worker_range[0] > 1 or bool(self.gpus_per_worker)

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers that fine-tune together."""
        if isinstance(self.workers, int):
            return self.workers, self.workers
        fewest, most = self.workers.split("-")
        return int(fewest), int(most)
