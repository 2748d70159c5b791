"""`python -m raybooth.mini`: where mini lies, and how it is made."""

import argparse
from pathlib import Path

from raybooth.mini import FOLDER

PARTS = ("tokenizer", "vae", "clip", "vit", "unet")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m raybooth.mini", description="mini, the embedded base model of raybooth")
    parser.add_argument("--path", action="store_true", help="print the folder of the shipped model")
    parser.add_argument("--train", type=Path, metavar="WORK", help="train mini from scratch in this folder; the same command goes on after a stop")
    parser.add_argument("--export", type=Path, metavar="WORK", help="write what was trained there to the folder that ships")
    parser.add_argument("--from-shipped", action="store_true", help="train the parts further from the shipped weights")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to train (default: all)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    args = parser.parse_args()
    if args.path:
        print(FOLDER)
    elif args.export:
        from raybooth.mini.export import export

        export(args.export, FOLDER)
    elif args.train:
        train(args.train, args.parts, args.threads, args.from_shipped)
    else:
        parser.print_help()


def train(work: Path, parts: tuple[str, ...], threads: int | None, from_shipped: bool) -> None:
    import torch

    from raybooth.mini import pretrain

    if threads:
        torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    if from_shipped:
        pretrain.start_from(FOLDER, work, parts)
    tokenizer = pretrain.train_tokenizer(work)
    if "vae" in parts:
        pretrain.train_vae(work)
    if "clip" in parts:
        pretrain.train_clip(work, tokenizer)
    if "vit" in parts:
        pretrain.train_vit(work)
    if "unet" in parts:
        pretrain.train_unet(work, tokenizer, pretrain.train_vae(work), pretrain.train_clip(work, tokenizer))


main()
