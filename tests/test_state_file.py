"""A state.json that somebody has edited, and signed again: one message with the file, the entry, what was found and
expected, whoever reads it; never a traceback, never an escape sequence on a terminal. And checkpoints that a run in
progress removes while they are read."""

import copy
import json
import shutil
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sample
import train
from checkpoint import list_checkpoints, open_checkpoint, prune_checkpoints, with_checkpoint
from errors import UserError
from files import json_bytes, read_json
from json_types import Mismatch, conform
from model_folder import ModelFolder, open_model_folder
from state_file import State, read_state
from tests.conftest import ROOT
from tests.test_checkpoint import save
from tests.test_terminal import CONTROL, in_terminal, needs_pty, script
from tests.test_train import TINY
from training.report import main as report
from training.state import Progress
from training.stored import read_progress

LAST = "run/checkpoints/step-00000004"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_text) -> Path:
    """A folder with a run of four steps."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        flags = "--max_steps=4", "--eval_interval=2", f"--data={small_text}", "--run=run", "--threads=1"
        assert train.main([*TINY, *flags]) == 0
    return home


@pytest.fixture
def home(trained, tmp_path, monkeypatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sign(checkpoint: Path, state: dict[str, Any]) -> None:
    """Writes a state, and a manifest that fits it."""
    data = json.dumps(state).replace("Infinity", "1e999").encode()
    (checkpoint / "state.json").write_bytes(data)
    manifest = read_json(checkpoint / "manifest.json")
    del manifest["crc32"]
    manifest["files"]["state.json"] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (checkpoint / "manifest.json").write_bytes(json_bytes({**manifest, "crc32": zlib.crc32(json_bytes(manifest))}))


def edited(state: dict[str, Any], entry: str, value: object) -> dict[str, Any]:
    """entry: keys and indices between dots. value: ... removes it."""
    state = copy.deepcopy(state)
    *parents, last = [int(key) if key.isdigit() else key for key in entry.split(".")]
    place: Any = state
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return state


READERS = {
    "resume": lambda: train.main(["--resume=run", "--max_steps=5"]),
    "sample": lambda: sample.main(["--run=run", "--max_new_tokens=2", "--checkpoint=latest"]),
    "novelty": lambda: sample.main(["--run=run", "--max_new_tokens=2", "--checkpoint=latest", "--novelty"]),
    "report": lambda: report(["run"]),
    "export": lambda: open_model_folder(Path(LAST, "model")).state(),  # for the model card
    "init_from": lambda: train.main([*TINY, f"--init_from={LAST}", "--data=text", "--run=new", "--max_steps=1"]),
}
NULL, NUMBER, TEXT, LIST, OBJECT = None, 3.5, "text", ["x"], {"x": 1}
EDITS = [  # entry, value, who must refuse it
    *(("step", value, "resume") for value in (-1, 2**63, 1.0, True, TEXT, NULL, LIST)),
    *((f"progress.{name}", value, "resume") for name in ("step", "evaluated_step", "finished_step")
      for value in (-1, TEXT, LIST, 4.0, 9)),
    *((f"progress.{name}", value, "resume") for name in ("log_loss", "eval_loss") for value in (OBJECT, TEXT, NULL)),
    *((f"progress.{name}", value, "resume") for name in ("history", "best", "kept", "bar", "grad_scaler")
      for value in (TEXT, LIST, {"x": TEXT}, NUMBER)),
    *((f"progress.history.0.{name}", value, "resume") for name in ("step", "val_loss", "train_loss")
      for value in (TEXT, LIST, OBJECT)),
    ("progress.history.0.step", 4, "resume"), ("progress.history.1.step", 5, "resume"),
    ("progress.history.0.val_loss", ..., "resume"), ("progress.best.0.counts", [1], "resume"),
    ("progress.best.0.counts.0", 0, "resume"), ("progress.unknown", 1, "resume"), ("progress.early_decay", 5, "resume"),
    *((name, ..., "resume") for name in ("progress", "options", "auto", "logs", "environment", "dataset", "val_loss")),
    *((name, value, "resume") for name in ("progress", "options", "auto", "logs", "environment", "dataset", "kept")
      for value in (NULL, TEXT, NUMBER, LIST)),
    *((f"options.{name}", value, "resume") for name, value in (
        ("max_steps", ...), ("max_steps", TEXT), ("n_embd", -4), ("optimizer", "x"), ("unknown", 1), ("teachers", TEXT),
        ("seed", NUMBER), ("n_head", 7), ("learning_rate", NULL), ("exclude", [[]]), ("separator", LIST))),
    ("auto.device", 3, "resume"), ("logs.metrics.jsonl", -5, "resume"), ("environment.torch", LIST, "resume"),
    *((f"dataset.{name}", value, "resume") for name in ("path", "fingerprint") for value in (..., NULL, LIST)),
    ("dataset.path", "a\0b", "resume"), ("dataset.example_prompt", LIST, "sample"), ("val_loss", TEXT, "sample"),
    ("val_bits_per_byte", True, "sample"), ("step", TEXT, "sample"),
    ("dataset", LIST, "novelty"), ("dataset.path", NUMBER, "novelty"), ("options", LIST, "novelty"),
    ("options.init_from", LIST, "novelty"), ("tokens", TEXT, "export"), ("environment", TEXT, "export"),
    ("dataset.name", OBJECT, "export"), ("options", NUMBER, "export"), ("chain", LIST, "sample"),
    ("teachers", [{"bytes": TEXT}], "resume"), ("kept", [{"path": TEXT}], "init_from"),
]  # fmt: skip


@pytest.mark.parametrize("reader", ["resume", "sample", "novelty", "export", "init_from"])
def test_an_edited_state_is_one_message(trained, home, capsys, reader):
    state, accepted = read_json(Path(LAST, "state.json")), []
    Path("text").write_text("a cat sees the moon\n" * 500, encoding="utf-8")
    for entry, value, refuses in EDITS:
        if refuses != reader:
            continue
        changed = edited(state, entry, value) if "jsonl" not in entry else {**state, "logs": {"metrics.jsonl": value}}
        sign(Path(LAST), changed)
        try:
            READERS[reader]()
        except UserError as error:
            message = str(error)
        else:
            accepted.append((entry, value))
            shutil.rmtree("run")
            shutil.copytree(trained / "run", "run")
            continue
        assert f"{LAST}/state.json: " in message, (entry, value, message)
        assert any(part in message for part in entry.split(".") if not part.isdigit()), (entry, value, message)
        assert "open it with the Sprout that wrote it, or use another checkpoint" in message
    assert accepted == []
    assert report(["run"]) == 0, "tells what it can without the checkpoint"
    assert "Traceback" not in capsys.readouterr().err


def test_the_own_state_of_a_run_is_what_the_types_say(home):
    for checkpoint in list_checkpoints(Path("run")):
        state = read_state(checkpoint / "state.json")
        assert state.keys() <= State.__annotations__.keys()
        assert read_progress(Progress, state).step == state["step"]


def test_a_new_field_of_the_progress_is_checked_by_its_annotation(home):
    @dataclass
    class Longer(Progress):
        others: list[float] = field(default_factory=list)
        number: int = 0
        rolled_step: int | None = None

    state = read_json(Path(LAST, "state.json"))
    assert read_progress(Longer, read_state(Path(LAST, "state.json"))).number == 0
    for name, value in (
        ("others", [1.0, "x"]),
        ("recent", LIST),
        ("number", -1),
        ("rolled_step", 5),
        ("rollbacks", [{}]),
    ):
        sign(Path(LAST), edited(state, f"progress.{name}", value))
        with pytest.raises(UserError, match=rf"progress\.{name}"):
            read_progress(Longer, read_state(Path(LAST, "state.json")))


def test_json_values_are_compared_with_types():
    assert conform(dict[str, list[int | None]], {"a": [1, None]}) == {"a": [1, None]}
    for hint, value, problem in (
        (int, True, "it is True, expected an integer >= 0"), (float, 10**400, "expected a finite number"),
        (list[int], [1, "x"], r"\[1\] is 'x'"), (dict[str, int], {"a b": -1}, r"\['a b'\] is -1"),
        (int | None, "x" * 100, r"x\.\.\., expected an integer >= 0 or null"), (Any, [{"a": [1e999]}], "inf"),
    ):  # fmt: skip
        with pytest.raises(Mismatch, match=problem):
            conform(hint, value)


# ---- Terminals -------------------------------------------------------------------------------------------------------

ESCAPE = "\x1b]0;x\x07\x9b31m\u202e"


@needs_pty
def test_no_escape_sequence_of_a_state_reaches_a_terminal(home):
    state = read_json(Path(LAST, "state.json"))
    state["dataset"] |= {"name": ESCAPE, "path": ESCAPE, "example_prompt": ESCAPE, "fingerprint": ESCAPE}
    state["environment"] = dict.fromkeys(state["environment"], ESCAPE)
    state["auto"] = dict.fromkeys(state["auto"], ESCAPE)
    state["options"] |= {"separator": ESCAPE, "init_from": ESCAPE, "wandb_project": ESCAPE}
    score = "sample.py", f"--run={home / 'run'}", f"--score={ROOT / 'Makefile'}", "--checkpoint=latest"
    resume = "train.py", f"--resume={home / 'run'}"
    for changes, arguments in (
        ({}, score),
        ({}, (*resume, f"--data={home / 'data'}")),
        ({"options": {**state["options"], ESCAPE: 1}}, resume),
    ):
        sign(home / LAST, state | changes)
        code, got = in_terminal(*script(*arguments))
        assert code in (0, 2), got
        assert "Traceback" not in got
        assert not CONTROL.search(got.replace("\r", "").replace("\x1b[A", "")), (arguments, got)  # tqdm's own
    assert report(["run"]) == 0
    page = (home / "run/report.html").read_text("utf-8")
    assert not CONTROL.search(page.replace("\u202e", ""))


@needs_pty
def test_a_traceback_shows_symbols(tmp_path):
    code = "from errors import run_script, start_script; start_script()\ndef main(): raise ValueError('\\x1b[31m')\n"
    _, got = in_terminal(sys.executable, "-c", code + "run_script(main)")
    assert "ValueError: ␛[31m" in got
    assert not CONTROL.search(got)


# ---- A run in progress -----------------------------------------------------------------------------------------------


def test_what_a_run_removes_while_it_is_read_is_found_again(tmp_path, capsys):
    """A thread saves and prunes in a loop, as fast as it can, while a reader opens the run's checkpoint."""
    run, ended, saved = tmp_path / "run", threading.Event(), [1, 2]
    for step in saved:
        save(run, step, val_loss=1.0 / step)

    def write() -> None:
        while not ended.is_set():
            saved.append(saved[-1] + 1)
            save(run, saved[-1], val_loss=1.0 / saved[-1])
            prune_checkpoints(run)

    def read(folder: Path) -> tuple[int, ModelFolder]:
        time.sleep(0.01)
        opened = open_model_folder(folder, check_weights=False)
        opened.model_tensors()
        return int(read_state(folder.parent / "state.json")["step"]), opened

    writer = threading.Thread(target=write)
    writer.start()
    try:
        steps = [with_checkpoint(run, which, read)[0] for _ in range(100) for which in ("best", "latest")]
        whole = partial(with_checkpoint, run, "latest", lambda folder: open_checkpoint(folder.parent))
        steps += [whole().step for _ in range(100)]
    finally:
        ended.set()
        writer.join()
    assert len(saved) > 40, "the run was not in progress"
    assert len({*steps}) > 20
    assert capsys.readouterr().err == ""


def test_a_damaged_checkpoint_is_not_read_again_and_again(tmp_path):
    for step in (1, 2):
        save(tmp_path / "run", step)
    (tmp_path / "run/checkpoints/step-00000002/state.json").write_text("{")
    seen = list[Path]()

    def read(folder: Path) -> None:
        seen.append(folder)
        open_checkpoint(folder.parent)

    with pytest.raises(UserError, match="Restore it from a copy"):
        with_checkpoint(tmp_path / "run", "latest", read)
    assert len(seen) == 1
    for which in ("step-7", "latest"):
        with pytest.raises(UserError):
            with_checkpoint(tmp_path / ("run" if which == "step-7" else "none"), which, read)
    assert len(seen) == 1


@pytest.mark.slow
def test_sample_py_beside_a_training_that_saves_each_step(home, monkeypatch):
    """Real processes: the checkpoint is removed between the moment it is found and that its files are read."""
    shown = list[str]()
    training = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--resume=run", "--max_steps=100_000", "--save_interval=1",
         "--eval_interval=1000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while len(list_checkpoints(Path("run"))) < 2 or list_checkpoints(Path("run"))[-1].name <= "step-00000004":
            assert training.poll() is None
        for i in range(6):
            which = ("best", "latest")[i % 2]
            done = subprocess.run(
                [sys.executable, str(ROOT / "sample.py"), "--run=run", "--max_new_tokens=1", f"--checkpoint={which}"],
                capture_output=True, text=True,
            )  # fmt: skip
            shown.append(done.stderr)
            assert done.returncode == 0, done.stderr
    finally:
        training.terminate()
        training.wait()
    assert not any("warning" in text or "removed" in text for text in shown)
