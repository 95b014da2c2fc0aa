"""Several processes on one machine (gloo): the same run as one process, under every layout; resumes at another size."""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

import common.hardware as hardware_module
import sample as sample_script
import train as train_script
from checkpoint import list_checkpoints, open_checkpoint
from config import planning
from errors import UserError
from model import GPT, GPTConfig
from parallel import orthogonalizing, processes
from parallel.orthogonalizing import assign, split_rows
from tests.test_train import read_events
from training import data, micro_batch, setup
from training.data import TrainBatches
from training.options import OptimizerOptions, TrainOptions

ROOT = Path(__file__).resolve().parent.parent
PLAIN = (
    *("debug", "--threads=1", "--dtype=float32", "--compile=false", "--learning_rate=2e-3", "--log_interval=1"),
    *("--max_steps=20", "--eval_interval=10", "--eval_tokens=1000", "--sample_tokens=10", "--final_samples=1"),
    *("--tokens_per_step=512", "--micro_batch_size=2"),  # 16 rows; 4, 2 or 1 micro-batches in 2, 4 or 8 processes
)
RICH = (
    *(*PLAIN, "--max_steps=12", "--eval_interval=6", "--optimizer=muon", "--muon_learning_rate=4e-3", "--dropout=0.1"),
    *("--ema_half_life=0.1", "--activation_checkpointing=true", "--max_ngram=2", "--ngram_rows=509", "--n_embd=24"),
    *("--n_head=2", "--first_attention=recent", "--label_smoothing=0.1", "--schedule=wsd", "--tie_embeddings=false"),
)
BUDGET = (*PLAIN, "--max_steps=none", "--budget_minutes=0.02", "--schedule=wsd")


def free_port() -> int:
    """A port that nobody listens on, of those that no system gives to a program that asks for any."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := random.randrange(20000, 32000)))
            return port


def launch(folder: Path, size: int, *commands: tuple[str, ...]) -> list[list[dict]]:
    """Runs train.py for each command in `size` processes → for each of them, what each command has returned."""
    file = folder / f"commands-{size}.json"
    file.write_text(json.dumps(commands), encoding="utf-8")
    env = os.environ | {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    # as torchrun does: the stores are here, so that no other program can take a port before they are opened
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in commands]
    command = [sys.executable, "-m", "tests.parallel_runner", str(file), *(str(store.port) for store in stores)]
    started = [
        subprocess.Popen(command, cwd=folder, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    try:
        assert [process.wait(timeout=240) for process in started] == [0] * size
    finally:
        for process in started:
            process.kill()
    return [json.loads(Path(f"{file}.{rank}").read_text("utf-8")) for rank in range(size)]


def make_runs(folder: Path, text: Path) -> None:
    """Runs of 1, 2 and 4 processes: plain-1, plain-ddp-2 …, rich-1 …; and those of 2 that went on for 6 steps in 1 and
    4, in the other layout: fsdp-to-1, fsdp-to-4 …"""
    data, more = f"--data={text}", ("--max_steps=18", "--schedule=constant")

    def commands(name: str, argv: tuple[str, ...], size: int, *layouts: str) -> list[tuple[str, ...]]:
        return [(*argv, data, f"--run={name}-{layout}-{size}", f"--parallel={layout}") for layout in layouts]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, argv in (("plain", PLAIN), ("rich", RICH)):
            assert train_script.main([*argv, data, f"--run={name}-1"]) == 0
        two = [*commands("plain", PLAIN, 2, "ddp", "fsdp"), *commands("rich", RICH, 2, "ddp", "fsdp")]
        reported = [launch(folder, 2, *two, (*BUDGET, data, "--run=budget"))[0]]
        for layout in ("fsdp", "ddp"):
            for size in (1, 4):
                shutil.copytree(folder / f"rich-{layout}-2", folder / f"{layout}-to-{size}")
            assert train_script.main([f"--resume={layout}-to-1", *more]) == 0
    four = [*commands("plain", PLAIN, 4, "ddp"), *commands("rich", RICH, 4, "ddp", "fsdp", "hsdp")]
    four += [(f"--resume={a}-to-4", *more, f"--parallel={b}") for a, b in (("fsdp", "ddp"), ("ddp", "fsdp"))]
    reported.append(launch(folder, 4, *four)[0])
    assert all(result["code"] == 0 for results in reported for result in results)
    (folder / "reported.json").write_text(json.dumps([results[0]["reductions"] for results in reported]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_text) -> Path:
    """The folder of make_runs, which the first of pytest's workers makes for all."""
    base = tmp_path_factory.getbasetemp()
    home = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = home / "several processes"
    with FileLock(home / "several processes.lock"):
        if not (folder / "reported.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copyfile(small_text, folder / "sätze.txt")
            make_runs(folder, folder / "sätze.txt")
    return folder


LAYOUTS = ("ddp-2", "fsdp-2", "ddp-4", "fsdp-4", "hsdp-4")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "rich"])
def test_the_losses_are_those_of_one_process(runs, name, layout):
    if name == "plain" and layout in ("fsdp-4", "hsdp-4"):
        pytest.skip("rich has it")
    one, several = (read_events(runs / run) for run in (f"{name}-1", f"{name}-{layout}"))
    assert [event["event"] for event in several] == [event["event"] for event in one]
    assert len([event for event in one if event["event"] == "step"]) == (20 if name == "plain" else 12)
    for a, b in zip(one, several, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"loss", "val_loss", "train_loss", "bits_per_byte", "grad_norm"}:
            assert b[key] == (
                None if a[key] is None else pytest.approx(a[key], rel=2e-4 if key == "grad_norm" else 2e-5)
            )
        assert {k: b[k] for k in ("step", "tokens", "targets", "learning_rate") if k in b} == {
            k: a[k] for k in ("step", "tokens", "targets", "learning_rate") if k in a
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_of_the_same_weights_gives_the_same_bits(runs, layout):
    """Before the first step: equal initial weights in every layout, and the same sums in the same order."""
    one, several = (read_events(runs / run, "eval")[0] for run in ("rich-1", f"rich-{layout}"))
    assert one["step"] == 0
    assert several == one


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_and_weights_are_those_of_one_process(runs, layout):
    assert (runs / f"rich-{layout}" / "samples.txt").read_text("utf-8") == (runs / "rich-1" / "samples.txt").read_text(
        "utf-8"
    )
    one, several = (open_checkpoint(list_checkpoints(runs / run)[-1]) for run in ("rich-1", f"rich-{layout}"))
    for kind in ("model_tensors", "optimizer_tensors"):
        expected, found = getattr(one, kind)(), getattr(several, kind)()
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_gradients_are_added_up_once_per_step(runs):
    """However many micro-batches a step has: DDP's one bucket, in each of 20 steps of 4 and of 2 micro-batches."""
    assert json.loads((runs / "reported.json").read_text("utf-8")) == [20, 20]


def test_a_time_budget_gives_all_processes_the_same_plan(runs):
    events = read_events(runs / "budget")
    assert [event["event"] for event in events if event["event"] == "plan"]
    assert json.loads((runs / "budget" / "config.json").read_text("utf-8"))["options"]["max_steps"] > 0
    assert list_checkpoints(runs / "budget")


def test_sharded_checkpoints_are_read_without_the_other_processes(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert (list_checkpoints(runs / "rich-fsdp-4")[-1] / "shards").is_dir()
    texts = []
    for run in ("rich-1", "rich-fsdp-4", "rich-hsdp-4"):
        assert sample_script.main([f"--run={run}", "--max_new_tokens=20", "--temperature=0", "--threads=1"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].strip()
    assert texts == [texts[0]] * 3


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_a_run_saved_by_two_processes_resumes_in_one_and_in_four(runs, layout):
    one, four = (read_events(runs / f"{layout}-to-{size}", "step") for size in (1, 4))
    assert [event["step"] for event in four] == [*range(1, 19)]
    for a, b in zip(one, four, strict=True):
        assert b["tokens"] == a["tokens"]
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)


def test_a_resume_names_the_processes_that_differ(runs, small_text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    shutil.copytree(runs / "plain-ddp-2", tmp_path / "copy")
    assert train_script.main([f"--resume={tmp_path / 'copy'}", "--max_steps=22", "--schedule=constant"]) == 0
    assert "world_size 2 → 1, parallel ddp → none" in capsys.readouterr().out


def test_torchrun_itself_with_a_run_and_a_data_folder_with_a_space(small_text, tmp_path):
    """The command of the README: without `--` torchrun would take --run for an abbreviation of its --run-path."""
    name = "my run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    command = [*torchrun, str(ROOT / "train.py"), *PLAIN, "--max_steps=2", f"--data={small_text}", f"--run={name}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "2 processes, ddp: " in done.stdout
    assert done.stdout.count("run: my run") == 1, "rank 0 alone prints"
    assert read_events(tmp_path / name, "step")[-1]["step"] == 2


# ---- Rules, in one process -------------------------------------------------------------------------------------------


class Tokens:
    """A split of the numbers 0, 1, 2 …"""

    def __len__(self):
        return 2001

    def read(self, start, count):
        return np.arange(start, start + count)

    def mask(self, start, count):
        return None


def test_the_processes_divide_the_rows_of_a_step(monkeypatch):
    """Together they read what one process reads, in its order, and draw dropout from the same seeds."""

    def batches(rank: int, size: int):
        monkeypatch.setattr(data, "world_size", lambda: size)
        monkeypatch.setattr(data, "rank", lambda: rank)
        return TrainBatches(Tokens(), 10, 16, 2, 7, torch.device("cpu"), True)(3)

    one = batches(0, 1)
    for size in (2, 4, 8):
        several = [batch for rank in range(size) for batch in batches(rank, size)]
        assert [batch.dropout_seed for batch in several] == [batch.dropout_seed for batch in one]
        assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(one, several, strict=True))


def test_rows_that_cannot_be_divided_are_an_error_that_names_what_works(monkeypatch):
    monkeypatch.setattr(micro_batch, "world_size", lambda: 6)
    with pytest.raises(
        UserError, match=r"16 rows .* among 6 processes: start 1, 2, 4 of them, .*--tokens_per_step=576"
    ):
        micro_batch.own_rows(16, 32)
    assert micro_batch.own_rows(18, 32) == 3


def test_matrices_are_assigned_by_their_work():
    sizes = [(100, 400)] * 6 + [(10, 10)] * 3
    owners = assign((*sizes,), 3)
    assert [owners[:6].count(process) for process in range(3)] == [2, 2, 2]
    assert sorted(owners[6:]) == [0, 1, 2]
    assert split_rows(7, 4) == [2, 2, 2, 1]
    assert split_rows(3, 4) == [1, 1, 1, 0]
    assert [len(part) for part in torch.arange(7).chunk(4)] == [2, 2, 2, 1]
    assert orthogonalizing.Divided([torch.zeros(2, 3)]).sizes == [(2, 3)]


def layout_of(monkeypatch, size: int, is_flag: bool = True, dtype: torch.dtype = torch.float32, **options) -> str:
    monkeypatch.setattr(setup, "world_size", lambda: size)
    monkeypatch.setattr(setup, "local_world_size", lambda: 2)
    hardware = setup.Hardware(torch.device("cpu"), dtype, 1, {})
    argv = ["debug", f"--parallel={options.get('parallel', 'auto')}"] if is_flag else ["debug"]
    return setup.choose_layout(TrainOptions(**options), argv, GPTConfig(), OptimizerOptions(), hardware).value


def test_the_layout(monkeypatch):
    monkeypatch.setattr(setup, "free_bytes", lambda hardware: 2**40)
    assert layout_of(monkeypatch, 1) == "none"
    assert layout_of(monkeypatch, 1, is_flag=False, parallel="fsdp") == "none", "a run of several resumes in one"
    assert layout_of(monkeypatch, 4) == "ddp"
    assert layout_of(monkeypatch, 4, parallel="hsdp") == "hsdp"
    monkeypatch.setattr(setup, "free_bytes", lambda hardware: 2**30)  # GPT-2's weights and moments take 2 GB
    assert layout_of(monkeypatch, 4) == "fsdp"
    assert layout_of(monkeypatch, 4, lora_rank=4, init_from="x") == "ddp"
    for size, options, words in (
        (1, {"parallel": "fsdp"}, "torchrun --nproc-per-node=2 -- train.py debug --parallel=fsdp"),
        (2, {"parallel": "none"}, "--parallel=auto"),
        (3, {"parallel": "hsdp"}, "--parallel=fsdp"),
        (2, {"parallel": "fsdp", "lora_rank": 4, "init_from": "x"}, "--parallel=ddp"),
        (2, {"parallel": "fsdp", "dtype": torch.float16}, "--parallel=ddp"),
    ):
        with pytest.raises(UserError, match=words):
            layout_of(monkeypatch, size, **options)


def test_a_resume_gives_each_process_a_gpu_of_its_own(monkeypatch):
    """What a run stores names no single GPU, and one that a run of one process has stored is not held against it."""
    for module in (setup, micro_batch, hardware_module):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(hardware_module, "local_rank", lambda: 1)
    hardware = setup.Hardware(torch.device("cuda:1"), torch.bfloat16, 1, {})
    values, _ = setup.choose_auto(TrainOptions(), GPTConfig(block_size=64), "sdpa", hardware, {})
    assert values["device"] == "cuda"
    assert [hardware_module._own_device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(UserError, match="--device=cuda, one GPU each"):
        hardware_module._own_device("mps")


def test_processes_that_differ_are_refused_in_all_of_them(monkeypatch):
    """Other dtypes, other texts, also old ones: none may go on while the others wait for it."""

    def elsewhere(*values: object) -> None:
        names = ("rank 0 of 2 on here", "rank 1 of 2 on there")
        monkeypatch.setattr(processes, "gather", lambda own: [*zip(values, names, strict=True)])

    alike = setup.Hardware(torch.device("cpu"), torch.float32, 1, {})
    elsewhere(("cpu", "float32"), ("cpu", "bfloat16"))
    with pytest.raises(UserError, match=r"rank 1 of 2 on there has cpu, bfloat16\): give --device and --dtype"):
        hardware_module._require_alike(alike)
    elsewhere(("cpu", "float32"), ("cpu", "float32"))
    hardware_module._require_alike(alike)
    dataset = SimpleNamespace(fingerprint="aaa", folder=Path("data/notes"))
    elsewhere(("aaa", "bbb"), ("aaa",))
    with pytest.raises(UserError, match="rank 1 of 2 on there has aaa"):
        planning.require_same(dataset, SimpleNamespace(fingerprint="bbb", folder=Path("data/old")))


def test_the_targets_of_a_step_are_those_of_all_processes(monkeypatch):
    """Also where one of them has none, since a mask covers its rows."""
    given = []
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "add_up", lambda *numbers: [number + 5 for number in numbers])
    gradients = processes.summed(lambda batches, n: given.append(n) or torch.tensor([1.0, 2.0]), blame=print)
    assert gradients([], 0).tolist() == [6.0, 2.0]
    assert given == [5]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_gradient_and_keeps_less(dropout):
    config = GPTConfig(n_layer=4, n_head=2, n_embd=32, block_size=64, vocab_size=50, eos_id=0, dropout=dropout)
    ids, found = torch.randint(50, (4, 64), generator=torch.Generator().manual_seed(0)), []
    for recompute in (False, True):
        model, kept = GPT(config, seed=1).train(), dict[int, int]()
        model.recompute_blocks = recompute

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, ids)
        loss.backward()
        found.append((loss, [parameter.grad for parameter in model.parameters()], sum(kept.values())))
    (loss, gradients, size), (other_loss, other_gradients, other_size) = found
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))
    assert other_size < size / 2
    assert math.isfinite(loss.item())


SRUN = """#!/bin/bash
# Starts the command once for each of two machines, which are this one.
for node in 0 1; do GROUP=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || code=1; done
exit ${code:-0}
"""


def test_the_slurm_script_of_the_readme_starts_and_resumes(small_text, tmp_path):
    """Two machines, that is two torchruns that find each other, of one process each, by stand-ins for srun and
    scontrol; the second submission goes on with the run."""
    readme = (ROOT / "README.md").read_text("utf-8")
    (script,) = (block for block in readme.split("```bash\n")[1:] if "#SBATCH" in block.partition("```")[0])
    script = script.partition("```")[0].replace("--nproc-per-node=8", "--nproc-per-node=1")
    small = " ".join(arg for arg in PLAIN if "max_steps" not in arg)
    assert script.count("gpt2_124m --run=runs/gpt2 --resume=auto") == 1
    shutil.copyfile(small_text, tmp_path / "text.txt")
    tools = tmp_path / "bin"
    tools.mkdir()
    torchrun = f'#!/bin/bash\nexec "{sys.executable}" -m torch.distributed.run "$@"\n'
    for name, content in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho localhost\n"), ("torchrun", torchrun)):
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    for steps in (2, 4):
        preset = f"{small} --schedule=constant --data=text.txt --max_steps={steps}"
        text = script.replace("gpt2_124m", preset).replace(":29500", f":{free_port()}")
        (tmp_path / "job.sh").write_text(text, encoding="utf-8")
        env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_ID": str(steps)}
        env |= {"SLURM_JOB_NODELIST": "node[1-2]", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "2 processes, ddp: " in done.stdout
        assert json.loads((tmp_path / "runs/gpt2/run_state.json").read_text())["state"] == "done"
    assert [event["step"] for event in read_events(tmp_path / "runs" / "gpt2", "step")] == [1, 2, 3, 4]
