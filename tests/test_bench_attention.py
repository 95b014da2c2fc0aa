"""What the GPU benches count, choose and print, and a whole run of each in tiny sizes without a GPU."""

import itertools
import json
import math
import queue

import pytest
import torch

import model
from bench import attention, attention_report, gpu, gpu_profile, launch_check, train_speed, tune_attention
from bench.attention import Problem
from bench.launch_check import CheckedCase
from bench.tune_attention import MOST_SPILLS
from errors import UserError
from model import GPT, GPTConfig, Launch
from tests.conftest import ROOT

CPU = torch.device("cpu")
SCRIPTS = {
    "attention": attention,
    "tune_attention": tune_attention,
    "train_speed": train_speed,
    "gpu_profile": gpu_profile,
}


def interpretable() -> bool:
    try:
        import numpy
        import triton
    except ImportError:
        return False
    broken = triton.__version__.startswith("3.6.") and [int(part) for part in numpy.__version__.split(".")[:2]] >= [
        2,
        4,
    ]
    return not torch.cuda.is_available() and not broken


needs_interpreter = pytest.mark.skipif(
    not interpretable(), reason="Triton's interpreter is not there, or broken, or Triton compiles here"
)


# ---- attention.py ----------------------------------------------------------------------------------------------------


def test_flops_by_the_convention_and_by_the_pairs_that_are_seen():
    assert Problem("causal", 2, 1024, 16, 64, CPU).flops("forward") == 4 * 2 * 16 * 1024**2 * 64 / 2
    assert Problem("causal", 2, 1024, 16, 64, CPU).flops("backward") == 2.5 * 4 * 2 * 16 * 1024**2 * 64 / 2
    for first in (attention.window(3, 40, 7, CPU), attention.documents(3, 40, 10, CPU)):
        seen = sum(t - int(first[b, t]) + 1 for b in range(3) for t in range(40))
        assert Problem("hidden", 3, 40, 2, 16, CPU, first).flops("forward") == 4 * 2 * 16 * seen


def test_documents_and_windows_start_where_they_should():
    first = attention.documents(2, 200, 20, CPU)
    assert (first.diff(dim=1) >= 0).all()
    starts = [*first[0].unique().tolist(), 200]
    assert all(10 <= after - before <= 30 for before, after in itertools.pairwise(starts[:-1]))
    assert all(first[0, start] == start for start in starts[:-1])
    assert attention.window(1, 6, 3, CPU).tolist() == [[0, 0, 0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("direction", "head_size", "length", "tflops", "met"),
    [
        ("forward", 64, 1024, 228.9, "below must"),
        ("forward", 64, 1024, 229.0, "must"),
        ("forward", 128, 8192, 475.0, "good"),
        ("backward", 64, 16384, 460.0, "stretch"),
        ("backward", 128, 16384, 900.0, "good"),  # no stretch is written down there
        ("forward", 64, 512, 900.0, ""),
        ("forward", 32, 1024, 900.0, ""),
    ],
)
def test_targets(direction, head_size, length, tflops, met):
    assert attention_report.target_met(direction, head_size, length, tflops) == met


def speed_rows():
    shape = {"problem": "causal", "T": 1024, "D": 64, "direction": "forward"}
    return attention_report.with_ratios(
        [
            {**shape, "contender": "triton", "tflops": 300.0},
            {**shape, "contender": "flash", "tflops": 200.0},
            {**shape, "contender": "cudnn", "unavailable": "not here"},
            {**shape, "T": 2048, "contender": "flash", "tflops": 212.4},
        ][:3]
    )


def test_ratios_are_given_if_the_rival_ran():
    mine, flash, cudnn = speed_rows()
    assert (mine["of_flash"], mine["target"], flash["of_flash"]) == (1.5, "stretch", 1.0)
    assert "of_cudnn" not in mine
    assert "of_flash" not in cudnn


def test_a_line_shows_all_speeds_and_our_ratios(capsys):
    attention_report.show_speed(speed_rows())
    line = capsys.readouterr().out.strip()
    assert (
        line
        == "causal                   T=1024   D=64   forward   triton 300, flash 200, cudnn -; 1.50 x flash; stretch"
    )


def test_the_table_is_markdown_with_a_column_a_length():
    rows = [
        *speed_rows(),
        {"problem": "causal", "T": 512, "D": 64, "direction": "forward", "contender": "flash", "tflops": 150.4},
    ]
    assert attention_report.table(rows, "forward", 64).splitlines() == [
        "| forward, D = 64 | 512 | 1,024 |",
        "|---|---|---|",
        "| triton | - | 300 |",
        "| flash | 150 | 200 |",
        "| cudnn | - | - |",
    ]
    assert attention_report.table(rows, "backward", 64) == ""


def test_a_result_is_drawn_and_other_files_are_refused(tmp_path):
    pytest.importorskip("matplotlib")
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"hardware": {"gpu": "a GPU", "date": "today"}, "speed": speed_rows()}))
    assert attention.main([f"--plot={result}"]) == 0
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result.write_text("[]")
    with pytest.raises(UserError, match="no result of this bench"):
        attention_report.plot(result)


# ---- gpu.py ----------------------------------------------------------------------------------------------------------


def test_runs_take_turns_there_and_back():
    order = []
    seconds = gpu.in_turns({name: lambda name=name: order.append(name) for name in "abc"}, 3, CPU)
    assert "".join(order) == "abc" + "cba" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_summary_gives_median_and_interquartile_range():
    assert gpu.summary([0.001, 0.002, 0.003, 0.004, 0.1]) == {"ms": 3.0, "spread": pytest.approx(16.833), "runs": 5}
    assert gpu.summary([0.5]) == {"ms": 500.0, "spread": 0.0, "runs": 1}


def test_reasons_catches_refusals_but_not_bugs():
    refused = {}
    with gpu.reasons(refused, "it"):
        raise torch.OutOfMemoryError("CUDA out of memory.\nand much more")
    assert refused == {"it": "CUDA out of memory."}
    with pytest.raises(AttributeError), gpu.reasons(refused, "that"):
        raise AttributeError("a mistake of ours")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_gpu_one_line_says_so(script, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        UserError, match=f"^bench/{script}.py needs a CUDA GPU and finds none; --(interpret|smoke) tries"
    ):
        SCRIPTS[script].main([])


@needs_interpreter
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("attention", ["--interpret", "--contenders=triton,flash,cudnn,math"]),
        ("tune_attention", ["--interpret", "--dtypes=bfloat16"]),
        ("train_speed", ["--smoke", "--presets=gpt2_124m"]),
    ],
)
def test_a_whole_run_in_tiny_sizes_writes_nothing(script, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if script == "attention":  # its compiled forms are left to a run by hand
        monkeypatch.setattr(torch, "compile", lambda form, **options: form)
    elsewhere = set((ROOT / "bench" / "results").iterdir())
    assert SCRIPTS[script].main(arguments) == 0
    assert set((ROOT / "bench" / "results").iterdir()) == elsewhere
    lines = capsys.readouterr().out.splitlines()
    assert "nothing is written" in lines[-1]
    if script == "attention":
        speeds = [line for line in lines if "triton 0, flash 0" in line]
        assert [line.split()[0] for line in speeds] == ["causal", "causal", "documents", "documents"]
        assert any(
            line.startswith("cudnn did not run (2 times, first causal forward T=32 D=16): No viable backend")
            for line in lines
        )
        assert sum("form" in line and "unavailable" not in line for line in lines) == 8
    elif script == "tune_attention":
        assert any(line.startswith('LAUNCHES: ("other", 2, 64): (Launch(') for line in lines)
        assert any(line.startswith('TMA_LAUNCHES: ("other", 2, 64): (Launch(') for line in lines)
    else:
        sides = [line for line in lines if "tokens_per_second" in line]
        assert len(sides) == 5, lines  # two attention paths, eager and compiled; that of the kernel recorded, too


@needs_interpreter
@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("attention", ["--interpret", "--parts=speed", "--contenders=triton,cudnn"], "speed"),
        ("train_speed", ["--smoke", "--presets=gpt2_124m", "--attention=sdpa", "--modes=eager"], "sides"),
    ],
)
def test_a_trial_is_written_where_out_names_a_folder(script, arguments, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert SCRIPTS[script].main([*arguments, f"--out={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*.json")
    figures = json.loads(path.read_text())
    assert figures["hardware"]["gpu"].startswith("none")
    assert figures[rows]


def test_figures_are_written_after_each_problem(tmp_path, monkeypatch):
    """So a run that is killed leaves what it had measured."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = []

    def measure(problem, contenders, seconds):
        seen.append([json.loads(path.read_text())["speed"] for path in tmp_path.glob("*.json")])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return [{"problem": problem.name, "contender": "triton", "direction": "forward", "T": 32, "D": 16, "tflops": 1}]

    monkeypatch.setattr(attention, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        attention.main(["--interpret", "--parts=speed", f"--out={tmp_path}"])
    assert seen[0] == []
    assert [row["problem"] for row in seen[1][0]] == ["causal"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--parts=speeds", "--parts=speeds: unknown 'speeds'; expected some of errors,speed,signatures"),
        ("--contenders=triton,fa3", "--contenders=triton,fa3: unknown 'fa3'; expected some of triton,flash"),
        ("--lengths=1000", "--lengths=1000: unknown '1000'; expected some of 64,128"),
        ("--head_sizes=96", "--head_sizes=96: unknown '96'; expected some of 64,128"),
    ],
)
def test_unknown_parts_of_the_attention_bench_are_named(option, message):
    with pytest.raises(UserError) as raised:
        attention.main(["--interpret", option])
    assert str(raised.value).startswith(message)


def test_the_masks_are_measured_at_their_length_alone():
    problems = attention.speed_problems(torch.device("meta"), [1024, 8192], [64])
    assert [(problem.name, problem.T) for problem in problems] == [
        ("causal", 1024),
        ("causal", 8192),
        ("documents of about 1000", 8192),
        ("window of 1024", 8192),
    ]
    assert len(attention.speed_problems(torch.device("meta"), [1024, 4096, 16384], [64, 128])) == 6


def test_reasons_keep_the_line_that_says_why():
    assert gpu.first_line("backend='inductor' raised:\nLoweringException: no flash\n\nmore") == (
        "backend='inductor' raised: LoweringException: no flash"
    )
    assert gpu.first_line("CUDA out of memory.\nTried to") == "CUDA out of memory."


# ---- tune_attention.py -----------------------------------------------------------------------------------------------

A, B, C = Launch(64, 64, 4, 2), Launch(128, 64, 4, 3), Launch(128, 128, 8, 2)


def test_the_launch_that_is_good_everywhere_is_chosen():
    timings = {1024: {A: 1.0, B: 1.1, C: 1.5}, 4096: {A: 14.0, B: 11.0, C: 10.0}}
    assert [launch for launch, _ in tune_attention.rank(timings)] == [B, A, C]
    choice = tune_attention.choose(timings, C, allowed=(A, B, C))
    assert (choice["best"], choice["second"], choice["present"]) == (B, A, C)
    assert choice["second_behind"] == pytest.approx(math.sqrt(14 / 12.1) - 1, abs=1e-3)
    assert choice["fastest_at"] == {1024: (A, 0.1), 4096: (C, 0.1)}
    where = {"table": "LAUNCHES", "kernel": "forward", "dtype": "bfloat16", "D": 64}
    text = tune_attention.describe(where | choice)
    assert "Launch(128, 64, 4, 3), the second Launch(64, 64, 4, 2) +7.6%" in text
    assert "at T=1,024 Launch(64, 64, 4, 2) is faster: 10.0%" in text


PROBLEM = ("forward", "bfloat16", 64)
ALL = {variant: {"error": 0.5} for variant in tune_attention.VARIANTS}


def chosen(table, seconds, **changes):
    """changes: by launch, what differs from a launch that is right in every variant."""
    compiled = {(*PROBLEM, launch, variant): found for launch in seconds for variant, found in ALL.items()}
    for launch, variant, found in changes.get("changes", ()):
        compiled[*PROBLEM, launch, variant] = found
    return tune_attention.choose_for(table, *PROBLEM, "sm_90", {PROBLEM: {1024: seconds}}, compiled)


def test_each_table_gets_the_best_launch_that_hardly_spills_and_is_right_in_every_variant():
    spills, fails, by_tma = Launch(128, 128, 4, 2), Launch(128, 64, 4, 2, True), Launch(64, 64, 4, 2, True)
    seconds = {spills: 1.0, fails: 1.1, by_tma: 1.2, A: 1.3, B: 1.4}
    changes = [
        (spills, "plain", {"spills": MOST_SPILLS + 1, "error": 0.5}),
        (by_tma, "plain", {"spills": MOST_SPILLS, "error": 0.5}),
    ]
    changes += [(fails, "grouped", {"unavailable": "out of resources"})]
    found = [chosen(table, seconds, changes=changes) for table in ("LAUNCHES", "TMA_LAUNCHES")]
    assert [choice["best"] for choice in found] == [A, by_tma]
    assert found[1]["ahead_but_refused"] == [spills, fails]
    assert found[1]["present"] == model.TMA_LAUNCHES["sm_90", 2, 64][0]
    assert found[1]["unchecked"] == []
    jobs = tune_attention.finalists({PROBLEM: {1024: seconds}})
    assert {job[3] for job in jobs} == {spills, fails, by_tma, A, B}
    assert {job[4] for job in jobs} == {"masked", "grouped", "tail"}
    assert {job[3] for job in jobs[:6]} == {A, spills}, "the best of each form first"


def test_a_launch_that_was_not_checked_comes_after_those_that_were():
    """Not checked: the time was over, or the compiler crashed."""
    open_ones = [(A, variant, {"unchecked": "no time was left"}) for variant in ("masked", "tail")]
    assert chosen("LAUNCHES", {A: 1.0, B: 1.1}, changes=open_ones)["best"] == B
    choice = chosen("LAUNCHES", {A: 1.0}, changes=open_ones)
    assert (choice["best"], choice["unchecked"]) == (A, ["masked", "tail"])


def test_nothing_is_chosen_where_everything_is_refused():
    assert chosen("LAUNCHES", {A: 1.0}, changes=[(A, "plain", {"spills": MOST_SPILLS + 1, "error": 0.1})]) is None
    assert chosen("LAUNCHES", {A: 1.0}, changes=[(A, "tail", {"unavailable": "wrong results", "error": 9.0})]) is None
    assert chosen("LAUNCHES", {}) is None


def test_where_the_time_ends_while_launches_compile_each_kernel_has_some():
    jobs = tune_attention.to_compile([("bfloat16", 64), ("bfloat16", 128)], "sm_90", None)
    assert len({job[:3] for job in jobs[:6]}) == 6
    assert [job[3] for job in jobs[:3]] == list(model.LAUNCHES["sm_90", 2, 64])
    assert len(jobs) == len(set(jobs))


@needs_interpreter
def test_figures_are_written_while_the_tuner_times(tmp_path, monkeypatch):
    """With rows of the tables as soon as all kernels of a head size were timed."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen, time_kernel = [], tune_attention.time_kernel

    def look(*arguments):
        (path,) = tmp_path.glob("*.json")
        seen.append(json.loads(path.read_text()))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return time_kernel(*arguments)

    monkeypatch.setattr(tune_attention, "time_kernel", look)
    with pytest.raises(KeyboardInterrupt):
        tune_attention.main(["--interpret", f"--out={tmp_path}"])
    assert [sum("microseconds" in row for row in figures["launches"]) for figures in seen] == [0, 3, 6]
    assert {row["kernel"] for row in seen[2]["launches"] if "microseconds" in row} == {"forward", "query_gradient"}


# ---- launch_check.py -------------------------------------------------------------------------------------------------


def checked(T=32, dtype="bfloat16", **changes):
    torch.manual_seed(3)
    return CheckedCase(T, T, 16, dtype, CPU, 64, **changes)


@needs_interpreter
@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "float16", "masked": True, "group": 4}, {"dtype": "float32", "T": 37, "masked": True}]
)
def test_right_launches_are_accepted(changes, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = checked(**changes)
    for kernel in model.KERNELS:
        assert case.check(kernel, Launch(32, 16, 4, 1, tma="masked" not in changes))[1] <= 1, kernel


@pytest.mark.parametrize("output", ["out", "lse", "delta", "dq", "dk", "dv"])
@pytest.mark.parametrize("mistake", ["unwritten", "a token is off", "a token is zero"])
def test_wrong_launches_are_not(output, mistake, monkeypatch):
    """The launch writes what is right, but for one token."""
    case = checked()
    kernel = next(kernel for kernel, written in launch_check.WRITTEN.items() if output in written)

    def launch(kernel, launch):
        for name in launch_check.WRITTEN[kernel]:
            getattr(case, name).copy_(case.exact[name])
        written = getattr(case, output)
        row = written[-1, :, 16] if output in ("lse", "delta") else written[-1, 16]
        row.mul_(1.1) if mistake == "a token is off" else row.fill_(math.nan if mistake == "unwritten" else 0.0)

    monkeypatch.setattr(case, "launch", launch)
    assert not case.check(kernel, A)[1] <= 1


def test_a_worker_that_lost_its_gpu_reports_and_ends(monkeypatch):
    """torch.cuda is a stub: after the second launch every call fails."""
    results = iter([{"error": 0.5}, {"unavailable": "an illegal memory access was encountered"}, {"error": 0.5}])
    last = {}

    def run(job, device):
        last.clear()
        last.update(next(results))
        return dict(last)

    def synchronize():
        if "unavailable" in last:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tune_attention, "compile_and_check", run)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    todo, done = queue.Queue(), queue.Queue()
    for job in ("one", "two", "three"):
        todo.put(job)
    with pytest.raises(RuntimeError):
        tune_attention.compile_some(todo, done)
    assert [done.get() for _ in range(done.qsize())] == [
        ("one", {"error": 0.5}),
        ("two", {"unavailable": "an illegal memory access was encountered"}),
    ]
    assert todo.get() == "three"


@needs_interpreter
def test_a_launch_with_wrong_results_is_neither_timed_nor_chosen(tmp_path, monkeypatch, capsys):
    """The kernel is right, but its launches with blocks of 64 queries lose a part of the sum."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    right = launch_check.launch_kernel

    def launch_kernel(name, launch, *tensors):
        right(name, launch, *tensors)
        if name == "forward" and launch.block_q == 64:
            tensors[4][:, -1] *= 0.9

    monkeypatch.setattr(launch_check, "launch_kernel", launch_kernel)
    assert tune_attention.main(["--interpret", f"--out={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*.json")
    figures = json.loads(path.read_text())
    wrong = [row for row in figures["launches"] if row["kernel"] == "forward" and row["launch"][0] == 64]
    assert wrong
    assert all("microseconds" not in row and row["unavailable"].startswith("wrong results") for row in wrong)
    assert "LAUNCHES bfloat16 D=16: no row" in capsys.readouterr().out


def test_the_sweep_includes_the_launches_of_the_table():
    for kernel, first in (("forward", (128, 128, 8, 2)), ("key_value_gradient", (64, 128, 8, 2))):
        found = tune_attention.candidates(kernel, "bfloat16", 64)
        assert {Launch(*first), Launch(*first, True), Launch(64, 64, 4, 2)} <= set(found)
        launches = [job[3] for job in tune_attention.to_compile([("bfloat16", 64)], "other", None) if job[0] == kernel]
        assert launches[0] == model.LAUNCHES["other", 2, 64][list(model.KERNELS).index(kernel)]
        assert len(launches) == len(set(launches)) < 45


# ---- train_speed.py --------------------------------------------------------------------------------------------------


def test_rates_of_a_training_step():
    row = {"flops_per_token": 1_000_000_000, "seconds": [0.1, 0.09, 0.12]}
    assert train_speed.rates(row, 32_768, matmul_tflops=655.36, vendor_flops=1e15) == {
        "tokens_per_second": 327_680,
        "spread": 0.3,
        "of_matmul": 0.5,
        "mfu": 0.328,
    }
    assert train_speed.rates(row, 32_768, 655.36, train_speed.vendor_flops("some GPU"))["mfu"] is None
    assert train_speed.vendor_flops("NVIDIA H200") == 989e12


def test_flops_of_a_token_of_the_124m_model():
    side = train_speed.Side(GPT(GPTConfig(), seed=None), lambda model, x, y: x, GPTConfig(), compiled=False)
    assert train_speed.flops_per_token(side) == pytest.approx(855e6, rel=1e-3)
