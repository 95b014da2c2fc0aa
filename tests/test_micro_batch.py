"""The micro-batch: a divisor of a step's rows, what fits into memory, and less where memory runs out, wherever it does:
what has failed is gone before the next try, and the run ends as one that never failed, up to rounding."""

import json
import math
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import model as model_module
import train as train_script
from errors import UserError
from model import GPT, GPTConfig
from tests.test_train import (  # noqa: F401  (a fixture)
    SHAPE,
    TINY,
    _in_a_folder_of_its_own,
    message_of,
    read_events,
    tensors_of,
    train,
)
from training import compilation, optim, setup
from training.compilation import compile_model, expected_seconds
from training.data import MicroBatch
from training.evaluation import evaluate
from training.micro_batch import fit_micro_batch, fit_to_memory, until_it_fits
from training.options import EvalOptions, TrainOptions

AUTO = [flag for flag in TINY if not flag.startswith(("--micro_batch_size", "--dropout"))]
SHORT = [*AUTO, *SHAPE, "--dropout=0", "--max_steps=3", "--eval_interval=3", "--log_interval=1", "--sample_tokens=0"]
OUT = "CUDA out of memory. Tried to allocate 2.00 GiB."


def options_of(run: str) -> dict:
    return json.loads(Path(run, "config.json").read_text("utf-8"))["options"]


def weights_of(run: str, step: int = 3) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "checkpoints" / f"step-{step:08d}" / "model" / "model.safetensors")


# ---- What fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "fixed", "a_row", "free", "fits"),
    [
        (64, 100, 10, 10_000, 64),  # all of them
        (64, 100, 10, 500, 32),  # 35 would
        (60, 100, 10, 500, 30),
        (60, 100, 10, 400, 20),  # 26 would; not only halves are tried
        (64, 1000, 10, 500, 1),  # not even one: the first step will say so
        (1, 1000, 10, 500, 1),
        (7, 0, 100, 630, 1),  # a divisor, and there is no other
    ],
)
def test_the_most_rows_whose_peak_fits(size, fixed, a_row, free, fits):
    def peak(rows: int) -> float:
        assert rows > 1
        return math.inf if fixed + rows * a_row > free else fixed + rows * a_row

    assert fit_to_memory(size, peak, free) == fits


@pytest.mark.parametrize(("rows_in_memory", "fits"), [(8, 8), (5, 4), (2, 2), (1, 1), (0, 1)])
def test_a_trial_that_runs_out_of_memory_leaves_nothing(rows_in_memory, fits, monkeypatch, capsys):
    """With a stub of torch.cuda. The trial holds the gradients of one micro-batch beside the other's activations."""
    model, forward = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=65, eos_id=None)), []
    plain = GPT.forward

    def short_of_memory(self, ids, *args, **kwargs):
        forward.append((len(ids), self.embed.weight.grad is not None))
        if len(ids) > rows_in_memory:
            raise torch.OutOfMemoryError(OUT)
        return plain(self, ids, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", short_of_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    for name, value in (("memory_allocated", 0), ("max_memory_allocated", 1000), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    hardware = SimpleNamespace(device=torch.device("cuda"), autocast=nullcontext)
    assert fit_micro_batch(8, model, hardware) == fits
    assert all(parameter.grad is None for parameter in model.parameters())
    if fits > 1:
        assert forward[-2:] == [(fits, False), (fits, True)]
    assert ("the largest that fits into 1.0 GiB" in capsys.readouterr().out) is (fits < 8)


# ---- A step that runs out --------------------------------------------------------------------------------------------


class Failing:
    """Wraps a function so that its calls of the given numbers run out of memory: each allocates first. At every call
    it checks that nothing of an earlier failure is alive."""

    def __init__(self, function, numbers, works_first=False):
        self.function, self.numbers, self.works_first = function, set(numbers), works_first
        self.calls, self.alive = 0, []

    def __call__(self, *args, **kwargs):
        assert [reference() for reference in self.alive] == [None] * len(self.alive)
        self.calls += 1
        if self.calls - 1 not in self.numbers:
            return self.function(*args, **kwargs)
        result = self.function(*args, **kwargs) if self.works_first else None
        activations = torch.zeros(1000, requires_grad=True).exp()
        self.alive += [weakref.ref(activations), *([weakref.ref(result)] if isinstance(result, torch.Tensor) else [])]
        raise torch.OutOfMemoryError(OUT)

    def __get__(self, instance, owner=None):  # as a method
        return partial(self, instance)


@pytest.fixture
def runs(small_text):
    """Starts a run of three steps with one micro-batch of 8 rows each."""

    def start(name: str, *args: str) -> None:
        assert train(*SHORT, f"--data={small_text}", f"--run=runs/{name}", *args) == 0

    return start


def scaler(_):
    return torch.amp.GradScaler("cpu", init_scale=4.0)


PLACES = {
    "forward pass": ("model.GPT.forward", True),
    "loss": ("model.F.cross_entropy", True),
    "backward pass": ("torch.Tensor.backward", True),
    "clipping": ("train.clip_gradients", False),
    "clipping, done": ("train.clip_gradients", True),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_step_is_repeated_with_fewer_rows_and_nothing_of_it_is_left(
    place, scaled, optimizer, runs, monkeypatch, capsys
):
    """With float16's scaler too, which must not think that the next gradients are unscaled already."""
    if scaled:
        monkeypatch.setattr(setup, "make_scaler", scaler)
    runs("whole", f"--optimizer={optimizer}")
    target, works_first = PLACES[place]
    module, _, name = target.rpartition(".")
    owner = {"model.GPT": GPT, "model.F": model_module.F, "torch.Tensor": torch.Tensor, "train": train_script}[module]
    if place in ("forward pass", "loss"):  # not those of the evaluation before the first step
        plain = getattr(owner, name)
        failing = Failing(plain, {1}, works_first)  # in the second step
        in_training = lambda *args, **kwargs: (failing if torch.is_grad_enabled() else plain)(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(owner, name, in_training)
    else:
        failing = Failing(getattr(owner, name), {1}, works_first)
        monkeypatch.setattr(owner, name, failing)
    capsys.readouterr()
    runs("short", f"--optimizer={optimizer}")
    assert capsys.readouterr().out.count("step 1: out of memory; micro-batch 8 → 4.") == 1
    assert failing.calls > 3
    assert options_of("runs/short")["micro_batch_size"] == 4
    for name, weight in weights_of("runs/whole").items():
        torch.testing.assert_close(weights_of("runs/short")[name], weight, rtol=1e-4, atol=1e-5)
    losses = [[event["loss"] for event in read_events(f"runs/{run}", "step")] for run in ("whole", "short")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 3


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("optimizer", "kind", "calls"), [
    ("adamw", "adamw", (0, 1, 3)), ("muon", "muon", (0, 2)), ("muon", "adamw", (0, 1)), ("sgd", "sgd", (1,)),
])  # fmt: skip
def test_an_optimizer_step_that_runs_out_goes_on_where_it_was(optimizer, kind, calls, scaled, runs, monkeypatch):
    """Some groups are updated already: the same gradients update the others, so the bits are those of a whole run."""
    if scaled:
        monkeypatch.setattr(setup, "make_scaler", scaler)
    runs("whole", f"--optimizer={optimizer}")
    for call in calls:
        monkeypatch.setitem(optim.UPDATES, kind, failing := Failing(optim.UPDATES[kind], {call}))
        runs(f"short-{call}", f"--optimizer={optimizer}")
        assert failing.alive
        assert tensors_of(f"runs/short-{call}", 3) == tensors_of("runs/whole", 3)
        assert options_of(f"runs/short-{call}")["micro_batch_size"] == 8


@pytest.mark.parametrize(("optimizer", "owner", "function", "call"), [
    ("muon", sys.modules["training.muon"], "orthogonalize", 4),  # the second of three shapes, in the second step
    ("adamw", torch.Tensor, "addcmul_", 1),  # of the rows of n-grams that have a gradient
    ("sgd", torch, "_foreach_add", 1),
])  # fmt: skip
def test_a_group_is_updated_as_a_whole(optimizer, owner, function, call, runs, monkeypatch):
    """A failure within an update function comes before it writes."""
    table = ("--max_ngram=2", "--ngram_rows=64", f"--optimizer={optimizer}")
    runs("whole", *table)
    monkeypatch.setattr(owner, function, failing := Failing(getattr(owner, function), {call}))
    runs("short", *table)
    assert failing.alive
    assert tensors_of("runs/short", 3) == tensors_of("runs/whole", 3)


def test_an_optimizer_step_that_never_fits_is_one_error(small_text, monkeypatch):
    monkeypatch.setitem(optim.UPDATES, "adamw", Failing(optim.UPDATES["adamw"], range(2, 100)))
    message = message_of(*SHORT, f"--data={small_text}", "--optimizer=adamw", "--run=runs/short")
    assert message.startswith("out of memory in the optimizer's step, which a smaller micro-batch does not change;")
    assert options_of("runs/short")["micro_batch_size"] == 8


def test_the_optimizer_has_its_state_before_the_first_forward_pass(small_text, monkeypatch):
    """So a trial sees what is really free. A failure there is one clear error, and leaves no partial state."""
    seen = []
    monkeypatch.setattr(train_script, "fit_micro_batch", lambda *args: seen.append(args))
    zeros = Failing(torch.zeros_like, {3})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", zeros)
        message = message_of(*SHORT, f"--data={small_text}", "--optimizer=adamw")
    assert message.startswith(f"out of memory ({OUT}); use a smaller model")
    assert seen == []
    assert zeros.calls == 4


def test_state_that_is_partly_there_is_completed():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=65, eos_id=None))
    optimizer = optim.make_optimizer(model, optim.OptimizerOptions(optimizer="adamw"))
    optimizer.state[model.embed.weight] = {"exp_avg": torch.ones_like(model.embed.weight)}
    optimizer.allocate()
    assert all(state.keys() == {"exp_avg", "exp_avg_sq", "step"} for state in optimizer.state.values())
    assert optimizer.state[model.embed.weight]["exp_avg"].all()


@pytest.fixture
def _memory_for_two_rows(monkeypatch):
    forward = GPT.forward

    def short_of_memory(self, ids, *args, **kwargs):
        if self.training and ids.shape[0] > 2:
            raise torch.OutOfMemoryError(OUT)
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", short_of_memory)


@pytest.mark.usefixtures("_memory_for_two_rows")
def test_an_out_of_memory_halves_the_micro_batch_until_it_fits(small_text, capsys):
    assert train(*AUTO, *SHAPE, f"--data={small_text}", "--run=runs/short", "--max_steps=3", "--eval_interval=3") == 0
    out = capsys.readouterr().out
    assert "step 0: out of memory; micro-batch 8 → 4. The result may not be bitwise equal" in out
    assert "step 0: out of memory; micro-batch 4 → 2." in out
    assert options_of("runs/short")["micro_batch_size"] == 2
    assert train("--resume=runs/short", "--max_steps=5") == 0
    assert "out of memory" not in capsys.readouterr().out


@pytest.mark.usefixtures("_memory_for_two_rows")
def test_a_forced_micro_batch_that_does_not_fit_is_an_error(small_text):
    message = message_of(*AUTO, *SHAPE, f"--data={small_text}", "--micro_batch_size=8")
    assert message == "--micro_batch_size=8 does not fit into the device's memory; use --micro_batch_size=4, or auto"


def test_one_row_too_many_is_an_error(small_text, monkeypatch):
    forward = GPT.forward

    def no_memory(self, *args, **kwargs):
        if self.training:
            raise torch.OutOfMemoryError(OUT)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", no_memory)
    with pytest.raises(UserError, match="one row does not fit"):
        train(*AUTO, *SHAPE, f"--data={small_text}", "--eval_interval=1000", "--tokens_per_step=32")


# ---- Measuring and compiling -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_memory_for_two_rows")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_steps_that_measure_a_budget_find_what_fits(optimizer, small_text, monkeypatch, capsys):
    """They leave no trace: the run has the bits of one with their plan and micro-batch."""
    monkeypatch.setattr("training.budget.Budget.is_spent", lambda self, now: False)
    Path("timed.py").write_text(f"optimizer = '{optimizer}'\nbudget_minutes = 0.002\nwarmup_steps = 2\n")
    flags = [flag for flag in SHORT[1:] if not flag.startswith(("--max_steps", "--eval_interval"))]
    assert train("debug", "timed.py", *flags, f"--data={small_text}", "--eval_interval=1000", "--run=timed") == 0
    out = capsys.readouterr().out
    assert out.index("step 0: out of memory; micro-batch 4 → 2.") < out.index("ms a step")
    options = options_of("timed")
    assert options["micro_batch_size"] == 2
    assert train("timed/config.json", "--threads=1", "--micro_batch_size=2", "--run=again") == 0
    assert tensors_of("again", options["max_steps"]) == tensors_of("timed", options["max_steps"])


CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
)


def test_compiling_takes_fewer_rows_and_keeps_the_cache(monkeypatch, tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=65, eos_id=None))
    batch = MicroBatch(torch.zeros((8, 16), dtype=torch.int64), torch.zeros((8, 16), dtype=torch.int64), None)
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(compilation, "cache_folder", lambda threads: folder)
    for name in ("use_cache", "shorten_inductor"):
        monkeypatch.setattr(compilation, name, lambda *args: None)
    monkeypatch.setattr(compilation, "cpp_compiler", lambda: "g++")
    monkeypatch.setattr(compilation.torch, "compile", lambda function, **options: function)
    run, asked = compilation.run_micro_batch, []

    def short_of_memory(model, batch, hardware):
        asked.append(len(batch.x))
        if len(batch.x) > 2:
            raise RuntimeError(CPU_ERROR)
        run(model, batch, hardware)

    monkeypatch.setattr(compilation, "run_micro_batch", short_of_memory)
    hardware = SimpleNamespace(device=torch.device("cpu"), threads=1, autocast=nullcontext, dtype=torch.float32)
    state = SimpleNamespace(compiler="some", step=0, discard_update=model.zero_grad)
    batches = SimpleNamespace(size=8)
    compiling = lambda: compile_model(model, state, MicroBatch(*(x[: batches.size] for x in batch[:2]), None), hardware)  # noqa: E731
    assert until_it_fits(batches, state, False, compiling) is model
    assert asked == [8, 4, 2]
    assert state.compiler.startswith("inductor")
    assert folder.exists()
    model.__dict__.pop("run_block")

    # the choice of whether to compile measures as well: it then takes its estimate
    asked.clear()
    options = TrainOptions(max_steps=10**9)
    assert expected_seconds(options, EvalOptions(), model, [batch], hardware) > 1e3
    assert asked == [8]


# ---- Evaluation and samples ------------------------------------------------------------------------------------------


def test_an_evaluation_goes_on_with_fewer_rows(small_text, monkeypatch, capsys):
    from prepare_data import PrepareOptions
    from prepare_data.resolve import resolve_data

    data = resolve_data(str(small_text), PrepareOptions(tokenizer="bytes"))
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257, eos_id=256)).train()
    score = partial(evaluate, model, data.val, data.tokenizer.token_bytes, autocast=nullcontext, max_tokens=1000)
    whole, forward, asked = score(rows=16), GPT.forward, []

    def short_of_memory(self, ids, *args, **kwargs):
        asked.append(len(ids))
        if len(ids) > 5:
            raise torch.OutOfMemoryError(OUT)
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", short_of_memory)
    capsys.readouterr()
    short = score(rows=16)
    assert capsys.readouterr().out.splitlines() == [
        "evaluation: out of memory; 16 rows at a time → 8", "evaluation: out of memory; 8 rows at a time → 4"
    ]  # fmt: skip
    assert asked[:4] == [16, 8, 4, 4]
    assert short.targets == whole.targets
    assert short.loss == pytest.approx(whole.loss, rel=1e-6)
    assert short.standard_error == pytest.approx(whole.standard_error, rel=1e-4)
    assert model.training

    monkeypatch.setattr(GPT, "forward", lambda *args, **kwargs: Failing(None, {0})())
    with pytest.raises(UserError, match="one row does not fit"):
        score(rows=2)


@pytest.mark.parametrize(("rows", "samples", "line"), [
    (1, 3, "out of memory with 3 samples at once: going on with 1"), (0, 0, "no samples: one sample needs more memory"),
])  # fmt: skip
def test_samples_that_do_not_fit_stop_no_training(rows, samples, line, small_text, monkeypatch, capsys):
    init = model_module.KVCache.__init__

    def short_of_memory(self, config, n_rows, *args, **kwargs):
        if n_rows > rows:
            raise torch.OutOfMemoryError(OUT)
        init(self, config, n_rows, *args, **kwargs)

    monkeypatch.setattr(model_module.KVCache, "__init__", short_of_memory)
    flags = [*SHORT, f"--data={small_text}", "--sample_tokens=4", "--final_samples=3", "--run=runs/short"]
    assert train(*flags) == 0
    captured = capsys.readouterr()
    assert line in captured.out + captured.err
    assert Path("runs/short/samples.txt").read_text("utf-8").count("==== step 3 (sample ") == samples


def test_a_save_that_runs_out_of_memory_stops_no_training(runs, monkeypatch, capsys):
    """It happens on the host, whose memory holds a copy of the weights."""
    moments = setup.TrainState._moments
    monkeypatch.setattr(setup.TrainState, "_moments", Failing(moments, {0, 1}))  # for a copy, and without one
    runs("short")
    assert f"step 0: not saved: out of memory ({OUT})" in capsys.readouterr().out
    assert set(weights_of("runs/short"))


def test_memory_that_runs_out_anywhere_else_is_one_clear_error(small_text, monkeypatch):
    def no_memory(*args):
        raise RuntimeError(CPU_ERROR)

    monkeypatch.setattr(setup, "build_model", no_memory)
    message = message_of(*SHORT, f"--data={small_text}")
    assert message.startswith("out of memory (")
    assert "use a smaller model (--n_layer, --n_embd)" in message
