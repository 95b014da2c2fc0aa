"""Cached generation beside nanoGPT's GPT.generate: equal shapes, one row, temperature 0.8, top-k 200, float32, random weights.

    python bench/generate.py --peer=PATH_TO_NANOGPT [--shapes=small,124m] [--runs=N] [--tokens=N] [--threads=N]

Both run in this process, in turns, so that a machine that slows down slows both; an uncounted run of a few tokens each comes first.
Prints tokens/s (medians of the runs) and their ratio, and writes them to bench/results/ with the machine and how busy it was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

import torch  # noqa: E402

from bench.hardware import Stopwatch, commit_of, hardware, write_results  # noqa: E402
from bench.peer import import_model  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from generation.engine import generate  # noqa: E402
from generation.options import SamplingOptions  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

TEMPERATURE, TOP_K, WARM_UP_TOKENS = 0.8, 200, 5
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {  # name: (shape, tokens of a run, runs of each side)
    "small": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65}, 500, 5),
    "124m": ({"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50_257}, 350, 2),
}
Run = Callable[[int], None]  # draws so many tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--runs", type=int, help="runs of each side; 5 of small and 2 of 124m without it")
    parser.add_argument("--tokens", type=int, help="tokens of a run; 500 of small and 350 of 124m without it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    names = options.shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        raise UserError(f"--shapes={options.shapes}: unknown {unknown[0]!r}; expected {', '.join(SHAPES)}")
    torch.set_num_threads(options.threads)
    peer = import_model(options.peer)
    settings = {"temperature": TEMPERATURE, "top_k": TOP_K, "rows": 1, "dtype": "float32", "device": "cpu"}
    figures = {**hardware(), "peer": commit_of(options.peer), **settings}
    for name in names:
        shape, tokens, runs = SHAPES[name]
        figures[name] = measure(name, peer, shape, options.tokens or tokens, options.runs or runs)
    print(f"written: {write_results('generate', figures)}")


def measure(name: str, peer: ModuleType, shape: dict[str, Any], tokens: int, runs: int) -> dict[str, Any]:
    """Both sides in turns → shape, ratio, medians and all runs."""
    sides = {"sprout": sprout(shape), "nanogpt": nanogpt(peer, shape)}
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for run in sides.values():
        run(WARM_UP_TOKENS)
    for _ in range(runs):
        for side, run in sides.items():
            with Stopwatch() as watch:
                run(tokens)
            measured[side].append({"tokens_per_second": round(tokens / watch.measured["seconds"], 2), **watch.measured})
            print(f"{name:6} {side:8} {measured[side][-1]}", flush=True)
    medians = {side: statistics.median(figures["tokens_per_second"] for figures in measured[side]) for side in sides}
    ratio = round(medians["sprout"] / medians["nanogpt"], 2)
    print(f"{name:6} {tokens} tokens: {medians['sprout']:.1f} and {medians['nanogpt']:.1f} tokens/s, {ratio:.2f} times nanoGPT's speed")
    return {**shape, "tokens": tokens, "ratio": ratio, "median_tokens_per_second": medians, "runs": measured}


def sprout(shape: dict[str, Any]) -> Run:
    model = GPT(GPTConfig(**shape, eos_id=None)).eval()

    def run(tokens: int) -> None:
        options = SamplingOptions(max_new_tokens=tokens, temperature=TEMPERATURE, top_k=TOP_K, stop_at_eos=False)
        drawn = sum(event.token is not None for event in generate(model, [[0]], options, seed=0))
        assert drawn == tokens

    return run


def nanogpt(peer: ModuleType, shape: dict[str, Any]) -> Run:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        model = peer.GPT(peer.GPTConfig(**shape, bias=True, dropout=0.0)).eval()

    def run(tokens: int) -> None:
        ids = model.generate(torch.zeros(1, 1, dtype=torch.int64), tokens, temperature=TEMPERATURE, top_k=TOP_K)
        assert ids.shape == (1, 1 + tokens)

    return run


if __name__ == "__main__":
    run_script(main)
