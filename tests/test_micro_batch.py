"""The micro-batch: a divisor of a step's rows, what fits into memory, and less after an out-of-memory."""

import json

import pytest
import torch

import model as model_module
from errors import UserError
from tests.test_train import SHAPE, TINY, _in_a_folder_of_its_own, message_of, train  # noqa: F401  (a fixture)
from training.micro_batch import fit_to_memory

AUTO = [flag for flag in TINY if not flag.startswith("--micro_batch_size")]


@pytest.mark.parametrize(
    ("size", "fixed", "a_row", "free", "fits"),
    [
        (64, 100, 10, 10_000, 64),  # all of them
        (64, 100, 10, 500, 32),  # 35 would
        (60, 100, 10, 500, 30),
        (64, 100, 10, 125, 1),  # two are not even tried
        (64, 1000, 10, 500, 1),  # not even one: the first step will say so
        (1, 100, 10, 500, 1),
        (7, 0, 100, 630, 1),  # a divisor, and there is no other
    ],
)
def test_as_many_rows_as_the_peaks_of_one_and_two_allow(size, fixed, a_row, free, fits):
    asked = []

    def peak(rows: int) -> int:
        asked.append(rows)
        assert rows == 1 or fixed + 2 * a_row <= free
        return fixed + rows * a_row

    assert fit_to_memory(size, peak, free) == fits
    assert asked in ([], [1], [1, 2])


@pytest.fixture
def _memory_for_two_rows(monkeypatch):
    forward = model_module.GPT.forward

    def short_of_memory(self, ids, *args, **kwargs):
        if self.training and ids.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(model_module.GPT, "forward", short_of_memory)


@pytest.mark.usefixtures("_memory_for_two_rows")
def test_an_out_of_memory_halves_the_micro_batch_and_the_run_goes_on(small_text, capsys):
    assert train(*AUTO, *SHAPE, f"--data={small_text}", "--run=runs/short", "--max_steps=3", "--eval_interval=3") == 0
    out = capsys.readouterr().out
    assert "step 0: out of memory; micro-batch 8 → 4. The result may not be bitwise equal" in out
    assert "step 0: out of memory; micro-batch 4 → 2." in out
    with open("runs/short/config.json", encoding="utf-8") as file:
        assert json.load(file)["options"]["micro_batch_size"] == 2
    assert train("--resume=runs/short", "--max_steps=5") == 0
    assert "out of memory" not in capsys.readouterr().out


@pytest.mark.usefixtures("_memory_for_two_rows")
def test_a_forced_micro_batch_that_does_not_fit_is_an_error(small_text):
    message = message_of(*AUTO, *SHAPE, f"--data={small_text}", "--micro_batch_size=8")
    assert message == "--micro_batch_size=8 does not fit into the device's memory; use --micro_batch_size=4, or auto"


def test_one_row_too_many_is_an_error(small_text, monkeypatch):
    forward = model_module.GPT.forward

    def no_memory(self, *args, **kwargs):
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model_module.GPT, "forward", no_memory)
    with pytest.raises(UserError, match="one row does not fit"):
        train(*AUTO, *SHAPE, f"--data={small_text}", "--eval_interval=1000", "--tokens_per_step=32")
