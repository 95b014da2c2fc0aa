"""bench/gpu_session.py without a GPU: time limits, parts that hang or crash, a kill in the middle, the final table."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import model
from bench import generate, gpu, gpu_facts, gpu_part, gpu_session, short_run, train_speed, tune_attention
from bench.gpu_report import report
from bench.gpu_session import Part, Session, limit
from errors import UserError
from tests.conftest import ROOT
from tests.test_bench_attention import needs_interpreter

CPU = torch.device("cpu")
posix = pytest.mark.skipif(os.name == "nt", reason="process groups and SIGTERM")


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


@pytest.fixture
def session(tmp_path):
    (tmp_path / "parts").mkdir()
    options = argparse.Namespace(out=tmp_path, launches=None, commit="abc", minutes=1.0, smoke=True)
    return Session(options, tmp_path / "parts")


def saved(session):
    return json.loads(session.path.read_text(encoding="utf-8"))["parts"]


# ---- Time ------------------------------------------------------------------------------------------------------------


def test_a_part_gets_its_minimum_and_its_share_of_the_rest():
    parts = [Part([], 10, 1), Part([], 20, 3), Part([], 30, 0)]
    assert limit(parts, 100) == 10 + 40 * 1 / 4
    assert limit(parts[1:], 90) == 20 + 40  # what the first left goes to those after it
    assert limit(parts[2:], 77) == 77
    assert limit(parts, 30) == pytest.approx(5)  # too little for all minimums: they shrink alike
    assert limit(parts, -3) == 0


def test_later_parts_keep_their_minimum_if_all_earlier_ones_use_their_limit():
    options = gpu_session.read_options(["--smoke"])
    parts = list(gpu_session.make_parts(options).values())
    left = 13 * 60.0
    for place, part in enumerate(parts):
        seconds = limit(parts[place:], left)
        assert seconds >= part.minimum
        left -= seconds
    assert left == pytest.approx(0, abs=1e-6)


def test_the_parts_have_the_names_and_the_order_that_the_options_know():
    assert tuple(gpu_session.make_parts(gpu_session.read_options([]))) == gpu_session.PARTS
    assert gpu_session.read_options(["--parts=train,facts"]).parts == ["facts", "train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts=facts,speed"], "--parts=facts,speed: unknown 'speed'; expected some of facts,tests,attention,tune,"),
        (["--minutes=0"], "--minutes=0: expected more than 0"),
        (["--peer=nowhere"], "--peer=nowhere: no model.py there; expected a checkout of nanoGPT"),
        (["--text=nowhere.txt"], "--text=nowhere.txt: no such file"),
        (["--launches=nowhere.json"], "--launches=nowhere.json: no such file"),
    ],
)
def test_wrong_options_are_one_clear_line(arguments, message):
    with pytest.raises(UserError) as raised:
        gpu_session.main([*arguments, "--smoke"])
    assert str(raised.value).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"^bench/gpu_session.py needs a CUDA GPU and finds none; --smoke tries"):
        gpu_session.main([f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    options = argparse.Namespace(out=tmp_path / "file", launches=None, commit="", minutes=1.0, smoke=True)
    with pytest.raises(UserError, match="cannot be written"):
        Session(options, tmp_path)


# ---- A part that goes wrong ------------------------------------------------------------------------------------------


@posix
def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_its_figures(session, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_part, "GRACE", 1.0)
    child = "import time; time.sleep(100)"
    code = (
        "import pathlib, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        "pathlib.Path(sys.argv[2]).write_text(str(child.pid));"
        "pathlib.Path(sys.argv[1].removeprefix('--out='), 'a.json').write_text('{\"found\": 1}'); time.sleep(100)"
    )
    began = time.monotonic()
    session.run("tune", Part(python(code, "--out=OUT", str(tmp_path / "pid")), 0, 0), 4.0)
    assert 3 < time.monotonic() - began < 60  # not 100
    assert session.parts["tune"]["status"] == "out of time"
    assert saved(session)["tune"]["result"] == {"found": 1}
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not alive(pid):
            break
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a child whose parent is gone may stay a zombie where no init process reaps it
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
    except FileNotFoundError:
        return False


@posix
def test_a_part_that_crashes_costs_only_itself(session, capsys):
    session.run("facts", Part(python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), 0, 0), 30)
    session.run("train", Part(python("raise ValueError('a bug')"), 0, 0), 30)
    session.run("generate", Part(python("print('fine')"), 0, 0), 30)
    session.run("short_run", Part(python("print('left out: train.py needs filelock here')"), 0, 0), 30)
    rows = saved(session)
    assert [row["status"] for row in rows.values()] == ["crashed", "failed", "done", "left out"]
    assert rows["facts"]["why"] == "SIGSEGV; see the log"
    assert rows["train"]["why"] == "exit code 1: ValueError: a bug"
    assert rows["short_run"]["why"] == "train.py needs filelock here"
    assert "---- facts: crashed after" in capsys.readouterr().out
    assert "Traceback" in session.log_path.read_text(encoding="utf-8")


def test_long_output_goes_to_the_log_and_its_beginning_to_the_screen(session, capsys):
    session.run("facts", Part(python("for i in range(200): print('line', i, 'x' * 500)"), 0, 0), 30)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) < 80
    assert max(map(len, shown)) <= 180
    assert "line 199" in session.log_path.read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["tests/{} {} [ 50%]", "[gw3] [ 50%] {1} tests/{0} "], ids=["one by one", "-n"])
def test_the_outcomes_of_tests_are_counted(form, session, capsys):
    lines = [form.format(*row) for row in (("test_x.py::test_a", "PASSED"), ("test_x.py::test_b[1-a b]", "FAILED"))]
    lines += ["tests/test_x.py::test_a ", "FAILED tests/test_x.py::test_b[1-a b] - AssertionError", "1 failed"]
    session.run("tests", Part(python(f"print('\\n'.join({lines!r})); raise SystemExit(1)"), 0, 0), 30)
    row = saved(session)["tests"]
    assert row["tests"] == {"passed": ["tests/test_x.py::test_a"], "failed": ["tests/test_x.py::test_b[1-a b]"]}
    assert row["status"] == "failed"
    shown = capsys.readouterr().out
    assert lines[1].strip() in shown
    assert "test_a" not in shown


DRIVER = """
import sys
from bench import gpu_part, gpu_session
gpu_part.POLL_EVERY = 0.1
slow = "import json, pathlib, sys, time; pathlib.Path(sys.argv[1][6:], 'a.json').write_text(json.dumps({'found': 1}));"
slow += "print('begun', flush=True); time.sleep(100)"
quick = {name: gpu_session.Part([sys.executable, '-c', ''], 5, 1) for name in gpu_session.PARTS}
slow = gpu_session.Part([sys.executable, '-c', slow, '--out=OUT'], 5, 1)
gpu_session.make_parts = lambda options: quick | {'attention': slow}
sys.exit(gpu_session.main(sys.argv[1:]))
"""


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_kill_in_the_middle_leaves_valid_json(number, tmp_path):
    command = python(DRIVER, "--smoke", f"--out={tmp_path}", "--parts=facts,attention,generate")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if line == "begun\n":
                time.sleep(1)
                child = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
                process.send_signal(number)
                break
        if number == signal.SIGKILL:
            os.killpg(int(child), signal.SIGKILL)  # it holds the pipe; on a lent machine it goes with the machine
        printed += process.stdout.read()
    (path,) = tmp_path.glob("*.json")
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert list(parts) == ["facts", "attention"]
    assert parts["attention"]["result"] == {"found": 1}
    if number == signal.SIGKILL:
        assert parts["attention"]["status"] == "running"
        return
    assert process.returncode == 128 + number
    assert parts["attention"]["status"] == "stopped"
    assert f"stopped by {number.name}" in printed
    assert "attention        stopped" in printed  # the final table


@posix
@pytest.mark.slow
def test_a_whole_session_of_some_parts_in_tiny_sizes(tmp_path):
    command = [sys.executable, "bench/gpu_session.py", "--smoke", "--parts=facts,generate", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [row["status"] for row in result["parts"].values()] == ["done", "done"]
    assert "sprout x16" in done.stdout
    assert "no figure means anything" in done.stdout


# ---- The table -------------------------------------------------------------------------------------------------------


def recorded():
    def rows(direction, triton, flash, cudnn):
        shape = {"problem": "causal", "D": 64, "direction": direction}
        speeds = {"triton": triton, "flash": flash, "cudnn": cudnn}
        found = [{**shape, "T": 1024, "contender": name, "tflops": speed} for name, speed in speeds.items()]
        return [*found, {**shape, "T": 1024, "contender": "flex_flash", "unavailable": "not installed"}]

    def done(result):
        return {"status": "done", "seconds": 10.0, "limit_seconds": 20, "result": result}

    sides = {"gpt2_124m, triton, compiled": {"tokens_per_second": 612_345, "mfu": 0.523, "memory_gib": 20.5}}
    bound = {"tokens_per_second": 17_000.0, "share": 0.25}
    shape = {"median_tokens_per_second": {"sprout": 4200.4}, "bound": {"sprout": bound}}
    shape |= {"first_request": {"sprout": {"seconds": 1.5}}}
    evaluations = [{"step": 0, "val_loss": 4.2, "seconds": 9.0}, {"step": 250, "val_loss": 1.46, "seconds": 48.2}]
    run = {"evaluations": evaluations, "best_val_loss": 1.46, "command": ["train.py", "shakespeare_char"]}
    group = {"group": "matrix products", "us": 31_200.0, "launches": 148.0, "share": 0.462}
    step = {"wall_us": 67_600.0, "busy_us": 65_100.0, "idle_us": 2500.0, "launches": 812.0, "groups": [group]}
    replays = {"64 slots": {"us": 600.2, "host_us": 12.0, "busy_us": 410.0, "launches": 183}}
    replays |= {"draw": {"us": 90.0, "host_us": 4.0}}
    loop = {**step, "wall_us": 900.0, "busy_us": 520.0, "idle_us": 380.0, "launches": 190.0, "groups": []}
    decoding = {"loop_us": 914.0, "replays_us": 700.0, "replays": replays, "profiled_tokens": 64, "loop": loop}
    plain = {"loop_us": 1151.0, "replays_us": None, "replays": {}}
    profiled = {"training": {"gpt2_124m": step, "modern_124m": {"wall_us": 76_000.0}}}
    profiled |= {"decoding": {"one sample": decoding, "16 samples": plain}, "unavailable": {"a": "no kernels"}}
    hardware = {"gpu": "a GPU", "torch": "2.11.0", "triton": "3.6.0"}
    choice = {"table": "LAUNCHES", "kernel": "forward", "D": 64, "present_behind": 0.052}
    wrong = [{"error": 9.0, "unavailable": "wrong results"}, {"error": 0.5}, {"unavailable": "no memory"}]
    tuning = {"rows": ["LAUNCHES: (a row),"], "chosen": [choice], "launches": wrong, "variants": []}
    step = {"layers": 4, "width": 192, "tokens": 2048, "predicted_ms": 1.9}
    small = [{**step, "kind": "eager", "passes_ms": 15.9, "optimizer_ms": 2.8}]
    small += [{**step, "kind": "recorded", "passes_ms": 1.5, "optimizer_ms": 0.5}]
    error = {"contender": "triton", "T": 1024, "D": 64, "out": 0.002, "dq": 0.004, "dk": 0.003, "dv": 0.001}
    errors = [{**error, "of_flash": 1.02}, {"contender": "cudnn", "T": 1024, "D": 64, "unavailable": "not here"}]
    return {
        "bench": "gpu_session",
        "parts": {
            "facts": done({"hardware": hardware, "ceilings": {"matmul_tflops": 780.0, "copy_tb_per_second": 4.3}}),
            "tests": {"status": "failed", "why": "exit code 1: 1 failed", "tests": {"passed": ["a"], "failed": ["b"]}},
            "attention": done({"speed": rows("backward", 110.0, 100.0, 140.0) + rows("forward", 300.0, 200.0, 320.0)}),
            "tune": {"status": "out of time", "seconds": 20.0, "limit_seconds": 20, "result": tuning},
            "attention_tuned": done({"speed": [], "errors": errors}),
            "profile": done(profiled),
            "small_steps": done({"rows": small}),
            "train": done({"sides": sides, "unavailable": {"modern_124m, sdpa, compiled": "out of time"}}),
            "generate": done({"bench": "generate", "124m": shape}),
            "short_run": done({**run, "seconds_to_1.47": 48.2}),
        },
    }


def test_the_table_of_a_recorded_result(tmp_path, capsys):
    """Of a session in two commands: the parts of both are in one table."""
    first = recorded()
    later = {name: first["parts"].pop(name) for name in ("train", "generate", "short_run")}
    (tmp_path / "first.json").write_text(json.dumps({**first, "date": "2026-12-01", "commit": "abc"}))
    (tmp_path / "second.json").write_text(json.dumps({**first, "parts": later}))
    assert gpu_session.main(["--report", str(tmp_path / "first.json"), str(tmp_path / "second.json")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "2026-12-01, commit abc",
        "a GPU, torch 2.11.0, triton 3.6.0: 780.0 TFLOP/s of bfloat16 products, 4.3 TB/s of a copy",
        "tune out of time, 20 of 20 s",
        "gpu tests: 1 passed, 1 failed",
        "triton flash cudnn flex_flash / cudnn / flash",
        "forward D 64 T 1,024 300 200 320 - 0.94 1.50",
        "backward D 64 T 1,024 110 100 140 - 0.79 1.10",
        "triton D 64 T 1,024 4.00e-03, 1.02 × flash",
        "tuned rows for model.py",
        "LAUNCHES: (a row),",
        "LAUNCHES forward D 64: the present one +5.2%",
        "1 launches have wrong results: see their `error` in the result",
        "gpt2_124m, a compiled step: 67.60 ms",
        "812 launches, device busy 65.10 ms",
        "matrix products 31.20 ms 46.2% 148.0 launches",
        "idle 2.50 ms 3.7%",
        "modern_124m, a compiled step: 76.00 ms",
        "decoding, one sample: 914 µs a step, its graphs alone 700, so 214 are the host's",
        "graph of 64 slots: 600 µs a replay, 12 to queue it; 183 kernels, busy 410",
        "graph of draw: 90 µs a replay, 4 to queue it",
        "the first 64 steps: 900 µs a step",
        "190 launches, device busy 520.00 µs",
        "decoding, 16 samples: 1151 µs a step",
        "a: not measured: no kernels",
        "steps of small models, ms eager recorded compiled predicted",
        "4 x 192, 2,048 tokens 18.70 2.00 - 1.90",
        "gpt2_124m, triton, compiled 612,345 52.3% 20.5 GiB",
        "modern_124m, sdpa, compiled not measured: out of time",
        "sprout 4,200 tokens/s, 25% of the bandwidth bound 17,000; first request 1.50 s",
        "train.py shakespeare_char: val loss 4.2000 after 9 s, 1.4600 after 48 s; best 1.46",
        "missed forward ≥ 1.0 × cuDNN, D 64 (0.94)",
        "reached backward ≥ 1.1 × FlashAttention-2 (1.10)",
        "reached training gpt2_124m ≥ 600,000 tokens/s (612,345)",
        "reached decoding 124M, one sample ≥ 3,500 tokens/s (4,200)",
        "reached shakespeare_char to 1.47 in under 60 s (48.2)",
    ):
        assert line in lines


@pytest.mark.parametrize("missing", ["facts", "tests", "attention", "profile", "train", "generate", "short_run"])
def test_a_part_that_is_missing_is_not_measured(missing):
    result = recorded()
    result["parts"][missing] = {"status": "running"}
    shown = report(result)
    marks = {"attention": 2, "train": 1, "generate": 1, "short_run": 1}
    assert shown.count("not measured") - shown.count("not measured: ") == marks.get(missing, 0)
    assert report({"parts": {}}).count("not measured") == 5


def test_a_short_run_that_was_ended_early_missed_nothing():
    result = recorded()
    run = result["parts"]["short_run"]["result"]
    run |= {"seconds_to_1.47": None, "seconds": 41.0}
    assert "not measured shakespeare_char to 1.47 in under 60 s: ended after 41 s" in report(result)
    run["seconds"] = 75.0
    assert "missed       shakespeare_char to 1.47 in under 60 s (never)" in report(result)


def test_each_part_names_the_card():
    hardware = {"gpu": "a GPU", "torch": "2.11.0", "triton": "3.6.0"}
    for result in ({"hardware": hardware}, hardware):
        assert report(
            {"parts": {"train": {"status": "running"}, "generate": {"status": "done", "result": result}}}
        ).startswith("a GPU, torch 2.11.0, triton 3.6.0\n")


# ---- Launches in force -----------------------------------------------------------------------------------------------


LAUNCH = model.Launch(16, 32, 4, 2)


def tuned(tmp_path, **changes):
    chosen = [
        {"table": table, "kernel": kernel, "dtype": "bfloat16", "D": 64, "best": best}
        for table, best in (("LAUNCHES", LAUNCH), ("TMA_LAUNCHES", LAUNCH._replace(tma=True)))
        for kernel in model.KERNELS
    ]
    figures = {"bench": "tune_attention", "hardware": {}, "chosen": chosen, **changes}
    (tmp_path / "tuned.json").write_text(json.dumps(figures))
    return tmp_path / "tuned.json"


@pytest.fixture
def tables(monkeypatch):
    """model.py's tables of launches, which the test may change."""
    for name in ("LAUNCHES", "TMA_LAUNCHES"):
        monkeypatch.setattr(model, name, dict(getattr(model, name)))
    return model


def test_tuned_launches_are_in_force_in_the_process(tmp_path, tables):
    before = tables.LAUNCHES["other", 2, 128]
    assert len(gpu.use_launches(tuned(tmp_path), CPU)) == 2
    assert tables.LAUNCHES["other", 2, 64] == (LAUNCH,) * 3
    assert tables.TMA_LAUNCHES["other", 2, 64] == (LAUNCH._replace(tma=True),) * 3
    assert tables.LAUNCHES["other", 2, 128] == before
    assert gpu.use_launches(None, CPU) == []


def test_launches_of_a_session_are_those_of_its_tuning(tmp_path):
    figures = json.loads(tuned(tmp_path).read_text())
    (tmp_path / "session.json").write_text(json.dumps({"bench": "gpu_session", "parts": {"tune": {"result": figures}}}))
    assert gpu.read_launches(tmp_path / "session.json") == gpu.read_launches(tmp_path / "tuned.json")


@pytest.mark.parametrize(
    "changes", [{"bench": "gpu_session"}, {"chosen": [{}]}, {"chosen": 3}, {"hardware": None}, {"table": "NO_TABLE"}]
)
def test_other_files_are_refused_as_launches(changes, tmp_path):
    path = tuned(tmp_path)
    if "table" in changes:
        path.write_text(path.read_text().replace("TMA_LAUNCHES", changes["table"]))
    else:
        path = tuned(tmp_path, **changes)
    with pytest.raises(UserError, match=r"^--launches=.*; expected a result of bench/tune_attention.py"):
        gpu.read_launches(path)


def test_launches_of_another_gpu_are_refused(tmp_path, tables):
    path = tuned(tmp_path, hardware={"architecture": "sm_80"})
    with pytest.raises(UserError, match="tuned for sm_80, this GPU is other"):
        gpu.use_launches(path, CPU)


def test_the_rows_of_a_tuning_that_is_not_complete_are_left_out(tmp_path):
    path = tuned(tmp_path)
    figures = json.loads(path.read_text())
    path.write_text(json.dumps({**figures, "chosen": figures["chosen"][:5]}))
    assert list(gpu.read_launches(path)[1]) == ["LAUNCHES"]


@needs_interpreter
def test_what_a_trial_of_the_tuner_writes_can_be_put_in_force(tmp_path, tables, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tune_attention.main(["--interpret", f"--out={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*-tune_attention.json")
    assert [row.split(" (")[0] for row in gpu.use_launches(path, CPU)] == ["LAUNCHES", "TMA_LAUNCHES"]


# ---- What the parts measure ------------------------------------------------------------------------------------------


def test_runs_on_a_gpu_are_timed_by_events_after_the_caches_are_flushed(monkeypatch):
    """torch.cuda is a stub: a queue in which an operation takes a second and an event takes none."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(queue)

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Flush:
        def zero_(self):
            queue.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(gpu, "_flush_buffer", lambda device: Flush())
    monkeypatch.setattr(gpu, "wake", lambda device: None)
    runs = {"a": lambda: queue.append("a"), "bb": lambda: queue.extend("bb")}
    assert gpu.in_turns(runs, 2, torch.device("cuda")) == {"a": [1.0, 1.0], "bb": [2.0, 2.0]}
    assert queue == ["flush", "a", "flush", "b", "b", "flush", "b", "b", "flush", "a"]


def test_settings_of_the_card_are_read_and_not_set(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_facts.shutil, "which", lambda name: None)
    assert gpu_facts.settings() == {}
    asked = []

    def answer(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=", ".join(map(str, range(len(gpu_facts.QUERIED)))) + "\n")

    monkeypatch.setattr(gpu_facts.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_facts.subprocess, "run", answer)
    assert gpu_facts.settings()["clocks.sm"] == str(gpu_facts.QUERIED.index("clocks.sm"))
    assert asked[0][:2] == ["nvidia-smi", "--id=0"]
    assert asked[0][2].startswith("--query-gpu=")


def test_the_bandwidth_bound_of_decoding_counts_weights_keys_and_values():
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50_257}
    gpt = model.GPT(model.GPTConfig(**shape, eos_id=None), seed=None)
    one = generate.against_copy("124m", "sprout", gpt, 1, 350, speed=3500.0, copy_tb_per_second=4.3)
    weights = sum(parameter.numel() for parameter in gpt.parameters()) - gpt.position.weight.numel()
    assert one["bytes_of_a_step"] == 2 * (weights + 175 * 2 * 12 * 768)
    assert one["tokens_per_second"] == pytest.approx(4.3e12 / one["bytes_of_a_step"], rel=1e-4)
    many = generate.against_copy("124m", "sprout x16", gpt, 16, 350, speed=3500.0, copy_tb_per_second=4.3)
    assert many["bytes_of_a_step"] - one["bytes_of_a_step"] == 2 * 15 * 175 * 2 * 12 * 768
    assert one["share"] == pytest.approx(3500 / one["tokens_per_second"], abs=1e-3)


def test_compiling_ahead_compiles_both_passes_and_runs_nothing(monkeypatch):
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx

    compiled = []
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs, **options: compiled.append(graph))
    side = train_speed.make_ours("modern_124m", "sdpa", "compiled", tiny=True)
    before = side.model.embed.weight.clone()
    x = torch.zeros(2, 32, dtype=torch.int64)
    with functorch_config.patch(force_non_lazy_backward_lowering=False):
        train_speed.compile_only(side, x, x)
        assert functorch_config.force_non_lazy_backward_lowering
    assert len(compiled) == 1  # no graph break
    assert torch.equal(before, side.model.embed.weight)


def test_sides_are_measured_as_they_get_ready_until_the_time_is_up(capsys):
    arguments = train_speed.read_arguments(["--smoke", "--presets=gpt2_124m", "--attention=sdpa"])
    arguments.presets, arguments.smoke = ["gpt2_124m", "modern_124m"], True
    sides = train_speed.make_sides(arguments)
    assert list(sides) == [f"{preset}, sdpa, {mode}" for mode in ("compiled", "eager") for preset in arguments.presets]
    x = torch.zeros(2, 32, dtype=torch.int64)
    deadline = gpu.Deadline(10.0)
    steps = train_speed.prepare(sides, x, x, deadline, 1)
    measured = next(steps)
    assert len(measured.figures["gpt2_124m, sdpa, compiled"]["seconds"]) == 1
    deadline._end = time.monotonic() - 1
    assert [len(found.refused) for found in steps] == [1, 2, 3]
    assert set(measured.refused.values()) == {"out of time"}


def test_the_short_run_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(short_run, "PACKAGES", ("os", "no_such_package"))
    assert short_run.main([f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith("left out: train.py needs no_such_package here")
    assert not list(tmp_path.iterdir())


def test_the_time_to_the_goal_counts_on_tinyshakespeare_alone():
    evaluations = [{"step": s, "val_loss": loss, "seconds": 10.0 * s} for s, loss in enumerate((4.0, 1.5, 1.46, 1.44))]
    assert short_run.summarize({"evaluations": evaluations}, True)["seconds_to_1.47"] == 20.0
    assert short_run.summarize({"evaluations": evaluations[:2]}, True)["seconds_to_1.47"] is None
    assert "seconds_to_1.47" not in short_run.summarize({"evaluations": evaluations}, False)
    assert short_run.summarize({"evaluations": []}, False)["best_val_loss"] is None


def test_the_short_run_trains_and_keeps_losses_and_samples(tmp_path, capsys):
    assert short_run.main(["--smoke", f"--out={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*-short_run.json")
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert [evaluation["step"] for evaluation in figures["evaluations"]] == [0, 5, 10]
    assert "==== step 10 (sample" in figures["samples"]
    assert set(figures["train_seconds"]) == {"0", "5", "10"}
    assert "val loss" in capsys.readouterr().out
