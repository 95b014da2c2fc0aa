"""Samples text from a trained model: options → checkpoint → prompts → text.

    python sample.py                                       the newest run's best checkpoint starts a new document
    python sample.py --run=runs/notes --prompt="Once"      continues your text
    python sample.py --prompt_file=- < letter.txt          … or a file's
    python sample.py --prompts=many.jsonl --output=jsonl   many prompts in, JSON Lines out
    python sample.py --novelty                             marks what is copied from the training text
    python sample.py --interactive                         an interactive session, line by line
    python sample.py --inspect=out.html --prompt="Once"    a page of the prompt's attention maps and probabilities
    python sample.py --score=letters/                      bits per byte of texts, instead of samples
    python sample.py --serve                               a page to try prompts, and OpenAI's API, on this machine
    python sample.py --help                                every option

Reading order: main, then print_samples, the default of its five modes. The text goes to standard output while it is
generated, everything else to standard error.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.tracebacklimit = 0  # so that Ctrl-C is one line, until start_script

from errors import UserError, quote, run_script, start_script

if __name__ == "__main__":  # before the imports that take seconds
    start_script(prints_result=True)

import config

if __name__ == "__main__":  # the same
    config.check_command_line("sample.py")

import io
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint import with_checkpoint
from common.hardware import Hardware, choose_attention, choose_hardware
from common.options import HardwareOptions, RunOptions
from common.run_directory import newest_run
from common.tokenizer import Tokenizer
from generation.novelty import log, open_for_page, open_novelty, print_checked_jsonl, print_checked_texts, summary
from generation.options import SampleScriptOptions, SamplingOptions
from generation.prompts import Prompt, encode_prompts, has_trailing_space, print_jsonl, print_texts, read_prompts
from generation.quantize import quantize
from generation.text import load_model, stream_texts
from model import GPT
from model_folder import STATE
from prepare_data import TextOptions
from prepare_data.novelty import Copied, Novelty
from server.options import ServerOptions
from state_file import read_state


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code. Raises UserError."""
    argv = sys.argv[1:] if argv is None else argv
    options = config.load("sample.py", argv)
    script, server = options.section(SampleScriptOptions), options.section(ServerOptions)
    sampling, seed = read_sampling(options)
    other_mode = script.interactive or script.inspect is not None or script.prompts is not None
    if server.serve and (other_mode or script.output != "text"):
        raise UserError(
            "--serve gets its prompts over the network: remove --interactive, --inspect, --prompts and --output"
        )
    for note in options.notes:
        print(note, file=sys.stderr)

    # ---- checkpoint, prompts, model
    run_options = options.section(RunOptions)
    path = Path(run_options.run) if run_options.run is not None else newest_run(Path("runs"))
    prompts = read_prompts(script)
    text = run_options.data if options.origin["data"] == "flag" else None
    load = partial(load_run, script=script, options=options.section(HardwareOptions), text=text, serves=server.serve)
    run = with_checkpoint(path, script.checkpoint, load)
    model, tokenizer, hardware = run.model, run.tokenizer, run.hardware
    title = describe_checkpoint(path, run.folder, run.state, script.checkpoint)
    print(f"{title}; {hardware.describe()}", file=sys.stderr)
    draws = not (server.serve or script.interactive or script.score)
    if draws and prompts == [Prompt("")] and (advice := prompt_note(run.state)):
        print(advice, file=sys.stderr)

    # ---- one of five modes; each imports its own modules
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # Windows writes files in another encoding
    if script.score:
        from generation.score import print_scores

        reading = options.section(TextOptions)
        return print_scores(model, tokenizer, script, reading, hardware.autocast, run.state)
    if server.serve:
        from server.app import serve

        page_seed = seed if options.origin["seed"] == "flag" else None  # None: a new one for each request
        page_defaults = {"prompt": prompts[0].text, "n": script.num_samples, "seed": page_seed}
        return serve(model, tokenizer, run_name(run.folder), sampling, server, page_defaults, run.novelty)
    assert not isinstance(run.novelty, str)  # which a page alone shows
    if script.interactive:
        from generation.interactive import interact

        return interact(model, tokenizer, prompts[0].text, partial(sampling_with, argv), run.novelty)
    if script.inspect is not None:
        from inspection.page import inspect_prompt, write_page

        [ids] = encode_prompts(tokenizer, prompts, sampling.prepend_eos)
        data = inspect_prompt(model, tokenizer, ids, sampling)
        write_page(Path(script.inspect), data, title)
        if data["omitted"]:
            print(f"the prompt is too long to be shown in full: {data['omitted']}", file=sys.stderr)
        print(f"wrote {script.inspect} (open it in a browser)")
        return 0
    return print_samples(model, tokenizer, prompts, sampling, script, seed, run.novelty)


class Loaded(NamedTuple):
    """What is read of a checkpoint. state: its state.json, {} of a model folder elsewhere. novelty: as in
    open_for_page."""

    folder: Path
    state: Mapping[str, Any]
    model: GPT
    tokenizer: Tokenizer
    hardware: Hardware
    novelty: Novelty | str | None


def load_run(
    folder: Path, script: SampleScriptOptions, options: HardwareOptions, text: str | None, serves: bool
) -> Loaded:
    """The model, ready to generate, or to score as training evaluates: float32 weights under autocast. text: the one
    that --novelty compares with, where that was given."""
    as_trained = bool(script.score) and script.quantize is None
    hardware = choose_hardware(options, generating=not as_trained)
    model, tokenizer = load_model(folder, hardware.device, torch.float32 if as_trained else hardware.dtype)
    head_size = model.config.head_size
    model.attention = choose_attention(options.attention, hardware.device, hardware.dtype, head_size).value
    if script.quantize is not None:
        quantize(model)
    state: Mapping[str, Any] = read_state(folder.parent / STATE) if (folder.parent / STATE).is_file() else {}
    novelty = (open_for_page if serves else open_novelty)(folder, state, text, script)
    return Loaded(folder, state, model, tokenizer, hardware, novelty)


def print_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    sampling: SamplingOptions,
    script: SampleScriptOptions,
    seed: int,
    novelty: Novelty | None,
) -> int:
    """Prints num_samples samples of each prompt and returns the exit code."""
    n = script.num_samples
    ids = [row for row in encode_prompts(tokenizer, prompts, sampling.prepend_eos) for _ in range(n)]
    if any(has_trailing_space(tokenizer, prompt.text) for prompt in prompts):
        print(
            "note: this model's tokens include the space before a word; remove the prompt's trailing space for "
            "better samples",
            file=sys.stderr,
        )
    if unknown := set[str]().union(*(tokenizer.unknown(prompt.text) for prompt in prompts)):
        shown = " ".join(map(repr, sorted(unknown)[:8]))
        print(f"note: the tokenizer does not know {shown}; the model reads the prompt without it", file=sys.stderr)
    started = time.perf_counter()
    pieces = stream_texts(model, tokenizer, ids, sampling, seed, draws=[*range(n)] * len(prompts))
    texts, found = [prompt.text for prompt in prompts for _ in range(n)], list[Copied]()
    logprobs = sampling.logprobs is not None
    if novelty and script.output == "jsonl":
        tokens, found = print_checked_jsonl(pieces, prompts, n, tokenizer, novelty, logprobs=logprobs)
    elif novelty:
        tokens, found = print_checked_texts(pieces, texts, novelty, sampling.max_new_tokens)
    elif script.output == "jsonl":
        tokens = print_jsonl(pieces, prompts, n, tokenizer, logprobs=logprobs)
    else:
        tokens = print_texts(pieces, texts)
    seconds = time.perf_counter() - started
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    if novelty:
        log(*summary(found, novelty))
    return 0


def read_sampling(options: config.Options) -> tuple[SamplingOptions, int]:
    """Sampling options, and the seed."""
    return options.section(SamplingOptions), options.section(RunOptions).seed


def sampling_with(argv: list[str], flags: list[str]) -> tuple[SamplingOptions, int]:
    """The same of a command line to which flags are added."""
    return read_sampling(config.load("sample.py", [*argv, *flags]))


def prompt_note(state: Mapping[str, Any]) -> str | None:
    """One line where the model has seen few document beginnings, so that a new document begins in mid-sentence."""
    prompt = state.get("dataset", {}).get("example_prompt")
    if prompt is None:
        return None
    example = quote(prompt)
    return f"note: this model has seen few document beginnings, so a prompt reads better: --prompt={example}"


def run_name(model_folder: Path) -> str:
    """The name of the run that a model folder belongs to, else that of the folder."""
    folder = model_folder.resolve()
    return folder.parents[2].name if folder.parent.parent.name == "checkpoints" else folder.name


def describe_checkpoint(path: Path, folder: Path, state: Mapping[str, Any], which: str) -> str:
    """One line: the checkpoint's path, step and val loss, and whether it is the best or the latest one of a run."""
    if folder.name != "model" or not state:
        return f"model folder {folder}"
    step, loss = state["step"], state.get("val_loss")
    facts = [f"step {step}"]
    is_inside = folder.parent.resolve() in (path.resolve(), *path.resolve().parents)
    if which in ("best", "latest") and not is_inside:
        facts.append("latest" if loss is None else which)
    untrained = "untrained" if step == 0 else "no val loss"
    facts.append(untrained if loss is None else f"val loss {loss:.4f}")
    return f"{folder.parent} ({', '.join(facts)})"


if __name__ == "__main__":
    run_script(main)
