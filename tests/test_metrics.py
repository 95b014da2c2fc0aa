"""Logs: reproducible lines, truncated on resume."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
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


def test_a_full_disk_is_reported_once_and_stops_nothing(tmp_path, capsys):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    log = RunLog(tmp_path, {})
    log._files["metrics.jsonl"] = Full()
    for step in range(3):
        log.metrics("step", step, loss=1.0)
    assert capsys.readouterr().err.count("No space left") == 1


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
