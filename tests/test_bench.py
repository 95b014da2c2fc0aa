"""The parts of bench/ that count, parse and compare, on tiny input; the measurements themselves are run by hand."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import shakespeare_char_cpu as bench
from bench.hardware import Stopwatch, hardware, parse_cpuinfo, write_results
from bench.peer import (
    copy_peer,
    extract_function,
    import_model,
    peer_command,
    peer_ids,
    peer_report,
    plain_copy,
    prepare_ours,
    reseeded,
    run_process,
    score,
)
from errors import UserError
from tests.conftest import ROOT


@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 40])
def test_score_counts_every_target_once(length):
    torch.manual_seed(0)
    table = torch.randn(7, 7)  # a model of bigrams: the logits follow from the id alone
    ids = np.random.default_rng(length).integers(0, 7, length)
    expected = F.cross_entropy(table[ids[:-1]].double(), torch.from_numpy(ids[1:])).item()
    assert score(lambda x: table[x], ids, block_size=8, rows=2) == pytest.approx(expected, rel=1e-12)


def test_score_shows_windows_of_at_most_block_size_from_a_fixed_grid():
    seen = []

    def uniform(x):
        seen.extend(row.tolist() for row in x)
        return torch.zeros(*x.shape, 50)

    assert score(uniform, np.arange(22), block_size=5, rows=3) == pytest.approx(math.log(50))
    assert seen == [list(range(first, min(first + 5, 21))) for first in range(0, 21, 5)]


def test_speed_is_compared_within_and_across_rounds():
    summary = bench.summarise_speed({bench.PEER: [100.0, 200.0, 400.0], "Sprout float32": [150.0, 400.0, 600.0]})
    assert summary["Sprout float32"] == {
        "median": 400.0,
        "best": 600.0,
        "ratio_of_medians": 2.0,
        "ratio_of_bests": 1.5,
        "median_of_ratios": 1.5,
    }


def test_sides_alternate():
    order = []
    rates = bench.alternate({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, steps=2, tokens=10)
    assert "".join(order) == "aabb" + "bbaa" + "aabb"
    assert [len(rates[name]) for name in "ab"] == [3, 3]


def test_runs_are_compared_by_their_medians():
    runs = [{"side": bench.PEER, "val_loss": loss, "seconds": 10.0} for loss in (2.0, 1.9, 1.8)]
    runs += [{"side": "Sprout float32", "val_loss": 1.7, "seconds": seconds} for seconds in (4.0, 5.0, 9.0)]
    ours = bench.summarise_runs(runs)["Sprout float32"]
    assert ours["loss_difference"] == pytest.approx(-0.2)
    assert (ours["speed_up"], ours["best_speed_up"]) == (2.0, 2.5)


def test_reports_and_seed_of_the_peer():
    output = "step 0: train loss 4.1, val loss 4.2\niter 0: loss 4.1\nstep 250: train loss 2.4000, val loss 2.5000\n"
    assert peer_report(output) == 2.5
    script = "torch.manual_seed(1337 + offset)\n"
    assert reseeded(script, 1337) == script
    assert reseeded(script, 1338) == "torch.manual_seed(1338 + offset)\n"
    with pytest.raises(UserError, match="0 times, expected once"):
        reseeded("", 1337)


def test_the_last_weights_are_saved_at_any_number_of_steps():
    assert not any("eval_interval" in flag for flag in peer_command(2000, 250))
    assert "--eval_interval=30" in peer_command(30, 30)


def test_a_function_of_a_script_runs_without_the_script(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("def double(x):\n    return factor * x\n\nraise SystemExit('it trained')\n")
    assert extract_function(script, "double", {"factor": 2})(21) == 42
    with pytest.raises(UserError, match="expected one function triple, found 0"):
        extract_function(script, "triple", {})


def test_the_peers_model_does_not_take_the_place_of_ours(tmp_path):
    (tmp_path / "model.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass GPTConfig:\n    n_layer: int = 1\n"
    )
    import model

    assert import_model(tmp_path).GPTConfig(n_layer=2).n_layer == 2
    assert bench.GPT is model.GPT
    with pytest.raises(UserError, match=r"no model\.py there"):
        import_model(tmp_path / "elsewhere")


def test_both_programs_get_the_same_characters(tmp_path):
    text = tmp_path / "a text é.txt"
    text.write_bytes("\ufeffжизнь\r\n紅樓夢\n".encode())
    assert plain_copy(text, tmp_path / "input.txt").read_bytes() == "жизнь\n紅樓夢\n".encode()
    text.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        plain_copy(text, tmp_path / "input.txt")


def test_our_step_trains(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be: that is the question.\n" * 40)
    prepare_ours(text, tmp_path / "data")
    step = bench.our_step(tmp_path / "data", tmp_path / "run", "float32", 0.1)
    losses = [step() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.05


def test_cpuinfo_is_read_for_name_and_telling_flags():
    x86 = "processor\t: 0\nmodel name\t: Some CPU @ 2.5GHz\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n\nprocessor\t: 1\nflags\t: fpu\n"
    assert parse_cpuinfo(x86) == ("Some CPU @ 2.5GHz", ["avx2", "avx512_bf16", "amx_bf16"])
    assert parse_cpuinfo("processor : 0\nFeatures : fp asimd bf16 i8mm\n") == ("", ["bf16", "i8mm"])
    assert parse_cpuinfo("") == ("", [])


def test_results_are_dated_json_and_never_overwritten(tmp_path):
    with Stopwatch() as watch:
        sum(range(1000))
    figures = {"hardware": hardware(), "machine": watch.measured}
    first, second = write_results("name", figures, tmp_path), write_results("name", {}, tmp_path)
    assert first.name == f"{figures['hardware']['date']}-name.json"
    assert second.name == f"{figures['hardware']['date']}-name-2.json"
    assert json.loads(first.read_text(encoding="utf-8")) == figures
    assert watch.measured["seconds"] >= 0


def test_the_peer_prepares_its_text_without_the_requests_package(tmp_path, monkeypatch):
    home = tmp_path / "checkout" / "data" / "shakespeare_char"
    home.mkdir(parents=True)
    script = "import os, requests\nhere = os.path.dirname(__file__)\nprint(open(os.path.join(here, 'input.txt')).read(), requests.__file__)"
    (home / "prepare.py").write_text(f"{script}\nopen(os.path.join(here, 'val.bin'), 'wb').write(bytes(2))\n")
    (tmp_path / "text.txt").write_text("紅樓夢", encoding="utf-8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    peer = copy_peer(tmp_path / "checkout", tmp_path / "text.txt", tmp_path / "copy")
    assert peer_ids(peer, "val").tolist() == [0]
    assert [path.name for path in home.iterdir()] == ["prepare.py"], "the checkout itself stays as it is"


def test_a_command_that_fails_shows_its_last_lines(tmp_path):
    with pytest.raises(UserError, match=r"(?s)exit code 3.*жизнь"):
        run_process([sys.executable, "-c", "print('жизнь'); raise SystemExit(3)"], tmp_path)
    done = run_process([sys.executable, "-c", "print(1); print(2)"], tmp_path)
    assert done["output"] == "1\n2\n"
    assert 0 < done["lines"][0][0] <= done["lines"][1][0] <= done["machine"]["seconds"] + 0.001  # which is rounded


def test_the_gpu_benches_need_nothing_but_torch_triton_and_numpy():
    """On machines with a GPU the other packages may be missing, so no bench imports them on the way to its first line."""
    others = re.findall(r"^([a-z]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    missing = sorted({*others} - {"torch", "triton", "numpy"})
    assert {"tiktoken", "safetensors"} <= {*missing}
    benches = ", ".join(f"bench.{name}" for name in ("generate", "train_speed", "attention", "tune_attention"))
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import {benches}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
