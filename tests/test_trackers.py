"""Weights & Biases, TensorBoard and trackio: each only on request, without the network, and never in the way of the
training. Their records are those of metrics.jsonl, also where a run was killed and resumed."""

import json
import math
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import config
from checkpoint import list_checkpoints
from common.run_directory import claim_run
from errors import UserError
from tests.conftest import ROOT
from tests.test_train import TINY, train
from training.options import TRACKERS, LoggingOptions
from training.trackers import Trackers

ALL = {"wandb": "offline", "tensorboard": True, "trackio": True}


def install(monkeypatch, name, **contents):
    """A module in the place of a package, or of a part of one."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def trackio(monkeypatch, tmp_path):
    """A stub with a real database. `calls`: what its Run was made with, and got."""

    class Run:
        def __init__(self, **arguments):
            stub.calls.append(("Run", arguments))

        def log(self, values, step):
            if stub.error is not None:
                raise stub.error
            stub.calls.append(("log", step, values))

        def finish(self):
            stub.calls.append(("finish",))

    path = tmp_path / "trackio files" / "sprout.db"
    storage = SimpleNamespace(get_project_db_path=lambda project: path, init_db=lambda project: path)
    hub = install(monkeypatch, "huggingface_hub")
    hub.constants = install(monkeypatch, "huggingface_hub.constants", HF_HUB_OFFLINE=False)
    stub = install(monkeypatch, "trackio", Run=Run, SQLiteStorage=storage, calls=[], error=None, hub=hub, path=path)
    return stub


@pytest.fixture
def tensorboard(monkeypatch):
    """A stub whose events are their fields as text. `calls`: the events."""

    class Event:
        def __init__(self, wall_time, **fields):
            self.fields = fields

        def SerializeToString(self):
            stub.calls.append(self.fields)
            return repr(self.fields).encode()

    class SessionLog(SimpleNamespace):
        START = "START"

    class Writer:
        def __init__(self, file):
            self.write = file.write

    summary = SimpleNamespace(scalar=lambda *value: value, text=lambda *value: value)
    stub = install(monkeypatch, "tensorboard", calls=[])
    install(monkeypatch, "tensorboard.compat")
    install(monkeypatch, "tensorboard.compat.proto", event_pb2=SimpleNamespace(Event=Event, SessionLog=SessionLog))
    install(monkeypatch, "torch.utils.tensorboard", RecordWriter=Writer, summary=summary)
    return stub


# ---- on request


def test_none_is_imported_without_its_option(tmp_path):
    before = set(sys.modules)
    trackers = Trackers(tmp_path, LoggingOptions(), {})
    trackers.start(0)
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert not {name.partition(".")[0] for name in set(sys.modules) - before} & set(TRACKERS)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_with_its_pip_line_before_anything_else(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"--{name} needs .* pip install {name}"):
        config.load("train.py", ["debug", f"--{name}={str(ALL[name]).lower()}"])
    with pytest.raises(UserError, match=f"pip install {name}"):  # a part of it is missing
        Trackers(tmp_path, LoggingOptions(**{name: ALL[name]}), {})


@pytest.mark.usefixtures("trackio", "tensorboard")
def test_config_json_does_not_hand_them_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f"--{name}={str(value).lower()}" for name, value in ALL.items()]
    for asked in (flags, []):
        options = config.load("train.py", ["debug", *asked])
        Path("config.json").write_text(json.dumps(config.dump(options, {})))
        again = config.load("train.py", ["config.json"])
        assert again.section(LoggingOptions) == LoggingOptions()
        assert [name for name in TRACKERS if name in "".join(again.notes)] == [*TRACKERS] * bool(asked)


@pytest.mark.usefixtures("trackio")
def test_the_runs_of_one_command_have_the_same(tmp_path, monkeypatch, small_text, capsys):
    monkeypatch.chdir(tmp_path)
    flags = (*TINY, "--compile=false", "--tokenizer=bytes", f"--data={small_text}")  # a preset, so by config.json
    assert train(*flags, "--run=x", "--teachers=1", "--trackio") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("now a model that learns"))
    assert "--trackio=true" in shlex.split(line)
    made = [call[1]["name"] for call in sys.modules["trackio"].calls if call[0] == "Run"]
    assert made == ["x-teacher", "x"]


@pytest.mark.usefixtures("tensorboard")
def test_a_run_that_ended_before_its_first_step_may_be_started_again(tmp_path):
    run = claim_run(str(tmp_path / "a run"), "")
    for _ in range(2):
        trackers = Trackers(run, LoggingOptions(tensorboard=True), {})
        trackers.start(0)
        trackers.finish()
        assert claim_run(str(run), "") == run


# ---- what they get


def test_trackio_stays_on_this_machine_and_drops_what_is_made_again(tmp_path, trackio, capsys, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    options = LoggingOptions(trackio=True)
    run = tmp_path / "my run"
    for first_step in (0, 6):
        trackers = Trackers(run, options, {"n_layer": 2})
        trackers.start(first_step)
        trackers.log({"train/loss": 1.5, "mfu": None}, 10)
        trackers.log({"sample/1": "a text"}, 10)
        trackers.finish()
        identity = trackio.calls[0][1]["run_id"]
        if first_step == 0:
            trackio.path.parent.mkdir(exist_ok=True)
            with sqlite3.connect(trackio.path) as database:
                database.execute("CREATE TABLE metrics (run_id, step)")
                rows = [(name, step) for name in (identity, "another") for step in (5, 6, 7)]
                database.executemany("INSERT INTO metrics VALUES (?, ?)", rows)
    made = {"url": None, "client": None, "project": "sprout", "name": "my run", "run_id": identity}
    calls = [("Run", {**made, "config": {"n_layer": 2}}), ("log", 10, {"train/loss": 1.5}), ("finish",)]
    assert trackio.calls == calls * 2
    with sqlite3.connect(trackio.path) as database:
        kept = database.execute("SELECT run_id, step FROM metrics").fetchall()
    assert kept == [(identity, 5), ("another", 5), ("another", 6), ("another", 7)]
    assert trackio.hub.constants.HF_HUB_OFFLINE
    assert capsys.readouterr().err == ""


def test_tensorboard_gets_numbers_and_texts_and_where_they_begin(tmp_path, tensorboard):
    trackers = Trackers(tmp_path, LoggingOptions(tensorboard=True), {})
    trackers.start(7)
    trackers.log({"val/val_loss": 1.5, "mfu": None, "sample/1": "# no title\n\nend"}, 9)
    trackers.finish()
    version, start, *events = tensorboard.calls
    assert version == {"file_version": "brain.Event:2"}
    assert (start["step"], start["session_log"].status) == (7, "START")
    text = "    # no title\n    \n    end"
    assert events == [{"step": 9, "summary": pair} for pair in (("val/val_loss", 1.5), ("sample/1", text))]
    assert len(list(tmp_path.glob("tensorboard/*tfevents*"))) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left"), sqlite3.OperationalError("No space left")])
def test_one_that_fails_is_off_after_one_line_and_the_others_go_on(tmp_path, trackio, tensorboard, capsys, error):
    trackers = Trackers(tmp_path, LoggingOptions(tensorboard=True, trackio=True), {})
    trackers.start(0)
    trackio.error = error
    for step in range(3):
        trackers.log({"loss": 1.0}, step)
    trackers.finish()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("trackio failed (")
    assert "No space left" in lines[0]
    assert [event["step"] for event in tensorboard.calls[2:]] == [0, 1, 2]


@pytest.mark.usefixtures("tensorboard")
def test_one_that_does_not_start_is_off_after_one_line(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    trackers = Trackers(tmp_path, LoggingOptions(tensorboard=True), {})
    trackers.start(0)
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert capsys.readouterr().err.count("tensorboard did not start (") == 1


def test_a_failure_that_trackio_only_warns_of_turns_it_off(tmp_path, trackio, capsys):
    trackers = Trackers(tmp_path, LoggingOptions(trackio=True), {})
    trackers.start(0)
    trackers._running[0]._run._warn_once("key", "database or disk is full")
    for step in range(2):
        trackers.log({"loss": 1.0}, step)
    trackers.finish()
    assert capsys.readouterr().err.count("disk is full") == 1
    assert ("finish",) not in trackio.calls


# ---- Weights & Biases


def test_wandb_offline_needs_no_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = Trackers(tmp_path, LoggingOptions(wandb="offline"), {"n_layer": 2})
    trackers.start(0)
    trackers.log({"train/loss": 1.5}, 1)
    trackers.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_online_without_a_key_is_an_error_not_a_prompt(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a prompt"))
    with pytest.raises(UserError, match="wandb login"):
        Trackers(tmp_path, LoggingOptions(wandb="online"), {})


def test_wandb_has_the_final_evaluation_in_the_place_of_the_last_one(tmp_path, monkeypatch):
    logged = {}
    run = SimpleNamespace(log=lambda values, step: logged.setdefault(step, {}).update(values), finish=lambda: None)
    errors = SimpleNamespace(Error=RuntimeError)
    install(monkeypatch, "wandb", init=lambda **options: run, errors=errors)
    trackers = Trackers(tmp_path, LoggingOptions(wandb="offline"), {})
    trackers.start(0)
    trackers.log({"val/val_loss": 1.5}, 4)
    trackers.log({"sample/1": "a text"}, 4)
    trackers.log({"final/val_loss": 1.6}, 4)
    assert logged == {4: {"val/val_loss": 1.6}}


# ---- the real packages


REAL = ("debug", "--n_layer=1", "--tokens_per_step=256", "--sample_tokens=10", "--threads=1", "--log_interval=2")
REAL += ("--eval_interval=2000", "--eval_tokens=1000", "--dtype=float32", "--compile=false", "--run=runs/one")


def recorded(run):
    """The values that metrics.jsonl has, by the names that trackers have them under: (step, value)."""
    values = {}
    for line in Path(run, "metrics.jsonl").read_bytes().splitlines():
        record = json.loads(line)
        folder = {"step": "train", "eval": "val", "final": "final"}.get(record.pop("event"))
        step, timing = record.pop("step"), record.pop("timing", {})
        named = {f"{folder}/{name}": value for name, value in record.items()} | (timing if folder == "train" else {})
        for name, value in named.items() if folder else ():
            if value is not None:
                values.setdefault(name, []).append((step, value))
    return values


def in_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(run, "tensorboard")))
    events.Reload()
    assert {"sample/1/text_summary"} <= {*events.Tags()["tensors"]}
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


READ_TRACKIO = """
import json, trackio
(run,) = trackio.Api().runs("sprout")
rows = trackio.SQLiteStorage.get_logs("sprout", run.name, run_id=run.id)
print(json.dumps([run.name, run.config["n_layer"], run.config["_Username"], rows]))
"""


def in_trackio(run):
    done = subprocess.run([sys.executable, "-c", READ_TRACKIO], check=True, capture_output=True, text=True)
    name, n_layer, user, rows = json.loads(done.stdout)
    assert (name, n_layer, user) == ("one", 1, None)
    values = {}
    for row in rows:
        row.pop("timestamp")
        step = row.pop("step")
        for key, value in row.items():
            values.setdefault(key, []).append((step, value))
    return values


@pytest.mark.slow
@pytest.mark.parametrize(("name", "read"), [("tensorboard", in_tensorboard), ("trackio", in_trackio)])
def test_the_real_one_has_what_metrics_jsonl_has(tmp_path, monkeypatch, small_text, name, read):
    """Also after a kill between two checkpoints, and after a resume of a finished run. With a token and a Space in the
    environment, trackio still goes nowhere: there is no network where this is run."""
    if not find_spec(name):
        pytest.skip(f"{name} is not installed")
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for variable, value in {"TRACKIO_DIR": "tracked", "TRACKIO_SPACE_ID": "me/space", "HF_TOKEN": "hf_none"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(small_text, "text.txt")
    script = [sys.executable, str(ROOT / "train.py")]
    flags = (*REAL, "--data=text.txt", "--tokenizer=bytes", "--max_steps=100000", f"--{name}")
    process = subprocess.Popen([*script, *flags], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (saved := list_checkpoints(Path("runs/one"))) or time.time() - saved[-1].stat().st_mtime < 1:
        assert process.poll() is None  # a second: trackio writes what it has twice in it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    step = int(saved[-1].name.partition("-")[2])
    assert max(step for step, _ in recorded("runs/one")["train/loss"]) > step
    for steps in (step + 24, step + 36):
        done = subprocess.run(
            [*script, "--resume=runs/one", f"--max_steps={steps}", "--eval_interval=10"],
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        want, got = recorded("runs/one"), read("runs/one")
        assert {key: [step for step, _ in points] for key, points in got.items()} == {
            key: [step for step, _ in points] for key, points in want.items()
        }
        assert len({step for step, _ in got["val/val_loss"]}) == len(got["val/val_loss"])
        for key, points in want.items():
            pairs = zip(points, got[key], strict=True)
            assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in pairs), key
