"""Whole training steps on a CPU beside nanoGPT, in turns: same shapes, same number of tokens.

    python bench/cpu_speed.py --peer=PATH_TO_NANOGPT [--settings=small,baby,124m] [--rounds=N]
                              [--dtype=auto|float32|bfloat16] [--sides="nanogpt,sprout compiled"]

small: nanoGPT's documented CPU setting for tinyshakespeare. baby: its GPU setting for the same text, with dropout 0.2;
ours applies dropout to embeddings and residual branches, never to attention weights, so the two compute different
things there: compare val losses by whole trainings. 124m: GPT-2's shape, 4 rows of 256 tokens.

Both also compiled: nanoGPT by torch.compile as its train.py does by default, ours as train.py does on a CPU.

Random ids. A step is forward, backward, clipping and update, each as the side's own training does it; ours with the
allocator settings, micro-batch size and dtype that train.py would choose. Each side has its own process, as those
settings hold for a whole process; only one of them works at a time. Prints tokens/s (median and best), GFLOP/s beside
those of a large matrix product, the seconds until the first step was done, and ratios, and writes them with the machine
to bench/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import torch  # noqa: E402

from bench.hardware import Stopwatch, commit_of, hardware, write_results  # noqa: E402
from bench.peer import import_model, rotated  # noqa: E402
from common.hardware import Hardware, choose_hardware, tune_allocator  # noqa: E402
from common.options import HardwareOptions  # noqa: E402
from common.weights import flops_per_token  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from training.compilation import compile_model  # noqa: E402
from training.data import MicroBatch  # noqa: E402
from training.micro_batch import choose_micro_batch  # noqa: E402
from training.optim import clip_gradients, make_optimizer  # noqa: E402
from training.options import OptimizerOptions  # noqa: E402


class Setting(NamedTuple):
    shape: dict[str, Any]
    rows: int
    steps: int  # steps of a block
    rounds: int


SETTINGS = {
    "small": Setting(
        {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65, "bias": False, "dropout": 0.0},
        12,
        20,
        15,
    ),
    "baby": Setting(
        {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "bias": False, "dropout": 0.2},
        64,
        1,
        4,
    ),
    "124m": Setting(
        {
            "n_layer": 12,
            "n_head": 12,
            "n_embd": 768,
            "block_size": 256,
            "vocab_size": 50_304,
            "bias": True,
            "dropout": 0.0,
        },
        4,
        1,
        6,
    ),
}
SIDES = ("nanogpt", "nanogpt compiled", "sprout", "sprout compiled")
Step = Callable[[], object]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--rounds", type=int, help="blocks of each side (default: by setting)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="our dtype; the peer's is float32"
    )
    # the process of one side: see run_worker
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--sides", default=",".join(SIDES), help="which to measure")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the figures")
    arguments = parser.parse_args(argv)
    names = arguments.settings.split(",")
    if unknown := [name for name in names if name not in SETTINGS]:
        raise UserError(f"--settings={arguments.settings}: unknown {unknown[0]!r}; expected {', '.join(SETTINGS)}")
    if unknown := [side for side in arguments.sides.split(",") if side not in SIDES]:
        raise UserError(f"--sides={arguments.sides}: unknown {unknown[0]!r}; expected {', '.join(SIDES)}")
    peer = import_model(arguments.peer)
    if arguments.worker is not None and arguments.worker.startswith("sprout"):
        tune_allocator()
    chosen = choose_hardware(HardwareOptions(device="cpu", dtype=arguments.dtype))
    if arguments.worker is not None:
        setting, compiled = SETTINGS[names[0]], arguments.worker.endswith("compiled")
        make = partial(peer_step, peer) if arguments.worker.startswith("nanogpt") else partial(our_step, chosen)
        run_worker(make(setting, compiled), setting.steps)
        return 0
    figures: dict[str, Any] = {"hardware": hardware(), "sprout": commit_of(ROOT), "peer": commit_of(arguments.peer)}
    figures |= {"dtype": chosen.dtype_name, "peak_gflops": peak_gflops()}
    print(f"a product of 2,048 x 2,048 matrices: {figures['peak_gflops']} GFLOP/s", flush=True)
    for name in names:
        figures[name] = measure(name, arguments)
    print(f"written: {write_results('cpu_speed', figures, arguments.results)}")
    return 0


def run_worker(step: Step, steps: int) -> None:
    """Warms up with one step and prints its seconds. Then, for every line on standard input, runs a block of steps and
    prints its seconds."""
    started = time.perf_counter()
    step()
    print(time.perf_counter() - started, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        print(time.perf_counter() - started, flush=True)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs blocks of both sides in turns. Returns tokens/s of every block, ratios, and the machine's load."""
    setting = SETTINGS[name]
    tokens = setting.rows * setting.shape["block_size"] * setting.steps
    command = [sys.executable, __file__, f"--peer={arguments.peer}", f"--settings={name}", f"--dtype={arguments.dtype}"]
    sides = arguments.sides.split(",")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    with Stopwatch() as watch, ExitStack() as stack:
        workers, first = {}, {}
        for side in sides:  # one after the other: a first step may compile
            workers[side] = stack.enter_context(subprocess.Popen([*command, f"--worker={side}"], **pipes))
            first[side] = float(workers[side].stdout.readline())

        def block(side: str) -> float:
            worker = workers[side]
            print(file=worker.stdin, flush=True)
            return tokens / float(worker.stdout.readline())

        for side in sides:
            block(side)  # warm-up
        for number in range(arguments.rounds or setting.rounds):
            for side in rotated(list(sides), number):
                rates[side].append(block(side))
        for worker in workers.values():
            worker.stdin.close()
    flops = flops_per_token(GPT(GPTConfig(**setting.shape, eos_id=None), seed=None))
    ratios: dict[str, float] = {}
    for side, figures in rates.items():
        median = statistics.median(figures)
        for other, theirs in rates.items():
            if side.startswith("sprout") and other.startswith("nanogpt"):
                ratios[f"{side} / {other}"] = statistics.median(a / b for a, b in zip(figures, theirs, strict=True))
        print(
            f"{name:6} {side:16} {median:10,.0f} tokens/s (best {max(figures):,.0f}), {1e-9 * flops * median:,.0f}"
            f" GFLOP/s; first step {first[side]:.1f} s",
            flush=True,
        )
    for pair, ratio in ratios.items():
        print(f"{name:6} {pair}: {ratio:.2f}", flush=True)
    return {"tokens_per_second": rates, "ratios": ratios, "first_step_seconds": first, "machine": watch.measured}


def peak_gflops() -> dict[str, float]:
    """GFLOP/s of a large matrix product in either type, the best of a few."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, seconds = torch.randn(2048, 2048).to(dtype), math.inf
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(a, a)
            seconds = min(seconds, time.perf_counter() - started)
        found[str(dtype).removeprefix("torch.")] = round(2e-9 * 2048**3 / seconds)
    return found


def batch(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, min(setting.shape["vocab_size"], 50_257), (setting.rows, setting.shape["block_size"] + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def peer_step(peer: ModuleType, setting: Setting, compiled: bool) -> Step:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        model = peer.GPT(peer.GPTConfig(**setting.shape)).train()
        optimizer = model.configure_optimizers(
            weight_decay=0.1, learning_rate=1e-4, betas=(0.9, 0.99), device_type="cpu"
        )
    x, y = batch(setting)
    forward: Any = torch.compile(model) if compiled else model

    def step() -> float:
        _, loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def our_step(chosen: Hardware, setting: Setting, compiled: bool) -> Step:
    config = GPTConfig(**setting.shape, eos_id=None)
    model = GPT(config).train()
    optimizer = make_optimizer(model, OptimizerOptions(learning_rate=1e-4))
    x, y = batch(setting)
    auto: Literal["auto"] = "auto"
    size = choose_micro_batch(auto, x.numel(), config, chosen).value
    if compiled:
        compile_blocks(model, MicroBatch(x[:size], y[:size], 0 if config.dropout else None), chosen)

    def step() -> float:
        total = 0.0
        for rows in range(0, setting.rows, size):
            with chosen.autocast():
                loss = model(x[rows : rows + size], y[rows : rows + size], reduction="sum") / y.numel()
            loss.backward()
            total += float(loss.item())
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def compile_blocks(model: GPT, batch: MicroBatch, chosen: Hardware) -> None:
    """As train.py does; its messages go to standard error. Raises UserError where that fails."""
    state: Any = SimpleNamespace(compiler="wanted")
    with contextlib.redirect_stdout(sys.stderr):
        compile_model(model, state, batch, chosen)
    if state.compiler == "none":
        raise UserError("Sprout's block was not compiled, see above; leave it out: --sides=nanogpt,sprout")


if __name__ == "__main__":
    run_script(main)
