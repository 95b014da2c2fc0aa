"""What every bench records beside its figures: machine, versions, load by other processes; and writes them.

Knows no model. Speeds depend on the machine and on what else ran on it, hence `hardware` and Stopwatch.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from files import replace_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8", "sve", "bf16", "i8mm")


def hardware() -> dict[str, Any]:
    """Date, machine, CPU and versions, ready for JSON."""
    cpuinfo = Path("/proc/cpuinfo")
    name, flags = parse_cpuinfo(cpuinfo.read_text(errors="replace") if cpuinfo.exists() else "")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": name or platform.processor() or "unknown",
        "flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def parse_cpuinfo(text: str) -> tuple[str, list[str]]:
    """The text of Linux's /proc/cpuinfo → the CPU's name ("" if it has none) and those of CPU_FLAGS that it lists."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())  # of the first processor
    has = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", ""), [flag for flag in CPU_FLAGS if flag in has]


class Stopwatch:
    """Context manager that sets `measured`: seconds, CPU seconds of this process and its finished children, on Linux
    also the shares (0 … 1) of all cores used by `others` and by the hypervisor (`steal`). Above 0.05: measure again."""

    measured: dict[str, float]

    def __enter__(self) -> Stopwatch:
        self._before = (time.perf_counter(), _own_cpu_seconds(), *_machine_cpu_seconds())
        return self

    def __exit__(self, *exc: object) -> None:
        after = (time.perf_counter(), _own_cpu_seconds(), *_machine_cpu_seconds())
        seconds, own, busy, steal = (now - then for now, then in zip(after, self._before, strict=True))
        self.measured = {"seconds": round(seconds, 3), "cpu_seconds": round(own, 2)}
        if busy > 0:
            available = seconds * (os.cpu_count() or 1)
            self.measured |= {
                "others": round(max(0.0, busy - own) / available, 3),
                "steal": round(steal / available, 3),
            }


def _own_cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _machine_cpu_seconds() -> tuple[float, float]:
    """Busy and stolen seconds of all cores since boot; zeros on systems without /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in stat.read_text().split()[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick


def commit_of(checkout: Path) -> str:
    """The checkout's commit, with "+changes" where tracked files were modified; "unknown" without git."""
    git = ["git", "-C", str(checkout)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changes.strip() else "")


def write_results(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes FOLDER/DATE-NAME.json, or DATE-NAME-2.json … if that exists: figures are never overwritten."""
    path = new_result(name, folder)
    save_results(path, figures)
    return path


def new_result(name: str, folder: Path = RESULTS) -> Path:
    """The path that write_results would write to; the folder is made. For results that grow, see save_results."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}-{name}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def save_results(path: Path, figures: dict[str, Any]) -> None:
    """Replaces the file atomically: a bench that is killed leaves the figures that it had at its last save."""
    replace_file(path, (json.dumps(figures, indent=1, ensure_ascii=False) + "\n").encode())
