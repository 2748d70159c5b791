"""What is asked for and answered, in OpenAI's images API, with seed, steps, guidance and metadata as extensions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_SEED = 2**53 - 1
"""The largest whole number that JavaScript tells apart from the next."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and all of them together.

    Attributes:
        queue: pictures that are waited for at once, over all requests.
        body: bytes of a request to /v1; `upload`: to anything else.
        seconds: time for a request, from its arrival to its last picture.
        kept_bytes, kept_seconds: of the pictures that are handed out as URLs.
    """

    prompt: int = 1000
    n: int = 10
    steps: int = 100
    queue: int = 256
    body: int = 1 << 16
    upload: int = 1 << 28
    seconds: float = 120
    kept_bytes: int = 1 << 26
    kept_seconds: float = 600


DEFAULTS = Limits()


class ImageRequest(BaseModel):
    """What POST /v1/images/generations takes. null is as good as leaving out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, description="what the picture shall show; {subject}, {token} and {class} are filled in")]
    model: Annotated[str | None, Field(max_length=64, description="id of a subject; may be left out where there is only one")] = None
    n: Annotated[int | None, Field(ge=1, description="pictures")] = 1
    size: Annotated[str | None, Field(max_length=16, description="auto, or the model's own such as 512x512")] = "auto"
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    stream: bool | None = False
    partial_images: Annotated[int | None, Field(ge=0, le=3, description="pictures in progress that are streamed")] = 0
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="of the first picture; the k-th has seed + k; default: a random one")] = None
    steps: Annotated[int | None, Field(ge=1, description="denoising steps; default: the run's")] = None
    guidance: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False, description="classifier-free guidance scale; default: the run's")] = None
    metadata: Annotated[bool | None, Field(description="whether pictures carry prompt, seed and model as PNG text")] = True
    output_format: Literal["png"] | None = "png"
    # What OpenAI's own models take, and these do not use.
    background: Annotated[Literal["auto", "opaque"] | None, Field(description="opaque, whatever is asked for")] = "auto"
    complexity: Annotated[Literal["low", "medium", "high"] | None, Field(description="ignored")] = None
    moderation: Annotated[Literal["auto", "low"] | None, Field(description="ignored")] = "auto"
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="ignored")] = None
    quality: Annotated[Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] | None, Field(description="ignored")] = "auto"
    safety_identifier: Annotated[str | None, Field(max_length=256, description="ignored")] = None
    style: Annotated[Literal["vivid", "natural"] | None, Field(description="ignored")] = None
    user: Annotated[str | None, Field(max_length=256, description="ignored")] = None

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("the prompt is empty: write what the picture shall show")
        return value


def bounded(limits: Limits) -> type[ImageRequest]:
    """ImageRequest with a server's own limits, so that its description states them."""
    fields = ImageRequest.model_fields

    class Bounded(ImageRequest):
        """What to draw."""

        prompt: Annotated[str, Field(min_length=1, max_length=limits.prompt, description=fields["prompt"].description)]
        n: Annotated[int | None, Field(ge=1, le=limits.n, description=fields["n"].description)] = 1
        steps: Annotated[int | None, Field(ge=1, le=limits.steps, description=fields["steps"].description)] = None

    Bounded.__name__ = "ImageRequest"
    return Bounded


class Picture(BaseModel):
    """One picture: its PNG in base64, or where to fetch it; and the seed that draws it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImageAnswer(BaseModel):
    """The pictures."""

    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    size: str


class Model(BaseModel):
    """A subject, or the base model. What it does not have is null."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["raybooth"] = "raybooth"
    class_: Annotated[str | None, Field(alias="class", serialization_alias="class")] = None
    token: str | None = None
    prompt: str | None = None
    kind: Literal["base", "lora", "full"]
    size: str
    photographs: Sequence[str]

    model_config = ConfigDict(populate_by_name=True)


class Models(BaseModel):
    """All that can be drawn."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether pictures can be drawn now."""

    status: Literal["ok", "starting"]


def event(kind: str, index: int, b64: str, size: str, created: int, **more: Any) -> dict[str, Any]:
    """One event of a stream, in the shape of OpenAI's; `index` is the picture's number among the n."""
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
    return {
        "type": f"image_generation.{kind}", "b64_json": b64, "created_at": created, "index": index, "size": size, "background": "opaque",
        "output_format": "png", "quality": "auto", **({"usage": usage} if kind == "completed" else {}), **more,
    }  # fmt: skip
