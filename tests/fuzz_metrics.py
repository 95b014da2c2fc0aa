"""training.report and training.reference on odd lines in metrics.jsonl, with an odd config.json now and then."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path

from tests.fuzz_values import VALUES, Tries, as_json, edit, edit_bytes, memory_folder
from training.report import draw, page, read_facts, read_metrics

SCORES = {"val_loss": 3.0, "standard_error": 0.1, "perplexity": 20.0, "bits_per_byte": 2.0, "targets": 999}
TIMING = {"tokens_per_second": 5e4, "seconds": 1.5, "train_seconds": 2.0, "memory_bytes": 10**8, "mfu": None}
LINES = [
    {"event": "eval", "step": 0, **SCORES, "train_loss": None, "timing": {"train_seconds": 1.0}},
    {"event": "eval", "step": 9, **SCORES, "train_loss": 2.5, "timing": {"train_seconds": 2.0}},
    {
        "event": "step",
        "step": 5,
        "loss": 3.5,
        "learning_rate": 0.01,
        "grad_norm": 0.5,
        "tokens": 2560,
        "timing": TIMING,
    },
    {
        "event": "step",
        "step": 9,
        "loss": 3.2,
        "learning_rate": 0.01,
        "grad_norm": 0.4,
        "tokens": 4608,
        "timing": TIMING,
    },
    {"event": "plan", "step": 3, "timing": {"max_steps": 40, "decay_steps": 8}},
    {"event": "patience", "step": 8, "max_steps": 20, "decay_steps": 2},
    {"event": "kept", "step": 0, "name": "old", "val_loss": 3.0, "before": None},
    {"event": "kept", "step": 9, "name": "old", "val_loss": 3.1, "before": 3.0},
    {"event": "skip", "step": 4, "loss": "nan", "grad_norm": "nan"},
    {"event": "final", "step": 9, **SCORES},
    {"event": "rollback", "step": 9, "to": 4},
]
CONFIG = {"format": "sprout-config", "version": 1, "auto": {}, "options": {"max_steps": 20, "tokens_per_step": 512}}
CONFIG["options"] |= {"data": "notes", "n_layer": 2, "learning_rate": 0.01}  # type: ignore[operator]
DRAWN = 2000  # one of so many is drawn, too, which takes half a second


def run(examples: int, seed: int) -> list[str]:
    rng, tries = random.Random(seed), Tries()
    with memory_folder() as home, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(home)
        for number in range(examples):
            lines = [_line(rng) for _ in range(rng.randint(1, 8))]
            (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + rng.choice((b"\n", b"")))
            if number % 20 == 0:
                (folder / "config.json").write_bytes(as_json(edit(CONFIG, rng)))
            tries.attempt(lambda: _report(folder, number % DRAWN == 0), lines)  # noqa: B023
    return tries.problems


def _report(folder: Path, is_drawn: bool) -> None:
    lines = read_metrics(folder)
    facts = read_facts(folder, lines)
    text = page("name", facts, [], draw(lines, facts) if is_drawn else b"")
    if "<script" in text or "\x1b" in text:
        raise AssertionError("text from outside is in the page as it was")


def _line(rng: random.Random) -> bytes:
    line, how = rng.choice(LINES), rng.random()
    if how < 0.4:
        return as_json(edit(line, rng))
    if how < 0.5:
        return json.dumps({**line, rng.choice([*line]): "<script>\x1b"}).encode()
    if how < 0.7:
        return edit_bytes(as_json(line), rng)
    if how < 0.75:
        return as_json(rng.choice(VALUES))
    return as_json(line)
