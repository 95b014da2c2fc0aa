"""Recorded training steps, by a recorder that repeats the Python code, as a CPU can; really: test_gpu_scripts.py."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from common.hardware import Hardware
from errors import UserError
from model import GPT, IGNORED_TARGET, GPTConfig
from train import calculate_gradients, update
from training.data import MicroBatch
from training.lora import add_adapters
from training.optim import make_optimizer
from training.options import OptimizerOptions
from training.state import TrainState
from training.step_graphs import WARM_UP, StepGraphs, obstacle

CPU = torch.device("cpu")
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50, eos_id=49, positions="rotary")


class Repeats:
    """What is recorded runs again at each replay. breaks: recordings that fail."""

    def __init__(self, breaks=()):
        self.breaks, self.count = breaks, 0

    def on_stream(self):
        return nullcontext()

    def record(self, work):
        self.count += 1
        if self.count in self.breaks:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return work


def make_state(kind="adamw", config=TINY, lora_rank=None):
    model = GPT(config, seed=3).train()
    if lora_rank is not None:
        add_adapters(model, lora_rank, 4.0, seed=0)
    optimizer = make_optimizer(model, OptimizerOptions(optimizer=kind, learning_rate=0.01, weight_decay=0.5))
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), 4)


def batch(number, rows=4, seed=None):
    ids = torch.randint(0, 49, (rows, 17), generator=torch.Generator().manual_seed(number))
    targets = ids[:, 1:].clone()
    targets[0, : number % 16] = IGNORED_TARGET
    return MicroBatch(ids[:, :-1], targets, seed)


def trained(state, batches_of_steps, recorder=None):
    """Losses and gradient norms of the steps, whose learning rate rises."""
    hardware = Hardware(CPU, torch.float32, 1, {})
    gradients = partial(calculate_gradients, partial(state.model), state, hardware, 0.0, 1.0)
    steps = gradients, state.optimizer.step
    if recorder is not None:
        graphs = StepGraphs(gradients, state, CPU, recorder)
        steps = graphs.gradients, graphs.step
    figures = []
    for number, batches in enumerate(batches_of_steps):
        for group in state.optimizer.param_groups:
            group["lr"] = 0.002 * (number + 1) * group["scale"]
        figures.append(update(*steps, state, batches))
    return torch.tensor(figures)


def assert_same_training(kind, steps, recorder, config=TINY, lora_rank=None):
    plain, recorded = make_state(kind, config, lora_rank), make_state(kind, config, lora_rank)
    torch.testing.assert_close(trained(recorded, steps, recorder), trained(plain, steps), rtol=1e-4, atol=1e-5)
    for mine, its in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_recorded_steps_train_as_others_do(kind):
    """With other tokens, numbers of targets and learning rates in each step."""
    recorder = Repeats()
    assert_same_training(kind, [[batch(number)] for number in range(8)], recorder)
    assert recorder.count == 2


def test_recorded_steps_train_adapters():
    recorder = Repeats()
    assert_same_training("adamw", [[batch(number)] for number in range(8)], recorder, lora_rank=2)
    assert recorder.count == 2


def test_dropout_draws_by_the_seed_of_the_step():
    steps = [[batch(1, seed=number)] for number in range(8)]
    config = GPTConfig(**{**TINY.to_dict(), "dropout": 0.3})
    assert_same_training("adamw", steps, Repeats(), config)
    losses = trained(make_state(config=config), steps, Repeats())[:, 0]
    assert len(set(losses.tolist())) == 8


def test_another_shape_runs_as_it_is(capsys):
    """Memory ran out after the recording, beside an evaluation for instance: a micro-batch has half the rows."""
    steps = [[batch(number)] if number < 5 else [batch(number, 2), batch(number + 20, 2)] for number in range(10)]
    recorder = Repeats()
    assert_same_training("muon", steps, recorder)
    assert recorder.count == 2
    assert capsys.readouterr().out.count("is not recorded as a CUDA graph: memory ran out") == 1


def test_a_shape_that_changes_before_is_recorded():
    recorder = Repeats()
    assert_same_training("muon", [[batch(number, rows=4 if number < 2 else 2)] for number in range(8)], recorder)
    assert recorder.count == 2


def test_several_micro_batches_run_as_they_are(capsys):
    recorder = Repeats()
    assert_same_training("adamw", [[batch(number), batch(number + 20)] for number in range(5)], recorder)
    assert recorder.count == 0
    assert capsys.readouterr().out.count("it has several micro-batches") == 1


@pytest.mark.parametrize("breaks", [1, 2])
def test_what_cannot_be_recorded_runs_as_it_is_after_one_line(breaks, capsys):
    recorder = Repeats([breaks])
    assert_same_training("muon", [[batch(number)] for number in range(6)], recorder)
    assert recorder.count == breaks  # no second trial
    assert capsys.readouterr().out.count("is not recorded as a CUDA graph: operation not permitted when stream") == 1


def test_the_learning_rate_is_a_number_again_after_the_recording():
    state = make_state()
    trained(state, [[batch(number)] for number in range(WARM_UP + 2)], Repeats())
    assert all(isinstance(group["lr"], float) for group in state.optimizer.param_groups)


def test_only_steps_that_do_not_ask_the_host_are_recorded():
    gpu, cpu = (Hardware(device, torch.bfloat16, 1, {}) for device in (torch.device("cuda"), CPU))
    half = Hardware(gpu.device, torch.float16, 1, {})
    tables = GPTConfig(**{**TINY.to_dict(), "max_ngram": 2, "ngram_rows": 64})
    assert obstacle(make_state().optimizer, gpu) is None
    assert obstacle(make_state("muon").optimizer, gpu) is None
    assert obstacle(make_state("sgd").optimizer, gpu) == "the optimizer's sgd cannot be"
    assert "adamw_rows" in obstacle(make_state(config=tables).optimizer, gpu)
    assert "float16" in obstacle(make_state().optimizer, half)
    assert obstacle(make_state().optimizer, cpu)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_recorded_steps_are_those_that_are_not_to_the_bit(kind):
    """As a resumed run needs it, whose first steps are not recorded."""
    steps, states = [[batch(number)] for number in range(8)], [make_state(kind), make_state(kind)]
    figures = [trained(state, steps, Repeats(breaks)) for state, breaks in zip(states, ((), (1,)), strict=True)]
    assert torch.equal(*figures)
    for mine, its in zip(*(state.model.parameters() for state in states), strict=True):
        assert torch.equal(mine, its)


class HalfRecords(Repeats):
    """The optimizer's step fails after its first group."""

    def record(self, work):
        self.count += 1
        if self.count == 2:
            group = work.__self__.param_groups[1]
            kind, group["kind"] = group["kind"], "gone"
            try:
                work()
            except KeyError:
                raise RuntimeError("CUDA error: out of memory") from None
            finally:
                group["kind"] = kind
        return work


def test_a_step_whose_recording_ended_halfway_is_done_as_a_whole(capsys):
    steps, states = [[batch(number)] for number in range(WARM_UP + 1)], [make_state("muon"), make_state("muon")]
    recorder = HalfRecords()
    trained(states[0], steps[:-1], Repeats([1]))
    trained(states[1], steps[:-1], recorder)
    before = [parameter.detach().clone() for parameter in states[1].model.parameters()]
    graphs_of_last_step(states[1], steps, recorder)
    assert "out of memory" in capsys.readouterr().out
    changed = [not torch.equal(old, new) for old, new in zip(before, states[1].model.parameters(), strict=True)]
    assert all(changed)


def graphs_of_last_step(state, steps, recorder):
    hardware = Hardware(CPU, torch.float32, 1, {})
    graphs = StepGraphs(
        partial(calculate_gradients, partial(state.model), state, hardware, 0.0, 1.0), state, CPU, recorder
    )
    for batches in steps:
        update(graphs.gradients, graphs.step, state, batches)


def test_a_step_with_dropout_that_cannot_be_recorded_is_one_clear_error():
    """A generator that was in use by a failed recording cannot draw any more."""
    config = GPTConfig(**{**TINY.to_dict(), "dropout": 0.3})
    with pytest.raises(UserError, match="--cuda_graphs=false"):
        trained(make_state(config=config), [[batch(1, seed=number)] for number in range(5)], Repeats([1]))
