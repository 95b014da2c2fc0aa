"""Where the time of a compiled training step and of a decode step goes on a GPU: kernels by kind, idle time, host.

    python bench/gpu_profile.py --out=DIR [--minutes=1.5] [--launches=RESULT.json]
    python bench/gpu_profile.py --smoke                     tests this script on a CPU, tiny, written only to --out

Decoding: bench/generate.py's 124m, one sample and ROWS. `loop_us` is the time of a step, which is one token of every
sample, of whole requests. `replays` are the CUDA graphs that the loop replays (generation/cuda_graphs.py), alone:
REPLAYS of each in a row, then one wait, so without Python's loop and without reading ids on the host; `host_us` is the
time of one call while the GPU is idle, which is what the host needs to queue it. `replays_us` adds them up as the loop
uses them: what `loop_us` has beyond it is the host's. Then torch.profiler's kernels of a request of PROFILED_TOKENS;
those of replayed graphs come from CUPTI, one by one.

Training: bench/train_speed.py's compiled step with the fused kernels. `wall_us` is measured without the profiler.
STEPS steps are profiled one by one with the kernels alone, and one more with the operators that launched them, for the
shapes and rates of the products (`products`). The step waits for the device once, before the optimizer: kernels after
the last copy to the host are the optimizer's (`optimizer: …`), among them Muon's products. A trial does not compile.

Decoding goes first and without the profiler before any profiling, so that nothing of CUPTI slows it. Where the
profiler shows no kernels, all but the tables is measured and a line says so. DIR/DATE-gpu_profile.json is written after
each model and batch. Needs torch, triton and numpy.

Reading order: bench/gpu_kernels.py, which says what the figures of a table are; then decoding, training, main.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import train_speed  # noqa: E402
from bench.generate import ROWS, SHAPES, TOP_K, converted, sprout  # noqa: E402
from bench.gpu import Deadline, Run, card, ceilings, choose_device, reasons, synchronize, use_launches  # noqa: E402
from bench.gpu_kernels import busy_and_gaps, groups_of_step, kernels_of, products_of, summarize  # noqa: E402
from bench.gpu_part import LEFT_OUT  # noqa: E402
from bench.gpu_report import profile as report  # noqa: E402
from bench.hardware import RESULTS, commit_of, hardware, new_result, save_results  # noqa: E402
from errors import run_script  # noqa: E402
from generation import cuda_graphs, transfer  # noqa: E402
from generation.direct_calls import with_direct_calls  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

WARM_UP, WALL_STEPS, STEPS = 6, 8, 3  # training steps: before anything counts, timed, profiled
BATCH = 32  # sequences of 1,024 tokens in a training step
REPLAYS, LOOPS, PROFILED_TOKENS = 200, 3, 64
COMPILE_SHARE = 0.7  # of the time that is left after decoding
LAST_START = 8.0  # seconds: with less time left no further model is trained


# ---- Decoding --------------------------------------------------------------------------------------------------------


def seconds_of(run: Run, count: int, device: torch.device) -> float:
    """Seconds of one of `count` runs, which are queued without a wait between them."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        run()
    synchronize(device)
    return (time.perf_counter() - begin) / count


@contextmanager
def recorded(model: GPT, rows: int, dtype: torch.dtype) -> Iterator[dict[str, Run]]:
    """The graphs that a request of so many samples has recorded: "64 slots", "128 slots", … and "draw". Empty without a
    GPU. All rows are idle, so that no replay lengthens them."""
    device = model.embed.weight.device
    if not transfer.is_gpu(device):
        yield {}
        return
    direct = with_direct_calls(model)
    with torch.inference_mode(), cuda_graphs.lent(model, direct, rows, rows, device, dtype) as decoder:
        cache = decoder.new_cache(rows)
        for row in range(rows):
            cache.make_idle(row)
        runs: dict[str, Run] = {
            f"{span} slots": replay for (count, span), replay in sorted(decoder.steps.items()) if count == rows
        }
        draws = [replay for key, replay in decoder.draws.items() if key[0] == rows]
        yield runs | {"draw": draws[-1]}


def replays_of_a_loop(replays: Mapping[str, Mapping[str, float]], tokens: int) -> float | None:
    """µs of a step and its draw, on average over the first `tokens` steps of an empty cache."""
    spans = sorted(int(name.split()[0]) for name in replays if name != "draw")
    if not spans:
        return None
    used = [next((span for span in spans if span >= length), spans[-1]) for length in range(1, tokens + 1)]
    return round(sum(replays[f"{span} slots"]["us"] for span in used) / tokens + replays["draw"]["us"], 1)


def time_decoding(model: GPT, rows: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """The loop and its graphs without the profiler."""
    device, run = model.embed.weight.device, sprout(model, rows)
    run(tokens)  # records

    def loop_us(tokens: int) -> float:
        return 1e6 / tokens * statistics.median(seconds_of(lambda: run(tokens), 1, device) for _ in range(LOOPS))

    figures: dict[str, Any] = {"tokens": tokens, "loop_us": round(loop_us(tokens), 1)}
    short = min(PROFILED_TOKENS, tokens)
    figures |= {"profiled_tokens": short, "profiled_loop_us": round(loop_us(short), 1), "replays": {}}
    with recorded(model, rows, dtype) as replays:
        for name, replay in replays.items():
            alone = []
            for _ in range(20):
                synchronize(device)
                begin = time.perf_counter()
                replay()
                alone.append(time.perf_counter() - begin)
            us = {"us": seconds_of(replay, REPLAYS, device), "host_us": statistics.median(alone)}
            figures["replays"][name] = {key: round(1e6 * value, 1) for key, value in us.items()}
    figures["replays_us"] = replays_of_a_loop(figures["replays"], tokens)
    return figures


def profile_decoding(model: GPT, rows: int, dtype: torch.dtype, figures: dict[str, Any]) -> None:
    """Adds to the figures of time_decoding: each graph's kernels, and those of a request."""
    device, run, tokens = model.embed.weight.device, sprout(model, rows), figures["profiled_tokens"]
    with recorded(model, rows, dtype) as replays:
        for name, replay in replays.items():
            kernels = kernels_of(replay, device)
            busy = round(busy_and_gaps(kernels)[0], 1)
            figures["replays"][name] |= {"busy_us": busy, "launches": len(kernels)}
    kernels = kernels_of(lambda: run(tokens), device)
    figures["loop"] = summarize([kernels], tokens, figures["profiled_loop_us"])


def measure_decoding(result: dict[str, Any], device: torch.device, save: Callable[[], None]) -> None:
    shape, tokens, _ = SHAPES["tiny" if result["smoke"] else "124m"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = converted(GPT(GPTConfig(**shape, eos_id=None)).eval(), device, dtype)
    sides = {"one sample": 1, f"{ROWS} samples": ROWS}
    for name, rows in sides.items():
        with reasons(result["unavailable"], f"decoding, {name}"):
            result["decoding"][name] = time_decoding(model, rows, tokens, dtype)
            save()
    for name, figures in result["decoding"].items():
        with reasons(result["unavailable"], f"decoding, {name}, profile"):
            profile_decoding(model, sides[name], dtype, figures)
        save()
    cuda_graphs.drop_kept()


# ---- Training --------------------------------------------------------------------------------------------------------


def profile_training(
    preset: str, x: Tensor, y: Tensor, result: dict[str, Any], deadline: Deadline, save: Callable[[], None]
) -> None:
    device, tiny = x.device, result["smoke"]
    warm_up, timed, profiled = (1, 1, 1) if tiny else (WARM_UP, WALL_STEPS, STEPS)
    side = train_speed.make_ours(
        preset, "triton", "eager" if tiny else "compiled", tiny
    )  # compiling takes most of a trial
    step = train_speed.make_step(side, x, y)
    begin = time.perf_counter()
    for _ in range(warm_up):
        step()
    print(f"{preset}: warm after {time.perf_counter() - begin:.0f} s", flush=True)
    wall_us = 1e6 * train_speed.block(step, timed, device)[0]
    figures = result["training"][preset] = {"wall_us": round(wall_us, 1)}
    save()
    with reasons(result["unavailable"], f"training {preset}, profile"):
        kernels_of(step, device)  # the profiler's first record takes longer
        sessions = [kernels_of(step, device) for _ in range(profiled)]
        figures |= summarize(sessions, profiled, wall_us, groups_of_step)
        save()
        if deadline.left() < 0:
            result["unavailable"][f"training {preset}, products"] = "out of time"
        else:
            figures["products"] = products_of(step, device, result["ceilings"]["matmul_tflops"])


def measure_training(
    result: dict[str, Any], device: torch.device, deadline: Deadline, save: Callable[[], None]
) -> None:
    presets = list(train_speed.PRESETS)
    B, T = (2, train_speed.TINY["block_size"]) if result["smoke"] else (BATCH, GPTConfig().block_size)
    result |= {"rows": B, "T": T}
    ids = torch.randint(GPTConfig().vocab_size - 1, (B, T + 1)).to(device)  # without the last id, which ends documents
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if not result["smoke"]:
        sides = argparse.Namespace(presets=presets, attention=["triton"], rows=B, smoke=False)
        train_speed.compile_ahead(sides, COMPILE_SHARE * deadline.left())
        train_speed.lower_both_passes()
    for preset in presets:
        if deadline.left() < LAST_START:
            result["unavailable"][f"training {preset}"] = "out of time"
            continue
        with reasons(result["unavailable"], f"training {preset}"):
            profile_training(preset, x, y, result, deadline, save)
        save()
        if device.type == "cuda":
            torch.cuda.empty_cache()


# ---- The script ------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> Iterator[str]:
    """The longest kernels, products and gaps, which the report leaves to the log and the result."""
    loops = {f"decoding, {name}": row.get("loop", {}) for name, row in result["decoding"].items()}
    for name, row in {**loops, **result["training"]}.items():
        if "kernels" in row:
            yield f"\n{name}: the longest kernels, µs a step, launches, µs each"
        for kernel in row.get("kernels", ()):
            yield f"{kernel['us']:10.1f} {kernel['launches']:7.1f} {kernel['us_each']:9.2f}  {kernel['name']}"
        if row.get("products"):
            yield f"\n{name}: products of a step, µs, times, TFLOP/s"
        for product in row.get("products", ()):
            yield f"{product['us']:10.1f} {product['launches']:5} {product['tflops']:7.1f}  {product['shapes']}"
        if row.get("gaps"):
            yield f"\n{name}: the longest waits of a profiled step, µs"
        for gap in row.get("gaps", ()):
            yield f"{gap['us']:10.1f}  after {gap['after'][:60]}, before {gap['before'][:60]}"


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    device, deadline = choose_device("bench/gpu_profile.py", "--smoke", arguments.smoke), Deadline(arguments.minutes)
    # what torch.profiler does itself for Inductor's CUDA graphs: CUPTI's end and new start crash with them
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    launches = use_launches(arguments.launches, device)
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high")
    result: dict[str, Any] = {
        "bench": "gpu_profile",
        "commit": commit_of(ROOT),
        "hardware": {**hardware(), **card(device)},
        "ceilings": ceilings(device),
        "launches": launches,
        "smoke": device.type == "cpu",
        "top_k": TOP_K,
        "decoding": {},
        "training": {},
        "unavailable": {},
    }
    path = None if result["smoke"] and arguments.out is None else new_result("gpu_profile", arguments.out or RESULTS)

    def save() -> None:
        if path is not None:
            save_results(path, result)

    measure_decoding(result, device, save)
    measure_training(result, device, deadline, save)
    save()
    print("\n".join([*report(result), *tables(result)]))
    if result["smoke"]:
        print("tested on the CPU: its timings mean nothing")
    print("nothing is written" if path is None else f"written: {path}")
    unprofiled = [name for name in result["unavailable"] if name.endswith("profile")]
    if unprofiled:
        print(f"{LEFT_OUT}{', '.join(unprofiled)}: {result['unavailable'][unprofiled[0]]}; wall times alone")
    return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the figures (default: bench/results)")
    parser.add_argument("--launches", type=Path, help="use the launches of this result of bench/tune_attention.py")
    parser.add_argument("--minutes", type=float, default=1.5, help="no further model is started at their end")
    parser.add_argument(
        "--smoke", action="store_true", help="test the script on a CPU with tiny sizes; also with TRITON_INTERPRET=1"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main)
