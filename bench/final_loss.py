"""The lowest val loss on tinyshakespeare by characters, from scratch, by a model that other programs can open.

    python bench/final_loss.py --text=FILE [--seeds=1337,1] [-- PRESET --option=value …]

nanoGPT's split: the last tenth of the characters. Published: 1.4697 nats a character by nanoGPT (10.6M parameters, an
A100, 3 minutes). Scored are the run's best weights, which sample.py takes, and its last ones, in float32, every target
once, without our EOS: in windows of the model's own context that do not overlap, as nanoGPT counts, and strided,
where each target sees more context. The best weights were chosen by their loss on this split, the last ones were not.

Seconds are those of the whole process of train.py: imports, preparation, compiling, evaluations and checkpoints.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import numpy as np  # noqa: E402

import config  # noqa: E402
from bench.hardware import commit_of, hardware, new_result, save_results  # noqa: E402
from bench.peer import plain_copy, prepare_ours, run_process  # noqa: E402
from checkpoint import resolve_model_folder  # noqa: E402
from common.option import section_from  # noqa: E402
from common.scoring import cut_windows, score_windows  # noqa: E402
from common.weights import count_parameters, import_weights  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from files import read_json  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from model_folder import open_model_folder  # noqa: E402
from prepare_data.shards import open_dataset  # noqa: E402

DEFAULT_FLAGS = ["shakespeare_char_best"]
GOALS = (1.4697, 1.45)  # nats a character: nanoGPT's README; what nobody credible has published
CHECKPOINTS = ("best", "latest")


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    options = config.load("train.py", arguments.sprout).section(GPTConfig)
    if options.max_ngram > 1:
        raise UserError("this bench is about models that other programs can open: leave out --max_ngram")
    figures: dict[str, Any] = {"bench": "final_loss", "hardware": hardware(), "sprout": commit_of(ROOT), "runs": []}
    path = new_result(arguments.name, arguments.results)
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as folder:
        work = Path(folder)
        data = prepare_ours(plain_copy(arguments.text, work / "input.txt"), work / "data") / "shakespeare"
        for seed in arguments.seeds:
            figures["runs"].append(run_once([*arguments.sprout, f"--seed={seed}"], data, work / f"run-{seed}"))
            save_results(path, figures)
    print(f"written: {path}")
    return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare, or another UTF-8 text")
    parser.add_argument("--seeds", default="1337", help="a run for each, separated by commas")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the figures")
    parser.add_argument("--name", default="final_loss", help="of the figures' file")
    parser.add_argument("sprout", nargs="*", metavar="-- PRESET --option=value", help=f"default: {DEFAULT_FLAGS[0]}")
    arguments = parser.parse_args(argv)
    if not arguments.text.is_file():
        raise UserError(f"--text={arguments.text}: no such file; give tinyshakespeare, or a text of yours")
    if not all(seed.isdecimal() for seed in arguments.seeds.split(",")):
        raise UserError(f"--seeds={arguments.seeds}: expected numbers separated by commas, such as 1337,1,2")
    arguments.seeds, arguments.sprout = arguments.seeds.split(","), arguments.sprout or DEFAULT_FLAGS
    return arguments


def run_once(flags: list[str], data: Path, run: Path) -> dict[str, Any]:
    """Trains and scores → what the run used, its seconds and its losses, which are printed too."""
    result = run_process([sys.executable, "train.py", *flags, f"--data={data}", f"--run={run}"], ROOT)
    dataset = open_dataset(data)
    ids = dataset.val.read(0, len(dataset.val))
    ids = ids[ids != dataset.tokenizer.eos_id]
    used = read_json(run / "config.json")["options"]
    facts = {"flags": flags, "machine": result["machine"], "tokens": used["max_steps"] * used["tokens_per_step"]}
    losses = {}
    for which in CHECKPOINTS:
        folder = open_model_folder(resolve_model_folder(run, which))
        model = GPT(section_from(GPTConfig, folder.config), seed=None)
        import_weights(model, folder.model_tensors())
        losses[which] = {"checkpoint": folder.path.parent.name, **scores(model.eval(), ids)}
        facts["parameters"] = count_parameters(model)
        print(f"{' '.join(flags)}: {which}: {losses[which]}", flush=True)
    own = losses["latest"]["own_context"]
    reached = [f"{goal} reached" if own <= goal else f"{own - goal:.4f} above {goal}" for goal in GOALS]
    print(f"  {facts['parameters']:,} parameters, {facts['machine']['seconds']:.0f} s; the last: {', '.join(reached)}")
    return {**facts, "losses": losses, "options": used}


def scores(model: GPT, ids: np.ndarray) -> dict[str, float]:
    """Nats per target of ids[1:] in windows of the model's context, and with strides of a half and an eighth of it."""
    T = model.config.block_size
    found = {}
    for name, stride in (("own_context", T), (f"stride_{T // 2}", T // 2), (f"stride_{T // 8}", max(1, T // 8))):
        windows = cut_windows([np.stack((ids, ids))], T, stride)
        nats = [scored.nats for batch in score_windows(model, windows, autocast=nullcontext) for scored in batch]
        found[name] = round(float(np.concatenate(nats).mean()), 5)
    return found


if __name__ == "__main__":
    run_script(main)
