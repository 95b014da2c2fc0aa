"""Cached generation, against the memory's bandwidth and nanoGPT's GPT.generate. Random weights.

    python bench/generate.py [--peer=PATH_TO_NANOGPT] [--shapes=small,124m] [--runs=N] [--tokens=N] [--threads=N]
                             [--transformers] [--out=DIR]
    python bench/generate.py --run=RUN                  val loss of a trained model with and without int8

Temperature 0.8, top-k 200. All sides run in this process in turns, so that a change of the machine's speed affects all;
each starts with a request that is timed apart (`first_request`): of a few tokens on a CPU, of the full length on a GPU,
where it records CUDA graphs. Prints tokens/s (medians of the others) and ratios. float32 on a CPU, bfloat16 on a GPU.

The bandwidth bound is the bandwidth over the bytes that a step must read: all weights once, and the keys and values of
every row. On a GPU the bandwidth is that of a copy of 1 GiB, and each of our sides is compared with its bound. On a CPU
it is that of large matrices multiplied by a vector, and compared with one sample of 32 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from bench.gpu import card, ceilings, use_launches  # noqa: E402
from bench.hardware import RESULTS, Stopwatch, commit_of, hardware, new_result, save_results, write_results  # noqa: E402
from bench.peer import import_model  # noqa: E402
from common.weights import export_weights, import_weights  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from generation.engine import generate  # noqa: E402
from generation.options import SamplingOptions  # noqa: E402
from generation.quantize import quantize  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

TEMPERATURE, TOP_K, WARM_UP_TOKENS = 0.8, 200, 5
CONTEXT, ROWS = 32, 16
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {  # name: (shape, tokens of a run, runs of each side)
    "small": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65}, 500, 5),
    "124m": ({"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50_257}, 350, 2),
    "tiny": ({"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 65}, 8, 2),  # to try this out
}
GPU_RUNS = 7  # default on a GPU, where a run takes a fraction of a second
Run = Callable[[int], int]  # number of tokens per sample → number of tokens generated in all


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--run", type=Path, help="a trained run: only compare its val loss with and without int8")
    parser.add_argument("--shapes", default="small,124m")
    parser.add_argument("--runs", type=int, help="runs of each side (default: 5 of small, 2 of 124m; 7 on a GPU)")
    parser.add_argument("--tokens", type=int, help="tokens of a sample (default: 500 of small, 350 of 124m)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--launches", type=Path, help="use the launches of this result of bench/tune_attention.py")
    parser.add_argument(
        "--transformers", action="store_true", help="also measure Hugging Face's GPT-2 with our weights"
    )
    options = parser.parse_args(argv)
    names = options.shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        raise UserError(f"--shapes={options.shapes}: unknown {unknown[0]!r}; expected {', '.join(SHAPES)}")
    if options.peer is not None and options.run is not None:
        raise UserError("--peer measures speed, --run the val loss with int8: give one of them")
    torch.set_num_threads(options.threads)
    if options.run is not None:
        figures = {**hardware(), "run": options.run.name, **losses_of_int8(options.run)}
        print(f"written: {write_results('generate-int8', figures, options.out)}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures = {
        "bench": "generate",
        **hardware(),
        "commit": commit_of(ROOT),
        "launches": use_launches(options.launches, device),
    }
    if options.peer is not None:
        figures["peer"] = commit_of(options.peer)
    figures |= {
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }
    if device.type == "cuda":
        figures |= {**card(device), "ceilings": ceilings(device)}
    path = new_result("generate", options.out)
    for name in names:
        figures[name] = measure(name, options, device, dtype, figures.get("ceilings"))
        save_results(path, figures)
    print(f"written: {path}")


def measure(
    name: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype, peaks: dict[str, float] | None
) -> dict[str, Any]:
    """Runs all sides in turns. Returns shape, ratios, medians, all runs and the bandwidth bound. peaks: those of
    bench/gpu.py, on a GPU."""
    shape, tokens, runs = SHAPES[name]
    tokens, runs = options.tokens or tokens, options.runs or (runs if peaks is None else GPU_RUNS)
    model = GPT(GPTConfig(**shape, eos_id=None)).eval()
    sides = {
        "sprout": sprout(converted(model, device, dtype)),
        f"sprout x{ROWS}": sprout(converted(model, device, dtype), ROWS),
    }
    if device.type == "cpu":
        sides["sprout int8"] = sprout(quantize(GPT(model.config).eval()))
    if options.peer is not None:
        sides["nanogpt"] = nanogpt(import_model(options.peer), shape, device, dtype)
    if options.transformers:
        sides["transformers"] = huggingface(model, device, dtype)
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    first = {side: timed(run, WARM_UP_TOKENS if device.type == "cpu" else tokens) for side, run in sides.items()}
    for _ in range(runs):
        for side, run in sides.items():
            measured[side].append(timed(run, tokens))
            print(f"{name:6} {side:12} {measured[side][-1]}", flush=True)
    medians = {side: statistics.median(figures["tokens_per_second"] for figures in measured[side]) for side in sides}
    for side, speed in medians.items():
        ratio = f", {speed / medians['nanogpt']:.2f} times nanoGPT's speed" if "nanogpt" in medians else ""
        print(f"{name:6} {side:12} {speed:.1f} tokens/s, {tokens} tokens a sample{ratio}")
    if peaks is None:
        bound: dict[str, Any] = against_bandwidth(name, model, device, dtype)
    else:
        bound = {
            side: against_copy(name, side, model, rows, tokens, medians[side], peaks["copy_tb_per_second"])
            for side, rows in (("sprout", 1), (f"sprout x{ROWS}", ROWS))
        }
    return {
        **shape,
        "tokens": tokens,
        "ratios": {
            side: round(speed / medians["nanogpt"], 2)
            for side, speed in medians.items()
            if side != "nanogpt" and "nanogpt" in medians
        },
        "median_tokens_per_second": medians,
        "first_request": first,
        "bound": bound,
        "runs": measured,
    }


def timed(run: Run, tokens: int) -> dict[str, float]:
    with Stopwatch() as watch:
        drawn = run(tokens)
    return {"tokens_per_second": round(drawn / watch.measured["seconds"], 2), **watch.measured}


def converted(model: GPT, device: torch.device, dtype: torch.dtype) -> GPT:
    """A copy on `device` with all parameters in `dtype`, as load_model makes it."""
    copy = GPT(model.config, seed=None).eval()
    import_weights(copy, export_weights(model))
    copy.to(device)
    for parameter in copy.parameters():
        parameter.data = parameter.data.to(dtype)
    return copy


def sprout(model: GPT, rows: int = 1, temperature: float = TEMPERATURE) -> Run:
    prompt = [0]

    def run(tokens: int) -> int:
        options = SamplingOptions(max_new_tokens=tokens, temperature=temperature, top_k=TOP_K, stop_at_eos=False)
        drawn = sum(event.token is not None for event in generate(model, [prompt] * rows, options, seed=0))
        assert drawn == rows * tokens
        return drawn

    return run


def nanogpt(peer: ModuleType, shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Run:
    """In the same precision by autocast. Its sample.py draws samples one by one, so this is its speed for many, too."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        model = peer.GPT(peer.GPTConfig(**shape, bias=True, dropout=0.0)).eval().to(device)

    def run(tokens: int) -> int:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            ids = model.generate(
                torch.zeros(1, 1, dtype=torch.int64, device=device), tokens, temperature=TEMPERATURE, top_k=TOP_K
            )
        assert ids.shape == (1, 1 + tokens)
        return tokens

    return run


def huggingface(model: GPT, device: torch.device, dtype: torch.dtype) -> Run:
    """transformers' GPT-2 with our weights. Raises UserError if its greedy ids differ from ours in float32."""
    try:
        import transformers
    except ImportError:
        raise UserError("--transformers needs the package: pip install transformers") from None
    c = model.config
    names = {
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_embd": c.n_embd,
        "n_positions": c.block_size,
        "vocab_size": c.vocab_size,
    }
    with contextlib.redirect_stderr(io.StringIO()):
        other = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**names, bos_token_id=None, eos_token_id=None)
        ).eval()
    state = {
        "transformer.wte.weight": model.embed.weight[: c.vocab_size],
        "transformer.wpe.weight": model.position.weight,
    }
    state |= {"lm_head.weight": model.embed.weight[: c.vocab_size]}
    places = {"attn_norm": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp_norm": "ln_2"}
    places |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for i, block in enumerate(model.blocks):
        for ours, theirs in places.items():
            part = block.get_submodule(ours)
            weight = part.weight.T if part.weight.ndim == 2 else part.weight  # theirs are (in, out)
            state |= {f"transformer.h.{i}.{theirs}.weight": weight, f"transformer.h.{i}.{theirs}.bias": part.bias}
    state |= {"transformer.ln_f.weight": model.final_norm.weight, "transformer.ln_f.bias": model.final_norm.bias}
    other.load_state_dict(state)
    other.to(device, dtype)

    def ids(tokens: int, **options: Any) -> list[int]:
        prompt = torch.zeros(1, 1, dtype=torch.int64, device=device)
        with torch.inference_mode():
            out = other.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens, **options
            )
        drawn: list[int] = out[0, 1:].tolist()
        return drawn

    count = min(16, c.block_size - 1)
    greedy = SamplingOptions(max_new_tokens=count, temperature=0.0, stop_at_eos=False)
    ours = [
        event.token for event in generate(converted(model, device, dtype), [[0]], greedy, 0) if event.token is not None
    ]
    if (theirs := ids(count, do_sample=False)) != ours and dtype == torch.float32:
        raise UserError(f"transformers generates other greedy ids with the same weights: {theirs}, expected {ours}")

    def run(tokens: int) -> int:
        done = 0
        while done < tokens:  # it stops at n_positions: start a new text each time the context is full
            drawn = ids(min(tokens - done, c.block_size - 1), do_sample=True, temperature=TEMPERATURE, top_k=TOP_K)
            done += len(drawn)
        return done

    return run


def weight_count(model: GPT) -> int:
    """Numbers that a decode step reads: the embedding as output head; one row of the positions is not counted."""
    read = [*model.blocks.parameters(), *model.final_norm.parameters(), model.embed.weight]
    return sum(parameter.numel() for parameter in read)


def against_copy(
    name: str, side: str, model: GPT, rows: int, tokens: int, speed: float, copy_tb_per_second: float
) -> dict[str, float]:
    """Tokens/s relative to the bound of reading in bfloat16, for each step, all weights and the keys and values of the
    rows, half as many as there are tokens in the end."""
    c = model.config
    cached = rows * min(tokens, c.block_size) / 2 * 2 * c.n_layer * c.kv_heads * c.head_size
    size = torch.bfloat16.itemsize * (weight_count(model) + cached)
    bound = rows * 1e12 * copy_tb_per_second / size
    print(f"{name:6} {side:12} {speed / bound:.0%} of the bound {bound:.0f} tokens/s ({size / 1e6:.0f} MB a step)")
    return {"tokens_per_second": round(bound, 1), "bytes_of_a_step": round(size), "share": round(speed / bound, 3)}


def against_bandwidth(name: str, model: GPT, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Speed over the first CONTEXT tokens relative to the bound of reading all weights per token; medians of five."""
    weights = weight_count(model) * dtype.itemsize
    run = sprout(converted(model, device, dtype))
    reads, speeds = [], []
    matrices = [torch.randn(3072, 768, device=device, dtype=dtype) for _ in range(60)]
    vector = torch.randn(1, 768, device=device, dtype=dtype)
    run(CONTEXT)
    for _ in range(5):
        with torch.inference_mode():
            began = time.perf_counter()
            for matrix in matrices:
                F.linear(vector, matrix)
            reads.append(sum(matrix.numel() for matrix in matrices) * dtype.itemsize / (time.perf_counter() - began))
        began = time.perf_counter()
        run(CONTEXT)
        speeds.append(CONTEXT / (time.perf_counter() - began))
    bandwidth, speed = statistics.median(reads), statistics.median(speeds)
    bound = bandwidth / weights
    print(f"{name:6} context {CONTEXT}: {speed:.1f} tokens/s, {speed / bound:.0%} of the bound {bound:.1f}", end=" ")
    print(f"({weights / 1e6:.1f} MB a token at {bandwidth / 1e9:.1f} GB/s)")
    return {
        "tokens_per_second": speed,
        "bytes": weights,
        "bytes_per_second": bandwidth,
        "share": round(speed / bound, 3),
    }


def losses_of_int8(run: Path) -> dict[str, float]:
    """Val loss of a run's best weights, plain and in int8. Raises UserError if its dataset is missing."""
    # imported here because the speed bench also runs where only torch, triton and numpy are installed
    from checkpoint import open_latest, resolve_model_folder
    from generation.text import load_model
    from prepare_data.shards import open_dataset
    from training.evaluation import evaluate

    saved = open_latest(run)
    val = open_dataset(Path(saved.state["dataset"]["path"])).val
    model, tokenizer = load_model(resolve_model_folder(run, "best"), torch.device("cpu"))

    def loss() -> float:
        result = evaluate(model, val, tokenizer.token_bytes, autocast=contextlib.nullcontext)
        assert result is not None
        return result.loss

    plain = loss()
    quantize(model)
    rounded = loss()
    print(f"{run}: val loss {plain:.4f}, in int8 {rounded:.4f} ({rounded - plain:+.5f})")
    return {"val_loss": plain, "val_loss_int8": rounded}


if __name__ == "__main__":
    run_script(main)
