"""The parts of bench/ that count, parse and compare, on tiny inputs. The measurements themselves are run by hand."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import config
from bench import shakespeare_char_cpu as bench
from bench import train_speed, versions
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
from model import GPTConfig
from tests.conftest import ROOT
from training.options import OptimizerOptions


@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 40])
def test_score_counts_every_target_once(length):
    torch.manual_seed(0)
    table = torch.randn(7, 7)  # a bigram model: logits depend on the last id only
    ids = np.random.default_rng(length).integers(0, 7, length)
    expected = F.cross_entropy(table[ids[:-1]].double(), torch.from_numpy(ids[1:])).item()
    assert score(lambda x: table[x], ids, block_size=8, rows=2) == pytest.approx(expected, rel=1e-12)


def test_score_takes_windows_of_at_most_block_size_from_a_fixed_grid():
    seen = []

    def uniform(x):
        seen.extend(row.tolist() for row in x)
        return torch.zeros(*x.shape, 50)

    assert score(uniform, np.arange(22), block_size=5, rows=3) == pytest.approx(math.log(50))
    assert seen == [list(range(first, min(first + 5, 21))) for first in range(0, 21, 5)]


def test_speeds_are_compared_within_and_across_rounds():
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


def test_the_evaluation_interval_is_passed_unless_it_is_the_default():
    assert not any("eval_interval" in flag for flag in peer_command(2000, 250))
    assert "--eval_interval=30" in peer_command(30, 30)


def test_extracting_a_function_does_not_run_its_script(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("def double(x):\n    return factor * x\n\nraise SystemExit('it trained')\n")
    assert extract_function(script, "double", {"factor": 2})(21) == 42
    with pytest.raises(UserError, match="expected one function triple, found 0"):
        extract_function(script, "triple", {})


def test_the_peers_model_does_not_replace_ours(tmp_path):
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
    step = bench.our_step(tmp_path / "data", "float32", 0.1)
    losses = [step() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.05


def test_cpuinfo_gives_name_and_flags():
    first = "processor\t: 0\nmodel name\t: Some CPU @ 2.5GHz\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n"
    x86 = first + "\nprocessor\t: 1\nflags\t: fpu\n"
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
    script = "import os, requests\nhere = os.path.dirname(__file__)\n"
    script += "print(open(os.path.join(here, 'input.txt')).read(), requests.__file__)"
    (home / "prepare.py").write_text(f"{script}\nopen(os.path.join(here, 'val.bin'), 'wb').write(bytes(2))\n")
    (tmp_path / "text.txt").write_text("紅樓夢", encoding="utf-8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    peer = copy_peer(tmp_path / "checkout", tmp_path / "text.txt", tmp_path / "copy")
    assert peer_ids(peer, "val").tolist() == [0]
    assert [path.name for path in home.iterdir()] == ["prepare.py"], "the checkout itself must not change"


def test_a_command_that_fails_shows_its_last_lines(tmp_path):
    with pytest.raises(UserError, match=r"(?s)exit code 3.*жизнь"):
        run_process([sys.executable, "-c", "print('жизнь'); raise SystemExit(3)"], tmp_path)
    done = run_process([sys.executable, "-c", "print(1); print(2)"], tmp_path)
    assert done["output"] == "1\n2\n"
    assert 0 < done["lines"][0][0] <= done["lines"][1][0] <= done["machine"]["seconds"] + 0.001  # which is rounded


def test_the_gpu_benches_need_nothing_but_torch_triton_and_numpy():
    """The machines with a GPU may lack the other packages."""
    packages = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    missing = sorted({name.replace("-", "_") for name in packages} - {"torch", "triton", "numpy"})
    assert {"tiktoken", "safetensors", "annotated_types"} <= {*missing}
    names = (
        "generate",
        "train_speed",
        "attention",
        "tune_attention",
        "gpu_facts",
        "gpu_profile",
        "gpu_session",
        "short_run",
    )
    benches = ", ".join(f"bench.{name}" for name in names)
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import {benches}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("preset", train_speed.PRESETS)
def test_train_speed_measures_the_shapes_and_optimizers_of_the_presets(preset):
    options = config.load("train.py", [preset])
    assert train_speed.PRESETS[preset] == options.section(GPTConfig)
    ours, theirs = train_speed.OPTIMIZERS.get(preset, OptimizerOptions()), options.section(OptimizerOptions)
    assert (ours.optimizer, ours.muon_steps, ours.grad_clip) == (theirs.optimizer, theirs.muon_steps, theirs.grad_clip)


def test_a_preset_that_train_speed_does_not_know_is_refused():
    with pytest.raises(UserError, match="unknown 'debug'; expected some of gpt2_124m,modern_124m"):
        train_speed.read_arguments(["--presets=debug"])


# ---- bench/versions.py ----


def write_run(folder, weight=1.0, loss=2.5, sample="so it was"):
    """A minimal run directory with one checkpoint."""
    checkpoint = folder / "checkpoints" / "step-00000008"
    (checkpoint / "model").mkdir(parents=True)
    save_file({"embed.weight": torch.tensor([[0.0, weight]])}, checkpoint / "model" / "model.safetensors")
    save_file({"step": torch.tensor(8.0)}, checkpoint / "optimizer.safetensors")
    record = {"event": "step", "step": 8, "loss": loss, "timing": {"seconds": weight}}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "samples.txt").write_text(sample)
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, None),
        ({"weight": 1.0000001}, r"step-00000008/model/model.safetensors: embed.weight: 1 of 2 numbers differ"),
        ({"loss": 2.6}, r"metrics.jsonl: line 1, loss: 2.5 before, 2.6 after"),
        ({"sample": "so it is"}, r"samples.txt: byte 6 \(line 1\): 'so it was' before, 'so it is' after"),
    ],
)
def test_the_first_difference_of_two_runs_is_named(tmp_path, change, named):
    before, after = write_run(tmp_path / "before"), write_run(tmp_path / "after", **change)
    difference = versions.first_difference(before, after)
    assert difference is None if named is None else re.match(named, difference)


def test_one_changed_byte_of_the_optimizers_state_is_found(tmp_path):
    before, after = write_run(tmp_path / "before"), write_run(tmp_path / "after")
    path = after / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "optimizer.safetensors: step: 1 of 1 numbers differ" in versions.first_difference(before, after)


def test_missing_tensors_lines_and_checkpoints_are_differences(tmp_path):
    for name, tensors in (("a", {"x": torch.zeros(2)}), ("b", {"y": torch.zeros(2)}), ("c", {"x": torch.zeros(3)})):
        save_file(tensors, tmp_path / name)
    assert versions.tensor_difference(tmp_path / "a", tmp_path / "b") == "tensors in one file only: x, y"
    assert "x: (2,) torch.float32 before, (3,)" in versions.tensor_difference(tmp_path / "a", tmp_path / "c")
    assert versions.metrics_difference('{"step": 1}\n', '{"step": 1}\n{"step": 2}\n') == "line 2 is there after only"
    assert versions.metrics_difference('{"a": 1}', '{"b": 1}') == "line 1, a: 1 before, missing after"
    assert versions.text_difference(b"ab", b"abc") == "byte 2 (line 1): 'ab' before, 'abc' after"
    before, after = write_run(tmp_path / "before"), write_run(tmp_path / "after")
    (after / "checkpoints" / "step-00000008").rename(after / "checkpoints" / "step-00000009")
    assert versions.first_difference(before, after).startswith("last checkpoint: step-00000008 before")


def test_speeds_are_read_from_what_the_commands_write():
    steps = [{"event": "step", "tokens": 100 * n, "timing": {"train_seconds": 3 + n / 10}} for n in (1, 2, 3)]
    lines = "\n".join(map(json.dumps, [*steps, {"event": "eval", "timing": {"train_seconds": 9.0}}]))
    assert versions.training_rate(lines) == pytest.approx(1000)
    assert (
        versions.decode_rate("device cpu\nsample 1: length, 50 tokens\n50 tokens in 0.03 s: 1531.7 tokens/s\n")
        == 1531.7
    )
    with pytest.raises(UserError, match="expected two or more"):
        versions.training_rate(json.dumps(steps[0]))
    with pytest.raises(UserError, match="printed no tokens/s"):
        versions.decode_rate("error")


def test_rates_are_compared_within_and_across_rounds():
    summary = versions.compare_rates([100.0, 200.0, 400.0], [150.0, 400.0, 600.0])
    assert summary == {"before": 200.0, "after": 400.0, "ratio": 2.0, "lowest": 1.5, "highest": 2.0}


TRAIN_STAND_IN = """
import pathlib, shutil, sys
[run] = [argument[6:] for argument in sys.argv if argument.startswith("--run=")]
shutil.copytree(pathlib.Path(__file__).parent / "a run", run)
"""


@pytest.mark.parametrize(
    ("weight", "sample_script", "code", "shown"),
    [
        (1.0, "print('same')", 0, r"gpt2_124m +equal"),
        (2.0, "print('same')", 1, r"gpt2_124m +step-.*embed.weight: 1 of 2 numbers differ, by at most 1"),
        (1.0, "print('other')", 1, r"gpt2_124m +sample.py --temperature=0 .*'other\\n' before, 'same\\n' after"),
        (1.0, "raise SystemExit('out of ideas')", 1, r"before: sample.py .* exit code 1(?s:.*)out of ideas"),
    ],
)
def test_versions_runs_both_checkouts_and_reports_each_case(
    tmp_path, monkeypatch, capsys, weight, sample_script, code, shown
):
    for side, values in (("before", (weight, sample_script)), ("after", (1.0, "print('same')"))):
        write_run(tmp_path / side / "a run", weight=values[0])
        (tmp_path / side / "train.py").write_text(TRAIN_STAND_IN)
        (tmp_path / side / "sample.py").write_text(values[1])
    monkeypatch.setattr(versions, "ROOT", tmp_path / "after")
    arguments = [f"--before={tmp_path / 'before'}", "--parts=bits", "--cases=gpt2", f"--results={tmp_path}"]
    assert versions.main(arguments) == code
    assert re.search(shown, capsys.readouterr().out)
    figures = json.loads(next(tmp_path.glob("*-versions.json")).read_text(encoding="utf-8"))
    assert list(figures["bits"]) == ["gpt2_124m", "gpt2_124m, sliding_window"]


def test_wrong_arguments_of_versions_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no train\.py and sample\.py there"):
        versions.main([f"--before={tmp_path}"])
    for flag, named in (
        ("--parts=bit", "unknown 'bit'; expected bits, train, decode"),
        ("--cases=debugger", "none begins with debugger"),
        ("--rounds=0", "at least 1"),
        ("--text=nothing.txt", "no such file"),
    ):
        with pytest.raises(UserError, match=named):
            versions.main([f"--before={ROOT}", flag])


@pytest.mark.slow
@pytest.mark.skipif("SPROUT_BEFORE" not in os.environ, reason="SPROUT_BEFORE names no other checkout to compare with")
def test_another_version_computes_the_same_bits(tmp_path):
    """Weights, metrics.jsonl and samples of short runs: SPROUT_BEFORE=PATH make test-slow."""
    flags = [f"--before={os.environ['SPROUT_BEFORE']}", "--parts=bits", f"--results={tmp_path}"]
    command = [sys.executable, "bench/versions.py", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" equal\n") == len(versions.CASES)
