"""Logs: reproducible lines, truncated on resume."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.inject import failing
from training.metrics import RunLog, console_line, format_duration


def test_logs_are_truncated_to_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, {})
    log.metrics("step", 1, timing={"seconds": 0.1}, loss=2.5)
    log.sample(1, "猫 and text", "length")
    lengths = log.lengths()
    log.metrics("step", 2, loss=2.0)
    log.sample(2, "more", "length")
    log.close()
    log = RunLog(tmp_path, lengths)
    log.metrics("step", 2, loss=1.9)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines == [
        {"event": "step", "step": 1, "loss": 2.5, "timing": {"seconds": 0.1}},
        {"event": "step", "step": 2, "loss": 1.9},
    ]
    assert (tmp_path / "samples.txt").read_text("utf-8") == "==== step 1 (length) ====\n猫 and text\n\n"


@pytest.mark.parametrize("is_torn", [False, True])
def test_a_full_disk_is_reported_once_and_what_it_did_not_take_is_written_later(tmp_path, capsys, is_torn):
    log = RunLog(tmp_path, {})
    log.metrics("step", 0, loss=1.0)
    with failing("write", 1, errno.ENOSPC, tmp_path, times=None, is_torn=is_torn):
        for step in range(1, 3):
            log.metrics("step", step, loss=1.0)
    assert capsys.readouterr().err.count("No space left") == 1
    log.metrics("step", 3, loss=2.0)
    assert "records are written again" in capsys.readouterr().err
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""


def test_what_is_never_written_is_told_at_the_end_and_leaves_no_part_of_a_line(tmp_path, capsys):
    log = RunLog(tmp_path, {})
    log.metrics("step", 0, loss=1.0)
    with failing("write", 1, errno.EIO, tmp_path, times=None, is_torn=True):
        log.metrics("step", 1, loss=1.0)
        log.close()
    assert f"not saved: 1 records of {tmp_path / 'metrics.jsonl'}" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"event": "step", "step": 0, "loss": 1.0}\n'


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be renamed there")
def test_a_log_that_is_removed_is_written_again_and_one_that_is_renamed_goes_on_in_a_new_file(tmp_path, capsys):
    log, path = RunLog(tmp_path, {}), tmp_path / "metrics.jsonl"
    log.metrics("step", 0, loss=1.0)
    path.unlink()
    log.metrics("step", 1, loss=1.0)
    assert len(path.read_text().splitlines()) == 2
    path.rename(tmp_path / "old")
    log.metrics("step", 2, loss=1.0)
    assert len((tmp_path / "old").read_text().splitlines()) == 2
    assert json.loads(path.read_text())["step"] == 2
    assert log.lengths()["metrics.jsonl"] == path.stat().st_size
    log.close()
    assert capsys.readouterr().err.count(f"{path} ") == 2


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_a_backup_by_hard_links_stays_as_it_is(tmp_path):
    path, backup = tmp_path / "metrics.jsonl", tmp_path / "backup"
    path.write_text("old\nafter the checkpoint\n")
    os.link(path, backup)
    log = RunLog(tmp_path, {"metrics.jsonl": 4})
    log.metrics("step", 0)
    log.close()
    assert backup.read_text() == "old\nafter the checkpoint\n"
    assert path.read_text() == 'old\n{"event": "step", "step": 0}\n'


def test_console_lines_have_fixed_columns():
    lines = [
        console_line(step, 2000, loss, 1e-3, norm, rate, left, 2**30)
        for step, loss, norm, rate, left in [(1, 10.25, 123.4, 950.0, 7300.0), (2000, 1.5, 0.2, 1_234_567.0, 3.0)]
    ]
    assert len(lines[0]) == len(lines[1])
    assert "left 2:01:40" in lines[0]
    assert (
        console_line(1, 10, 1.0, 1e-3, 1.0, 1.0, 1.0, 2**30, "unknown")
        == console_line(1, 10, 1.0, 1e-3, 1.0, 1.0, 1.0, 2**30) + "  mfu unknown"
    )
    assert [format_duration(5), format_duration(65), format_duration(3600)] == ["0:05", "1:05", "1:00:00"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux has the start time of a process")
def test_time_counts_from_the_start_of_the_process():
    code = (
        "import time; time.sleep(0.3); from training.metrics import process_start; process_start();"
        "print(time.perf_counter() - process_start())"
    )
    started = time.perf_counter()
    command = [sys.executable, "-c", code]
    age = float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert 0.3 <= age <= time.perf_counter() - started + 0.02
