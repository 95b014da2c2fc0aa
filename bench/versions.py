"""Compares two checkouts of Sprout by their commands: are the bits the same, and which one is faster?

    git worktree add /tmp/before COMMIT
    python bench/versions.py --before=/tmp/before                    this checkout against that one, all parts
    python bench/versions.py --before=/tmp/before --parts=bits --cases=debug,vaswani2017

Both checkouts run as processes with this Python, on the same text. The bench knows only train.py, sample.py and the
files of a run, and passes only options that both versions have.

bits: short runs on one CPU thread. Compares the tensors of the last checkpoint byte for byte, metrics.jsonl line by
line without `timing`, samples.txt byte for byte, and what both versions of sample.py print from the older version's
checkpoint. In some cases both versions also resume the older version's run. Prints one line a case; the exit code is 1
if any case differs.

train, decode: tokens/s on a CPU. The sides take turns in processes of their own, in alternating order; reported are the
medians of the rounds and the ratio after/before. Training is measured from the first logged step to the last, without
start-up and evaluation; decoding as sample.py reports it. The 124m model has random weights. It has GPT-2's vocabulary
where TIKTOKEN_CACHE_DIR is set, else one of bytes, and then lacks most of GPT-2's output head.

Reading order: main, compare_bits, first_difference, then compare_training and compare_decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from bench.hardware import Stopwatch, commit_of, hardware, write_results  # noqa: E402
from bench.peer import rotated  # noqa: E402
from errors import UserError, run_script  # noqa: E402

PARTS = ("bits", "train", "decode")
TEXT_BYTES = 400_000  # of the standard library, where no --text is given
TENSORS = ("model/model.safetensors", "optimizer.safetensors")  # of a checkpoint


class Side(NamedTuple):
    name: str  # before or after
    checkout: Path
    folder: Path  # where its commands run, with runs/ and data/


class Case(NamedTuple):
    preset: str
    context: int  # block_size
    flags: str = ""
    resumes: bool = False


NARROW = (
    "--dtype=float32 --n_layer=2 --n_head=4 --n_embd=64 --tokens_per_step=512 --micro_batch_size=4 --warmup_steps=2"
)
BYTES = f"{NARROW} --tokenizer=bytes"
DOCUMENTS = r"--separator=\n\n --document_mask=true"
SMALL_BPE = "--n_layer=2 --vocab_size=512 --warmup_steps=2"
CASES = {
    "debug": Case("debug", 32, resumes=True),
    "quickstart float32": Case("quickstart", 256, f"{SMALL_BPE} --dtype=float32"),
    "quickstart bfloat16": Case("quickstart", 256, f"{SMALL_BPE} --dtype=bfloat16"),
    "shakespeare_char_cpu, dropout": Case("shakespeare_char_cpu", 64, "--dropout=0.1 --dtype=float32"),
    "speedrun_char_cpu": Case("speedrun_char_cpu", 128, "--micro_batch_size=2 --dtype=float32", resumes=True),
    "vaswani2017": Case("vaswani2017", 64, f"{NARROW} --n_hidden=128 --vocab_size=512"),
    "gpt2_124m": Case("gpt2_124m", 64, BYTES),
    "gpt2_124m, sliding_window": Case("gpt2_124m", 64, f"{BYTES} --sliding_window=24"),
    "modern_124m, n_kv_head": Case("modern_124m", 64, f"{BYTES} --n_hidden=128 --n_kv_head=2"),
    "modern_124m, document_mask": Case("modern_124m", 64, f"{BYTES} --n_hidden=128 {DOCUMENTS}"),
    "modern_124m, all three, bfloat16": Case(
        "modern_124m",
        64,
        f"{BYTES} --n_hidden=128 --n_kv_head=2 --sliding_window=24 {DOCUMENTS} --dtype=bfloat16",
    ),
}
SHORT_RUN = ["--threads=1", "--device=cpu", "--max_steps=8", "--log_interval=1", "--eval_interval=3"]
SHORT_RUN += ["--eval_tokens=3000", "--sample_tokens=20", "--final_samples=2"]


class Shape(NamedTuple):
    preset: str
    steps: int
    log_interval: int  # the steps up to the first logged one warm up


TRAINED = {"small": Shape("shakespeare_char_cpu", 300, 50), "quickstart": Shape("quickstart", 60, 10)}
VOCABULARY = "gpt2" if os.environ.get("TIKTOKEN_CACHE_DIR") else "bytes"  # GPT-2's would have to be downloaded
MODELS = {"small": ("shakespeare_char_cpu", ""), "124m": ("gpt2_124m", f"--tokenizer={VOCABULARY}")}  # preset, flags
DECODED = {
    "small, 1 sample": ("small", 1, 3000),
    "small, 16 samples": ("small", 16, 2000),
    "124m, 1 sample": ("124m", 1, 128),
}  # name: (model, samples, tokens of each)
NO_EXTRAS = ["--device=cpu", "--eval_interval=1000000", "--eval_tokens=1000", "--sample_tokens=0", "--final_samples=0"]


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    figures: dict[str, Any] = {
        "bench": "versions",
        "hardware": hardware(),
        "before": commit_of(arguments.before),
        "after": commit_of(ROOT),
    }
    with tempfile.TemporaryDirectory(prefix="sprout-versions-") as folder:
        work = Path(folder)
        text = arguments.text.resolve() if arguments.text else excerpt_of_stdlib(work / "text")
        sides = [Side("before", arguments.before, work / "before"), Side("after", ROOT, work / "after")]
        for side in sides:
            side.folder.mkdir()
        if "bits" in arguments.parts:
            figures["bits"] = compare_bits(sides, text, {name: CASES[name] for name in arguments.cases})
        if "train" in arguments.parts:
            figures["train"] = compare_training(sides, text, arguments.rounds)
        if "decode" in arguments.parts:
            figures["vocabulary_of_124m"] = VOCABULARY
            figures["decode"] = compare_decoding(sides, text, arguments.rounds)
    print(f"written: {write_results('versions', figures, arguments.results)}")
    return int(any(figures.get("bits", {}).values()))


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="another checkout of Sprout")
    parser.add_argument("--parts", default=",".join(PARTS), help="bits, train and decode, separated by commas")
    parser.add_argument("--cases", help="cases of bits whose names begin so, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side, for train and decode")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file (default: some of Python's standard library)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the figures")
    arguments = parser.parse_args(argv)
    arguments.before, arguments.parts = arguments.before.resolve(), arguments.parts.split(",")
    if not all((arguments.before / script).is_file() for script in ("train.py", "sample.py")):
        raise UserError(f"--before={arguments.before}: no train.py and sample.py there; expected a checkout of Sprout")
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        raise UserError(f"--parts: unknown {unknown[0]!r}; expected {', '.join(PARTS)}")
    if arguments.rounds < 1:
        raise UserError("--rounds must be at least 1")
    if arguments.text is not None and not arguments.text.is_file():
        raise UserError(f"--text={arguments.text}: no such file")
    prefixes = tuple((arguments.cases or "").split(","))  # the empty one fits every name
    arguments.cases = [name for name in CASES if name.startswith(prefixes)]
    if not arguments.cases:
        raise UserError(f"--cases: none begins with {' or '.join(prefixes)}; expected some of {', '.join(CASES)}")
    return arguments


def excerpt_of_stdlib(folder: Path) -> Path:
    """A folder with the first files of Python's standard library, TEXT_BYTES together."""
    folder.mkdir()
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if size < TEXT_BYTES:
            shutil.copyfile(path, folder / path.name)
            size += path.stat().st_size
    if not size:
        raise UserError("this Python has no sources of its standard library; give a text: --text=FILE")
    return folder


def run_command(side: Side, script: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Runs `python CHECKOUT/SCRIPT …` in the side's folder. Raises UserError on any exit code but 0."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONUTF8": "1"}
    command = [sys.executable, str(side.checkout / script), *arguments]
    done = subprocess.run(command, cwd=side.folder, env=environment, capture_output=True)
    if done.returncode:
        last = (done.stderr or done.stdout).decode("utf-8", errors="replace")[-1000:]
        shown = " ".join([script, *arguments])
        raise UserError(f"{side.name}: {shown}: exit code {done.returncode}. Its last lines:\n{last}")
    return done


# ---- Bits ------------------------------------------------------------------------------------------------------------


def compare_bits(sides: Sequence[Side], text: Path, cases: dict[str, Case]) -> dict[str, str | None]:
    """By case the first difference, None where there is none."""
    prompts = write_prompts(text, sides[0].folder.parent / "prompts.jsonl")
    outcome: dict[str, str | None] = {}
    with ThreadPoolExecutor(len(sides)) as both:  # each command has one thread
        for number, (name, case) in enumerate(cases.items()):
            try:
                outcome[name] = compare_case(sides, case, number, text, prompts, both)
            except UserError as error:
                outcome[name] = str(error)
            print(f"{name:34} {outcome[name] or 'equal'}", flush=True)
    return outcome


def write_prompts(text: Path, path: Path) -> Path:
    """Two prompts of different lengths from the beginning of the text, in JSON lines."""
    first = text if text.is_file() else min(text.iterdir())
    start = first.read_text(encoding="utf-8-sig")
    path.write_text("".join(f"{json.dumps(start[:length])}\n" for length in (5, 30)), encoding="utf-8")
    return path


def compare_case(
    sides: Sequence[Side], case: Case, number: int, text: Path, prompts: Path, both: ThreadPoolExecutor
) -> str | None:
    """Trains, resumes and samples on both sides → the first difference."""

    def on_both(*arguments: str) -> list[bytes]:
        return [done.stdout for done in both.map(lambda side: run_command(side, *arguments), sides)]

    runs = [side.folder / "runs" / str(number) for side in sides]
    options = [f"--block_size={case.context}", *case.flags.split(), f"--data={text}", *SHORT_RUN]
    on_both("train.py", case.preset, *options, f"--run=runs/{number}")
    if difference := first_difference(*runs):
        return difference
    if case.resumes:
        resumed = [side.folder / "runs" / f"{number}-resumed" for side in sides]
        for copy in resumed:
            shutil.copytree(runs[0], copy)
        on_both("train.py", f"--resume=runs/{number}-resumed", "--max_steps=12")
        if difference := first_difference(*resumed):
            return f"resumed: {difference}"
    beyond = case.context + 20
    source = [f"--run={runs[0]}", "--checkpoint=latest", "--device=cpu", "--threads=1"]
    for draw in (
        ["--temperature=0", "--max_new_tokens=30"],
        ["--temperature=0.8", "--num_samples=3", f"--max_new_tokens={beyond}", "--stop_at_eos=false"],
        ["--temperature=0", "--max_new_tokens=30", f"--prompts={prompts}"],
    ):
        printed = on_both("sample.py", *source, *draw)
        if difference := text_difference(*printed):
            return f"sample.py {' '.join(draw)}: {difference}"
    return None


def first_difference(before: Path, after: Path) -> str | None:
    """The first difference between two runs: their last checkpoints, metrics.jsonl, samples.txt."""
    checkpoints = [max((run / "checkpoints").glob("step-*")) for run in (before, after)]
    if checkpoints[0].name != checkpoints[1].name:
        return f"last checkpoint: {checkpoints[0].name} before, {checkpoints[1].name} after"
    for name in TENSORS:
        if difference := tensor_difference(*(checkpoint / name for checkpoint in checkpoints)):
            return f"{checkpoints[0].name}/{name}: {difference}"
    logs = [(run / "metrics.jsonl").read_text(encoding="utf-8") for run in (before, after)]
    if difference := metrics_difference(*logs):
        return f"metrics.jsonl: {difference}"
    samples = [(run / "samples.txt").read_bytes() for run in (before, after)]
    if difference := text_difference(*samples):
        return f"samples.txt: {difference}"
    return None


def tensor_difference(before: Path, after: Path) -> str | None:
    """The first difference between two safetensors files, which are equal only byte for byte."""
    if before.read_bytes() == after.read_bytes():
        return None
    old, new = load_file(before), load_file(after)
    if old.keys() != new.keys():
        return f"tensors in one file only: {', '.join(sorted(old.keys() ^ new.keys()))}"
    for name, x in old.items():
        y = new[name]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            return f"{name}: {tuple(x.shape)} {x.dtype} before, {tuple(y.shape)} {y.dtype} after"
        different = (x.reshape(-1, 1).view(torch.uint8) != y.reshape(-1, 1).view(torch.uint8)).any(dim=1)
        if different.any():
            largest = (x.double() - y.double()).abs().max().item()
            return f"{name}: {int(different.sum())} of {x.numel()} numbers differ, by at most {largest:.3g}"
    return "equal tensors, different headers"


def metrics_difference(before: str, after: str) -> str | None:
    """The first field in which two metrics.jsonl differ, `timing` left out."""
    for number, (old, new) in enumerate(zip_longest(before.splitlines(), after.splitlines()), 1):
        if old is None or new is None:
            return f"line {number} is there {'after' if old is None else 'before'} only"
        records = [json.loads(line) for line in (old, new)]
        for record in records:
            record.pop("timing", None)
        for name in dict.fromkeys([*records[0], *records[1]]):
            values = [repr(record[name]) if name in record else "missing" for record in records]
            if values[0] != values[1]:
                return f"line {number}, {name}: {values[0]} before, {values[1]} after"
    return None


def text_difference(before: bytes, after: bytes) -> str | None:
    """The first byte that differs, with the text around it."""
    if before == after:
        return None
    place = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    around = [text[max(0, place - 20) : place + 20].decode("utf-8", errors="replace") for text in (before, after)]
    line = before.count(b"\n", 0, place) + 1
    return f"byte {place} (line {line}): {around[0]!r} before, {around[1]!r} after"


# ---- Speed -----------------------------------------------------------------------------------------------------------


def take_turns(name: str, sides: Sequence[Side], rounds: int, measure: Callable[[Side, int], float]) -> dict[str, Any]:
    """`measure(side, round)` → tokens/s, of each side in every round; prints and returns medians and ratios."""
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    by_name = {side.name: side for side in sides}
    with Stopwatch() as watch:
        for number in range(rounds):
            for side in rotated(list(by_name), number):
                rates[side].append(measure(by_name[side], number))
    summary = compare_rates(rates["before"], rates["after"])
    print(
        f"{name:24} tokens/s: before {summary['before']:,.1f}, after {summary['after']:,.1f};"
        f" ratio {summary['ratio']:.3f} (rounds {summary['lowest']:.3f} … {summary['highest']:.3f}); {watch.measured}",
        flush=True,
    )
    return {**summary, "tokens_per_second": rates, "machine": watch.measured}


def compare_rates(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Medians of both, their ratio after/before, and the lowest and highest ratio within a round."""
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    medians = statistics.median(before), statistics.median(after)
    return {
        "before": medians[0],
        "after": medians[1],
        "ratio": medians[1] / medians[0],
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def compare_training(sides: Sequence[Side], text: Path, rounds: int) -> dict[str, Any]:
    figures = {}
    for name, shape in TRAINED.items():

        def measure(side: Side, number: int, name: str = name, shape: Shape = shape) -> float:
            run = f"runs/train-{name}-{number}"
            length = [f"--max_steps={shape.steps}", f"--log_interval={shape.log_interval}", "--save_interval=1000000"]
            run_command(side, "train.py", shape.preset, f"--data={text}", *NO_EXTRAS, *length, f"--run={run}")
            rate = training_rate((side.folder / run / "metrics.jsonl").read_text(encoding="utf-8"))
            shutil.rmtree(side.folder / run)
            return rate

        figures[name] = take_turns(f"train {name}", sides, rounds, measure)
    return figures


def training_rate(metrics: str) -> float:
    """Tokens/s between the first and the last logged step of a metrics.jsonl, evaluations left out."""
    steps = [event for event in map(json.loads, metrics.splitlines()) if event["event"] == "step"]
    if len(steps) < 2:
        raise UserError(f"metrics.jsonl has {len(steps)} logged steps, expected two or more")
    seconds = steps[-1]["timing"]["train_seconds"] - steps[0]["timing"]["train_seconds"]
    return float((steps[-1]["tokens"] - steps[0]["tokens"]) / seconds)


def compare_decoding(sides: Sequence[Side], text: Path, rounds: int) -> dict[str, Any]:
    """Both sides read the same weights, which the older version writes."""
    runs = {}
    for name, (preset, flags) in MODELS.items():
        runs[name] = sides[0].folder / "runs" / f"decode-{name}"
        source = [preset, *flags.split(), f"--data={text}"]
        run_command(sides[0], "train.py", *source, *NO_EXTRAS, "--max_steps=0", f"--run={runs[name]}")
    figures = {}
    for name, (model, samples, tokens) in DECODED.items():

        def measure(side: Side, number: int, model: str = model, samples: int = samples, tokens: int = tokens) -> float:
            source = [f"--run={runs[model]}", "--checkpoint=latest", "--device=cpu", "--dtype=float32"]
            draw = [f"--num_samples={samples}", f"--max_new_tokens={tokens}", "--stop_at_eos=false"]
            return decode_rate(run_command(side, "sample.py", *source, *draw).stderr.decode("utf-8"))

        figures[name] = take_turns(f"decode {name}", sides, rounds, measure)
    return figures


def decode_rate(stderr: str) -> float:
    """Tokens/s as sample.py reports them. Raises UserError where it reports none."""
    found = re.findall(r"^\d+ tokens in [\d.]+ s: ([\d.]+) tokens/s$", stderr, re.MULTILINE)
    if not found:
        raise UserError(f"sample.py printed no tokens/s on standard error:\n{stderr[-1000:]}")
    return float(found[-1])


if __name__ == "__main__":
    run_script(main)
