"""Cached generation beside nanoGPT's GPT.generate and the memory bandwidth: temperature 0.8, top-k 200, random weights.

    python bench/generate.py --peer=PATH_TO_NANOGPT [--shapes=small,124m] [--runs=N] [--tokens=N] [--threads=N]
                             [--transformers]
    python bench/generate.py --run=RUN                  val loss of a trained model with and without int8

All sides run in this process in turns, so that a change of the machine's speed affects all; each starts with an
uncounted run of a few tokens. Prints tokens/s (medians of the runs) and ratios. Over the first 32 tokens it also prints
the share of the bandwidth bound: the bandwidth at which large matrices are multiplied by a vector, measured in the same
run, divided by the bytes of the weights that a token reads. float32 on a CPU, bfloat16 on a GPU. Writes bench/results/.
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

from bench.hardware import Stopwatch, commit_of, hardware, write_results  # noqa: E402
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
}
Run = Callable[[int], int]  # number of tokens per sample → number of tokens generated in all


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--run", type=Path, help="a trained run: only compare its val loss with and without int8")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--runs", type=int, help="runs of each side (default: 5 of small, 2 of 124m)")
    parser.add_argument("--tokens", type=int, help="tokens of a sample (default: 500 of small, 350 of 124m)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--transformers", action="store_true", help="also measure Hugging Face's GPT-2 with our weights"
    )
    options = parser.parse_args()
    names = options.shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        raise UserError(f"--shapes={options.shapes}: unknown {unknown[0]!r}; expected {', '.join(SHAPES)}")
    if (options.peer is None) == (options.run is None):
        raise UserError(
            "give one of --peer=PATH_TO_NANOGPT (to measure speed) and --run=RUN (to measure the val loss with int8)"
        )
    torch.set_num_threads(options.threads)
    if options.run is not None:
        figures = {**hardware(), "run": options.run.name, **losses_of_int8(options.run)}
        print(f"written: {write_results('generate-int8', figures)}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peer = import_model(options.peer)
    settings = {
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }
    figures = {**hardware(), "peer": commit_of(options.peer), **settings}
    if device.type == "cuda":
        figures["gpu"] = torch.cuda.get_device_name(device)
    for name in names:
        shape, tokens, runs = SHAPES[name]
        figures[name] = measure(
            name,
            peer,
            shape,
            options.tokens or tokens,
            options.runs or runs,
            device=device,
            dtype=dtype,
            transformers=options.transformers,
        )
    print(f"written: {write_results('generate', figures)}")


def measure(
    name: str,
    peer: ModuleType,
    shape: dict[str, Any],
    tokens: int,
    runs: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    transformers: bool,
) -> dict[str, Any]:
    """Runs all sides in turns. Returns shape, ratios, medians, all runs and the bandwidth bound."""
    model = GPT(GPTConfig(**shape, eos_id=None)).eval()
    sides = {
        "sprout": sprout(converted(model, device, dtype)),
        f"sprout x{ROWS}": sprout(converted(model, device, dtype), ROWS),
    }
    if device.type == "cpu":
        sides["sprout int8"] = sprout(quantize(GPT(model.config).eval()))
    sides["nanogpt"] = nanogpt(peer, shape, device, dtype)
    if transformers:
        sides["transformers"] = huggingface(model, device, dtype)
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for run in sides.values():
        run(WARM_UP_TOKENS)
    for _ in range(runs):
        for side, run in sides.items():
            with Stopwatch() as watch:
                drawn = run(tokens)
            measured[side].append({"tokens_per_second": round(drawn / watch.measured["seconds"], 2), **watch.measured})
            print(f"{name:6} {side:12} {measured[side][-1]}", flush=True)
    medians = {side: statistics.median(figures["tokens_per_second"] for figures in measured[side]) for side in sides}
    ratios = {side: round(speed / medians["nanogpt"], 2) for side, speed in medians.items() if side != "nanogpt"}
    print(f"{name:6} {tokens} tokens a sample: nanoGPT {medians['nanogpt']:.1f} tokens/s")
    for side, ratio in ratios.items():
        print(f"{name:6} {side:12} {medians[side]:.1f} tokens/s, {ratio:.2f} times nanoGPT's speed")
    bound = against_bandwidth(name, model, device, dtype)
    return {
        **shape,
        "tokens": tokens,
        "ratios": ratios,
        "median_tokens_per_second": medians,
        "bound": bound,
        "runs": measured,
    }


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


def against_bandwidth(name: str, model: GPT, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Speed over the first CONTEXT tokens relative to the bound of reading all weights per token; medians of five."""
    read = [
        *model.blocks.parameters(),
        *model.final_norm.parameters(),
        model.embed.weight,
    ]  # the embedding as output head; a decode step reads one row of the positions, which is not counted
    weights = sum(parameter.numel() for parameter in read) * dtype.itemsize
    run = sprout(converted(model, device, dtype))
    reads, speeds = [], []
    matrices = [torch.randn(3072, 768, device=device, dtype=dtype) for _ in range(60 if device.type == "cpu" else 400)]
    vector = torch.randn(1, 768, device=device, dtype=dtype)
    run(CONTEXT)
    for _ in range(5):
        with torch.inference_mode():
            began = time.perf_counter()
            for matrix in matrices:
                F.linear(vector, matrix)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
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
