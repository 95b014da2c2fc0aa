"""The preset shakespeare_char_cpu beside nanoGPT's documented CPU command, on the same text, in one session.

    python bench/shakespeare_char_cpu.py --peer=PATH_TO_NANOGPT --text=PATH_TO_TINYSHAKESPEARE
                                         [--repeats=3] [--steps=2000] [--dropout=0.2]

Speed: both models in one process, each with its own code for a whole training step (read a batch, forward, backward,
clip, update), in alternating blocks of steps. Our allocator settings therefore hold for both. The peer's learning rate
is constant here, ours follows its schedule.

Runs: each program's own command from start to end, as processes, with its own evaluations. Then both final models are
scored by the same code in float32: every target of the peer's val split once, on a fixed grid of windows; our EOS after
the last character is not a target. Repeat r runs both at seed 1337 + r; the peer's train.py has the seed as a literal,
which is replaced in the temporary copy. --dropout is given to both; the peer also drops attention weights.

Reading order: main, measure_speed, run_programs; then `score` in bench/peer.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import config  # noqa: E402
from bench.hardware import Stopwatch, commit_of, hardware, write_results  # noqa: E402
from bench.peer import (  # noqa: E402
    EVAL_INTERVAL,
    SEED,
    check_same_ids,
    copy_peer,
    extract_function,
    import_model,
    load_ours,
    load_peer,
    our_report,
    peer_command,
    peer_ids,
    peer_report,
    plain_copy,
    prepare_ours,
    reseeded,
    rotated,
    run_process,
    score,
)
from common.hardware import choose_hardware, tune_allocator  # noqa: E402
from common.options import HardwareOptions  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from prepare_data.shards import open_dataset  # noqa: E402
from training.data import TrainBatches  # noqa: E402
from training.micro_batch import choose_micro_batch  # noqa: E402
from training.optim import clip_gradients, learning_rate, make_optimizer, make_plan  # noqa: E402
from training.options import OptimizerOptions, TrainOptions  # noqa: E402

PRESET = "shakespeare_char_cpu"
ROWS, BLOCK_SIZE = 12, 64
PEER_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": BLOCK_SIZE, "bias": False}
PEER = "nanoGPT float32"
TIMED_STEPS = 20  # steps of a block
ROUNDS = 10  # blocks of each side, per repeat

Step = Callable[[], object]


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    own_choice = choose_hardware(HardwareOptions(device="cpu")).dtype_name
    dtypes = arguments.dtype.split(",") if arguments.dtype else sorted({"float32", own_choice}, reverse=True)
    figures: dict[str, Any] = {
        "bench": PRESET,
        "command": f"python bench/{Path(__file__).name} --peer=PATH_TO_NANOGPT --text=PATH_TO_TINYSHAKESPEARE"
        f" --repeats={arguments.repeats} --steps={arguments.steps} --dtype={','.join(dtypes)}"
        f" --dropout={arguments.dropout}",
        "hardware": hardware(),
        "sprout": commit_of(ROOT),
        "peer": commit_of(arguments.peer),
        "text_sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
    }
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as folder:
        work = Path(folder)
        text = plain_copy(arguments.text, work / "input.txt")
        peer, data = copy_peer(arguments.peer, text, work / "peer"), prepare_ours(text, work / "data")
        check_same_ids(peer, data)
        rounds, steps = arguments.repeats * ROUNDS, min(TIMED_STEPS, arguments.steps)
        figures["speed"] = measure_speed(peer, data, dtypes, rounds, steps, arguments.dropout)
        show_speed(figures["speed"])
        figures["runs"] = run_programs(peer, data, work, dtypes, arguments.repeats, arguments.steps, arguments.dropout)
        figures["programs"] = summarise_runs(figures["runs"])
        show_programs(figures["programs"])
    print(f"written: {write_results(PRESET, figures, arguments.results)}")
    return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare, or any other text")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each program; the speed is measured in ten times as many rounds"
    )
    parser.add_argument("--steps", type=int, default=2000, help="steps of a run")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout of both sides; the documented setting is 0")
    parser.add_argument(
        "--dtype", help="our dtypes, separated by commas (default: float32, and what --dtype=auto chooses here)"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the figures")
    arguments = parser.parse_args(argv)
    arguments.peer, arguments.text = arguments.peer.resolve(), arguments.text.resolve()
    if not arguments.text.is_file():
        raise UserError(f"--text={arguments.text}: no such file")
    if not (arguments.peer / "train.py").is_file():
        raise UserError(f"--peer={arguments.peer}: no train.py there; expected a checkout of nanoGPT")
    if min(arguments.repeats, arguments.steps) < 1:
        raise UserError("--repeats and --steps must be at least 1")
    return arguments


# ---- Speed -----------------------------------------------------------------------------------------------------------


def measure_speed(
    peer: Path, data: Path, dtypes: Sequence[str], rounds: int, steps: int, dropout: float
) -> dict[str, Any]:
    """Tokens/s of whole training steps, in `rounds` rounds of one block of `steps` steps a side."""
    tune_allocator()
    with contextlib.redirect_stdout(io.StringIO()):  # both print their size
        sides: dict[str, Step] = {PEER: peer_step(peer, dropout)}
        sides |= {f"Sprout {dtype}": our_step(data, dtype, dropout) for dtype in dtypes}
    for step in sides.values():
        for _ in range(3):
            step()
    print(f"speed: {rounds} rounds of {steps} steps a side", flush=True)
    with Stopwatch() as watch:
        rates = alternate(sides, rounds, steps, ROWS * BLOCK_SIZE)
    return {
        "steps_a_block": steps,
        "machine": watch.measured,
        "tokens_per_second": rates,
        "summary": summarise_speed(rates),
    }


def peer_step(peer: Path, dropout: float) -> Step:
    """One step of the peer's training loop, with its own model, optimizer and batches."""
    module = import_model(peer)
    torch.manual_seed(SEED)
    model = module.GPT(
        module.GPTConfig(**PEER_SHAPE, dropout=dropout, vocab_size=int(peer_ids(peer, "train").max()) + 1)
    )
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.99), device_type="cpu")
    scope = {"os": os, "np": np, "torch": torch, "data_dir": str(peer / "data" / "shakespeare_char")}
    scope |= {"block_size": BLOCK_SIZE, "batch_size": ROWS, "device": "cpu", "device_type": "cpu"}
    draw = extract_function(peer / "train.py", "get_batch", scope)
    model.train()

    def step() -> float:
        _, loss = model(*draw("train"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def our_step(data: Path, dtype: str, dropout: float) -> Step:
    """One step of train.py's loop: learning rate, batch, forward, backward, clipping, update."""
    flags = [f"--data_dir={data}", f"--dtype={dtype}", f"--dropout={dropout}", "--device=cpu"]
    options = config.load("train.py", [PRESET, *flags])
    shape, train, optim = options.section(GPTConfig), options.section(TrainOptions), options.section(OptimizerOptions)
    chosen = choose_hardware(options.section(HardwareOptions))
    dataset = open_dataset(data / "shakespeare")
    tokenizer = dataset.tokenizer
    model = GPT(replace(shape, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id), seed=SEED).train()
    optimizer = make_optimizer(model, optim, chosen.dtype)
    plan = make_plan(train.max_steps, optim)
    size = choose_micro_batch(train.micro_batch_size, train.tokens_per_step, shape, chosen).value
    rows = train.tokens_per_step // shape.block_size
    batches = TrainBatches(dataset.train, shape.block_size, rows, size, SEED, chosen.device, dropout > 0)
    numbers = itertools.count()

    def step() -> float:
        number = next(numbers)
        rate = learning_rate(number, plan, optim)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        micro_batches = batches(number)
        n_targets = sum(batch.n_targets for batch in micro_batches)
        total = 0.0
        for x, y, dropout_seed in micro_batches:
            if dropout_seed is not None:
                torch.manual_seed(dropout_seed)
            with chosen.autocast():
                loss = model(x, y, reduction="sum") / n_targets
            loss.backward()
            total += loss.item()
        clip_gradients(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def alternate(sides: Mapping[str, Step], rounds: int, steps: int, tokens: int) -> dict[str, list[float]]:
    """Tokens/s of each side in every round. The order rotates, so no side always follows the same other one."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in rotated(list(sides), number):
            started = time.perf_counter()
            for _ in range(steps):
                sides[name]()
            rates[name].append(steps * tokens / (time.perf_counter() - started))
    return rates


def summarise_speed(rates: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Per side: median and best tokens/s, their ratios to the peer's, and the median of the ratios of the rounds."""
    theirs = rates[PEER]
    return {
        name: {
            "median": statistics.median(ours),
            "best": max(ours),
            "ratio_of_medians": statistics.median(ours) / statistics.median(theirs),
            "ratio_of_bests": max(ours) / max(theirs),
            "median_of_ratios": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        }
        for name, ours in rates.items()
    }


def show_speed(speed: Mapping[str, Any]) -> None:
    print(
        f"{'whole steps, tokens/s':24}{'median':>10}{'best':>10}"
        "   ratio to nanoGPT: of medians, of bests, median of the rounds"
    )
    for name, row in speed["summary"].items():
        ratios = f"{row['ratio_of_medians']:.2f}  {row['ratio_of_bests']:.2f}  {row['median_of_ratios']:.2f}"
        print(f"{name:24}{row['median']:10,.0f}{row['best']:10,.0f}   {ratios}")
    print(f"machine: {speed['machine']}", flush=True)


# ---- Whole programs --------------------------------------------------------------------------------------------------


def run_programs(
    peer: Path, data: Path, work: Path, dtypes: Sequence[str], repeats: int, steps: int, dropout: float
) -> list[dict[str, Any]]:
    """Runs and scores the peer's command and ours in turn, `repeats` times each."""
    interval = EVAL_INTERVAL if steps % EVAL_INTERVAL == 0 else steps  # the peer saves only where it evaluates
    val = peer_ids(peer, "val")
    script = (peer / "train.py").read_text(encoding="utf-8")
    runs = []
    for repeat in range(repeats):
        for side in rotated([PEER, *(f"Sprout {dtype}" for dtype in dtypes)], repeat):
            seed = SEED + repeat
            if side == PEER:
                (peer / "train.py").write_text(reseeded(script, seed), encoding="utf-8")
                command = peer_command(steps, interval, dropout)
                result = run_process([sys.executable, *command], peer)
                logits, reported = load_peer(peer), peer_report(result["output"])
            else:
                run = work / f"run-{side.split()[1]}-{repeat}"
                command = our_command(steps, interval, seed, side.split()[1], dropout)
                result = run_process([sys.executable, *command, f"--data_dir={data}", f"--run={run}"], ROOT)
                logits, reported = load_ours(run), our_report(run)
            loss = score(logits, val, BLOCK_SIZE)
            record = {
                "side": side,
                "seed": seed,
                "command": " ".join(["python", *command]),
                "val_loss": loss,
                "targets": len(val) - 1,
            }
            runs.append({**record, "reported_val_loss": reported, **result["machine"]})
            print(
                f"{side}, seed {seed}: {loss:.4f} nats a character (it reports {reported:.4f}); {result['machine']}",
                flush=True,
            )
    return runs


def our_command(steps: int, interval: int, seed: int, dtype: str, dropout: float) -> list[str]:
    flags = {
        "device": "cpu",
        "dtype": dtype,
        "seed": seed,
        "max_steps": steps,
        "eval_interval": interval,
        "dropout": dropout,
    }
    return ["train.py", PRESET, *(f"--{name}={value}" for name, value in flags.items())]


def summarise_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Per side: median loss and seconds, best seconds, and all three relative to the peer's."""
    sides = {side: [run for run in runs if run["side"] == side] for side in dict.fromkeys(run["side"] for run in runs)}
    summary = {
        side: {
            "val_loss": statistics.median(run["val_loss"] for run in own),
            "seconds": statistics.median(run["seconds"] for run in own),
            "best_seconds": min(run["seconds"] for run in own),
        }
        for side, own in sides.items()
    }
    theirs = summary[PEER]
    for row in summary.values():
        row["loss_difference"] = row["val_loss"] - theirs["val_loss"]
        row["speed_up"], row["best_speed_up"] = (
            theirs["seconds"] / row["seconds"],
            theirs["best_seconds"] / row["best_seconds"],
        )
    return summary


def show_programs(summary: Mapping[str, Mapping[str, float]]) -> None:
    print(
        f"{'whole programs, medians':24}{'nats/char':>10}{'seconds':>10}{'best':>10}"
        "   relative to nanoGPT: loss, times faster (of bests)"
    )
    for name, row in summary.items():
        figures = f"{row['val_loss']:10.4f}{row['seconds']:10.1f}{row['best_seconds']:10.1f}"
        print(f"{name:24}{figures}   {row['loss_difference']:+.4f}  {row['speed_up']:.2f} ({row['best_speed_up']:.2f})")


if __name__ == "__main__":
    run_script(main)
