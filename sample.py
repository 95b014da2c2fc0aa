"""Lets a trained model write: options → checkpoint → prompt → text.

    python sample.py                                       the newest run, its best checkpoint, a new document
    python sample.py --run=runs/notes --prompt="Once"      a run goes on with your words
    python sample.py --prompt_file=- < letter.txt          … or with a file's
    python sample.py --help                                every option

The text goes to standard output as it comes, all else to standard error.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import config
from checkpoint import STATE, resolve_model_folder
from errors import UserError, run_script
from files import read_json
from generation.options import SampleScriptOptions, SamplingOptions
from generation.text import Piece, load_model, stream_texts
from training.hardware import HardwareOptions, choose_attention_path, choose_hardware
from training.options import RunOptions
from training.run_directory import newest_run


def main(argv: list[str] | None = None) -> int:
    options = config.load("sample.py", sys.argv[1:] if argv is None else argv)
    script, sampling, run = options.section(SampleScriptOptions), options.section(SamplingOptions), options.section(RunOptions)
    for note in options.notes:
        print(note, file=sys.stderr)

    # ---- checkpoint
    path = Path(run.run) if run.run is not None else newest_run(Path("runs"))
    folder = resolve_model_folder(path, script.checkpoint)
    prompt = read_prompt(script)
    hardware = choose_hardware(options.section(HardwareOptions), generating=True)
    model, tokenizer = load_model(folder, hardware.device)
    model.attention = choose_attention_path(options.section(HardwareOptions).attention, hardware, model.config.head_size).value
    print(f"{describe(path, folder, script.checkpoint)}; {hardware.describe()}", file=sys.stderr)

    # ---- text
    started = time.perf_counter()
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # a Windows console may use another encoding
        with hardware.autocast():
            pieces = stream_texts(model, tokenizer, prompt, sampling, num_samples=script.num_samples, seed=run.seed)
            tokens = print_texts(pieces, prompt, script.num_samples)
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0
    seconds = time.perf_counter() - started
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def describe(path: Path, folder: Path, which: str) -> str:
    """The checkpoint in a few words: where it lies, its step, and `which` it is where `path` is a run."""
    if folder.name != "model" or not (folder.parent / STATE).is_file():
        return f"model folder {folder}"
    state = read_json(folder.parent / STATE)
    step, loss = state.get("step"), state.get("val_loss")
    facts = [f"step {step}", *([which] if path not in (folder, folder.parent) else [])]
    facts.append(f"val loss {loss:.4f}" if isinstance(loss, float) else "no val loss")
    return f"{folder.parent} ({', '.join(facts)})"


def read_prompt(script: SampleScriptOptions) -> str:
    """The prompt of --prompt or --prompt_file; "" is a new document. Raises UserError."""
    if script.prompt_file is None:
        return script.prompt or ""
    try:
        data = sys.stdin.buffer.read() if script.prompt_file == "-" else Path(script.prompt_file).read_bytes()
        return data.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise UserError(
            f"--prompt_file={script.prompt_file} cannot be read: {error.strerror}; give a text file, or - for standard input"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt_file={script.prompt_file} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; "
            "convert it first, for example: iconv -f GB18030 -t UTF-8"
        ) from None


def print_texts(pieces: Iterable[Piece], prompt: str, num_samples: int) -> int:
    """Prints the samples in their order, the first one that has not ended live, later ones when their turn comes → tokens in all."""
    shown = 0
    waiting = [prompt] * num_samples  # text not yet printed
    tokens, reasons = [0] * num_samples, [""] * num_samples
    for sample, text, reason in pieces:
        waiting[sample] += text
        tokens[sample] += reason is None
        reasons[sample] = reason or ""
        while shown < num_samples:
            print(waiting[shown], end="", flush=True)
            waiting[shown] = ""
            if not reasons[shown]:
                break
            print(flush=True)
            print(f"sample {shown + 1}: {reasons[shown]}, {tokens[shown]} tokens", file=sys.stderr, flush=True)
            if shown + 1 < num_samples:
                print("---", flush=True)
            shown += 1
    return sum(tokens)


if __name__ == "__main__":
    run_script(main)
