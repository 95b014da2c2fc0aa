"""Whole training steps of the 124M presets on a GPU, in tokens/s: fused kernel and SDPA, nanoGPT and llm.c's PyTorch.

    python bench/train_speed.py --out=DIR                   both presets, attention paths and modes
    python bench/train_speed.py --out=DIR --peer-nanogpt=PATH --peer-llmc=PATH    their GPTs too; PATH: a checkout
    python bench/train_speed.py --out=DIR --presets=gpt2_124m --attention=triton --modes=compiled    one side alone
    python bench/train_speed.py --smoke                     tests this script on a CPU, tiny, written only to --out

A step is train.py's with one micro-batch (--rows, 32 of 1,024 tokens): forward and backward under bfloat16 autocast,
gradient clipping, one wait for the device, the preset's optimizer (modern_124m: Muon). `eager` or `compiled`: the model
as it is, or by torch.compile; `recorded`: compiled, and its steps replayed as CUDA graphs. The peers' models get the
same step, AdamW and data, so only the models differ. nanoGPT pads its vocabulary to 50,304 as its train.py does;
llm.c's attention is SDPA as with its --flash=1. The sides take turns in blocks of steps, in reverse order in every
other round. A side that runs out of memory is reported with the reason. DIR/DATE-train_speed.json is written after each
side and each round.

FLOP of a token: 6 · N + 12 · n_layer · T · C, where N counts all parameters except the table of positions. `of_matmul`
is the rate relative to a large square bfloat16 product measured in the same run, `mfu` relative to the vendor's figure.
`memory_gib` is the peak from building the side to its sixth step, weights and optimizer included.

Compiling takes about a minute a side, on one core for the most part. So before anything is measured, a process for each
compiled side compiles it, without running it, into PyTorch's cache on disk. Needs torch, triton and numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench.gpu import (  # noqa: E402
    Deadline,
    card,
    ceilings,
    choose_device,
    peak_memory,
    reasons,
    some,
    synchronize,
    use_launches,
)
from bench.hardware import RESULTS, commit_of, hardware, new_result, save_results  # noqa: E402
from bench.peer import import_model  # noqa: E402
from common.cuda_graphs import Recorder  # noqa: E402
from common.devices import vendor_flops  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from model import GPT, AttentionPath, GPTConfig  # noqa: E402
from training.optim import clip_gradients, make_optimizer  # noqa: E402
from training.options import OptimizerOptions  # noqa: E402
from training.step_graphs import WARM_UP  # noqa: E402

MODERN: dict[str, Any] = {
    "n_hidden": 2048,
    "positions": "rotary",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "qk_norm": True,
    "bias": False,
}
# As in config/, which needs more packages.
PRESETS = {"gpt2_124m": GPTConfig(), "modern_124m": GPTConfig(**MODERN)}
OPTIMIZERS = {"modern_124m": OptimizerOptions(optimizer="muon")}  # others: AdamW
MODES = ("recorded", "compiled", "eager")  # in this order: a run uses compiled steps, recorded as CUDA graphs
COMPILE_SHARE = 0.6  # of the time at most goes into compiling ahead; what is not complete then is lost
START_SHARE = 0.75  # of the time: after it no further side is started, so that those that are warm get their rounds
PEER_VOCABULARY = {"nanogpt": 50_304, "llmc": 50_257}
TINY: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}


@dataclass(frozen=True)
class Side:
    """One model to train. `loss(model, x, y)` returns its loss, a scalar; `model` there may be the compiled one."""

    model: nn.Module
    loss: Callable[[Callable[..., Any], Tensor, Tensor], Tensor]
    shape: GPTConfig  # depth, width and context, by which FLOP are counted
    compiled: bool
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    recorded: bool = False


def make_sides(arguments: argparse.Namespace) -> dict[str, Callable[[], Side]]:
    """Name → a function that builds the side. Each is built in its turn: one that runs out of memory stops no other."""
    sides: dict[str, Callable[[], Side]] = {}
    for mode in arguments.modes:
        for preset in arguments.presets:
            for path in arguments.attention:
                if mode == "recorded" and path != "triton":
                    continue
                sides[f"{preset}, {path}, {mode}"] = partial(make_ours, preset, path, mode, arguments.smoke)
        for name, checkout, file in (
            ("nanogpt", arguments.peer_nanogpt, "model.py"),
            ("llmc", arguments.peer_llmc, "train_gpt2.py"),
        ):
            if checkout is not None and mode != "recorded":
                module = import_model(checkout, file, name)
                sides[f"{name}, {mode}"] = partial(make_peer, name, module, mode == "compiled", arguments.smoke)
    return sides


def make_ours(preset: str, attention: AttentionPath, mode: str, tiny: bool) -> Side:
    shape = replace(PRESETS[preset], **TINY, n_hidden=64) if tiny else PRESETS[preset]
    optimizer = OPTIMIZERS.get(preset, OptimizerOptions())

    def loss(model: Callable[..., Any], x: Tensor, y: Tensor) -> Tensor:
        total: Tensor = model(x, y, reduction="sum")
        return total / y.numel()

    return Side(GPT(shape, attention=attention), loss, shape, mode != "eager", optimizer, mode == "recorded")


def make_peer(name: str, module: Any, compiled: bool, tiny: bool) -> Side:
    """nanoGPT's or llm.c's GPT; both return (logits, loss)."""
    shape = GPTConfig(**TINY) if tiny else GPTConfig()
    sizes = {key: getattr(shape, key) for key in TINY} | {"vocab_size": PEER_VOCABULARY[name]}
    if name == "llmc":
        module.FLASH = 1
    with contextlib.redirect_stdout(io.StringIO()):  # they print their size
        model = module.GPT(module.GPTConfig(**sizes, **({"bias": True, "dropout": 0.0} if name == "nanogpt" else {})))
    model.ngrams = None  # which our optimizer asks for
    return Side(model, lambda model, x, y: model(x, y)[1], shape, compiled)


def make_step(side: Side, x: Tensor, y: Tensor, backend: Any = None) -> Callable[[], float]:
    """A function that does one training step, as train.update does it, and returns its loss. backend: of torch.compile;
    None: the one of the device."""
    side.model.to(x.device).train()
    optimizer: Any = make_optimizer(side.model, side.optimizer, torch.bfloat16)
    model: Callable[..., Any] = side.model
    if side.compiled:  # dynamic=False: other sides' sizes would make it compile for any size
        backend = backend or ("inductor" if x.device.type == "cuda" else "aot_eager")
        model = torch.compile(side.model, dynamic=False, backend=backend)

    def gradients() -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            loss = side.loss(model, x, y)
        loss.backward()
        norm = clip_gradients(side.model.parameters(), side.optimizer.grad_clip)
        return torch.stack((loss.detach(), norm.to(loss.dtype)))

    def step() -> float:
        mean, _ = gradients().tolist()  # waits for the device, as train.py does
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(mean)

    return recorded(step, gradients, optimizer.step, x.device) if side.recorded and x.device.type == "cuda" else step


def recorded(
    step: Callable[[], float], gradients: Callable[[], Tensor], update: Callable[[], None], device: torch.device
) -> Callable[[], float]:
    """`step` for the first times, then its two parts recorded, as training/step_graphs.py does it."""
    recorder, replays, calls = Recorder(device), list[Callable[[], Any]](), count(1)

    def replayed() -> float:
        if not replays and next(calls) <= WARM_UP:
            with recorder.on_stream():
                return step()
        if not replays:
            replays.extend(recorder.record(part) for part in (gradients, update))
        mean, _ = replays[0]().tolist()
        replays[1]()
        return float(mean)

    return replayed


# ---- Compiling ahead -------------------------------------------------------------------------------------------------


class Compiled(Exception):
    """The model is compiled; it is not run."""


def lower_both_passes() -> None:
    """Else the backward pass is compiled when it first runs. A part of the cache's key: measured sides need it, too."""
    from torch._functorch import config as functorch_config

    if hasattr(functorch_config, "force_non_lazy_backward_lowering"):
        functorch_config.force_non_lazy_backward_lowering = True


def compile_and_stop(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
    """A backend of torch.compile that fills PyTorch's cache, with the backward pass too, and runs nothing."""
    from torch._inductor.compile_fx import compile_fx

    lower_both_passes()
    compile_fx(graph, inputs, **options)
    raise Compiled


def compile_only(side: Side, x: Tensor, y: Tensor) -> None:
    """What a process of compile_ahead does. What cannot be compiled is reported when the side is measured."""
    with contextlib.suppress(RuntimeError):  # torch wraps Compiled in one
        make_step(side, x, y, compile_and_stop)()


def compile_ahead(arguments: argparse.Namespace, seconds: float) -> None:
    """Compiles our sides side by side, each in a process; those that take longer than `seconds` are ended."""
    pairs = [(preset, path) for preset in arguments.presets for path in arguments.attention]
    command = [sys.executable, str(Path(__file__).resolve()), "--compile_only", f"--rows={arguments.rows}"]
    command += ["--smoke"] * arguments.smoke
    begin = time.monotonic()
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [
        subprocess.Popen([*command, f"--presets={preset}", f"--attention={path}"], **quiet) for preset, path in pairs
    ]
    for process in processes:
        try:
            process.wait(max(0.0, begin + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    print(f"{len(pairs)} sides compiled ahead in {time.monotonic() - begin:.0f} s", flush=True)


# ---- Measuring -------------------------------------------------------------------------------------------------------


def flops_per_token(side: Side) -> int:
    """FLOP of a token, as the module docstring counts them."""
    tables = {"position.weight", "transformer.wpe.weight"}
    counted = sum(parameter.numel() for name, parameter in side.model.named_parameters() if name not in tables)
    return 6 * counted + 12 * side.shape.n_layer * side.shape.block_size * side.shape.n_embd


def block(step: Callable[[], float], steps: int, device: torch.device) -> tuple[float, float]:
    """Returns seconds per step and the last loss. Synchronizes the device before the first and after the last step."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        loss = step()
    synchronize(device)
    return (time.perf_counter() - begin) / steps, loss


@dataclass
class Measured:
    """Step functions of the sides that run, what was measured of each, and why others do not run."""

    steps: dict[str, Callable[[], float]]
    figures: dict[str, dict[str, Any]]
    refused: dict[str, str]

    def add(self, name: str, seconds: float, loss: float) -> None:
        self.figures[name]["seconds"].append(round(seconds, 6))
        self.figures[name]["losses"].append(loss)


def prepare(
    sides: dict[str, Callable[[], Side]], x: Tensor, y: Tensor, deadline: Deadline, steps: int
) -> Iterator[Measured]:
    """Builds, compiles, warms up and measures the sides once, and yields after each. After START_SHARE of the time no
    further side is started."""
    measured, latest = Measured({}, {}, {}), (1 - START_SHARE) * deadline.left()
    device = x.device

    def begin(name: str) -> None:
        side, started = sides[name](), time.perf_counter()
        step = make_step(side, x, y)
        losses = [block(step, steps, device)[1] for steps in (1, 5 if device.type == "cuda" else 1)]
        measured.steps[name] = step
        measured.figures[name] = {"flops_per_token": flops_per_token(side), "losses": losses, "seconds": []}
        print(f"{name}: warm after {time.perf_counter() - started:.0f} s, losses {losses}", flush=True)

    for name in sides:
        if deadline.left() < latest:
            measured.refused[name] = "out of time"
        else:
            with reasons(measured.refused, name):
                memory = peak_memory(partial(begin, name), device)
                measured.figures[name]["memory_gib"] = round(memory / 2**30, 2)
                measured.add(name, *block(measured.steps[name], steps, device))
        yield measured


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    device = choose_device("bench/train_speed.py", "--smoke", arguments.smoke)
    rows = use_launches(arguments.launches, device)
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high")
    deadline = Deadline(arguments.minutes)
    arguments.smoke = device.type == "cpu"
    B, T = (2, TINY["block_size"]) if arguments.smoke else (arguments.rows, GPTConfig().block_size)
    ids = torch.randint(GPTConfig().vocab_size - 1, (B, T + 1)).to(device)  # without the last id, which ends documents
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if arguments.compile_only:
        compile_only(make_ours(arguments.presets[0], arguments.attention[0], "compiled", arguments.smoke), x, y)
        return 0
    facts, peaks = {**hardware(), **card(device)}, ceilings(device)
    print({**facts, **peaks})
    result: dict[str, Any] = {
        "bench": "train_speed",
        "commit": commit_of(ROOT),
        "hardware": facts,
        "ceilings": peaks,
        "launches": rows,
        "rows": B,
        "T": T,
        "dtype": "bfloat16 autocast",
        "steps_a_block": arguments.steps,
    }
    for name in ("peer_nanogpt", "peer_llmc"):
        if checkout := getattr(arguments, name):
            result[name] = commit_of(checkout)
    path = None if arguments.smoke and arguments.out is None else new_result("train_speed", arguments.out or RESULTS)

    def save(measured: Measured) -> None:
        for row in measured.figures.values():
            if row["seconds"]:
                row |= rates(row, B * T, peaks["matmul_tflops"], vendor_flops(facts["gpu"]))
        if path is not None:
            save_results(path, {**result, "sides": measured.figures, "unavailable": measured.refused})

    if arguments.modes != ["eager"] and not arguments.smoke:
        compile_ahead(arguments, COMPILE_SHARE * deadline.left())
        lower_both_passes()
    steps = 1 if arguments.smoke else arguments.steps
    for measured in prepare(make_sides(arguments), x, y, deadline, steps):
        save(measured)
    for number in range(1, 1 if arguments.smoke else arguments.rounds):
        for name in list(measured.steps)[:: -1 if number % 2 else 1]:
            measured.add(name, *block(measured.steps[name], steps, device))
        save(measured)
        if deadline.left() < 0:
            break
    show(measured)
    if arguments.smoke:
        print("smoke test on the CPU passed; its timings mean nothing")
    print("nothing is written" if path is None else f"written: {path}")
    return 0


def show(measured: Measured) -> None:
    for name, row in measured.figures.items():
        if row["seconds"]:
            keys = ("tokens_per_second", "spread", "of_matmul", "mfu", "memory_gib")
            print("  ".join([f"{name:32}", *(f"{key} {row.get(key)}" for key in keys)]))
    for name, reason in measured.refused.items():
        print(f"{name:32}  not measured: {reason}")


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
    parser.add_argument("--out", type=Path, help="folder for the figures (default: bench/results)")
    parser.add_argument("--presets", default=",".join(PRESETS), help="presets of Sprout, separated by commas")
    parser.add_argument("--attention", default="triton,sdpa", help="triton, sdpa, or both")
    parser.add_argument("--modes", default=",".join(MODES), help="some of recorded, compiled, eager")
    parser.add_argument("--launches", type=Path, help="use the launches of this result of bench/tune_attention.py")
    parser.add_argument("--peer-nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--peer-llmc", type=Path, help="a checkout of llm.c")
    parser.add_argument("--rows", type=int, default=32, help="sequences of 1,024 tokens in a step")
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each side")
    parser.add_argument("--minutes", type=float, default=6.5, help="no further side or round is started after them")
    parser.add_argument("--compile_only", action="store_true", help="only fill PyTorch's cache with one compiled side")
    parser.add_argument(
        "--smoke", action="store_true", help="test the script on a CPU with tiny sizes; also with TRITON_INTERPRET=1"
    )
    arguments = parser.parse_args(argv)
    for name, known in (("presets", PRESETS), ("attention", ("triton", "sdpa")), ("modes", MODES)):
        setattr(arguments, name, some(getattr(arguments, name), (), list(known), name))
    if min(arguments.rows, arguments.steps, arguments.rounds) < 1:
        raise UserError("--rows, --steps and --rounds must be at least 1")
    return arguments


if __name__ == "__main__":
    run_script(main)
