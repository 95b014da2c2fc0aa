"""torture.py in short: a few trials of each section, and the table. `make torture` has all of them;
test_parallel_faults.py those of torchrun."""

import os
from importlib import import_module
from pathlib import Path

import pytest

from tests import torture
from tests.torture import FAULTS, FUZZ, Fault
from tests.torture_trials import Row, make_home

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a trial is a fork")

SHORT = {
    "kill_write": 3, "kill_fsync": 3, "kill_rename": 3, "kill_mkdir": 2, "kill_unlink": 2, "sigterm": 3, "sigint": 2,
    "sighup": 2, "sigterm_twice": 2, "errno_ENOSPC": 4, "errno_EIO": 4, "errno_EMFILE": 3, "limited_file_size": 3,
    "damage_cut": 4, "damage_bit": 3, "damage_removed": 2, "damage_swapped": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("torture in short"))


@pytest.mark.parametrize("name", SHORT)
def test_a_fault_in_short(home, name):
    row = FAULTS[name].run(name, home, SHORT[name])
    assert row.problems == []
    assert row.survived == row.trials


def test_kills_happen_and_cost_no_more_than_two_intervals(home):
    """Two, since a checkpoint may be in flight."""
    row = FAULTS["kill_rename"].run("kill_rename", home, 4)
    assert row.trials == 4
    assert 0 <= min(row.lost) <= max(row.lost) <= 8


@pytest.mark.parametrize("name", FUZZ)
def test_a_fuzz_in_short(name):
    if (missing := FAULTS[f"fuzz_{name}"].missing()) is not None:
        pytest.skip(missing)
    assert import_module(f"tests.fuzz_{name}").run(300 if name != "models" else 60, 7) == []


def test_the_table(monkeypatch, capsys):
    rows = {"good": Row(3, 3, [0, 4]), "bad": Row(2, 1, [], ["before fsync 3: other weights"]), "absent": Row()}
    found = {name: Fault("fuzz", lambda name, home, trials: rows[name], 1) for name in rows}
    found["absent"] = Fault("fuzz", found["absent"].run, 1, lambda: "no disk")
    monkeypatch.setattr(torture, "FAULTS", found)
    assert torture.main(["good", "absent"]) == 0
    assert torture.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fault", "trials", "survived", "steps", "lost", "seconds"]
    assert lines[1].split()[:6] == ["good", "3", "3", "0", "to", "4"]
    assert lines[2].split() == ["absent", "skipped:", "no", "disk"]
    assert "    before fsync 3: other weights" in lines
    with pytest.raises(SystemExit):
        torture.main(["unknown"])
    assert torture.main(["--list"]) == 0
