"""--lora_rank: adapters alone are trained, saved and resumed; everything that reads a model sees merged weights."""

import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import sample as sample_script
import train as train_script
from checkpoint import list_checkpoints, open_checkpoint, resolve_model_folder
from common.hardware import choose_hardware
from common.options import HardwareOptions
from common.weights import export_weights, flops_per_token, import_weights, trained_parameters
from errors import UserError
from files import DamagedFile, size_and_crc
from generation.engine import generate
from generation.options import SamplingOptions
from model import GPT, GPTConfig
from model_folder import merge, open_model_folder, write_model_folder
from tests.test_train import TINY, message_of, read_events, reproducible, tensors_of, train, train_until_cut
from training.average import WeightAverage
from training.compilation import compile_model
from training.lora import ALPHA, AdaptedLinear, add_adapters, describe, narrow_frozen
from training.optim import make_optimizer
from training.options import OptimizerOptions
from training.plan import first_values
from training.state import TrainState

GREEDY = SamplingOptions(max_new_tokens=20, temperature=0.0)
ADAPT = (*TINY, "--init_from=base", "--data=new.txt", "--lora_rank=2", "--compile=false", "--seed=3")
CONFIG = GPTConfig(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=32, positions="rotary", norm="rmsnorm", mlp="swiglu",
    qk_norm=True, bias=False, vocab_size=1100, eos_id=0,
)  # fmt: skip
OTHER = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=32, tie_embeddings=False, max_ngram=2, ngram_rows=64,
                  vocab_size=70, eos_id=0)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_text) -> Path:
    """A folder with a run, one that adapts it to another text, and the same with averages."""
    folder, before = tmp_path_factory.mktemp("finished runs"), Path.cwd()
    os.chdir(folder)
    try:
        shutil.copy(small_text, "old.txt")
        lines = small_text.read_text("utf-8").splitlines()[:1500]
        Path("new.txt").write_text("".join(f"{line[:-1]}, {line[:4]}?\n" for line in lines), encoding="utf-8")
        assert train(*TINY, "--data=old.txt", "--run=base", "--max_steps=40") == 0
        assert train(*ADAPT, "--run=straight") == 0
        assert train(*ADAPT, "--run=averaged", "--ema_half_life=0.2") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def _in_a_copy(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def adapted(config: GPTConfig, rank: int = 3, seed: int = 0) -> GPT:
    """A model whose adapters have an effect."""
    model = GPT(config, seed=1)
    add_adapters(model, rank, ALPHA / rank, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            if name.endswith("lora_b"):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def merged(model: GPT) -> GPT:
    tensors, whole = export_weights(model), GPT(model.config, seed=None).to(model.embed.weight.dtype)
    adapters = {name: tensors.pop(name) for name in trained_parameters(model)}
    scale = next(module.scale for module in model.modules() if isinstance(module, AdaptedLinear))
    import_weights(whole, merge(tensors, adapters, scale))
    return whole


def some_ids(config: GPTConfig, rows: int = 2, length: int = 24, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def weights_of(run: str) -> dict[str, torch.Tensor]:
    return open_model_folder(resolve_model_folder(Path(run))).model_tensors()


# ---- the adapters


@pytest.mark.parametrize("config", [CONFIG, OTHER])
def test_new_adapters_change_nothing_and_cover_all_matrices_of_the_blocks(config):
    plain, model = GPT(config, seed=1), GPT(config, seed=1)
    add_adapters(model, 3, ALPHA / 3, seed=0)
    ids = some_ids(config)
    torch.testing.assert_close(model(ids), plain(ids), rtol=0, atol=0)
    names = {name.removesuffix(".lora_a") for name in trained_parameters(model) if name.endswith(".lora_a")}
    assert names == {
        f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
    }
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            assert 0.9 / math.sqrt(module.in_features) < module.lora_a.abs().max() <= 1 / math.sqrt(module.in_features)
    again, other = GPT(config, seed=1), GPT(config, seed=1)
    add_adapters(again, 3, ALPHA / 3, seed=0)
    add_adapters(other, 3, ALPHA / 3, seed=1)
    one, same, different = (m.get_parameter("blocks.1.mlp.up.lora_a") for m in (model, again, other))
    assert torch.equal(one, same)
    assert not torch.equal(one, different)


@pytest.mark.parametrize("config", [CONFIG, OTHER])
def test_merged_weights_are_the_same_model(config):
    model = adapted(config).double()
    whole, ids = merged(model), some_ids(config)
    torch.testing.assert_close(model(ids), whole(ids), rtol=1e-12, atol=1e-12)
    assert (model(ids) - GPT(config, seed=1).double()(ids)).abs().max() > 1e-3
    prompts = [ids[0, :5].tolist(), ids[1, :9].tolist()]
    greedy = [[(event.sample, event.token) for event in generate(m.eval(), prompts, GREEDY, 1)] for m in (model, whole)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("config", [CONFIG, OTHER])
@pytest.mark.parametrize("chunked", [False, True])
def test_gradients_are_those_of_the_merged_weights_and_no_frozen_tensor_has_any(config, chunked, monkeypatch):
    """dL/dB = s · dL/dW · Aᵀ, dL/dA = s · Bᵀ · dL/dW; with the loss in chunks, and without."""
    monkeypatch.setattr("model.MIN_CHUNKED_LOGITS", 1 if chunked else 2**30)
    monkeypatch.setattr("model.CHUNK_LOGITS", {"cpu": 1})
    monkeypatch.setattr("model.MIN_CHUNK_ROWS", 20)
    model = adapted(config).double()
    whole, ids = merged(model), some_ids(config)
    for each in (model, whole):
        each(ids, ids.roll(-1)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith((".lora_a", ".lora_b"))
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear):
            gradient = whole.get_parameter(f"{name}.weight").grad
            torch.testing.assert_close(layer.lora_b.grad, layer.scale * gradient @ layer.lora_a.mT)
            torch.testing.assert_close(layer.lora_a.grad, layer.scale * layer.lora_b.mT @ gradient)


def test_nothing_is_kept_of_frozen_weights():
    for config in (CONFIG, OTHER):
        model = adapted(config)
        optimizer = make_optimizer(model, OptimizerOptions())
        optimizer.allocate()
        assert {id(p) for p in optimizer.state} == {id(p) for p in trained_parameters(model).values()}
        average = WeightAverage(model, 0.1)
        assert len(average.tensors) == len(trained_parameters(model)) == 16
        count = sum(p.numel() for p in trained_parameters(model).values())
        size, line = describe(model)
        assert size == sum(p.numel() for p in export_weights(GPT(config, seed=None)).values())
        assert f" {count:,} parameters are trained" in line
        assert 4 / 6 < flops_per_token(model) / flops_per_token(GPT(config, seed=None)) < 1
    assert describe(GPT(CONFIG))[1] == ""


def test_bfloat16_autocast_and_dropout():
    model = adapted(GPTConfig(**{**CONFIG.to_dict(), "dropout": 0.5})).train()
    ids = some_ids(CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = {float(model(ids, ids.roll(-1)).detach()) for _ in range(2)}
        model(ids, ids.roll(-1)).backward()
        model.eval()
        torch.testing.assert_close(model(ids), merged(model).eval()(ids), rtol=0.1, atol=0.05)
    assert len(losses) == 2
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trained_parameters(model).values())


@pytest.mark.parametrize("config", [CONFIG, OTHER])
def test_frozen_matrices_in_bfloat16_are_the_same_numbers_under_autocast(config):
    wide, narrow = adapted(config), adapted(config)
    narrow_frozen(narrow, torch.bfloat16)
    ids = some_ids(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [model(ids, ids.roll(-1)) for model in (wide, narrow)]
        greedy = [[event.token for event in generate(m.eval(), [[1, 2]], GREEDY, 1)] for m in (wide, narrow)]
    assert torch.equal(*losses)
    assert greedy[0] == greedy[1]
    for loss in losses:
        loss.backward()
    for one, other in zip(trained_parameters(wide).values(), trained_parameters(narrow).values(), strict=True):
        assert torch.equal(one.grad, other.grad)
    sizes = [sum(p.nbytes for p in model.blocks.parameters() if not p.requires_grad) for model in (wide, narrow)]
    assert sizes[1] < 0.52 * sizes[0]


def test_the_scale_makes_first_steps_alike_at_all_ranks():
    """The change of the logits by one step of AdamW, which moves every element of B by the learning rate."""
    ids, moved = some_ids(CONFIG), []
    for rank in (2, 8):
        model = GPT(CONFIG, seed=1)
        before = model(ids).detach()
        add_adapters(model, rank, ALPHA / rank, seed=0)
        optimizer = make_optimizer(model, OptimizerOptions(learning_rate=1e-4))
        model(ids, ids.roll(-1)).backward()
        optimizer.step()
        moved.append(float((model(ids) - before).detach().square().mean().sqrt()))
    assert 0.5 < moved[1] / moved[0] < 2


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_a_compiled_block_trains_adapters(dtype, close):
    hardware = choose_hardware(HardwareOptions(device="cpu", dtype=dtype, threads=1))
    losses = []
    for compiler in ("none", "inductor"):
        model = adapted(CONFIG).train()
        narrow_frozen(model, hardware.dtype)
        optimizer = make_optimizer(model, OptimizerOptions())
        state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), 2, compiler=compiler)
        ids = some_ids(CONFIG, length=32)
        forward = compile_model(model, state, train_script.MicroBatch(ids, ids.roll(-1), None), hardware)
        assert state.compiler.startswith(compiler)
        for _ in range(3):
            with hardware.autocast():
                loss = forward(ids, ids.roll(-1), reduction="sum")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[:3] == pytest.approx(losses[3:], rel=close)
    assert losses[2] < losses[0]


# ---- a run


@pytest.mark.usefixtures("_in_a_copy")
def test_a_run_saves_adapters_alone_beside_one_base():
    base, folder = Path("straight/base"), Path("straight/checkpoints/step-00000020/model")
    source = Path("base/checkpoints/step-00000040/model")
    assert {path.name for path in base.iterdir()} == {path.name for path in source.iterdir()}
    assert all((base / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        assert {name.rpartition(".")[2] for name in tensors.keys()} == {"lora_a", "lora_b"}  # noqa: SIM118
    assert (folder / "model.safetensors").stat().st_size < 0.12 * (base / "model.safetensors").stat().st_size
    config = json.loads((folder / "config.json").read_text())
    entry = size_and_crc(base / "model.safetensors")
    assert config["adapter"] == {"rank": 2, "scale": ALPHA / 2, "base": entry}
    assert open_model_folder(folder).config == open_model_folder(source).config
    before, after = weights_of("base"), weights_of("straight")
    for name, weight in before.items():
        is_adapted = name.startswith("blocks.") and weight.dim() == 2
        assert torch.equal(weight, after[name]) != is_adapted
    evals = read_events("straight", "eval")
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] - 0.1


@pytest.mark.usefixtures("_in_a_copy")
def test_a_run_says_what_is_trained(capsys):
    assert train(*ADAPT, "--run=other", "--max_steps=1") == 0
    out = capsys.readouterr().out
    whole = sum(tensor.numel() for tensor in weights_of("base").values())
    assert re.search(rf"^model: {whole:,} parameters", out, re.M)
    with safe_open("other/checkpoints/step-00000001/model/model.safetensors", framework="pt") as tensors:
        count = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    assert re.search(rf"^adapters of rank 2: {count:,} parameters are trained", out, re.M)


@pytest.mark.usefixtures("_in_a_copy")
@pytest.mark.parametrize("run", ["straight", "averaged", "narrow"])
def test_a_resumed_run_ends_in_the_same_bits(run):
    if run == "narrow":
        assert train(*ADAPT, "--dtype=bfloat16", "--run=narrow") == 0
        evals = [read_events(name, "eval")[-1]["val_loss"] for name in ("narrow", "straight")]
        assert evals[0] == pytest.approx(evals[1], rel=0.02)
    shutil.copytree(run, "moved/cut")
    shutil.rmtree("moved/cut/checkpoints/step-00000020")
    shutil.rmtree("base")  # the run has what it needs
    assert train("--resume=moved/cut") == 0
    assert tensors_of("moved/cut", 20) == tensors_of(run, 20)
    assert reproducible("moved/cut") == reproducible(run)


@pytest.mark.usefixtures("_in_a_copy")
@pytest.mark.parametrize("moment", [1, 13])
def test_a_killed_run_ends_in_the_same_bits(moment, monkeypatch):
    train_until_cut(monkeypatch, "killed", moment, [*ADAPT, "--run=killed"])
    assert train("--resume=killed") == 0
    assert tensors_of("killed", 20) == tensors_of("straight", 20)


@pytest.mark.usefixtures("_in_a_copy")
@pytest.mark.parametrize("when", ["_link_or_copy", "sync_directory", "save_checkpoint"])
def test_a_run_killed_before_its_first_checkpoint_is_started_again(when, monkeypatch):
    """Killed while the base is written, or after it."""
    place = "training.saving" if when == "save_checkpoint" else "model_folder"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"{place}.{when}", killed)
        patch.setattr("model_folder.try_remove_tree", lambda path: None)  # a killed process tidies nothing
        with pytest.raises(KeyboardInterrupt):
            train(*ADAPT, "--run=killed")
    assert list_checkpoints(Path("killed")) == []
    left = {path.name for path in Path("killed").iterdir()}
    assert ("base" in left) == (when == "save_checkpoint")
    assert train(*ADAPT, "--run=killed") == 0
    assert tensors_of("killed", 20) == tensors_of("straight", 20)
    assert not any(path.name.endswith(".writing") for path in Path("killed").iterdir())


@pytest.mark.usefixtures("_in_a_copy")
def test_a_run_started_again_without_adapters_has_no_base(monkeypatch):
    train_until_cut(monkeypatch, "killed", 1, [*ADAPT, "--run=killed"])
    shutil.rmtree("killed/checkpoints")
    assert Path("killed/base").is_dir()
    whole = [flag for flag in ADAPT if not flag.startswith("--lora_rank")]
    assert train(*whole, "--run=killed", "--max_steps=1") == 0
    assert not Path("killed/base").exists()


@pytest.mark.usefixtures("_in_a_copy")
@pytest.mark.parametrize("removed", ["run", "run/base", "run/base/model.safetensors"])
def test_a_base_that_is_removed_while_the_run_trains_is_written_again(monkeypatch, capsys, removed):
    step = train_script.update

    def remove_and_step(steps, optimizer_step, state, batches):
        if state.step == 12:
            (Path(removed).unlink if Path(removed).is_file() else partial(shutil.rmtree, removed))()
        return step(steps, optimizer_step, state, batches)

    monkeypatch.setattr(train_script, "update", remove_and_step)
    assert train(*ADAPT, "--run=run") == 0
    assert re.search(r"run/base: .*model\.safetensors.* was removed, and is written again", capsys.readouterr().out)
    assert tensors_of("run", 20) == tensors_of("straight", 20)
    assert {path.name: path.read_bytes() for path in Path("run/base").iterdir()} == {
        path.name: path.read_bytes() for path in Path("straight/base").iterdir()
    }


@pytest.mark.usefixtures("_in_a_copy")
def test_adapters_that_were_set_aside_find_their_base():
    assert train("--resume=straight", "--from=step-10", "--max_steps=11") == 0
    assert weights_of("straight/checkpoints/set-aside/step-00000020").keys() == weights_of("base").keys()


@pytest.mark.usefixtures("_in_a_copy")
def test_the_base_is_copied_where_links_are_impossible(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr("model_folder.os.link", refuse)
    assert train(*ADAPT, "--run=copied") == 0
    assert Path("copied/base/model.safetensors").stat().st_nlink == 1
    assert tensors_of("copied", 20) == tensors_of("straight", 20)


# ---- what reads a run of adapters


@pytest.mark.usefixtures("_in_a_copy")
def test_samples_scores_and_evaluations_use_the_merged_weights(capsys):
    assert sample_script.main(["--run=straight", "--prompt=Anna", "--max_new_tokens=20", "--temperature=0"]) == 0
    text = capsys.readouterr().out
    assert train("--resume=straight", "--eval_only=true") == 0
    resumed = capsys.readouterr().out
    flags = ("--data=new.txt", "--eval_only=true", "--threads=1", "--dtype=float32")
    assert train("--init_from=straight", *flags, "--lora_rank=2") == 0
    initial = capsys.readouterr().out
    assert "--lora_rank: no effect with --eval_only" in initial
    losses = [float(re.search(r"val loss ([\d.]+)", out)[1]) for out in (resumed, initial)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0] == pytest.approx(read_events("straight", "final")[0]["val_loss"], abs=2e-4)

    whole = open_model_folder(resolve_model_folder(Path("straight")))
    write_model_folder(Path("whole"), whole.model_tensors(), whole.config, whole.tokenizer, {})
    assert sample_script.main(["--run=whole", "--prompt=Anna", "--max_new_tokens=20", "--temperature=0"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.usefixtures("_in_a_copy")
def test_a_run_from_an_adapted_model_starts_from_merged_weights():
    assert train(*ADAPT, "--init_from=straight", "--run=next", "--max_steps=10") == 0
    expected, base = weights_of("straight"), open_model_folder(Path("next/base")).model_tensors()
    assert expected.keys() == base.keys()
    assert all(torch.equal(expected[name], base[name]) for name in expected)
    assert read_events("next", "eval")[0]["val_loss"] == pytest.approx(
        read_events("straight", "eval")[-1]["val_loss"], abs=1e-4
    )
    shutil.copytree("next", "again")
    shutil.rmtree("again/checkpoints/step-00000010")
    shutil.rmtree("straight")
    assert train("--resume=again") == 0
    assert tensors_of("again", 10) == tensors_of("next", 10)
    whole = [flag for flag in ADAPT if not flag.startswith("--lora_rank")]
    assert train(*whole, "--init_from=next", "--run=last", "--max_steps=1") == 0
    assert open_checkpoint(list_checkpoints(Path("last"))[-1]).model.adapter is None


@pytest.mark.usefixtures("_in_a_copy")
def test_an_adapted_model_teaches_and_a_run_of_adapters_learns_from_it():
    taught = (*ADAPT, "--teacher=straight", "--run=taught")
    assert train(*taught) == 0
    shutil.rmtree("taught/checkpoints/step-00000020")
    before = tensors_of("taught", 10)
    assert train("--resume=taught") == 0
    assert before == tensors_of("taught", 10)
    state = open_checkpoint(list_checkpoints(Path("taught"))[-1]).state
    assert state["teachers"][0]["base"] == size_and_crc(Path("straight/base/model.safetensors"))


@pytest.mark.usefixtures("_in_a_copy")
def test_a_saved_config_repeats_the_run():
    assert train("straight/config.json", "--run=repeated", "--threads=1", "--micro_batch_size=4") == 0
    assert tensors_of("repeated", 20) == tensors_of("straight", 20)


# ---- what is refused


@pytest.mark.usefixtures("_in_a_copy")
def test_adapters_without_their_run_are_refused_with_what_to_do():
    shutil.copytree("straight/checkpoints/step-00000020", "copy/step-00000020")
    shutil.copytree("straight/checkpoints/step-00000020/model", "alone")
    for path in ("alone", "copy/step-00000020"):
        message = message_of("debug", f"--init_from={path}", "--data=new.txt")
        assert "adapters" in message
        assert "python -m interop export RUN --to=model" in message
        with pytest.raises(UserError, match="interop export"):
            sample_script.main([f"--run={path}", "--prompt=A"])
    for path in ("averaged/../straight", "straight/checkpoints/step-00000010/../step-00000020/model"):
        assert weights_of(path).keys() == weights_of("base").keys()
    shutil.rmtree("straight/base")
    with pytest.raises(UserError, match="interop export"):
        sample_script.main(["--run=straight", "--prompt=A"])
    assert "without the weights" in message_of("--resume=straight")


@pytest.mark.usefixtures("_in_a_copy")
@pytest.mark.parametrize("how", ["changed", "cut", "gone", "other"])
def test_a_damaged_base_is_refused(how):
    path = Path("straight/base/model.safetensors")
    content = path.read_bytes()
    path.unlink()
    if how == "changed":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif how == "cut":
        path.write_bytes(content[:-100])
    elif how == "other":
        shutil.copy("averaged/checkpoints/step-00000020/model/model.safetensors", path)
    folder = open_model_folder(resolve_model_folder(Path("straight")))
    with pytest.raises(DamagedFile, match=r"base.*Restore it from a copy: .* holds adapters of it"):
        folder.model_tensors()
    assert "straight/base/model.safetensors" in message_of("--resume=straight")
    assert Path("straight/checkpoints/step-00000020").is_dir()


@pytest.mark.usefixtures("_in_a_copy")
@pytest.mark.parametrize(
    "entry",
    [
        {}, 7, [1], {"rank": 2, "scale": 16.0}, {"rank": 0, "scale": 16.0, "base": {"bytes": 1, "crc32": 1}},
        {"rank": 2, "scale": 1e999, "base": {"bytes": 1, "crc32": 1}},
        {"rank": 2, "scale": 16.0, "base": "/etc/passwd"},
    ],
)  # fmt: skip
def test_a_malformed_entry_is_refused(entry):
    shutil.copytree("straight/checkpoints/step-00000020/model", "alone")
    config = json.loads(Path("alone/config.json").read_text())
    Path("alone/config.json").write_text(json.dumps({**config, "adapter": entry}))
    with pytest.raises(DamagedFile, match=r"config\.json"):
        open_model_folder(Path("alone"))


def test_adapters_that_do_not_fit_their_base_are_refused():
    weights = {"x.weight": torch.zeros(4, 6), "y.bias": torch.zeros(4)}
    a, b = torch.zeros(2, 6), torch.zeros(4, 2)
    assert merge(dict(weights), {"x.lora_a": a, "x.lora_b": b}, 1.0).keys() == weights.keys()
    for adapters in (
        {"x.lora_a": a}, {"x.lora_a": a, "x.lora_b": b, "z": a}, {"z.lora_a": a, "z.lora_b": b},
        {"x.lora_a": b, "x.lora_b": a}, {"x.lora_a": a, "x.lora_b": torch.zeros(4, 3)},
        {"x.lora_a": a, "x.lora_b": torch.zeros(8)}, {"x.lora_a": a[0], "x.lora_b": b},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"fit|alone|does not have"):
            merge(dict(weights), adapters, 1.0)


@pytest.mark.usefixtures("_in_a_copy")
def test_wrong_flags_name_what_to_write():
    assert "--init_from=MODEL" in message_of("debug", "--lora_rank=4", "--data=new.txt")
    assert "--optimizer=adamw" in message_of(*ADAPT, "--optimizer=muon")
    message = message_of(*ADAPT, "--lora_rank=400")
    largest = int(re.search(r"--lora_rank=(\d+) or less", message)[1])
    assert train(*ADAPT, f"--lora_rank={largest}", "--run=largest", "--max_steps=1") == 0
    assert f"--lora_rank={largest}" in message_of(*ADAPT, f"--lora_rank={largest + 1}")
    assert "was started with lora_rank=2" in message_of("--resume=straight", "--lora_rank=3")
    assert "was started with lora_rank=none" in message_of("--resume=base", "--lora_rank=2")
    assert not Path("runs").exists()


@pytest.mark.usefixtures("_in_a_copy")
def test_a_file_that_is_not_of_the_base_is_kept(monkeypatch):
    """The directory of a run that was killed before its first checkpoint, to which someone has added a file."""
    train_until_cut(monkeypatch, "killed", 1, [*ADAPT, "--run=killed"])
    shutil.rmtree("killed/checkpoints")
    Path("killed/base/notes.txt").write_text("mine")
    assert "killed/base" in message_of(*ADAPT, "--run=killed")
    assert Path("killed/base/notes.txt").read_text() == "mine"


# ---- with a plan


def test_the_plan_does_not_choose_muon_for_adapters():
    assert first_values({"lora_rank": 8})["optimizer"] == "adamw"
    assert first_values({})["optimizer"] == "muon"


@pytest.mark.usefixtures("_in_a_copy")
def test_a_run_with_a_plan_trains_adapters(capsys):
    flags = ("--data=new.txt", "--init_from=base", "--lora_rank=2", "--max_steps=3", "--threads=1", "--sample_tokens=5")
    assert train(*flags, "--run=planned") == 0
    options = json.loads(Path("planned/config.json").read_text())["options"]
    assert (options["optimizer"], options["lora_rank"]) == ("adamw", 2)
    assert options["learning_rate"] == 1e-3
    assert "adapters of rank 2" in capsys.readouterr().out
    assert train("--data=new.txt", "--init_from=base", "--lora_rank=2", "--budget_minutes=1", "--plan") == 0
