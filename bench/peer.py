"""Other trainers beside ours: reads a checkout that the user names with --peer. Its code is not part of this project.

Reading order: import_model and extract_function, the same text for both programs, nanoGPT's command, `score`. Two
functions import what they need themselves: the GPU benches use import_model on machines with only torch, triton and
numpy.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.hardware import ROOT, Stopwatch
from common.weights import import_weights
from errors import UserError
from model import GPT, GPTConfig

SEED = 1337  # default of both programs
EVAL_INTERVAL = 250  # default of the peer's configuration
PEER_DATA = Path("data", "shakespeare_char")  # where its scripts read the text


def import_model(checkout: Path, file: str = "model.py", project: str = "nanoGPT") -> ModuleType:
    """Imports the checkout's model file as peer_NAME, so that it does not replace our model. Raises UserError."""
    path = checkout / file
    if not path.is_file():
        raise UserError(f"--peer={checkout}: no {file} there; expected a checkout of {project}")
    spec = importlib.util.spec_from_file_location(name := f"peer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def extract_function(path: Path, name: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """One function of a script that trains when imported, with `scope` as its globals. Raises UserError."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if len(found) != 1:
        raise UserError(f"{path}: expected one function {name}, found {len(found)}; is it a checkout of nanoGPT?")
    module = ast.Module(body=list(found), type_ignores=[])
    exec(compile(module, str(path), "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function


# ---- The same text on both sides -------------------------------------------------------------------------------------


def plain_copy(text: Path, path: Path) -> Path:
    """Copies the text as UTF-8 without byte order mark, with \\n as newline, for both programs. Raises UserError."""
    try:
        path.write_text(text.read_text(encoding="utf-8-sig"), encoding="utf-8", newline="\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--text={text}: not UTF-8 at byte {error.start}; convert it first: iconv -f ENCODING -t UTF-8"
        ) from None
    return path


def copy_peer(checkout: Path, text: Path, home: Path) -> Path:
    """Copies the checkout and runs its prepare.py there, which downloads nothing where input.txt exists."""
    shutil.copytree(checkout, home, ignore=shutil.ignore_patterns(".git", "out*", "*.bin", "*.pt", "*.pkl"))
    (home / PEER_DATA).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(text, home / PEER_DATA / "input.txt")
    if importlib.util.find_spec("requests") is None:  # prepare.py imports it in any case
        (home / PEER_DATA / "requests.py").touch()
    run_process([sys.executable, str(PEER_DATA / "prepare.py")], home)
    return home


def prepare_ours(text: Path, data_dir: Path) -> Path:
    """Prepares the text as our dataset DATA_DIR/shakespeare: characters, the last tenth as val split."""
    arguments = [f"--input={text}", "--tokenizer=char", "--split=tail", f"--data_dir={data_dir}"]
    run_process([sys.executable, "-m", "prepare_data", "shakespeare", *arguments], ROOT)
    return data_dir


def peer_ids(peer: Path, split: str) -> np.ndarray:
    """The ids of the peer's train or val split, (N,) int64."""
    return np.fromfile(peer / PEER_DATA / f"{split}.bin", dtype=np.uint16).astype(np.int64)


def check_same_ids(peer: Path, data_dir: Path) -> None:
    """Raises UserError unless both programs have the same ids in both splits, except for our EOS."""
    from prepare_data.shards import open_dataset

    dataset = open_dataset(data_dir / "shakespeare")
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        ours = split.read(0, len(split))
        if not np.array_equal(ours[ours != dataset.tokenizer.eos_id], peer_ids(peer, name)):
            raise UserError(f"the {name} splits of the two programs differ, so their losses cannot be compared")


# ---- Its command -----------------------------------------------------------------------------------------------------


def peer_command(steps: int, interval: int, dropout: float = 0.0) -> list[str]:
    """nanoGPT's documented CPU command, which here saves the last weights even if they are not its best."""
    command = "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1"
    command += " --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128"
    command += f" --max_iters={steps} --lr_decay_iters={steps} --dropout={dropout}"
    own_interval = [] if interval == EVAL_INTERVAL else [f"--eval_interval={interval}"]
    return [*command.split(), "--always_save_checkpoint=True", *own_interval]


def reseeded(script: str, seed: int) -> str:
    """The peer's train.py with another seed. Raises UserError unless it sets the seed exactly once."""
    text, count = re.subn(rf"(torch\.manual_seed\(){SEED}\b", rf"\g<1>{seed}", script)
    if count != 1:
        raise UserError(
            f"the peer's train.py sets the seed {SEED} {count} times, expected once; "
            "use the commit of nanoGPT named in bench/results"
        )
    return text


def run_process(command: Sequence[str], home: Path) -> dict[str, Any]:
    """Runs a command in the folder `home`. Returns its output, its lines with the seconds at which they were printed,
    and the machine's load. Raises UserError on any exit code but 0."""
    lines: list[tuple[float, str]] = []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    streams: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "encoding": "utf-8",
        "errors": "replace",
    }
    with Stopwatch() as watch:
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=home, env=environment, **streams) as process:
            assert process.stdout is not None
            lines.extend((time.perf_counter() - began, line) for line in process.stdout)
    output = "".join(line for _, line in lines)
    if process.returncode:
        raise UserError(f"{' '.join(command[1:])}: exit code {process.returncode}. Its last lines:\n{output[-2000:]}")
    return {"output": output, "lines": lines, "machine": watch.measured}


def peer_report(output: str) -> float:
    """The last val loss that the peer prints, a mean over random batches; NaN if it prints none."""
    found = re.findall(r"^step \d+: train loss [\d.]+, val loss ([\d.]+)", output, re.MULTILINE)
    return float(found[-1]) if found else math.nan


def our_report(run: Path) -> float:
    """The last val loss in metrics.jsonl, computed in the run's dtype, EOS included."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["val_loss"] for record in records if "val_loss" in record][-1]


# ---- The last weights, same score for both ---------------------------------------------------------------------------


def load_peer(peer: Path) -> Callable[[Tensor], Tensor]:
    """The peer's last weights as a function: ids (B, T) → logits (B, T, V). Loads with weights_only=True."""
    saved = torch.load(peer / "out-shakespeare-char" / "ckpt.pt", map_location="cpu", weights_only=True)
    module = import_model(peer)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    return lambda ids: model(ids, ids)[0]  # without targets it returns the last position only


def load_ours(run: Path) -> GPT:
    """A model with our last weights: ids (B, T) → logits (B, T, V)."""
    from checkpoint import open_latest
    from common.option import section_from

    saved = open_latest(run)
    model = GPT(section_from(GPTConfig, saved.config), seed=None)
    import_weights(model, saved.model_tensors())
    model.eval()
    return model


@torch.no_grad()
def score(logits_of: Callable[[Tensor], Tensor], ids: np.ndarray, block_size: int, rows: int = 64) -> float:
    """Mean nats per target; each of ids[1:] is a target once, in windows at 0, T, 2T …, the short last one included."""
    inputs, targets = torch.from_numpy(ids[:-1]), torch.from_numpy(ids[1:])
    whole = len(targets) // block_size * block_size
    windows = [
        (inputs[:whole].view(-1, block_size), targets[:whole].view(-1, block_size)),
        (inputs[None, whole:], targets[None, whole:]),
    ]
    nats = 0.0
    for x, y in windows:  # (B, T) full windows, then (1, remainder)
        for some_x, some_y in zip(x.split(rows), y.split(rows), strict=True):
            if some_y.numel():
                nats += F.cross_entropy(
                    logits_of(some_x).double().flatten(0, 1), some_y.flatten(), reduction="sum"
                ).item()
    return nats / len(targets)


def rotated(names: list[str], by: int) -> list[str]:
    """The names from index `by` on, then those before it: the order of a round."""
    by %= len(names)
    return names[by:] + names[:by]
