"""Every row of LAUNCHES compiles ahead of time, without register spills, and uses tensor cores. Needs no GPU."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest

import model
from tests.conftest import ROOT

pytest.importorskip("triton", reason="the kernel is Triton's")

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
NARROW_STACK = 8  # bytes of stack that ptxas uses for 16-wide heads on sm_80, though only 80 of 255 registers are taken
GROUPED_STACK = 128  # bytes allowed to the key and value gradient with grouped heads, which adds a loop


def table_rows(architecture: int, dtype: str, head_size: int, *variant) -> list[tuple]:
    """The rows of ahead_of_time for what launches_for would choose; variant: masked, group, tail."""
    key = 4 if dtype == "float32" else 2, 64 if head_size <= 64 else 128
    launches = model.LAUNCHES.get((f"sm_{architecture}", *key)) or model.LAUNCHES["other", *key]
    return [
        (kernel, architecture, dtype, head_size, *launch, *variant)
        for kernel, launch in zip(model.KERNELS, launches, strict=True)
    ]


MASKED = (True, 1, True)  # documents, ungrouped, T not divisible: the largest code
FEW = [
    row
    for architecture in (80, 90)
    for head_size in (64, 128)
    for row in table_rows(architecture, "bfloat16", head_size, *MASKED)
]
FEW += [row for head_size in (64, 128) for row in table_rows(80, "float32", head_size, *MASKED)]
FEW += table_rows(90, "float16", 96, *MASKED)
MANY = [
    row
    for architecture in SHARED_MEMORY
    for dtype in ("bfloat16", "float16", "float32")
    for head_size in (16, 32, 48, 64, 80, 96, 128)
    for variant in (MASKED, (False, 1, False), (True, 4, True))
    for row in table_rows(architecture, dtype, head_size, *variant)
    if head_size in (64, 128) or (architecture in (80, 90) and dtype == "bfloat16")
]


@cache
def compiled(rows: tuple) -> list[dict]:
    """In a process that compiles: Triton interprets in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ahead_of_time", json.dumps(rows)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(rows: list[tuple]) -> None:
    assert len(rows) == len(set(rows))
    for row, found in zip(rows, compiled(tuple(rows)), strict=True):
        kernel, architecture, dtype, head_size, *_ = row
        grouped = row[-2] > 1 and kernel == "key_value_gradient"
        assert found["shared"] <= SHARED_MEMORY[architecture], row
        if dtype == "float32":  # exact products, without tensor cores; spills are the price
            continue
        assert found["wgmma" if architecture == 90 else "mma"] > 0, row
        assert found["ex2"] > 0, row
        allowed = GROUPED_STACK if grouped else NARROW_STACK if head_size < 64 else 0
        assert found["stack"] <= allowed, (row, found)
        assert allowed or found["spills"] == 0, (row, found)


def test_the_launch_table_compiles_without_spills():
    assert len(FEW) <= 24
    check(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_all_head_sizes_types_and_variants_compile(architecture):
    check([row for row in MANY if row[1] == architecture])
