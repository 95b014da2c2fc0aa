"""python -m interop import|export: models of other programs in, ours out. `--help` of each says how."""

from errors import UserError, quote, run_script, start_script

if __name__ == "__main__":
    start_script()  # before the imports that take time

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists what there is")


def make_parser() -> Parser:
    parser = Parser(prog="python -m interop", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    importing = commands.add_parser(
        "import", allow_abbrev=False, help="a model of another program → a model folder",
        description="Makes a model folder of a transformers folder (GPT-2, Llama, Mistral, Qwen2, Qwen3, Arcee,"
        " GPT-NeoX, OPT), a GGUF file, nanoGPT's ckpt.pt or llm.c's .bin. sample.py --run=, train.py --init_from= and"
        " everything else take it.",
    )  # fmt: skip
    importing.add_argument("source", metavar="PATH", help="folder or file; with --download a name of the hub: gpt2")
    importing.add_argument("--out", metavar="DIR", help="the new model folder; default: models/NAME")
    importing.add_argument(
        "--download", action="store_true", help="PATH is a model of the Hugging Face hub: fetch it first"
    )
    importing.add_argument("--pt", action="store_true", help="allow pickle files (.pt, pytorch_model.bin), restricted")
    importing.add_argument("--tokenizer", metavar="NAME", help="for files that have none: gpt2, or a tokenizer's file")
    importing.add_argument("--eos", metavar="TOKEN", help="the end-of-sequence token, in place of the model's own")
    importing.add_argument("--block_size", type=int, metavar="N", help="a shorter context than the model's own")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(sys.argv[1:] if argv is None else argv)
    return run_import(arguments)


def run_import(arguments: argparse.Namespace) -> int:
    from interop.importing import describe, import_model
    from interop.sources import open_source

    given = arguments.source
    if arguments.download:
        from interop.hub import fetch

        path = fetch(given, arguments.pt)
    else:
        path = Path(given).expanduser()
    out = Path(arguments.out or f"models/{name_for(given)}")
    if out.exists():
        raise UserError(f"{out} exists; remove it, or give another folder with --out=DIR")
    source = open_source(path, pickle=arguments.pt, tokenizer=arguments.tokenizer, eos=arguments.eos)
    for note in source.notes:
        print(f"note: {note}")
    config = import_model(source, out, arguments.block_size)
    shown = quote(str(out))
    print(f"{source.kind}: {describe(config)}")
    print(f'wrote {out}; next:\n  python sample.py --run={shown} --prompt="Once upon a time"')
    print(f"  python train.py finetune --init_from={shown} --data=my_novel.txt --budget_minutes=30")
    return 0


def name_for(source: str) -> str:
    """The name of a model folder: that of the file or folder without extension."""
    path = Path(source.rstrip("/\\")).expanduser()
    name = path.resolve().name if not path.name else path.name
    return path.stem if path.suffix in (".gguf", ".pt", ".bin", ".pth") else name


if __name__ == "__main__":
    run_script(main)
