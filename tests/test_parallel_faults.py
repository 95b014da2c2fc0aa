"""Several processes under faults: each ends in a clean restart or in one clear message that names the rank, within the
timeout, and what was saved is resumed. Real launches of torchrun; the rest of the faults is `slow`, and `make torture`
shows all of them in a table."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from common.run_directory import claim_run, is_of_this_launch, runs_of_this_launch
from common.run_state import write_state
from config import restart
from errors import UserError
from parallel import processes
from parallel.launch import LostContact, give_up, is_lost_contact, naming_saved, refuse_repetition
from tests import torture_parallel as torture
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="torture_parallel.py finds processes by /proc"
)

QUICK = ("kill_and_restart", "terminate_worker", "kill_launcher")


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    """With a text, and a space in its name."""
    return torture.prepare(tmp_path_factory.mktemp("two processes"))


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_in_short(folder, name):
    """What is said, how long it takes, and what is saved; that the run goes on to the same bits is `slow`."""
    result = torture.attempt(name, folder, resume=False)
    assert result.problems == [], result.output


@pytest.mark.slow
@pytest.mark.parametrize("name", torture.FAULTS)
def test_a_fault_in_full(folder, name):
    if (missing := torture.FAULTS[name].missing()) is not None:
        pytest.skip(missing)
    result = torture.attempt(name, folder)
    assert result.problems == [], result.output


def test_a_wrong_option_is_told_once_and_before_torchrun_says_much(folder):
    one = torture.launch(folder, [*torture.torchrun(2), str(ROOT / "train.py"), "debug", "--max_step=3"])
    with torture.ending(one):
        assert one.wait(60)
    assert one.text().count("error: ") == 1, one.text()
    assert "--max_steps" in one.text().partition("Traceback")[0]


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(folder):
    """One that shows after they have joined."""
    one = torture.launch(folder, [*torture.torchrun(2), str(ROOT / "train.py"), "debug", "--data=no such text"])
    with torture.ending(one):
        assert one.wait(60)
    assert one.text().count("error: ") == 1, one.text()
    assert "rank 1 of 2" not in one.text().partition("Traceback")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "words"), [("none:0:0", "would fail as before"), ("terminate:1:15", "not to go on")])
def test_torchrun_repeats_no_work_that_would_end_the_same(folder, fault, words):
    """An error of the user, and a stop by a signal: it starts the processes again, and they end at once."""
    data = "--data=no such text" if fault.startswith("none") else "--data=text.txt"
    command = [*torture.torchrun(2, "--max-restarts=2"), str(ROOT / "tests/faulty_train.py"), *torture.TRAIN, data]
    one = torture.launch(folder, [*command, "--run=run"], fault)
    with torture.ending(one):
        assert one.wait(120)
    assert one.text().count(words) == 2, one.text()
    assert one.text().count("step 16/") <= 1


def test_an_error_is_left_for_the_processes_that_start_again(monkeypatch):
    """In the store of all attempts, below the prefixes of each; not what another attempt may mend."""
    base = dist.HashStore()
    one, other = (dist.PrefixStore("a", dist.PrefixStore(f"attempt {number}", base)) for number in range(2))
    refuse_repetition(one)
    give_up(one, UserError("no such text\nmore"))
    with pytest.raises(UserError, match=r"would fail as before: no such text$") as caught:
        refuse_repetition(other)
    assert caught.value.exit_code == 2
    assert not caught.value.may_retry
    assert LostContact("").may_retry


# ---- What a restarted process goes on with


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """As if torchrun had started this process; a function that lets another torchrun start it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def again(name: str) -> None:
        for module in ("common.run_directory", "config.restart"):
            monkeypatch.setattr(f"{module}.launches", lambda: (name,))

    again("first")
    yield again
    processes.launches.cache_clear()
    processes.launcher.cache_clear()


def continued(*argv: str) -> list[str]:
    found = list[list[str]]()
    restart.begin_or_resume(lambda arguments: found.append([*arguments]) or 0, argv)
    return found[0]


def save(run: Path, step: int = 10) -> Path:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return run


def test_the_first_attempt_and_another_launch_begin_a_new_run(launched):
    assert continued("debug") == ["debug"]
    save(claim_run(None, "debug"))
    launched("second")
    assert continued("debug") == ["debug"]


@pytest.mark.parametrize("run", [None, "here/my run"])
def test_a_restart_resumes_the_run_that_the_launch_has_begun(launched, run):
    save(claim_run(None, "other"))
    launched("second")
    path = save(claim_run(run, "debug"))
    flags = [f"--run={run}"] if run else []
    assert continued("debug", *flags, "--max_steps=50") == [f"--resume={path}"]
    plan = ["debug", *flags, "--plan", "--gpus=2"]
    assert continued(*plan) == plan


def test_of_a_chain_of_runs_the_newest_one_is_resumed(launched):
    """Also where the command has resumed an earlier one of them."""
    save(claim_run("runs/last-teacher", "x"))
    launched("second")
    assert continued("--resume=runs/last-teacher") == ["--resume=runs/last-teacher"]
    save(claim_run("runs/last", "x"))
    assert continued("--resume=runs/last-teacher") == ["--resume=runs/last"]


def test_a_run_without_a_checkpoint_begins_anew_in_its_directory(launched):
    run = claim_run(None, "debug")
    (run / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n')
    assert continued("debug", "--seed=2") == ["debug", "--seed=2", f"--run={run}"]
    assert claim_run(str(run), "debug") == run
    assert (run / "metrics.jsonl.old").exists()


@pytest.mark.parametrize(
    ("state", "resumable", "code"), [("stopped", True, 75), ("failed", False, 2), ("failed", True, None)]
)
def test_what_a_restart_cannot_mend_is_not_repeated(launched, monkeypatch, capsys, state, resumable, code):
    """Of the same launch, also where it is resumed; another one goes on."""
    run = save(claim_run(None, "debug"))
    monkeypatch.setattr("common.run_state.launches", lambda: ("second",))
    values = {"state": state, "resumable": resumable, "exit_code": code or 69, "message": "a reason\nmore"}
    write_state(run, values)
    assert continued("debug") == [f"--resume={run}"]
    launched("second")
    assert continued("debug") == ["debug"], "begun by another launch, and not named"
    found = list[list[str]]()
    for number, argv in enumerate(([f"--resume={run}"], ["debug", f"--run={run}", "--resume=auto"]), 1):
        assert restart.begin_or_resume(lambda arguments: found.append([*arguments]) or 0, argv) == (code or 0)
        assert len(found) == (number if code is None else 0)
    assert capsys.readouterr().err.count("is not to go on here: a reason\n") == (0 if code is None else 2)


def test_run_json_tells_the_launch_and_damage_is_no_match(launched):
    run = claim_run(None, "debug")
    assert json.loads((run / "run.json").read_text()) == {"ordinal": 1, "launches": ["first"]}
    for damaged in ("", "[]", '{"launches": "first"}', '{"launches": [["first"], 3]}'):
        (run / "run.json").write_text(damaged)
        assert not is_of_this_launch(run)
    assert runs_of_this_launch(Path("runs")) == []


def test_two_launches_never_have_one_name(launched, monkeypatch):
    def name(parent: subprocess.Popen) -> str:
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        processes.launches.cache_clear()
        processes.launcher.cache_clear()
        assert not processes.is_orphan()
        (found,) = processes.launches()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert processes.is_orphan()
        return found

    one, other = (subprocess.Popen(["sleep", "30"]) for _ in range(2))
    try:
        assert name(one) == name(one) != name(other)
    finally:
        for process in (one, other):
            process.kill()
            process.wait()


# ---- Which errors mean that another process is gone


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("[/a/b/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1", True),
        ("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv", True),
        (
            "Got the following error when running the callback: RuntimeError: [x/gloo/transport/tcp/pair.cc:5] Read",
            True,
        ),
        ("mat1 and mat2 shapes cannot be multiplied", False),
        ("DataLoader timed out; Connection refused", False),
    ],
)
def test_only_errors_of_the_connections_count(text, is_lost, monkeypatch):
    assert is_lost_contact(RuntimeError(text)) == is_lost
    monkeypatch.setattr("parallel.launch.has_group", lambda: True)
    with pytest.raises(LostContact if is_lost else RuntimeError) as caught, naming_saved(lambda: "step 20 is saved"):
        raise RuntimeError(text)
    if is_lost:
        assert str(caught.value).startswith("lost contact with another process (")
        assert str(caught.value).endswith("; step 20 is saved")
        assert "gloo" not in str(caught.value)


def test_without_torchrun_nobody_is_an_orphan(monkeypatch):
    """nohup's shell may end."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    processes.launcher.cache_clear()
    processes.launches.cache_clear()
    assert not processes.is_orphan()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not processes.is_orphan()
    assert processes.launches() == ()
