"""Learning rate schedules and optimizers."""

import math
import subprocess
import sys

import pytest
import torch

from common.weights import export_weights, import_weights
from model import GPT, GPTConfig
from tests.conftest import ROOT
from training.optim import (
    Plan,
    adamw_rows,
    clip_gradients,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    make_plan,
    optimizer_tensors,
)  # fmt: skip
from training.options import OptimizerOptions

TINY = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=1100, eos_id=0)  # padded to 1152


def rates(steps: int, **options) -> list[float]:
    chosen = OptimizerOptions(**{"learning_rate": 1.0, "warmup_steps": 10, **options})
    return [learning_rate(step, make_plan(steps, chosen), chosen) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    assert rates(100, schedule=schedule)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates(100, schedule=schedule)) == pytest.approx(1.0)


def test_schedules_after_the_warm_up():
    cosine, linear, wsd = (rates(110, schedule=name, min_learning_rate=0.1) for name in ("cosine", "linear", "wsd"))
    assert cosine[60] == pytest.approx(0.55)
    assert linear[60] == pytest.approx(0.55)
    assert linear[109] == pytest.approx(0.1, abs=0.01)
    assert wsd[10:88] == [1.0] * 78
    assert wsd[99] == pytest.approx(0.1 + 0.9 * 11 / 22)
    assert wsd[109] == pytest.approx(0.1 + 0.9 * 1 / 22)
    assert rates(110, schedule="wsd", decay_steps=50)[60:62] == [1.0, pytest.approx(49 / 50)]
    assert rates(110, schedule="inverse_sqrt")[89] == pytest.approx(math.sqrt(10 / 90))
    assert rates(110, schedule="constant")[109] == 1.0


def test_inverse_sqrt_is_the_formula_of_the_2017_paper():
    """d^-0.5 · min(step^-0.5, step · warmup^-1.5), steps from 1 (Vaswani et al. 2017, equation 3)."""
    options = OptimizerOptions(learning_rate=(512 * 4000) ** -0.5, schedule="inverse_sqrt", warmup_steps=4000)
    for step in (1, 100, 3999, 4000, 4001, 100_000):
        paper = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert learning_rate(step - 1, Plan(100_000, 1), options) == pytest.approx(paper)


def test_only_matrices_have_weight_decay():
    model = GPT(TINY)
    groups = make_optimizer(model, OptimizerOptions(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"])
    assert all(p.dim() < 2 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_optimizer_state_round_trips_through_a_checkpoint_bitwise(name):
    ids = torch.randint(0, 1100, (4, 8), generator=torch.Generator().manual_seed(0))
    options = OptimizerOptions(optimizer=name, learning_rate=0.01)

    def steps(model, optimizer, count):
        for _ in range(count):
            model(ids, ids).backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = GPT(TINY)
    steps(straight, first := make_optimizer(straight, options), 3)
    saved = optimizer_tensors(first, straight)
    assert all(tensor.shape[0] == 1100 for key, tensor in saved.items() if key.startswith("embed") and tensor.dim())
    resumed = GPT(TINY, seed=None)
    import_weights(resumed, export_weights(straight))
    load_optimizer_tensors(second := make_optimizer(resumed, options), resumed, saved)
    steps(straight, first, 3)
    steps(resumed, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_updates_equal_torch_optim_bitwise(name):
    ids = torch.randint(0, 1100, (4, 8), generator=torch.Generator().manual_seed(0))
    options = OptimizerOptions(optimizer=name, learning_rate=0.01, weight_decay=0.1)
    ours, theirs = GPT(TINY), GPT(TINY)
    decayed, others = ([p for p in theirs.parameters() if (p.dim() >= 2) == decay] for decay in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if name == "adamw":
        peer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)
    else:
        peer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    for model, optimizer in ((ours, make_optimizer(ours, options)), (theirs, peer)):
        for _ in range(3):
            model(ids, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def step_rows(gradients, sparse=True, **settings):
    """A table after steps with these gradients (R, C) or None, by adamw_rows."""
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1} | settings
    table = torch.linspace(-1, 1, 12).view(4, 3).clone()
    moments = [torch.zeros_like(table), torch.zeros_like(table), torch.zeros(4), torch.zeros(())]
    for gradient in gradients:
        given = gradient.to_sparse(1) if sparse else gradient
        adamw_rows([table], [given], *([moment] for moment in moments), **settings)
    return table


def step_dense(gradients, weight_decay=0.1):
    table = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3).clone())
    peer = torch.optim.AdamW([table], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    for gradient in gradients:
        table.grad = gradient.clone()
        peer.step()
    return table.detach()


@pytest.mark.parametrize("sparse", [True, False])
def test_rows_with_a_gradient_in_every_step_move_as_with_adamw(sparse):
    gradients = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(step_rows(gradients, sparse), step_dense(gradients), atol=1e-6)


def test_rows_without_a_gradient_rest():
    gradients = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    gradients[:, 2] = 0
    assert torch.equal(step_rows(gradients)[2], torch.linspace(-1, 1, 12).view(4, 3)[2])


def test_a_row_with_a_gradient_now_and_then_ends_where_adamw_takes_it():
    """Every seventh step, a steady gradient: what AdamW does in the six steps between is done at once."""
    gradients = torch.zeros(7 * 40, 4, 3)
    gradients[::7, 1] = 1.0
    rows, dense = step_rows(gradients, weight_decay=0.0)[1], step_dense(gradients, weight_decay=0.0)[1]
    start = torch.linspace(-1, 1, 12).view(4, 3)[1]
    assert ((rows - start) / (dense - start)).sub(1).abs().max() < 0.1


def test_only_rows_that_were_read_have_a_gradient_on_a_cpu():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9, eos_id=None, max_ngram=3))
    ids = torch.tensor([[1, 2, 3, 4]])
    model(ids, ids).backward()
    gradient = model.ngrams.weight.grad.coalesce()
    assert gradient.indices().shape[1] <= 8
    norm = clip_gradients(model.parameters(), 1e-3)
    dense = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
    assert torch.cat([grad.flatten() for grad in dense]).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert norm > 1e-3


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_model_with_ngrams_resumes_bitwise(name):
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9, eos_id=None, max_ngram=3)
    draws = torch.randint(0, 9, (6, 2, 8), generator=torch.Generator().manual_seed(0))
    options = OptimizerOptions(optimizer=name, learning_rate=0.01)

    def steps(model, optimizer, batches):
        for ids in batches:
            model(ids, ids).backward()
            clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    straight = GPT(config)
    steps(straight, first := make_optimizer(straight, options), draws[:3])
    resumed = GPT(config, seed=None)
    import_weights(resumed, export_weights(straight))
    load_optimizer_tensors(second := make_optimizer(resumed, options), resumed, optimizer_tensors(first, straight))
    steps(straight, first, draws[3:])
    steps(resumed, second, draws[3:])
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_without_the_last_step_of_each_row_is_resumed():
    """Of a version in which AdamW moved the whole table in every step."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9, eos_id=None, max_ngram=3)
    model, ids = GPT(config), torch.tensor([[1, 2, 3, 4]])
    optimizer = make_optimizer(model, OptimizerOptions())
    for _ in range(2):
        model(ids, ids).backward()
        optimizer.step()
    saved = optimizer_tensors(optimizer, model)
    del saved["ngrams.weight/last_step"]
    load_optimizer_tensors(again := make_optimizer(model, OptimizerOptions()), model, saved)
    assert again.state[model.ngrams.weight]["last_step"].eq(2).all()


ONE_STEP = """
import sys
import torch
from model import GPT, GPTConfig
from training.optim import make_optimizer
from training.options import OptimizerOptions
model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=4, eos_id=3))
optimizer = make_optimizer(model, OptimizerOptions(optimizer="muon"))
ids = torch.zeros(1, 4, dtype=torch.int64)
model(ids, ids).backward()
optimizer.step()
assert "torch._dynamo" not in sys.modules
"""


def test_making_an_optimizer_does_not_import_the_compiler():
    assert subprocess.run([sys.executable, "-c", ONE_STEP], cwd=ROOT, check=False).returncode == 0


def test_optimizer_state_of_another_model_is_refused():
    model = GPT(TINY)
    with pytest.raises(ValueError, match=r"'blocks\.9'"):
        load_optimizer_tensors(make_optimizer(model, OptimizerOptions()), model, {"blocks.9/exp_avg": torch.zeros(3)})
    with pytest.raises(ValueError, match="shape"):
        load_optimizer_tensors(
            make_optimizer(model, OptimizerOptions()), model, {"final_norm.weight/exp_avg": torch.zeros(3)}
        )
