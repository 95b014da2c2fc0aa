"""What a step costs on a GPU: the formula against steps that were measured there, and the fit of its constants."""

import json

import pytest
import torch

from common.hardware import Hardware
from model import GPTConfig
from tests.conftest import ROOT
from training import plan, step_cost
from training.options import OptimizerOptions
from training.step_cost import Seconds, StepCost

MEASURED = ROOT / "bench" / "results" / "2026-11-27-gpu_small_steps.json"
SHAPES = {(shape.n_layer, shape.n_embd): shape for shape in plan.shapes(128, {})}
# What `measure` found on that H200.
PASS, LAYER, UPDATE = (3.763e-15, 5.071e-12), 1.8907e-4, (9.756e-5, 8.273e-15)


def cost_on_a_gpu(optimizer="muon", **constants):
    config = GPTConfig(**{**plan.ARCHITECTURE, **SHAPES[2, 128]._asdict(), "vocab_size": 2048, "eos_id": None})
    gpu = Hardware(torch.device("cuda"), torch.bfloat16, 1, {})
    return StepCost(config, OptimizerOptions(optimizer=optimizer, muon_steps=3), gpu, "triton", **constants)


def recorded_steps():
    rows = json.loads(MEASURED.read_text("utf-8"))["rows"]
    return [row for row in rows if row["kind"] == "recorded"]


@pytest.mark.parametrize("row", recorded_steps(), ids=lambda row: "{layers} x {width}, {tokens} tokens".format(**row))
def test_recorded_steps_cost_what_they_took_on_an_h200(row):
    """Wide models take less than predicted: their products come nearer to the card's peak. Most for the widest, whose
    step of few tokens is half Muon's."""
    cost = cost_on_a_gpu(pass_seconds=PASS, layer_seconds=LAYER, update_seconds=UPDATE)
    predicted = 1e3 * cost.step_seconds(SHAPES[row["layers"], row["width"]], row["tokens"])
    assert 0.8 <= predicted / (row["passes_ms"] + row["optimizer_ms"]) <= 1.65


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_models_give_the_constants(monkeypatch, optimizer):
    law = cost_on_a_gpu(optimizer, pass_seconds=PASS, layer_seconds=LAYER, update_seconds=UPDATE)

    def measured(cost, shape):
        count = cost.counts(shape)
        token = PASS[0] * count.flops + PASS[1] * count.written
        update = sum(seconds * work for seconds, work in zip(UPDATE, cost._update(count), strict=True))
        return Seconds(token, update, LAYER * count.layers)

    monkeypatch.setattr(step_cost, "measure_shape", measured)
    found = cost_on_a_gpu(optimizer)
    found.measure(list(SHAPES.values()))
    for shape in SHAPES.values():
        assert found.step_seconds(shape, 8192) == pytest.approx(law.step_seconds(shape, 8192), rel=1e-6)


def test_on_a_very_slow_machine_one_model_is_measured(monkeypatch):
    measured = []

    def slow(cost, shape):
        measured.append(shape)
        return Seconds(1e-4, 0.1)

    monkeypatch.setattr(step_cost, "measure_shape", slow)
    cost = cost_on_a_gpu()
    cost.measure(list(SHAPES.values()))
    assert len(measured) == 1
    assert cost.step_seconds(SHAPES[4, 128], 4096) > cost.step_seconds(SHAPES[2, 128], 4096) > 0
