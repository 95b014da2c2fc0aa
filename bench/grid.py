"""Runs of train.py over texts, settings and seeds: the plan beside settings by hand, or one change at a time.

    python bench/grid.py --text=novel.txt --text=folder --settings=FILE [--seeds=1337] [-- --budget_minutes=3]

FILE has a setting per line, `name: --option=value …`; lines that start with # are comments. A setting without options
is the plan's own run. Options after -- are added to every setting. Texts, settings and seeds are run in that order, so
that neighbors are near each other in time on a machine whose speed varies. The figure is bits per byte of the whole val
split, which is the same text for all tokenizers, at the checkpoint that sample.py takes, and at the last step.

Figures are saved after every run under --name; with the same name again, what is measured already is not repeated, so
a grid may take several days. A run that a signal ends is not counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

from bench.hardware import RESULTS, commit_of, hardware, save_results  # noqa: E402
from bench.peer import run_process  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from files import read_json  # noqa: E402

PLAN = "plan"
SCORED = re.compile(r"val loss ([\d.]+).* ([\d.]+) bits per byte")


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    path = arguments.results / f"{arguments.name}.json"
    figures = read_json(path) if path.exists() else {"bench": "grid", "hardware": hardware(), "runs": []}
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as folder:
        for text in arguments.text:
            for seed in arguments.seeds:
                for name, flags in arguments.settings.items():
                    cell = {"text": text.stem, "setting": name, "seed": seed, "flags": [*flags, *arguments.sprout]}
                    if any({**run, **cell} == run for run in figures["runs"]):
                        continue
                    figures["runs"].append({**cell, **run_once(cell, text, arguments.data_dir, Path(folder))})
                    save_results(path, figures)
    show(figures["runs"])
    print(f"written: {path}")
    return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, action="append", required=True, help="a file or a folder; may be repeated")
    parser.add_argument("--settings", type=Path, help="a file of lines `name: flags` (default: the plan alone)")
    parser.add_argument("--seeds", default="1337", help="a run for each, separated by commas")
    parser.add_argument("--name", default=f"{datetime.date.today().isoformat()}-grid", help="of the figures' file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data", help="where prepared texts are kept")
    parser.add_argument("sprout", nargs="*", metavar="-- --option=value", help="options of every run")
    arguments = parser.parse_args(argv)
    for text in arguments.text:
        if not text.exists():
            raise UserError(f"--text={text}: no such file or folder")
    if not all(seed.isdecimal() for seed in arguments.seeds.split(",")):
        raise UserError(f"--seeds={arguments.seeds}: expected numbers separated by commas, such as 1337,1,2")
    arguments.seeds = arguments.seeds.split(",")
    arguments.settings = {PLAN: []} if arguments.settings is None else read_settings(arguments.settings)
    return arguments


def read_settings(path: Path) -> dict[str, list[str]]:
    """The settings of the file by name. Raises UserError on a line of another form, or two of one name."""
    settings = dict[str, list[str]]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, colon, flags = line.partition(":")
        if not line.strip() or line.startswith("#"):
            continue
        if not colon or name.strip() in settings:
            raise UserError(f"{path}:{number}: expected `name: --option=value …` with a name of its own, got {line!r}")
        settings[name.strip()] = shlex.split(flags)
    return settings


def run_once(cell: Mapping[str, Any], text: Path, data_dir: Path, folder: Path) -> dict[str, Any]:
    """Trains a cell and scores its best checkpoint → its figures, which are printed too."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    data = [f"--data={text}", f"--data_dir={data_dir}"]
    # a preset among the flags may name a text of its own, so the text comes after it
    command = [sys.executable, "train.py", *cell["flags"], *data, f"--run={run}", f"--seed={cell['seed']}"]
    result = run_process(command, ROOT)
    events = read_events(run)
    *_, last = (event for event in events if event["event"] in ("eval", "final"))
    steps = [event for event in events if event["event"] == "step"]
    options = read_json(run / "config.json")["options"]
    evaluation = [sys.executable, "train.py", f"--init_from={run}", *data, "--eval_only=true"]
    found = SCORED.findall(run_process(evaluation, ROOT)["output"])
    figures = {
        "bits_per_byte": float(found[-1][1]),
        "last_bits_per_byte": round(last["bits_per_byte"], 4),
        "steps": last["step"],
        "tokens": last["step"] * options["tokens_per_step"],
        "last_train_loss": steps[-1]["loss"] if steps else None,
        "first_models": [facts_of(other) for other in sorted(run.parent.glob("run-teacher*"))],
        "machine": result["machine"],
        "sprout": commit_of(ROOT),
        "options": options,
    }
    score = f"{figures['bits_per_byte']:.4f} bits per byte (last step {figures['last_bits_per_byte']:.4f})"
    effort = f"{figures['steps']:,} steps, {result['machine']['seconds']:.0f} s"
    print(f"{cell['text']}, {cell['setting']}, seed {cell['seed']}: {score} after {effort}", flush=True)
    return figures


def facts_of(run: Path) -> dict[str, Any]:
    """The length and size of a run from which the one of a cell learns (--teachers)."""
    step = next(event["step"] for event in reversed(read_events(run)) if event["event"] == "step")
    options = read_json(run / "config.json")["options"]
    tokens = step * options["tokens_per_step"]
    return {"steps": step, "tokens": tokens, "n_layer": options["n_layer"], "n_embd": options["n_embd"]}


def read_events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def show(runs: Sequence[Mapping[str, Any]]) -> None:
    """A table: a row a setting, a column a text; means over the seeds, in bits per byte, and the best one marked."""
    texts = list(dict.fromkeys(run["text"] for run in runs))
    means = {
        (run["setting"], run["text"]): statistics.fmean(
            other["bits_per_byte"]
            for other in runs
            if (other["setting"], other["text"]) == (run["setting"], run["text"])
        )
        for run in runs
    }
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    width = max(len(setting) for setting in settings)
    print(" " * width, *(f"{text[:12]:>12}" for text in texts))
    for setting in settings:
        cells = []
        for text in texts:
            mean = means.get((setting, text))
            best = min(value for (_, other), value in means.items() if other == text)
            cells.append(f"{'' if mean is None else f'{mean:.4f}' + '*' * (mean == best):>12}")
        print(f"{setting:<{width}}", *cells)


if __name__ == "__main__":
    run_script(main)
