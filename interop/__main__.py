"""python -m interop import|export: models of other programs in, ours out. `--help` of each says how."""

from errors import UserError, quote, run_script, start_script

if __name__ == "__main__":
    start_script()  # before the imports that take time

import argparse
import os
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
    add_export(commands)
    return parser


def add_export(commands: "argparse._SubParsersAction[Parser]") -> None:
    exporting = commands.add_parser(
        "export", allow_abbrev=False, help="a run → a folder for other programs, or one whole model folder",
        description="Writes a folder that transformers opens (--to=hf; so do vLLM, the hub and lm_eval), or a GGUF file"
        " for llama.cpp and Ollama (--to=gguf). Before it is done, the written model is compared with ours: logits,"
        " greedy ids and the tokenizer, in transformers or llama.cpp where they are installed. --to=model: a model"
        " folder of ours, which can be copied anywhere, also from a run of adapters or of several processes.",
    )  # fmt: skip
    exporting.add_argument("run", metavar="RUN", help="a run, a checkpoint or a model folder")
    exporting.add_argument("--to", required=True, choices=("hf", "gguf", "model"), help="the format")
    exporting.add_argument("--out", metavar="DIR", help="the new folder; default: exports/NAME-FORMAT")
    exporting.add_argument(
        "--dtype", metavar="DTYPE",
        help="of the weights; hf: float32, bfloat16, float16 (default: as stored); gguf: f32, f16, q8_0 (default: f32)",
    )  # fmt: skip
    exporting.add_argument("--checkpoint", default="best", help="of a run: best (default), latest or step-N")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(sys.argv[1:] if argv is None else argv)
    return run_export(arguments) if arguments.command == "export" else run_import(arguments)


def run_import(arguments: argparse.Namespace) -> int:
    from interop.importing import describe, import_model
    from interop.sources import open_source

    given = arguments.source
    if arguments.download:
        from interop.hub import fetch

        path = fetch(given, arguments.pt)
    else:
        path = expanded("PATH", given)
    out = expanded("--out", arguments.out) if arguments.out else Path("models", name_for(given))
    try:
        if os.path.lexists(out):
            raise UserError(f"{out} exists; remove it, or give another folder with --out=DIR")
        source = open_source(path, pickle=arguments.pt, tokenizer=arguments.tokenizer, eos=arguments.eos)
        for note in source.notes:
            print(f"note: {note}")
        config = import_model(source, out, arguments.block_size)
    except OSError as error:  # no permission, too long a name, a disk that fails
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    shown = quote(str(out))
    print(f"{source.kind}: {describe(config)}")
    print(f'wrote {out}; next:\n  python sample.py --run={shown} --prompt="Once upon a time"')
    print(f"  python train.py finetune --init_from={shown} --data=my_novel.txt --budget_minutes=30")
    return 0


def expanded(what: str, text: str) -> Path:
    """A path as typed, ~ replaced. Raises UserError."""
    from common.option import expand_home, show

    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise UserError(f"{what}={show(text)}: {error}") from None


def run_export(arguments: argparse.Namespace) -> int:
    from checkpoint import with_checkpoint
    from interop.exporting import export_model, export_model_folder, plain_name

    run, out = expanded("RUN", arguments.run), None if arguments.out is None else expanded("--out", arguments.out)

    def export(folder: Path) -> tuple[Path, list[str]]:
        if arguments.to == "model":
            return export_model_folder(folder, out, arguments.dtype, "best")
        return export_model(folder, arguments.to, out, arguments.dtype, "best")

    path, proved = with_checkpoint(run, arguments.checkpoint, export)
    for line in proved:
        print(line)
    shown, name = quote(str(path)), plain_name(path.name)
    print(f"wrote {path}; next:")
    if arguments.to == "hf":
        code = f"from transformers import pipeline; print(pipeline('text-generation', {str(path)!r})('Once'))"
        print(f'  python -c "{code}"')
        print(f"  hf upload YOUR_NAME/{name} {shown}   (first fill in the license in its README.md)")
    elif arguments.to == "model":
        print(f'  python sample.py --run={shown} --prompt="Once upon a time"')
    else:
        print(f"  ollama create {name.lower()} -f {quote(str(path / 'Modelfile'))}")
    return 0


def name_for(source: str) -> str:
    """The name of a model folder: that of the file or folder without extension."""
    path = Path(source.rstrip("/\\") or source)
    name = path.resolve().name if path.name in ("", "..") else path.name
    return path.stem if path.suffix in (".gguf", ".pt", ".bin", ".pth") else name


if __name__ == "__main__":
    run_script(main)
