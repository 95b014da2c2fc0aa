"""state.json of a checkpoint, edited in any way and signed again, as all that reads it does: types, progress, chain,
options."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import config
from config.resume import check_stored, resumed_options
from config.start import Chain
from files import json_bytes
from state_file import build, read_state
from tests.fuzz_values import Tries, as_json, edit, edit_bytes, memory_folder
from training.state import Progress
from training.stored import read_progress

SUMS = {"nats": [3.5, 4.5, 5.0], "counts": [10, 10, 9]}


def example() -> dict[str, Any]:
    """A state in which every entry is there."""
    history = [
        {"step": at, "val_loss": 3.0 + at, "train_loss": 2.5, "standard_error": 0.1, "clear_rise": None}
        for at in (2, 4)
    ]
    dataset = {"name": "notes", "path": "/data/notes", "fingerprint": "ab" * 32, "example_prompt": None}
    progress = {"step": 4, "evaluated_step": 4, "finished_step": 4, "log_loss": 0.5, "log_count": 1, "eval_loss": 0.0}
    progress |= {"eval_count": 0, "skipped": 0, "history": history, "best": [SUMS], "stale": 1, "early_decay": 3}
    progress |= {"bar": {"step": 2, "val_loss": 5.0, "compared": [SUMS]}, "grad_scaler": {"scale": 2.0}}
    progress |= {"kept": [{"val_loss": 4.0, "compared": [SUMS]}]}
    return {
        "step": 4, "val_loss": 3.0, "val_bits_per_byte": 2.0, "samples": 64, "tokens": 2048, "progress": progress,
        "dataset": dataset, "environment": {"torch": "2.13", "threads": 1, "cuda": None, "world_size": 1},
        "options": config.load("train.py", ["debug"]).flat(), "auto": {"device": "no GPU"},
        "logs": {"metrics.jsonl": 100, "samples.txt": 20}, "kept": [dataset], "teachers": [{"bytes": 9, "crc32": 5}],
        "chain": {"run": "r", "arguments": ["debug"], "length": ["--max_steps=9"], "minutes": 2.0, "teachers": ["t"]},
    }  # fmt: skip


def run(examples: int, seed: int) -> list[str]:
    rng, tries, whole = random.Random(seed), Tries(), example()
    resume = config.load("train.py", ["--resume=run"])
    with memory_folder() as home:
        path = Path(home, "state.json")
        for number in range(examples):
            data = json_bytes(whole) if number == 0 else as_json(_edited(whole, rng))
            path.write_bytes(data if rng.random() < 0.95 else edit_bytes(data, rng))

            def read(number: int = number) -> None:
                state = read_state(path)
                read_progress(Progress, state)
                build(Chain, state, "chain")
                if number % 8 == 0:  # slower than all else
                    check_stored(resume, state)
                    resumed_options(resume, state["options"])
                _ = state["dataset"]["path"], state["logs"], state["auto"], state["environment"], state["val_loss"]

            tries.attempt(read, data[:2000])
    return tries.problems


def _edited(whole: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Options are most of a state, and one entry of many."""
    part = rng.choice(("progress", "progress", "", "options", "chain"))
    if not part:
        return edit(whole, rng)  # type: ignore[no-any-return]
    return {**whole, part: edit(whole[part], rng)}
