"""Other trainers beside us: reads a checkout that the user names with --peer. Nothing of it is part of this project.

Reading order: parts of its code, the same text for both programs, nanoGPT's command, and `score`, which counts both alike.
Two functions import what they read with, because the GPU benches take only import_model, on machines with torch, triton and numpy alone.
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
from errors import UserError
from model import GPT, GPTConfig

SEED = 1337  # of both programs
EVAL_INTERVAL = 250  # of the peer's own configuration
PEER_DATA = Path("data", "shakespeare_char")  # where it looks for the text, whatever text that is


def import_model(checkout: Path, file: str = "model.py", project: str = "nanoGPT") -> ModuleType:
    """The checkout's file with its model, under a name of its own beside our module of that name. Raises UserError."""
    path = checkout / file
    if not path.is_file():
        raise UserError(f"--peer={checkout}: no {file} there; expected a checkout of {project}")
    spec = importlib.util.spec_from_file_location(name := f"peer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def extract_function(path: Path, name: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """One function of a script that cannot be imported (it trains at once), run with `scope` as its globals. Raises UserError."""
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
    """A copy of the text that both programs read alike: UTF-8, no byte order mark, newlines as \\n. Raises UserError."""
    try:
        path.write_text(text.read_text(encoding="utf-8-sig"), encoding="utf-8", newline="\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--text={text}: not UTF-8 at byte {error.start}; convert it first: iconv -f ENCODING -t UTF-8"
        ) from None
    return path


def copy_peer(checkout: Path, text: Path, home: Path) -> Path:
    """A copy of the checkout in which its own script has prepared the text; with input.txt in place it downloads nothing."""
    shutil.copytree(checkout, home, ignore=shutil.ignore_patterns(".git", "out*", "*.bin", "*.pt", "*.pkl"))
    (home / PEER_DATA).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(text, home / PEER_DATA / "input.txt")
    if importlib.util.find_spec("requests") is None:  # its script imports what it would download with
        (home / PEER_DATA / "requests.py").touch()
    run_process([sys.executable, str(PEER_DATA / "prepare.py")], home)
    return home


def prepare_ours(text: Path, data_dir: Path) -> Path:
    """The text as our dataset DATA_DIR/shakespeare: characters, the last tenth for validation."""
    arguments = [f"--input={text}", "--tokenizer=char", "--split=tail", f"--data_dir={data_dir}"]
    run_process([sys.executable, "-m", "prepare_data", "shakespeare", *arguments], ROOT)
    return data_dir


def peer_ids(peer: Path, split: str) -> np.ndarray:
    """The ids of the peer's train or val split, (N,) int64."""
    return np.fromfile(peer / PEER_DATA / f"{split}.bin", dtype=np.uint16).astype(np.int64)


def check_same_ids(peer: Path, data_dir: Path) -> None:
    """Raises UserError unless both programs see the same ids in both splits, our EOS apart."""
    from prepare_data.shards import open_dataset

    dataset = open_dataset(data_dir / "shakespeare")
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        ours = split.read(0, len(split))
        if not np.array_equal(ours[ours != dataset.tokenizer.eos_id], peer_ids(peer, name)):
            raise UserError(f"the {name} splits of the two programs differ, so their losses cannot be compared")


# ---- Its command -----------------------------------------------------------------------------------------------------


def peer_command(steps: int, interval: int, dropout: float = 0.0) -> list[str]:
    """nanoGPT's documented CPU command, but the last weights are saved even where they are not its best."""
    command = "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64"
    command += f" --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters={steps} --lr_decay_iters={steps} --dropout={dropout}"
    own_interval = [] if interval == EVAL_INTERVAL else [f"--eval_interval={interval}"]
    return [*command.split(), "--always_save_checkpoint=True", *own_interval]


def reseeded(script: str, seed: int) -> str:
    """The peer's train.py with another seed. Raises UserError where it does not hold the seed as expected."""
    text, count = re.subn(rf"(torch\.manual_seed\(){SEED}\b", rf"\g<1>{seed}", script)
    if count != 1:
        raise UserError(
            f"the peer's train.py sets the seed {SEED} {count} times, expected once; take nanoGPT's commit named in bench/results"
        )
    return text


def run_process(command: Sequence[str], home: Path) -> dict[str, Any]:
    """Runs a command in the folder `home` → output, lines with the seconds when they came, and what it took. Raises UserError."""
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
    """The last val loss that the peer prints (its mean over random batches)."""
    found = re.findall(r"^step \d+: train loss [\d.]+, val loss ([\d.]+)", output, re.MULTILINE)
    return float(found[-1]) if found else math.nan


def our_report(run: Path) -> float:
    """The last val loss in metrics.jsonl (in the run's dtype; EOS counts there)."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["val_loss"] for record in records if "val_loss" in record][-1]


# ---- The last weights, scored alike ----------------------------------------------------------------------------------


def load_peer(peer: Path) -> Callable[[Tensor], Tensor]:
    """The peer's last weights: ids (B, T) → logits (B, T, V). The checkpoint is this bench's own, and read as data all the same."""
    saved = torch.load(peer / "out-shakespeare-char" / "ckpt.pt", map_location="cpu", weights_only=True)
    module = import_model(peer)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    return lambda ids: model(ids, ids)[0]  # with targets it returns all positions


def load_ours(run: Path) -> GPT:
    """Our last weights: ids (B, T) → logits (B, T, V)."""
    from checkpoint import open_latest
    from common.option import section_from

    saved = open_latest(run)
    model = GPT(section_from(GPTConfig, saved.config), seed=None)
    model.import_state(saved.model_tensors())
    model.eval()
    return model


@torch.no_grad()
def score(logits_of: Callable[[Tensor], Tensor], ids: np.ndarray, block_size: int, rows: int = 64) -> float:
    """Nats a target, every one of ids[1:] once: windows at 0, T, 2T …, the short last one included."""
    inputs, targets = torch.from_numpy(ids[:-1]), torch.from_numpy(ids[1:])
    whole = len(targets) // block_size * block_size
    windows = [
        (inputs[:whole].view(-1, block_size), targets[:whole].view(-1, block_size)),
        (inputs[None, whole:], targets[None, whole:]),
    ]
    nats = 0.0
    for x, y in windows:  # (B, T) whole windows, then (1, rest)
        for some_x, some_y in zip(x.split(rows), y.split(rows), strict=True):
            if some_y.numel():
                nats += F.cross_entropy(
                    logits_of(some_x).double().flatten(0, 1), some_y.flatten(), reduction="sum"
                ).item()
    return nats / len(targets)


def rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]
