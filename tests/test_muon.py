"""Muon: orthogonal updates with AdamW's RMS for every shape, batched as one by one; bitwise-exact resume."""

import dataclasses
import math
import shutil

import pytest
import torch

from common.weights import export_weights
from model import GPT
from tests.test_model import MODERN, TINY, ids_with_documents
from tests.test_train import TINY as TINY_RUN
from tests.test_train import _in_a_folder_of_its_own, reproducible, tensors_of, train  # noqa: F401  (a fixture)
from training.muon import orthogonalize
from training.optim import make_optimizer
from training.options import OptimizerOptions

PLAIN = OptimizerOptions(optimizer="muon", learning_rate=0.01, weight_decay=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (1, 40, 41)])
def test_singular_values_become_about_one_and_vectors_stay(shape, dtype):
    torch.manual_seed(0)
    u, s, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrices = u * torch.linspace(1.0, 0.02, s.shape[-1]) @ vt * 1e-3  # condition number 50, as gradients have
    out = orthogonalize(matrices, dtype).float()
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.65
    assert values.max() < 1.25
    alignment = (u.mT @ out @ vt.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(alignment.sort().values, values.sort().values, atol=0.05, rtol=0)
    assert not orthogonalize(torch.zeros(shape), dtype).any()


def test_orthogonalizing_a_batch_equals_one_by_one():
    matrices = torch.randn(5, 16, 48) * torch.logspace(-4, 2, 5)[:, None, None]
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices), alone, atol=1e-5, rtol=0)


def updates_of(model: GPT, options: OptimizerOptions = PLAIN) -> dict[str, torch.Tensor]:
    """The change of each tensor in one step."""
    before, ids = export_weights(model), ids_with_documents(4, 17)
    before = {name: tensor.clone() for name, tensor in before.items()}
    model(ids[:, :-1], ids[:, 1:]).backward()
    make_optimizer(model, options).step()
    return {name: tensor - before[name] for name, tensor in export_weights(model).items()}


@pytest.mark.parametrize(
    "variant", [TINY, MODERN, dataclasses.replace(MODERN, n_kv_head=2)], ids=["gpt2", "modern", "grouped"]
)
def test_the_matrices_of_blocks_get_orthogonal_updates_with_adamw_s_rms(variant):
    model = GPT(variant)
    updates = updates_of(model)
    in_muon = {id(matrix) for matrix in make_optimizer(model, PLAIN).param_groups[0]["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in in_muon} == {
        f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in in_muon:
            rms = updates[name].square().mean().sqrt().item() / PLAIN.learning_rate
            assert rms == pytest.approx(0.2, rel=0.25), name  # full rank, singular values 0.7 … 1.2


def test_two_muon_steps_equal_a_plain_implementation():
    """One matrix, with Nesterov momentum, weight decay and muon_learning_rate."""
    options = dataclasses.replace(PLAIN, muon_learning_rate=0.03, muon_momentum=0.9, muon_steps=4, weight_decay=0.1)
    model, ids = GPT(TINY), ids_with_documents(4, 17)
    optimizer, weight = make_optimizer(model, options), model.blocks[1].mlp.up.weight
    expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
    assert optimizer.param_groups[0]["scale"] == pytest.approx(3.0)
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * group["scale"]
        model(ids[:, :-1], ids[:, 1:]).backward()
        momentum = 0.9 * momentum + 0.1 * weight.grad
        direction = orthogonalize((0.9 * momentum + 0.1 * weight.grad).mT[None], steps=4)[0].mT  # (128, 32) is tall
        expected = expected * (1 - 0.03 * 0.1) - 0.03 * 0.2 * math.sqrt(128) * direction
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(weight.detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", [TINY, MODERN], ids=["gpt2", "modern"])
def test_every_weight_moves(variant):
    assert [name for name, update in updates_of(GPT(variant)).items() if not update.any()] == []


def test_muon_learning_rate_needs_a_learning_rate():
    assert OptimizerOptions(muon_learning_rate=0.1, learning_rate=0.0).problems()
    assert not OptimizerOptions(muon_learning_rate=0.1).problems()


def test_resume_with_muon_is_bitwise_exact(small_text):
    args = (*TINY_RUN, f"--data={small_text}", "--optimizer=muon", "--muon_learning_rate=0.02")
    assert train(*args, "--run=straight") == 0
    shutil.copytree("straight", "cut")
    shutil.rmtree("cut/checkpoints/step-00000020")
    assert train("--resume=cut") == 0
    assert tensors_of("cut", 20) == tensors_of("straight", 20)
    assert reproducible("cut") == reproducible("straight")
