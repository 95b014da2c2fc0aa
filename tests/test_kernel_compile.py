"""Every row of the launch tables compiles ahead of time and uses tensor cores, with hardly a spill. Needs no GPU."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache

import pytest

import model
from bench.ahead_of_time import PRODUCTS, SHARED_MEMORY, Job, cost
from bench.tune_attention import candidates
from tests.conftest import ROOT

pytest.importorskip("triton", reason="the kernel is Triton's")

PLAIN, MASKED, GROUPED, TAIL = (False, 1, True), (True, 1, True), (True, 4, True), (True, 1, False)
# of what a job is besides its row: masked, group, whole


def table_jobs(architecture: int, dtype: str, head_size: int, variant: tuple = PLAIN) -> list[Job]:
    """What launches_for would choose, of both tables."""
    key = f"sm_{architecture}", 4 if dtype == "float32" else 2, 64 if head_size <= 64 else 128
    tables = [model.LAUNCHES.get(key) or model.LAUNCHES["other", *key[1:]]]
    if variant[2] and head_size in (64, 128):
        tables.append(model.TMA_LAUNCHES.get(key, tables[0]))
    return [
        Job(kernel, architecture, dtype, head_size, launch, *variant)
        for number, kernel in enumerate(model.KERNELS)
        for launch in dict.fromkeys(table[number] for table in tables)
    ]


FEW = [
    job
    for architecture in (80, 90)
    for head_size in (64, 128)
    for job in table_jobs(architecture, "bfloat16", head_size)
]
FEW += [job for head_size in (64, 128) for job in table_jobs(90, "bfloat16", head_size, MASKED) if job.launch.tma]
FEW += [job for head_size in (64, 128) for job in table_jobs(80, "float32", head_size)]
MANY = [
    job
    for architecture in SHARED_MEMORY
    for dtype in ("bfloat16", "float16", "float32")
    for head_size in (16, 32, 48, 64, 80, 96, 128)
    for variant in (PLAIN, MASKED, GROUPED, TAIL)
    for job in table_jobs(architecture, dtype, head_size, variant)
    if head_size in (64, 128) or (architecture in (80, 90) and dtype == "bfloat16")
]


@cache
def compiled(jobs: tuple[Job, ...]) -> list[dict]:
    """In a process that compiles: Triton interprets in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    as_json = json.dumps([dataclasses.asdict(job) | {"launch": list(job.launch)} for job in jobs])
    command = [sys.executable, "-m", "bench.ahead_of_time", "--jobs", as_json]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(jobs: list[Job]) -> None:
    assert len(jobs) == len(set(jobs))
    for job, found in zip(jobs, compiled(tuple(jobs)), strict=True):
        assert "error" not in found, (job, found)
        assert found["shared"] <= SHARED_MEMORY[job.architecture], job
        if job.dtype == "float32":  # exact products, without tensor cores; spills are the price
            continue
        assert found["loop"]["wgmma" if job.architecture == 90 else "mma"] > 0, job
        assert found["loop"]["ex2"] > 0, job
        assert found["loop"]["waits"] <= PRODUCTS[job.kernel], job  # more: the assembler made the products synchronous
        if job.whole or job.kernel != "key_value_gradient":  # there masked loads cost more registers than there are
            allowed = found["loop"]["instructions"] // 40 if job.masked else 0
            assert found["loop"]["spills"] <= allowed, (job, found)


def test_the_launch_table_compiles_without_spills_in_the_loop():
    assert len(FEW) <= 28
    check(FEW)
    # the loop without its mask: one exponential per score and little more, and few of all instructions
    job = table_jobs(90, "bfloat16", 64)[0]
    found = compiled(tuple(FEW))[FEW.index(job)]
    exponentials = job.launch.block_q * job.launch.block_k // (32 * job.launch.num_warps)
    assert exponentials < found["loop"]["ex2"] <= 1.1 * exponentials
    assert 5 < cost(job, found)["per_score"] < 10
    assert found["loop"]["instructions"] < 0.6 * found["instructions"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_all_head_sizes_types_and_variants_compile(architecture):
    check([job for job in MANY if job.architecture == architecture])


@pytest.mark.parametrize("kernel", model.KERNELS)
def test_the_tuner_tries_the_rows_of_the_table(kernel):
    for table in (model.LAUNCHES, model.TMA_LAUNCHES):
        for D in (64, 128):
            launch = table["sm_90", 2, D][list(model.KERNELS).index(kernel)]
            assert launch in candidates(kernel, "bfloat16", D)


@pytest.mark.slow
def test_launches_reach_the_driver():
    """Through Triton's own launch path, by pointers and, where the table says so, by TMA with a limit of registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.launch_without_gpu"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    launched = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(row["passed"] == len(row["descriptors"]) for row in launched)
    for D in (64, 128):
        for name, launch in zip(model.KERNELS, model.TMA_LAUNCHES["sm_90", 2, D], strict=True):
            box = [f"tensordesc<fp16[{launch.loaded(name)}, {D}]>"] * (2 if launch.tma else 0)
            row = {"kernel": model.KERNELS[name].__name__, "warps": launch.num_warps, "maxnreg": launch.maxnreg}
            assert row | {"descriptors": box, "passed": len(box)} in launched
