"""Bad input: one clear sentence that names the thing, exit status 2, no traceback, and nothing that existed is lost."""

import errno
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from raybooth.cli import main
from raybooth.workspace import Workspace


@dataclass
class World:
    """What a row may spoil: a folder, good photographs in it, a good model in it, a storage with something in it, its configuration also."""

    folder: Path

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    @property
    def config(self) -> Path:
        return self.storage / "config.json"

    def photo(self, name: str, data: bytes) -> None:
        (self.photos / name).write_bytes(data)


def image(width: int = 64, height: int = 64, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 60).save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int = 40_000) -> bytes:
    """A PNG that says it is 40,000 x 40,000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


PHOTOGRAPH = Path(__file__).parent / "photographs" / "02.jpg"


def empty(w: World) -> None:
    shutil.rmtree(w.photos)
    w.photos.mkdir()


def only_text(w: World) -> None:
    empty(w)
    w.photo("notes.txt", b"hello")


def no_index(w: World) -> None:
    (w.model / "model_index.json").unlink()


def bad_index(w: World) -> None:
    (w.model / "model_index.json").write_text("{")


def unknown_family(w: World) -> None:
    index = json.loads((w.model / "model_index.json").read_text())
    (w.model / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))


def unet_file(w: World) -> Path:
    return w.model / "unet" / "diffusion_pytorch_model.safetensors"


def pickled(w: World) -> None:
    unet_file(w).rename(w.model / "unet" / "diffusion_pytorch_model.bin")


def cut_weights(w: World) -> None:
    unet_file(w).write_bytes(unet_file(w).read_bytes()[:-100])


def hollow_weights(w: World) -> None:
    unet_file(w).write_bytes(b"")


def garbage_weights(w: World) -> None:
    unet_file(w).write_bytes(b"\xff" * 5000)


def no_vae(w: World) -> None:
    shutil.rmtree(w.model / "vae")


def odd_prediction(w: World) -> None:
    path = w.model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))


def alone(name: str) -> Callable[[World], None]:
    """A file of the user's in a storage in which no run was begun."""

    def write(w: World) -> None:
        w.config.unlink()
        (w.storage / name).write_text("the user's")

    return write


def with_a_hole(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(300) + data[len(data) // 2 + 300 :]


def half_of(data: bytes) -> bytes:
    """As a copy that was cut off leaves it on a disk that had set aside the room for it."""
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def as_bmp(path: Path) -> bytes:
    buffer = io.BytesIO()
    Image.open(path).save(buffer, "BMP")
    return buffer.getvalue()


def a_lora(w: World) -> None:
    save_file({"unet.a.lora_A.weight": np.zeros((4, 8), np.float32)}, w.folder / "lora.safetensors")


def base_within(w: World) -> None:
    shutil.copytree(w.model, w.storage / "base-model")


def put(name: str, text: str) -> Callable[[World], None]:
    def write(w: World) -> None:
        (w.folder / name).write_text(text)

    return write


def in_the_way(w: World) -> None:
    (w.storage / "instance-images").mkdir()
    for name in ("00.png", "01.png"):
        (w.storage / "instance-images" / name).write_bytes(b"the user's")


def without(*names: str) -> Callable[[World], None]:
    def remove(w: World) -> None:
        for name in names:
            (w.model / name).unlink()

    return remove


def sharded(listed: str | None, present: bool = True) -> Callable[[World], None]:
    """The weights of the UNet as the first of two shards, or absent, with that text as their list."""

    def write(w: World) -> None:
        unet_file(w).rename(unet_file(w).with_stem("diffusion_pytorch_model-00001-of-00002"))
        if not present:
            unet_file(w).with_stem("diffusion_pytorch_model-00001-of-00002").unlink()
        if listed is not None:
            unet_file(w).with_name("diffusion_pytorch_model.safetensors.index.json").write_text(listed)

    return write


SHARDS = json.dumps({"weight_map": {f"{i}": f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}})


def header(text: str) -> Callable[[World], None]:
    """Weights that begin as safetensors do."""

    def write(w: World) -> None:
        unet_file(w).write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(64))

    return write


def toml(text: str) -> Callable[[World], None]:
    return put("my.toml", text)


def locked(w: World) -> None:
    lock = Workspace(str(w.storage)).locked()
    lock.__enter__()
    HELD.append(lock)


HELD: list = []

TABLE: list[tuple[str, Callable[[World], None] | None, list[str], str]] = [
    # what is wrong, how the world is spoilt, further arguments, what the sentence must name
    ("a folder as the configuration", None, ["FOLDER/photos"], "photos is a folder and no configuration file"),
    ("a configuration among the photographs", toml("seed = 1"), ["NONE", "--set=subject.photos=['FOLDER/my.toml']"], "put it before --photos"),
    ("steps beyond counting", None, [f"--set=finetune.steps={10**28}"], "finetune.steps"),
    ("a batch beyond memory", None, [f"--set=finetune.batch={10**10}"], "finetune.batch"),
    ("a warm-up longer than the run", None, ["--set=finetune.warmup=500"], "finetune.warmup = 500 is longer than finetune.steps"),
    ("a key with an empty part", None, ["--set=a..b=3"], "--set a..b=3 is not of the form"),
    ("an unclosed brace", None, ["--set=generate.prompts=a {subject"], "has a placeholder that is not known"),
    ("no photographs given", None, ["--photos=", "NONE"], "no photographs"),
    ("an empty folder", empty, [], "no photographs in"),
    ("a folder without pictures", only_text, [], "'.txt' is not a picture's file type"),
    ("a path that does not exist", None, ["PHOTOS=/nowhere/at/all"], "/nowhere/at/all"),
    ("a dataset without its prefix", None, ["PHOTOS=diffusers/dog-example"], "hf://diffusers/dog-example"),
    ("a URL that nothing answers", None, ["PHOTOS=http://127.0.0.1:9/a.png"], "cannot be fetched"),
    ("a photograph without a name", None, ["PHOTOS="], "subject.photos = ''"),
    ("photographs of an unknown user", None, ["PHOTOS=~nobody-of-this-name/dog"], "subject.photos = '~nobody-of-this-name/dog'"),
    ("a path that is too long", None, ["PHOTOS=" + "a" * 5000], "longer than a path may be"),
    ("a path with a NUL", toml('[subject]\nphotos = ["a\\u0000b"]'), ["FOLDER/my.toml", "NONE"], "holds a character that no path may hold"),
    ("a link to nothing", lambda w: (w.photos / "link.png").symlink_to("/nowhere.png"), [], "link.png is a link to /nowhere.png, which is not there"),
    ("a pipe", lambda w: os.mkfifo(w.photos / "pipe.png"), [], "pipe.png is neither a file nor a folder"),
    ("a URL with a blank", None, ["PHOTOS=http://127.0.0.1:9/my dog.png"], "http://127.0.0.1:9/my dog.png cannot be fetched"),
    ("a URL whose port is none", None, ["PHOTOS=http://h:abc/a.png"], "http://h:abc/a.png cannot be fetched"),
    ("a URL whose host is none", None, ["PHOTOS=http://[::1/a.png"], "http://[::1/a.png cannot be fetched"),
    ("a URL whose port cannot be", None, ["PHOTOS=http://127.0.0.1:99999999999999999999/a.png"], "cannot be fetched"),
    ("a URL in capitals", None, ["PHOTOS=HTTP://127.0.0.1:9/a.png"], "HTTP://127.0.0.1:9/a.png cannot be fetched"),
    ("a corrupt photograph", lambda w: w.photo("bad.png", image()[:60] + b"\0" * 200 + image()[260:]), [], "bad.png"),
    ("a truncated photograph", lambda w: w.photo("cut.jpg", image(kind="JPEG")[:900]), [], "cut.jpg is damaged or cut off"),
    ("a JPEG with a hole", lambda w: w.photo("hole.jpg", with_a_hole(PHOTOGRAPH.read_bytes())), [], "hole.jpg is damaged or cut off (Corrupt JPEG data"),
    ("half a JPEG, filled up", lambda w: w.photo("half.jpg", half_of(PHOTOGRAPH.read_bytes())), [], "half.jpg is damaged or cut off"),
    ("an empty file", lambda w: w.photo("none.png", b""), [], "none.png is not a picture"),
    ("a photograph of one pixel", lambda w: w.photo("dot.png", image(1, 1)), [], "dot.png is 1 x 1 pixels"),
    ("a thin photograph", lambda w: w.photo("thin.png", image(400, 8)), [], "thin.png is 400 x 8 pixels"),
    ("a decompression bomb", lambda w: w.photo("bomb.png", bomb()), [], "bomb.png has more than 178 million pixels"),
    ("a photograph that cannot be read to its end", None, ["PHOTOS=/proc/self/mem"], "/proc/self/mem cannot be read (Input/output error): check the path"),
    ("a name that colours the terminal", lambda w: w.photo("x\n\x1b[31my.png", b"none"), [], "x [31my.png is not a picture"),
    ("a URL without an answer, whatever the base", None, ["PHOTOS=http://127.0.0.1:9/a.png", "--base=/no/such/model"], "a.png cannot be fetched"),
    ("text named .jpg", lambda w: w.photo("text.jpg", b"hello, I am text"), [], "text.jpg is not a picture"),
    ("the same photograph twice", lambda w: w.photo("twin.png", (w.photos / "0.png").read_bytes()), [], "twin.png is the same photograph as"),
    ("the same picture in another file", lambda w: w.photo("twin.bmp", as_bmp(w.photos / "0.png")), [], "twin.bmp is the same photograph as"),
    ("an empty class", None, ["--class="], "subject.class is empty"),
    ("a class of blanks", None, ["--class=  "], "subject.class is empty"),
    ("an empty token", None, ["--token="], "subject.token"),
    ("a token with a placeholder", None, ["--token={subject}"], "subject.token = '{subject}' is not possible: it stands in prompts"),
    ("a class of two lines", None, ["--class=dog\ncat"], "where braces and control characters have no place"),
    ("a token that is the class", None, ["--token=Dog"], "subject.token equals subject.class"),
    ("a base in the storage itself", base_within, ["--base=FOLDER/storage/base-model"], "is what the storage FOLDER/storage itself has made"),
    ("a LoRA for a base", a_lora, ["--base=FOLDER/lora.safetensors"], "lora.safetensors is a LoRA and no model"),
    (
        "an optimizer that is not installed",
        None,
        ["--set=finetune.optimizer=prodigy"],
        "needs prodigyopt, which is not installed: pip install",
    ),
    ("a tracker that is not installed", None, ["--set=finetune.trackers=['mlflow']"], "finetune.trackers = 'mlflow' needs mlflow"),
    ("a list without its end", None, ['--set=generate.prompts=["a {subject}", "b"'], "begins like a TOML list and is none"),
    ("a list of bare words", None, ["--set=generate.prompts=[a {subject}]"], "begins like a TOML list and is none"),
    ("a text without its end", None, ["--set=subject.class='dog"], "begins like a TOML value and is none"),
    ("two settings in one", None, ["--set=seed=1\nfoo=2"], "holds more than one setting"),
    ("a guidance beyond all", None, ["--set=generate.guidance=1e300"], "generate.guidance"),
    ("a section in quotes", toml('"subject.class" = "dog"'), ["FOLDER/my.toml"], "stands under a quoted name"),
    ("an address with one slash", None, ["--storage=s3:/bucket/run"], "s3:/bucket/run is neither a folder nor an address"),
    ("an address of a host's file", None, ["--storage=file://localhost/tmp/run"], "is neither a folder nor an address"),
    ("an address of nothing", None, ["--storage=memory://"], "is neither a folder nor an address"),
    ("a bucket without its package", None, ["--storage=s3://bucket/run"], "pip install 'raybooth[s3]'"),
    ("a base that does not exist", None, ["--base=/no/such/model"], "/no/such/model"),
    ("a base of an unknown user", None, ["--base=~nobody-of-this-name/sd"], "base.model = '~nobody-of-this-name/sd'"),
    ("a base without model_index.json", no_index, [], "has no model_index.json"),
    ("a damaged model_index.json", bad_index, [], "model_index.json is damaged"),
    ("an unknown family", unknown_family, [], "KandinskyPipeline"),
    ("pickled weights only", pickled, [], "only pickled weights in unet/"),
    ("a missing weight file", lambda w: unet_file(w).unlink(), [], "no weights in unet/"),
    ("a missing component", no_vae, [], "no vae/ folder"),
    ("weights cut off", cut_weights, [], "diffusion_pytorch_model.safetensors are cut off"),
    ("empty weights", hollow_weights, [], "diffusion_pytorch_model.safetensors are cut off"),
    ("weights that are none", garbage_weights, [], "are cut off or damaged"),
    ("weights whose header makes no sense", header('{"a": {"data_offsets": []}}'), [], "are cut off or damaged"),
    ("weights whose offsets are none", header('{"a": {"data_offsets": [0, "x"]}}'), [], "are cut off or damaged"),
    ("a shard too few", sharded(SHARDS), [], "has no unet/diffusion_pytorch_model-00002-of-00002.safetensors"),
    ("a list of shards alone", sharded(SHARDS, present=False), [], "has no unet/diffusion_pytorch_model-00001-of-00002.safetensors"),
    ("shards without their list", sharded(None), [], "no list of them"),
    ("a torn list of shards", sharded(SHARDS[:40]), [], "diffusion_pytorch_model.safetensors.index.json is damaged"),
    ("a list of no shards", sharded("{}"), [], "no weight_map"),
    ("a part without its configuration", without("text_encoder/config.json"), [], "has no text_encoder/config.json"),
    ("a torn configuration", put("model/text_encoder/config.json", '{"a":'), [], "text_encoder/config.json is damaged"),
    ("a tokenizer without words", without("tokenizer/tokenizer.json"), [], "no vocabulary in tokenizer/"),
    ("torn words", put("model/tokenizer/tokenizer.json", '{"a":'), [], "tokenizer/tokenizer.json is damaged"),
    ("an index of no parts", put("model/model_index.json", '{"_class_name": "StableDiffusionPipeline"}'), [], "does not say of which class unet/ is"),
    ("an empty configuration of the UNet", put("model/unet/config.json", "{}"), [], "lack something or hold nonsense ('sample_size')"),
    ("a list as configuration", put("model/unet/config.json", "[]"), [], "unet/config.json is damaged (not a JSON object)"),
    ("an empty configuration of the VAE", put("model/vae/config.json", "{}"), [], "lack something or hold nonsense ('block_out_channels')"),
    ("sizes that are words", put("model/unet/config.json", '{"sample_size": "large", "cross_attention_dim": 32}'), [], "lack something or hold nonsense"),
    ("an empty configuration of the encoder", put("model/text_encoder/config.json", "{}"), [], "('hidden_size')"),
    ("a list as scheduler", put("model/scheduler/scheduler_config.json", "[]"), [], "scheduler_config.json is damaged (not a JSON object)"),
    ("a pickled checkpoint", put("my.ckpt", "pickle"), ["--base=FOLDER/my.ckpt"], "my.ckpt is not a .safetensors file"),
    ("a prediction that cannot be trained", odd_prediction, [], "predicts 'sample'"),
    ("a hub that cannot be reached", None, ["--base=someone/some-model"], "cannot be reached for the model someone/some-model"),
    ("a hub dataset that cannot be reached", None, ["PHOTOS=hf://someone/dog"], "cannot be reached for the dataset someone/dog"),
    ("a name that is no repository", None, ["--base=some//model"], "no model folder some/model"),
    ("a wrong type", None, ["--set=finetune.steps=many"], "finetune.steps = 'many'"),
    ("true for a number", None, ["--set=seed=true"], "seed = True is not possible"),
    ("false for a number", None, ["--set=prior.images=false"], "prior.images = False is not possible"),
    ("true for a number or a range", None, ["--set=cluster.workers=true"], "cluster.workers = True is not possible"),
    ("a section that is none", toml('subject = "dog"\n'), ["FOLDER/my.toml"], "subject = 'dog' is not possible"),
    ("JSON that is a list", put("my.json", "[1]"), ["FOLDER/my.json"], "my.json is not a configuration"),
    ("JSON that is nothing", put("my.json", "null"), ["FOLDER/my.json"], "my.json is not a configuration"),
    ("a file of no kind that is not TOML", put("mine", "= 3"), ["FOLDER/mine"], "mine is not valid TOML"),
    ("a negative number", None, ["--set=prior.images=-1"], "prior.images = -1"),
    ("a rate that is not a number", None, ["--set=finetune.lr=nan"], "finetune.lr = nan"),
    ("a weight beyond all numbers", None, ["--set=prior.weight=1e308"], "prior.weight = 1e+308"),
    ("a rate of zero", None, ["--set=finetune.lr=0"], "finetune.lr = 0"),
    ("an unknown key", None, ["--set=finetune.stepz=3"], "did you mean finetune.steps?"),
    ("a setting without its section", None, ["--set=steps=3"], "did you mean prior.steps or finetune.steps or generate.steps?"),
    ("a section as a value", None, ["--set=base=mini"], "it is a section of settings such as base.model"),
    ("an unknown section", None, ["--set=training.steps=3"], "did you mean"),
    ("a setting without a value", None, ["--set=seed"], "section.key=value"),
    ("an unknown scheduler", None, ["--set=prior.scheduler=magic"], "prior.scheduler = 'magic'"),
    ("an unknown placeholder", None, ["--set=generate.prompts=['{who} in the snow']"], "{who} in the snow"),
    ("a placeholder with blanks", None, ["--set=generate.prompts=['{ subject } in the snow']"], "{ subject } in the snow"),
    ("a placeholder of two words", None, ["--set=generate.prompts=['{my subject} in the snow']"], "{my subject} in the snow"),
    ("an empty placeholder", None, ["--set=generate.prompts=['{} in the snow']"], "'{} in the snow' has a placeholder that is not known"),
    ("a placeholder in double braces", None, ["--set=generate.prompts=['{{subject}} in the snow']"], "{{subject}} in the snow"),
    ("a token that is an article", None, ["--token=a"], "subject.token is 'a', a word of every prompt"),
    ("a class with its article", None, ["--class=an elephant"], "write the noun alone, 'elephant'"),
    ("a class by its name in Python", toml("subject.class_name = 'dog'\n"), ["FOLDER/my.toml"], "did you mean subject.class?"),
    ("class pictures that show the subject", None, ["--set=prior.prompt=photo of {subject}"], "names the subject: it must show the class alone"),
    ("class pictures of the very prompt", None, ["--set=prior.prompt=Photo of unqtkn {class}"], "names the subject: it must show the class alone"),
    ("a class of letters that are tokens each", None, ["--class=" + "小狗" * 8], "tokens that this model reads of a prompt"),
    ("a token longer than the model reads", None, [f"--token={'lo ng ' * 16}"], "tokens that this model reads of a prompt"),
    ("an empty prompt", None, ["--set=generate.prompts=[' ']"], "empty prompt"),
    ("a resolution that the model cannot have", None, ["--set=base.resolution=33"], "base.resolution = 33"),
    ("a configuration that does not exist", None, ["nothing.toml"], "nothing.toml"),
    ("a configuration that is not TOML", toml("= 3"), ["FOLDER/my.toml"], "is not valid TOML"),
    ("an unknown key in the file", toml("[finetune]\nstep = 3\n"), ["FOLDER/my.toml"], "did you mean finetune.steps?"),
    ("a section of another language", None, ["--set=self.x=1"], "self.x is not a known setting"),
    ("an unknown section with a known key", None, ["--set=genrate.prompts=x"], "did you mean generate.prompts?"),
    ("a number of thousands of digits", None, [f"--set=finetune.steps={'9' * 5000}"], "finetune.steps = '999"),
    ("brackets without end", None, [f"--set=finetune.steps={'[' * 5000}"], "[[[ begins like a TOML list and is none"),
    ("brackets without end in the file", toml(f"seed = {'[' * 5000}"), ["FOLDER/my.toml"], "is not valid TOML"),
    ("keys without end", None, [f"--set=finetune.steps{'.a' * 5000}=1"], "finetune.steps = "),
    ("keys without end in the file", toml(f"finetune.steps{'.a' * 5000} = 1"), ["FOLDER/my.toml"], "finetune.steps = "),
    ("more workers than rows at least", None, ["--set=cluster.workers='3-9'"], "finetune.batch is 2 for 3 workers"),
    ("more workers than rows", None, ["--set=cluster.workers=9"], "finetune.batch is 2 for 9 workers"),
    ("more GPU workers than GPUs", None, ["--set=cluster.gpus_per_worker=1"], "needs 1 GPUs and there are 0"),
    ("a cluster's port that none can be", None, ["--set=cluster.address='127.0.0.1:99999999999'"], "No Ray cluster answers at"),
    ("a cluster's port of other digits", None, ["--set=cluster.address='127.0.0.1:²'"], "No Ray cluster answers at"),
    ("a cluster that is not there", None, ["--set=cluster.address='127.0.0.1:9'"], "127.0.0.1:9"),
    ("a storage that is a file", None, ["--storage=FOLDER/photos/0.png"], "is not a folder"),
    ("a storage below a file", None, ["--storage=FOLDER/photos/0.png/run"], "is not a folder"),
    ("a storage that cannot be written to", None, ["--storage=/proc/raybooth"], "/proc/raybooth"),
    ("a storage of an unknown kind", None, ["--storage=gopher://x/y"], "gopher://x/y"),
    ("a storage with a password", None, ["--storage=ftp://me:secret@host/x"], "ftp://***@host/x has a password in its address"),
    ("a storage of an unknown user", None, ["--storage=~nobody-of-this-name/run"], "storage = '~nobody-of-this-name/run'"),
    ("a storage that is too long", None, ["--storage=/tmp/" + "a" * 300], "longer than a path may be"),
    ("a storage that is only read from", None, ["--storage=http://127.0.0.1:9/x"], "http://127.0.0.1:9/x cannot be written to"),
    ("a remote storage that cannot be written to", None, ["--storage=file:///proc/raybooth"], "file:///proc/raybooth cannot be written to"),
    ("a remote storage that nothing answers", None, ["--storage=hf://x/y"], "hf://x/y cannot be opened"),
    ("a lock of somebody else's", put("storage/.lock", "mine"), [], ".lock in the storage FOLDER/storage is none of raybooth's"),
    ("a lock that is a pipe", lambda w: os.mkfifo(w.storage / ".lock"), [], ".lock is no file, and in the way"),
    ("a lock that is a folder", lambda w: (w.storage / ".lock").mkdir(), [], "has a folder where a file of raybooth's belongs"),
    ("a file called as the kept configuration", put("storage/config.json", '{"mine": 1}'), [], "config.json in the storage FOLDER/storage is none that"),
    ("a file called as the report", alone("report.html"), [], "report.html in the storage"),
    ("a file called as the readings", alone("metrics.jsonl"), [], "metrics.jsonl in the storage"),
    ("files in the way", in_the_way, [], "2 files (00.png, ...) are in the way"),
    ("a storage in use", locked, [], "in use by"),
]


@pytest.mark.parametrize(("spoil", "arguments", "named"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_bad_input(spoil, arguments: list[str], named: str, tmp_path: Path, toy: Path, photos: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    world = World(tmp_path)
    shutil.copytree(photos, world.photos)
    shutil.copytree(toy, world.model)
    (world.storage / "class-images").mkdir(parents=True)
    (world.storage / "class-images" / "mine.png").write_bytes(b"the user's")
    world.config.write_text('{"subject": {"class": "cat"}, "base": {}, "finetune": {}, "storage": "."}')
    if spoil:
        spoil(world)
    given = [a.replace("FOLDER", str(tmp_path)) for a in arguments if not a.startswith(("PHOTOS=", "NONE", "--photos="))]
    source = next((a.removeprefix("PHOTOS=") for a in arguments if a.startswith("PHOTOS=")), str(world.photos))
    photos_option = [] if "NONE" in arguments else ["--photos", source]
    defaults = {"--class=": "dog", "--base=": str(world.model), "--storage=": str(world.storage)}
    options = [f"{k}{v}" for k, v in defaults.items() if not any(a.startswith(k) for a in given)]
    file = [a for a in given if not a.startswith("--")]
    before = snapshot(tmp_path)
    status = main(["run", *file, *photos_option, *options, *(a for a in given if a not in file)])
    while HELD:
        HELD.pop().__exit__(None, None, None)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("raybooth: ")]
    assert status == 2, printed.err
    assert len(lines) == 1
    assert printed.err.endswith(f"{lines[0]}\n")  # one line
    assert named.replace("FOLDER", str(tmp_path)) in lines[0]
    assert "Traceback" not in printed.err
    assert len(lines[0]) < 500
    after = snapshot(tmp_path)
    assert before.items() <= after.items()  # nothing that existed is lost or changed


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_the_table_is_long_enough():
    assert len(TABLE) >= 30


def test_a_base_that_may_not_be_read_is_said(tmp_path: Path, toy: Path, photos: Path, capsys, monkeypatch):
    def refused(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(shutil, "copyfile", refused)
    assert main(["prepare", "--photos", str(photos), "--class=dog", f"--base={toy}", f"--storage={tmp_path}"]) == 2
    assert f"base.model: {toy}" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "is full"), (errno.EFBIG, "does not take a file of this size")])
def test_a_disk_that_takes_no_more_is_said_and_keeps_what_was_complete(number: int, told: str, tmp_path: Path, toy: Path, photos: Path, capsys, monkeypatch):
    from raybooth import workspace

    storage = tmp_path / "storage"
    arguments = ["--photos", str(photos), "--class=dog", f"--base={toy}", f"--storage={storage}"]
    assert main(["prepare", *arguments]) == 0
    before = snapshot(storage / "instance-images")

    def full(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(workspace, "write_atomically", full)
    monkeypatch.setattr(workspace.Workspace, "__init__", _without_probe(workspace.Workspace.__init__, monkeypatch))
    assert main(["prepare", *arguments, "--set", "base.resolution=48"]) == 2
    assert told in capsys.readouterr().err
    assert snapshot(storage / "instance-images") == before


def _without_probe(init, monkeypatch):
    """The storage's own probe would meet the full disk first."""
    from raybooth import workspace

    def quiet(self, storage):
        full = workspace.write_atomically
        monkeypatch.setattr(workspace, "write_atomically", lambda path, data: path.write_bytes(data))
        try:
            init(self, storage)
        finally:
            monkeypatch.setattr(workspace, "write_atomically", full)

    return quiet
