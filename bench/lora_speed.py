"""What --lora_rank saves: time and memory of a training step beside that of all weights.

    python bench/lora_speed.py [--rank=16] [--steps=5] [--dtype=bfloat16] [--shape=n_layer=30,…]

Each side is a process of its own, on one thread, eager, with AdamW; the two take turns, so that both see the same
machine. Random weights of the shape of a model of 135M parameters, micro-batches of 1,024 tokens. Memory is the peak of
the process, of which PyTorch alone takes about 0.3 GiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import torch  # noqa: E402

from bench.hardware import commit_of, hardware, new_result, save_results  # noqa: E402
from common.hardware import choose_hardware  # noqa: E402
from common.options import HardwareOptions  # noqa: E402
from common.weights import count_parameters, trained_parameters  # noqa: E402
from errors import run_script  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from training.lora import ALPHA, add_adapters, narrow_frozen  # noqa: E402
from training.optim import clip_gradients, make_optimizer  # noqa: E402
from training.options import OptimizerOptions  # noqa: E402

SHAPE = "n_layer=30,n_embd=576,n_head=9,n_kv_head=3,n_hidden=1536,block_size=512,vocab_size=49152"
KIND: dict[str, Any] = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "eos_id": 0}
ROWS = 2


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    if arguments.side is not None:
        work(arguments)
        return 0
    ranks = {"full": 0, "adapters": arguments.rank}
    flags = [f"--steps={arguments.steps}", f"--dtype={arguments.dtype}", f"--shape={arguments.shape}"]
    script = [sys.executable, __file__, *flags]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    sides = {name: subprocess.Popen([*script, f"--side={rank}"], **pipes) for name, rank in ranks.items()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(arguments.steps + 1):  # the first step is warm-up
        for name, process in sides.items():
            found[name].append(ask(process))
            print(f"{name}: {found[name][-1]['seconds']:.2f} s")
    for process in sides.values():
        process.communicate()
    figures = {name: summarize(steps) for name, steps in found.items()}
    full, adapters = figures["full"], figures["adapters"]
    ratios = {name: adapters[name] / full[name] for name in ("seconds", "peak_gib", "trained")}
    path = new_result("lora_speed", arguments.results)
    facts = {"rank": arguments.rank, "dtype": arguments.dtype, "shape": arguments.shape, "tokens": full["tokens"]}
    result = {"bench": "lora_speed", "hardware": hardware(), "sprout": commit_of(ROOT), **facts, "ratios": ratios}
    save_results(path, {**result, **figures})
    for name, side in figures.items():
        print(
            f"{name}: {side['seconds']:.2f} s a step ({min(side['all']):.2f} to {max(side['all']):.2f}),"
            f" {side['peak_gib']:.2f} GiB, {side['trained']:,} of {side['parameters']:,} parameters trained"
        )
    print(f"adapters / full: time {ratios['seconds']:.2f}, memory {ratios['peak_gib']:.2f}\nwritten: {path}")
    return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--shape", default=SHAPE, help=f"model options, default: {SHAPE}")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the figures")
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    """One step of a side."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def summarize(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a side: the median of its steps but the first."""
    seconds = [step["seconds"] for step in steps[1:]]
    return {**steps[-1], "seconds": statistics.median(seconds), "all": seconds}


def work(arguments: argparse.Namespace) -> None:
    """The process of a side: a step for each line of its input."""
    shape = {name: int(value) for name, value in (part.split("=") for part in arguments.shape.split(","))}
    setting = choose_hardware(HardwareOptions(device="cpu", dtype=arguments.dtype, threads=1))
    model = GPT(GPTConfig(**shape, **KIND), seed=0)
    parameters = count_parameters(model)
    if arguments.side:
        add_adapters(model, arguments.side, ALPHA / arguments.side, seed=0)
        narrow_frozen(model, setting.dtype)
    model.train()
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    optimizer = make_optimizer(model, OptimizerOptions(learning_rate=1e-4), setting.dtype)
    ids = torch.randint(shape["vocab_size"], (ROWS, shape["block_size"]), generator=torch.Generator().manual_seed(0))
    for _ in sys.stdin:
        started = time.perf_counter()
        with setting.autocast():
            loss = model(ids, ids)
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        facts = {"seconds": seconds, "peak_gib": peak, "trained": trained, "parameters": parameters}
        print(json.dumps({**facts, "tokens": ids.numel()}), flush=True)


if __name__ == "__main__":
    run_script(main)
