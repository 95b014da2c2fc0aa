"""A stopping run saves, whatever happens to its outputs and its terminal; a script stops without a traceback. Real
processes, signals, pipes and terminals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train as train_script
from checkpoint import list_checkpoints, open_checkpoint
from common.run_state import read_state
from errors import NO_RESOURCES
from tests.conftest import ROOT
from training.interrupt import GRACE, STOPPED

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, pipes and terminals")

TINY = ("debug", "--n_layer=1", "--log_interval=1", "--tokens_per_step=256", "--sample_tokens=10", "--threads=1")
ENDLESS = (*TINY, "--max_steps=1_000_000", "--eval_interval=1_000_000", "--eval_tokens=1000", "--dtype=float32")
SCRIPT = str(ROOT / "train.py")
SECONDS = 90  # of patience with a busy machine


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, small_text) -> Path:
    """A folder with a dataset, data/notes."""
    folder = tmp_path_factory.mktemp("prepared")
    command = [sys.executable, "-m", "prepare_data", "text", f"--input={small_text}", "--name=notes"]
    options = ["--tokenizer=bytes", f"--data_dir={folder / 'data'}"]
    subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch) -> Path:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*args: str, redirected: str = "", **kwargs) -> subprocess.Popen:
    """train.py in a session of its own; `redirected`: what a shell makes of its streams, such as `2>&-`."""
    command = [sys.executable, SCRIPT, *args]
    if redirected:
        command = ["sh", "-c", f'exec "$@" {redirected}', "sh", *command]
    return subprocess.Popen(command, start_new_session=True, **kwargs)


def wait_for_steps(process: subprocess.Popen, run: str = "run", count: int = 3) -> None:
    """Until the run has logged a few steps, and its first checkpoint is written."""
    deadline = time.monotonic() + SECONDS
    while logged_steps(run) < count or not list_checkpoints(Path(run)):
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logged_steps(run: str) -> int:
    path = Path(run, "metrics.jsonl")
    return path.read_text("utf-8").count('"event": "step"') if path.exists() else 0


def assert_stopped_and_saved(process: subprocess.Popen, run: str = "run") -> None:
    """Exit code 75, and the last step that was trained is on disk, intact."""
    assert process.wait(SECONDS) == STOPPED
    saved = open_checkpoint(list_checkpoints(Path(run))[-1])
    events = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text("utf-8").splitlines()]
    assert saved.step == events[-1]["step"] >= 3


def test_ctrl_c_in_a_pipe_saves(folder):
    """`train.py … 2>&1 | tee log`: the signal goes to the whole group, and tee dies first."""
    tee = subprocess.Popen(["tee", "log"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *ENDLESS, "--data=notes", "--run=run"],
        stdout=tee.stdin, stderr=tee.stdin, process_group=tee.pid,
    )  # fmt: skip
    assert tee.stdin is not None
    tee.stdin.close()
    wait_for_steps(process)
    os.killpg(tee.pid, signal.SIGINT)
    assert_stopped_and_saved(process)
    assert tee.wait(SECONDS) == -signal.SIGINT


def test_a_closed_terminal_saves(folder):
    """SIGHUP, and every write to the terminal fails from then on."""
    ours, terminal = os.openpty()
    take_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", take_terminal, sys.executable, SCRIPT, *ENDLESS, "--data=notes", "--run=run"],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    os.set_blocking(ours, False)
    deadline = time.monotonic() + SECONDS
    while logged_steps("run") < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            os.read(ours, 1 << 16)  # a terminal that nobody reads blocks its writer
        except BlockingIOError:
            time.sleep(0.02)
    os.close(ours)
    assert_stopped_and_saved(process)


@pytest.mark.parametrize(
    ("redirected", "number"),
    [
        ("2>&-", signal.SIGTERM),
        ("<&- >&- 2>&-", signal.SIGHUP),
        (">/dev/full 2>/dev/full", signal.SIGTERM),
        (">&- 2>/dev/full", signal.SIGHUP),
    ],
    ids=["no stderr", "no streams", "full device", "mixed"],
)
def test_outputs_that_are_closed_or_full_change_nothing(folder, redirected, number):
    if "/dev/full" in redirected and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    process = start(*ENDLESS, "--data=notes", "--run=run", redirected=redirected)
    wait_for_steps(process)
    process.send_signal(number)
    assert_stopped_and_saved(process)
    for path in (file for file in Path("run").rglob("*") if file.is_file()):
        assert b"finishing this step" not in path.read_bytes(), f"{path} got the descriptor of a closed stream"


def test_a_reader_that_leaves_early_ends_no_training(folder):
    """`| head`: the pipe is closed before the first line is written; the run is completed."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = (*TINY, "--data=notes", "--run=run", "--max_steps=4", "--eval_interval=2", "--eval_tokens=1000")
    process = start(*arguments, stdout=writer, stderr=writer)
    os.close(writer)
    assert process.wait(SECONDS) == 0
    assert open_checkpoint(list_checkpoints(Path("run"))[-1]).step == 4


def test_two_ctrl_c_in_a_moment_are_one(folder):
    """Also a SIGHUP later on: someone presses Ctrl-C and closes the window."""
    process = start(*ENDLESS, "--data=notes", "--run=run", "--block_size=512", "--tokens_per_step=65536", stdout=-3)
    wait_for_steps(process, count=1)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    time.sleep(1.1 * GRACE)
    process.send_signal(signal.SIGHUP)
    assert process.wait(SECONDS) == STOPPED
    assert open_checkpoint(list_checkpoints(Path("run"))[-1]).step >= 1


def test_a_closed_window_does_not_change_the_exit_code_of_a_run_that_has_ended():
    """It takes torch a moment to exit."""
    program = "import atexit, errors, time; atexit.register(time.sleep, 1.5); errors.run_script(lambda: 75)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    time.sleep(1)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == STOPPED


def test_nohup_is_respected(folder):
    process = start(
        *ENDLESS, "--data=notes", "--run=run", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_for_steps(process)
    process.send_signal(signal.SIGHUP)
    wait_for_steps(process, count=logged_steps("run") + 3)
    process.send_signal(signal.SIGTERM)
    assert_stopped_and_saved(process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(number):
    """In the middle of a step that would never end; the first signal only sets the flag."""
    program = (
        "import os, time; from training.interrupt import GRACE, StopRequest\n"
        "with StopRequest() as stop:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    print('asked to stop:', stop(), flush=True)\n"
        "    time.sleep(GRACE)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    while True: pass"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 128 + number
    assert process.stdout == "asked to stop: True\n"
    assert process.stderr.count("finishing this step") == 1


@pytest.mark.parametrize("moment", ["evaluate", "sample_texts", "save_checkpoint"])
def test_a_signal_during_evaluation_sample_or_save(folder, monkeypatch, moment):
    module = {"save_checkpoint": "training.saving"}.get(moment, "train")
    function = getattr(sys.modules[module], moment)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(moment)
        if len(calls) == 2:  # that of step 4
            os.kill(os.getpid(), signal.SIGHUP)
        return function(*args, **kwargs)

    monkeypatch.setattr(f"{module}.{moment}", interrupted)
    arguments = [*TINY, "--data=notes", "--max_steps=8", "--eval_interval=4", "--eval_tokens=1000", "--dtype=float32"]
    arguments.append("--async_save=false")
    assert train_script.main([*arguments, "--run=run"]) == STOPPED
    assert open_checkpoint(list_checkpoints(Path("run"))[-1]).step == 4
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert train_script.main(["--resume=run"]) == 0
    assert train_script.main([*arguments, "--run=alone"]) == 0
    assert Path("run/samples.txt").read_bytes() == Path("alone/samples.txt").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a running process")
def test_a_stopping_run_that_cannot_save_says_so(folder):
    import resource

    process = start(*ENDLESS, "--data=notes", "--run=run", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))  # as if the disk were full
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == NO_RESOURCES, errors
    assert "are not saved (the last checkpoint is that of step 0): free disk space or memory, then" in errors
    assert "Traceback" not in errors


# ---- the first seconds, and the other scripts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_at_once(folder, monkeypatch, number):
    """While the model is built or compiled: nothing would be saved after it. The same command then begins, or goes
    on."""
    arguments = [*TINY, "--data=notes", "--run=run", "--eval_interval=4", "--eval_tokens=1000", "--dtype=float32"]
    make_forward = train_script.setup.make_forward

    def interrupted(*args):
        os.kill(os.getpid(), number)
        return make_forward(*args)

    for steps, saved in ((4, None), (8, 4)):
        command = [*arguments, f"--max_steps={steps}", "--resume=auto"]
        with monkeypatch.context() as patch:
            patch.setattr(train_script.setup, "make_forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train_script.main(command)
        state = read_state(Path("run"))
        assert (state["state"], state["resumable"], state["saved_step"], state["exit_code"]) == (
            "stopped",
            True,
            saved,
            130,
        )
        assert signal.getsignal(number) != signal.SIG_IGN
        assert train_script.main(command) == 0


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_in_the_first_import_is_one_line(tmp_path, script):
    (tmp_path / "select.py").write_text("raise KeyboardInterrupt")  # in the place of what errors.py imports
    command = [sys.executable, str(ROOT / script)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "KeyboardInterrupt\n")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux shows what a process has loaded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_in_the_first_seconds_end_it_too(folder, number):
    """A closed connection while torch is imported: the process ends, and the same command begins."""
    process = start(*TINY, "--data=notes", "--run=run", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch_cpu" not in maps.read_text():
        time.sleep(0.001)
    process.send_signal(number)
    assert process.communicate(timeout=SECONDS) == (b"", b"")
    assert process.returncode == -number
    assert not Path("run").exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux shows what a process has loaded")
@pytest.mark.parametrize(
    ("command", "library"),
    [
        ([SCRIPT], "libtorch_cpu"),
        ([str(ROOT / "sample.py")], "libtorch_cpu"),
        (["-m", "prepare_data", "python_stdlib", "--data_dir=no"], "_hashlib"),
        (["-m", "training.report", "run"], "_hashlib"),
    ],
)
def test_ctrl_c_in_the_first_seconds_is_one_word(folder, command, library):
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and library not in maps.read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, output) == (130, "")
    assert errors.strip().startswith("interrupted"), errors
    assert len(errors.splitlines()) == 1


def run(command: list[str], redirected: str) -> subprocess.CompletedProcess:
    shell = ["sh", "-c", f'"$@" {redirected}', "sh", sys.executable, *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_into_head_ends_quietly(script):
    assert run([str(ROOT / script), "--help"], "| head -1").stderr == ""
    assert run([str(ROOT / script), "--help"], ">&- 2>&-").returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_device_is_named_where_the_output_is_the_result():
    result = run([str(ROOT / "sample.py"), "--help"], ">/dev/full")
    assert result.returncode == 2
    assert result.stderr.startswith("error: standard output cannot be written (No space left on device)")
    assert len(result.stderr.splitlines()) == 1


def test_a_dataset_is_prepared_whatever_reads_the_output(folder, small_text):
    command = ["-m", "prepare_data", "text", f"--input={small_text}", "--tokenizer=bytes"]
    for name, redirected in (("head", "2>&1 | :"), ("closed", "<&- >&- 2>&-")):
        run([*command, f"--name={name}"], redirected)
        assert Path("data", name, "dataset.json").exists()
