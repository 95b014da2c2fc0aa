"""Training steps of the plan's models on a GPU: as Python launches them, recorded as CUDA graphs, compiled as well.

    python bench/gpu_small_steps.py [--out=DIR] [--minutes=1.5]
    python bench/gpu_small_steps.py --smoke     tests this script on a CPU, tiny, recording nothing

Medians of forward and backward pass and of the optimizer's step (Muon), bfloat16, random ids, context 128, VOCABULARY
ids; and what the plan predicts for a recorded step (training/step_cost.py). DIR/DATE-gpu_small_steps.json is written
after each row. Compiling takes most of the time, and is left out at its end.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import torch  # noqa: E402

from bench.gpu import Deadline, card, choose_device  # noqa: E402
from bench.hardware import RESULTS, commit_of, hardware, new_result, save_results  # noqa: E402
from common.cuda_graphs import Recorder  # noqa: E402
from common.hardware import Hardware, choose_attention  # noqa: E402
from errors import run_script  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from training import plan  # noqa: E402
from training.optim import clip_gradients, make_optimizer  # noqa: E402
from training.options import OptimizerOptions  # noqa: E402
from training.step_cost import StepCost, time_step  # noqa: E402

VOCABULARY = 2048
TOKENS = (2048, 8192, 32_768)  # of a step
COMPILED = (((4, 192), 2048), ((6, 256), 4096), ((12, 768), 8192))  # layers and width, tokens
COMPILE_SECONDS = 25.0  # with less time left nothing more is compiled
LAST_START = 3.0  # and nothing is timed
OPTIONS = OptimizerOptions(optimizer="muon", muon_steps=3)


def time_model(cost: StepCost, shape: plan.Shape, tokens: int, kind: str) -> dict[str, float]:
    """ms of forward and backward pass and of the optimizer's step. kind: eager, recorded, compiled."""
    device, hardware = cost.hardware.device, cost.hardware
    model = GPT(cost.with_shape(shape), 0, cost.attention).to(device).train()
    optimizer = make_optimizer(model, OPTIONS, hardware.dtype)
    if kind == "compiled":
        torch.compiler.reset()
    forward = torch.compile(model, dynamic=False) if kind == "compiled" else model
    ids = torch.randint(VOCABULARY, (max(1, tokens // shape.block_size), shape.block_size)).to(device)

    def passes() -> None:
        with hardware.autocast():
            loss = forward(ids, ids)
        loss.backward()
        clip_gradients(model.parameters(), 1.0)

    recorder = None if kind == "eager" or device.type == "cpu" else Recorder(device)
    began = time.perf_counter()
    seconds = time_step(passes, optimizer, hardware, recorder)
    row = {"passes_ms": 1e3 * seconds[0], "optimizer_ms": 1e3 * seconds[1], "took_s": time.perf_counter() - began}
    return {name: round(value, 3) for name, value in row.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the figures (default: bench/results)")
    parser.add_argument("--minutes", type=float, default=1.5, help="no further row is started at their end")
    parser.add_argument("--smoke", action="store_true", help="test the script on a CPU, with the smallest model")
    arguments = parser.parse_args(argv)
    device = choose_device("bench/gpu_small_steps.py", "--smoke", arguments.smoke)
    deadline, is_tiny = Deadline(arguments.minutes), device.type == "cpu"
    machine = Hardware(device, torch.bfloat16, torch.get_num_threads(), {})
    shapes = plan.shapes(128, {})[: 1 if is_tiny else None]
    config = GPTConfig(**{**plan.ARCHITECTURE, **shapes[0]._asdict(), "vocab_size": VOCABULARY, "eos_id": None})
    path = choose_attention("auto", device, machine.dtype, config.head_size).value
    cost = StepCost(config, OPTIONS, machine, path)
    cost.measure(shapes)
    result: dict[str, Any] = {
        "bench": "gpu_small_steps",
        "commit": commit_of(ROOT),
        "hardware": {**hardware(), **card(device)},
        "smoke": is_tiny,
        "rows": [],
    }
    file = None if is_tiny and arguments.out is None else new_result("gpu_small_steps", arguments.out or RESULTS)
    by_size = {(shape.n_layer, shape.n_embd): shape for shape in shapes}
    cells = [(size, tokens, kind) for size in by_size for tokens in TOKENS for kind in ("eager", "recorded")]
    cells = cells[:2] if is_tiny else cells + [(*cell, "compiled") for cell in COMPILED]
    for size, tokens, kind in cells:
        if deadline.left() < (COMPILE_SECONDS if kind == "compiled" else LAST_START):
            continue
        predicted = 1e3 * cost.step_seconds(by_size[size], tokens)
        row = {"layers": size[0], "width": size[1], "tokens": tokens, "kind": kind, "predicted_ms": round(predicted, 3)}
        row |= time_model(cost, by_size[size], tokens, kind)
        result["rows"].append(row)
        print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
        if file is not None:
            save_results(file, result)
    print("nothing is written" if file is None else f"written: {file}")
    return 0


if __name__ == "__main__":
    run_script(main)
