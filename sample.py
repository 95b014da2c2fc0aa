"""Lets a trained model write: options → checkpoint → prompt → text.

    python sample.py                                       the newest run, its best checkpoint, a new document
    python sample.py --run=runs/notes --prompt="Once"      a run goes on with your words
    python sample.py --prompt_file=- < letter.txt          … or with a file's
    python sample.py --prompts=many.jsonl --output=jsonl   many prompts in, JSON lines out
    python sample.py --interactive                         write together, line by line
    python sample.py --inspect=out.html --prompt="Once"    a page that shows how the model reads the prompt
    python sample.py --serve                               a page to try prompts, and OpenAI's API, on this machine
    python sample.py --help                                every option

Reading order: main, then print_samples. The text goes to standard output as it comes, all else to standard error.
"""

from __future__ import annotations

import io
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import config
from checkpoint import STATE, resolve_model_folder
from common.hardware import HardwareOptions, choose_attention_path, choose_hardware
from common.option import unescape
from common.options import RunOptions
from common.run_directory import newest_run
from common.tokenizer import Tokenizer
from errors import UserError, run_script
from files import read_json
from generation.interactive import interact
from generation.options import SampleScriptOptions, SamplingOptions
from generation.prompts import Prompt, encode_prompts, ends_in_a_lone_space, print_jsonl, print_texts, read_prompts
from generation.quantize import quantize
from generation.text import load_model, stream_texts
from inspection.page import look_inside, write_page
from model import GPT
from server.options import ServerOptions


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = config.load("sample.py", argv)
    script, run, server = (
        options.section(SampleScriptOptions),
        options.section(RunOptions),
        options.section(ServerOptions),
    )
    sampling = sampling_options(options)
    if server.serve and (
        script.interactive or script.inspect is not None or script.prompts is not None or script.output != "text"
    ):
        raise UserError(
            "--serve takes its prompts over the network: leave --interactive, --inspect, --prompts and --output out"
        )
    for note in options.notes:
        print(note, file=sys.stderr)

    # ---- checkpoint
    path = Path(run.run) if run.run is not None else newest_run(Path("runs"))
    folder = resolve_model_folder(path, script.checkpoint)
    prompts = read_prompts(script)
    hardware = choose_hardware(options.section(HardwareOptions), generating=True)
    model, tokenizer = load_model(folder, hardware.device, hardware.dtype)
    model.attention = choose_attention_path(
        options.section(HardwareOptions).attention, hardware, model.config.head_size
    ).value
    if script.quantize is not None:
        quantize(model)
    print(f"{describe(path, folder, script.checkpoint)}; {hardware.describe()}", file=sys.stderr)

    # ---- text, in one of four ways
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # a Windows console may use another encoding
    if server.serve:
        from server.app import serve  # the packages that it needs are not needed otherwise

        seed = run.seed if options.origin["seed"] == "flag" else None
        start = {"prompt": prompts[0].text, "n": script.num_samples, "seed": seed}
        return serve(model, tokenizer, name_of(folder), sampling, server, start)
    if script.interactive:
        return interact(model, tokenizer, prompts[0].text, lambda flags: changed(argv, flags))
    if script.inspect is not None:
        return inspect(
            model, tokenizer, prompts, sampling, Path(script.inspect), describe(path, folder, script.checkpoint)
        )
    return print_samples(model, tokenizer, prompts, sampling, script, run.seed)


def print_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    sampling: SamplingOptions,
    script: SampleScriptOptions,
    seed: int,
) -> int:
    n = script.num_samples
    ids = [row for row in encode_prompts(tokenizer, prompts, sampling.prepend_eos) for _ in range(n)]
    if any(ends_in_a_lone_space(tokenizer, prompt.text) for prompt in prompts):
        print(
            "note: words of this model begin with their space; it goes on better where the prompt does not end in one",
            file=sys.stderr,
        )
    started = time.perf_counter()
    try:
        pieces = stream_texts(model, tokenizer, ids, sampling, seed, draws=[*range(n)] * len(prompts))
        if script.output == "jsonl":
            tokens = print_jsonl(pieces, prompts, n, tokenizer, logprobs=sampling.logprobs is not None)
        else:
            tokens = print_texts(pieces, [prompt.text for prompt in prompts for _ in range(n)])
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0
    seconds = time.perf_counter() - started
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def inspect(
    model: GPT, tokenizer: Tokenizer, prompts: list[Prompt], sampling: SamplingOptions, path: Path, title: str
) -> int:
    [ids] = encode_prompts(tokenizer, prompts, sampling.prepend_eos)
    data = look_inside(model, tokenizer, ids, sampling)
    write_page(path, data, title)
    if data["left_out"]:
        print(f"the prompt is too long to be shown whole: {data['left_out']}", file=sys.stderr)
    print(f"wrote {path} (open it in a browser)")
    return 0


def sampling_options(options: config.Options) -> SamplingOptions:
    """How tokens are drawn, with the stop strings' escapes read."""
    sampling = options.section(SamplingOptions)
    return replace(sampling, stop=tuple(map(unescape, sampling.stop)))


def changed(argv: list[str], flags: list[str]) -> tuple[SamplingOptions, int]:
    """Sampling options and seed of the command line with these flags added. Raises UserError."""
    options = config.load("sample.py", [*argv, *flags])
    return sampling_options(options), options.section(RunOptions).seed


def name_of(folder: Path) -> str:
    """The run that a model folder belongs to, or else the folder's own name."""
    folder = folder.resolve()
    return folder.parents[2].name if folder.parent.parent.name == "checkpoints" else folder.name


def describe(path: Path, folder: Path, which: str) -> str:
    """The checkpoint in a few words: where it lies, its step, and `which` it is where `path` is a run."""
    if folder.name != "model" or not (folder.parent / STATE).is_file():
        return f"model folder {folder}"
    state = read_json(folder.parent / STATE)
    step, loss = state.get("step"), state.get("val_loss")
    facts = [f"step {step}", *([which] if path not in (folder, folder.parent) else [])]
    facts.append(f"val loss {loss:.4f}" if isinstance(loss, float) else "no val loss")
    return f"{folder.parent} ({', '.join(facts)})"


if __name__ == "__main__":
    run_script(main)
