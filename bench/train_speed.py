"""Whole training steps of the 124M presets on a GPU, in tokens/s: fused kernel and SDPA, nanoGPT and llm.c's PyTorch.

    python bench/train_speed.py --out=DIR                   both presets and attention paths: DIR/DATE-train_speed.json
    python bench/train_speed.py --out=DIR --peer-nanogpt=PATH --peer-llmc=PATH    their GPTs too; PATH: a checkout
    python bench/train_speed.py --out=DIR --presets=gpt2_124m --attention=triton  one side alone
    python bench/train_speed.py --smoke                     tests this script on a CPU with tiny sizes; writes nothing

A step is train.py's with one micro-batch (--rows, 32 of 1,024 tokens): forward and backward under bfloat16 autocast,
gradient clipping, AdamW; the model compiled with torch.compile. The peers' models get the same step, optimizer and
data, so only the models differ. nanoGPT pads its vocabulary to 50,304 as its train.py does; llm.c's attention is SDPA
as with its --flash=1. The sides take turns in blocks of steps, in reverse order in every other round. A side that runs
out of memory is reported with the reason.

FLOP of a token: 6 · N + 12 · n_layer · T · C, where N counts all parameters except the table of positions. `of_matmul`
is the rate relative to a large square bfloat16 product measured in the same run, `mfu` relative to the vendor's figure.

Needs torch, triton and numpy. Compiling takes about a minute a side; after --minutes no further side is started.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench.gpu import Deadline, card, ceilings, choose_device, peak_memory, reasons  # noqa: E402
from bench.hardware import commit_of, hardware, write_results  # noqa: E402
from bench.peer import import_model  # noqa: E402
from common.hardware import vendor_flops  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from model import GPT, AttentionPath, GPTConfig  # noqa: E402
from training.optim import make_optimizer  # noqa: E402
from training.options import OptimizerOptions  # noqa: E402

MODERN: dict[str, Any] = {
    "n_hidden": 2048,
    "positions": "rotary",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "qk_norm": True,
    "bias": False,
}
PRESETS = {"gpt2_124m": GPTConfig(), "modern_124m": GPTConfig(**MODERN)}  # as in config/, which needs more packages
PEER_VOCABULARY = {"nanogpt": 50_304, "llmc": 50_257}
TINY: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}


@dataclass(frozen=True)
class Side:
    """One model to train. `loss(model, x, y)` returns its loss, a scalar; `model` there may be the compiled one."""

    model: nn.Module
    loss: Callable[[Callable[..., Any], Tensor, Tensor], Tensor]
    shape: GPTConfig  # depth, width and context, by which FLOP are counted


def make_sides(arguments: argparse.Namespace) -> dict[str, Callable[[], Side]]:
    """Name → a function that builds the side. Each is built in its turn: one that runs out of memory stops no other."""
    sides: dict[str, Callable[[], Side]] = {}
    for preset in arguments.presets:
        shape = PRESETS[preset]
        if arguments.smoke:
            shape = replace(shape, **TINY, n_hidden=64)
        sides |= {f"{preset}, {path}": partial(make_ours, shape, path) for path in arguments.attention}
    for name, checkout, file in (
        ("nanogpt", arguments.peer_nanogpt, "model.py"),
        ("llmc", arguments.peer_llmc, "train_gpt2.py"),
    ):
        if checkout is not None:
            sides[name] = partial(make_peer, name, import_model(checkout, file, name), arguments.smoke)
    return sides


def make_ours(shape: GPTConfig, attention: AttentionPath) -> Side:
    return Side(GPT(shape, attention=attention), lambda model, x, y: model(x, y), shape)


def make_peer(name: str, module: Any, tiny: bool) -> Side:
    """nanoGPT's or llm.c's GPT; both return (logits, loss)."""
    shape = GPTConfig(**TINY) if tiny else GPTConfig()
    sizes = {key: getattr(shape, key) for key in TINY} | {"vocab_size": PEER_VOCABULARY[name]}
    if name == "llmc":
        module.FLASH = 1
    with contextlib.redirect_stdout(io.StringIO()):  # they print their size
        model = module.GPT(module.GPTConfig(**sizes, **({"bias": True, "dropout": 0.0} if name == "nanogpt" else {})))
    return Side(model, lambda model, x, y: model(x, y)[1], shape)


def make_step(side: Side, x: Tensor, y: Tensor, compiled: bool) -> Callable[[], Tensor]:
    """A function that does one training step and returns its loss, without waiting for the device."""
    options = OptimizerOptions()
    side.model.to(x.device).train()
    optimizer = make_optimizer(side.model, options)
    model: Callable[..., Any] = torch.compile(side.model) if compiled else side.model
    parameters, clip = list(side.model.parameters()), options.grad_clip
    assert clip is not None

    def step() -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            loss = side.loss(model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def flops_per_token(side: Side) -> int:
    """FLOP of a token, as the module docstring counts them."""
    tables = {"position.weight", "transformer.wpe.weight"}
    counted = sum(parameter.numel() for name, parameter in side.model.named_parameters() if name not in tables)
    return 6 * counted + 12 * side.shape.n_layer * side.shape.block_size * side.shape.n_embd


def block(step: Callable[[], Tensor], steps: int, device: torch.device) -> tuple[float, float]:
    """Returns seconds per step and the last loss. Synchronizes the device before the first and after the last step."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        loss = step()
    synchronize(device)
    return (time.perf_counter() - begin) / steps, float(loss)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(
    sides: dict[str, Callable[[], Side]], x: Tensor, y: Tensor, deadline: Deadline
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, dict[str, Any]], dict[str, str]]:
    """Builds, compiles and warms up the sides. Returns step functions, figures so far, and reasons for failed sides."""
    steps: dict[str, Callable[[], Tensor]] = {}
    figures: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}

    def begin(name: str) -> None:
        side, started = sides[name](), time.perf_counter()
        step = make_step(side, x, y, compiled=x.device.type == "cuda")
        losses = [block(step, steps, x.device)[1] for steps in (1, 5 if x.device.type == "cuda" else 1)]
        steps[name], figures[name] = step, {"flops_per_token": flops_per_token(side), "losses": losses, "seconds": []}
        print(f"{name}: compiled and warm after {time.perf_counter() - started:.0f} s, losses {losses}", flush=True)

    for name in sides:
        if deadline.left() < 0:
            refused[name] = "out of time"
            continue
        with reasons(refused, name):
            memory = peak_memory(partial(begin, name), x.device)
            figures[name]["memory_gib"] = round(memory / 2**30, 2)
    return steps, figures, refused


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    device = choose_device("bench/train_speed.py", "--smoke", arguments.smoke)
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high")
    deadline = Deadline(arguments.minutes)
    facts, peaks = {**hardware(), **card(device)}, ceilings(device)
    arguments.smoke = device.type == "cpu"
    rows, T = (2, TINY["block_size"]) if arguments.smoke else (arguments.rows, GPTConfig().block_size)
    print({**facts, **peaks})
    ids = torch.randint(GPTConfig().vocab_size - 1, (rows, T + 1)).to(
        device
    )  # without the last id, which ends documents
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    steps, figures, refused = prepare(make_sides(arguments), x, y, deadline)
    rounds, steps_a_block = (1, 1) if device.type == "cpu" else (arguments.rounds, arguments.steps)
    for number in range(rounds):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            seconds, loss = block(steps[name], steps_a_block, device)
            figures[name]["seconds"].append(round(seconds, 6))
            figures[name]["losses"].append(loss)
    for name, row in figures.items():
        row |= rates(row, rows * T, peaks["matmul_tflops"], vendor_flops(facts["gpu"]))
        print(
            "  ".join(
                [f"{name:22}", *(f"{key} {row[key]}" for key in ("tokens_per_second", "spread", "of_matmul", "mfu"))]
            )
        )
    for name, reason in refused.items():
        print(f"{name:22}  not measured: {reason}")
    if device.type == "cpu":
        print("smoke test on the CPU passed; its timings mean nothing, so nothing is written")
        return 0
    peers = {
        name: commit_of(checkout) for name in ("peer_nanogpt", "peer_llmc") if (checkout := getattr(arguments, name))
    }
    settings = {"rows": rows, "T": T, "dtype": "bfloat16 autocast", "steps_a_block": arguments.steps}
    result = {
        "bench": "train_speed",
        "commit": commit_of(ROOT),
        **peers,
        "hardware": facts,
        "ceilings": peaks,
        **settings,
    }
    print(
        f"written: {write_results('train_speed', {**result, 'sides': figures, 'unavailable': refused}, arguments.out)}"
    )
    return 0


def rates(row: dict[str, Any], tokens: int, matmul_tflops: float, vendor_flops: float | None) -> dict[str, Any]:
    """Tokens/s of the median block, the spread of the blocks as a share of it, and the shares of both peak rates."""
    middle = statistics.median(row["seconds"])
    tflops = row["flops_per_token"] * tokens / middle / 1e12
    return {
        "tokens_per_second": round(tokens / middle),
        "spread": round((max(row["seconds"]) - min(row["seconds"])) / middle, 3),
        "of_matmul": round(tflops / matmul_tflops, 3) if matmul_tflops else None,
        "mfu": None if vendor_flops is None else round(1e12 * tflops / vendor_flops, 3),
    }


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the figures")
    parser.add_argument("--presets", default=",".join(PRESETS), help="presets of Sprout, separated by commas")
    parser.add_argument("--attention", default="triton,sdpa", help="triton, sdpa, or both")
    parser.add_argument("--peer-nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--peer-llmc", type=Path, help="a checkout of llm.c")
    parser.add_argument("--rows", type=int, default=32, help="sequences of 1,024 tokens in a step")
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each side")
    parser.add_argument("--minutes", type=float, default=6.5, help="time limit after which no further side is started")
    parser.add_argument(
        "--smoke", action="store_true", help="test the script on a CPU with tiny sizes; also with TRITON_INTERPRET=1"
    )
    arguments = parser.parse_args(argv)
    arguments.presets, arguments.attention = arguments.presets.split(","), arguments.attention.split(",")
    if unknown := [preset for preset in arguments.presets if preset not in PRESETS]:
        raise UserError(f"--presets: unknown {unknown[0]!r}; expected {', '.join(PRESETS)}")
    if not set(arguments.attention) <= {"triton", "sdpa"}:
        raise UserError(f"--attention={','.join(arguments.attention)}: expected triton, sdpa, or triton,sdpa")
    if min(arguments.rows, arguments.steps, arguments.rounds) < 1:
        raise UserError("--rows, --steps and --rounds must be at least 1")
    return arguments


if __name__ == "__main__":
    run_script(main)
