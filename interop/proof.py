"""Compares an exported model with ours: logits on fixed prompts, greedy ids, the ids of texts.

A `Reference` is what our model says. check_transformers, check_llama_cpp and check_files compare it with what the
target's own code says, or our importer reads, and return what they found equal; they raise ProofFailed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.tokenizer import Tokenizer
from common.weights import build_for_weights, import_weights
from interop import classes
from interop.importing import read_tensors
from interop.sources import open_source
from interop.tokenizer_files import prepended_id
from model import GPT, GPTConfig, KVCache

TEXTS = (
    "Once upon a time, there was a king.",
    "def add(a, b):\n    return a + b  # 12345\n",
    "It's 3.14, isn't it?  Two  spaces,\ttab.\n\nA new paragraph: “quotes”, naïve, 东京, 🙂",
    "THE END\n",
)
GREEDY_IDS = 60
MAX_PROMPT, MAX_ROWS = 1024, 32  # ids of a prompt; its last positions, whose logits are compared


class ProofFailed(Exception):
    """The exported model is not ours; what differs."""


class Tolerance(NamedTuple):
    """Of the logits on one prompt: the largest difference; or, with is_rms, the root mean square of all, without what
    is added to all logits of a position: where the other program rounds activations, single logits say little."""

    allowed: float
    is_rms: bool = False

    def measure(self, difference: Tensor) -> float:
        if not self.is_rms:
            return float(difference.abs().max())
        return float((difference - difference.mean(dim=-1, keepdim=True)).square().mean().sqrt())


class Reference(NamedTuple):
    """prompts: ids; logits: (n, V) float32 of the last MAX_ROWS positions of each; greedy: the ids that continue the
    first prompt, and greedy_logits (n, V), from which each was taken."""

    prompts: list[list[int]]
    logits: list[Tensor]
    greedy: list[int]
    greedy_logits: Tensor

    def tolerance(self) -> Tolerance:
        """1e-4, and for logits above 10 as much more as float32's steps are larger there."""
        return Tolerance(1e-4 * max(1.0, max(float(logits.abs().max()) for logits in self.logits) / 10))

    def spread(self) -> float:
        """The standard deviation of the logits of a token, on average."""
        return float(torch.cat(self.logits).std(dim=-1).mean())


def known_texts(tokenizer: Tokenizer) -> list[str]:
    """TEXTS without the characters that the tokenizer does not know."""
    unknown = tokenizer.unknown("".join(TEXTS))
    return ["".join(char for char in text if char not in unknown) for text in TEXTS]


def prompts_for(config: GPTConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """The texts' ids after the one that begins a text, and random ids that reach beyond a sliding window, at most as
    many as the context has."""
    size = min(config.block_size, max(128, min(MAX_PROMPT, (config.sliding_window or 0) + 32)))
    ids = [[tokenizer.start_id, *tokenizer.encode(text).tolist()][:size] for text in known_texts(tokenizer)]
    ids[0] = ids[0][: max(1, config.block_size // 2)]  # leaves room for the greedy ids
    generator = torch.Generator().manual_seed(0)
    return [*ids, torch.randint(config.vocab_size, (size,), generator=generator).tolist()]


@torch.inference_mode()
def make_reference(config: GPTConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> Reference:
    """What a model with these weights computes in float32 on the CPU."""
    model = build_for_weights(config, tensors)
    import_weights(model, tensors)
    model.eval()
    prompts = prompts_for(config, tokenizer)
    logits = [model(torch.tensor([ids]))[0, -MAX_ROWS:].clone() for ids in prompts]
    count = min(GREEDY_IDS, config.block_size - len(prompts[0]))
    greedy, rows = greedy_ids(model, prompts[0], count)
    return Reference(prompts, logits, greedy, rows)


def greedy_ids(model: GPT, prompt: Sequence[int], count: int) -> tuple[list[int], Tensor]:
    """The `count` most probable ids after a prompt, and the logits (count, V) that chose them."""
    cache = KVCache(replace(model.config, block_size=len(prompt) + count), rows=1)
    if len(prompt) > 1:
        model.prefill(torch.tensor([prompt[:-1]]), [len(prompt) - 1], cache, [0])
    ids, rows = [prompt[-1]], list[Tensor]()
    for _ in range(count):
        rows.append(model.decode(torch.tensor([ids[-1]]), cache)[0].clone())
        ids.append(int(rows[-1].argmax()))
    return ids[1:], torch.stack(rows) if rows else torch.empty(0, model.config.vocab_size)


class Difference(NamedTuple):
    """Of logits: the largest one, and the one that was compared with the tolerance, as text."""

    largest: float
    text: str


def compare_logits(reference: Reference, theirs: Callable[[list[int]], Tensor], tolerance: Tolerance) -> Difference:
    """theirs: ids → logits (n, V) of the last positions by the other program. Raises ProofFailed."""
    largest, measured, kind = 0.0, 0.0, " (root mean square)" * tolerance.is_rms
    for ids, ours in zip(reference.prompts, reference.logits, strict=True):
        found = theirs(ids)
        if found.shape != ours.shape:
            raise ProofFailed(f"the logits have the shape {tuple(found.shape)}, ours {tuple(ours.shape)}")
        difference = tolerance.measure(found - ours)
        if not difference <= tolerance.allowed:  # also where it is NaN
            raise ProofFailed(
                f"logits differ by {difference:.2g}{kind}, allowed {tolerance.allowed:.1g}, on the ids {ids[:8]} …"
            )
        largest, measured = max(largest, float((found - ours).abs().max())), max(measured, difference)
    return Difference(largest, f"logits within {measured:.1e}{kind}, allowed {tolerance.allowed:.1e}")


def compare_greedy(reference: Reference, found: Sequence[int], difference: float) -> str:
    """Raises ProofFailed where a greedy id differs, unless the logits of the two ids are so near that differences such
    as those found elsewhere explain it: then nothing is compared after it."""
    for n, (ours, theirs) in enumerate(zip(reference.greedy, found, strict=False)):
        if ours != theirs:
            gap = float(reference.greedy_logits[n, ours] - reference.greedy_logits[n, theirs])
            if gap <= 4 * difference:
                return f"{n} greedy ids equal, then a near-tie (logits {gap:.1e} apart)"
            raise ProofFailed(f"greedy id {n + 1} is {theirs}, ours {ours}, whose logit is {gap:.2g} higher")
    if len(found) != len(reference.greedy):
        raise ProofFailed(f"{len(found)} greedy ids, expected {len(reference.greedy)}")
    return f"{len(found)} greedy ids equal"


def compare_texts(tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> str:
    """encode: the other program's ids of a text. Raises ProofFailed."""
    first = prepended_id(tokenizer)
    for text in known_texts(tokenizer):
        expected = [first] * (first is not None) + tokenizer.encode(text).tolist()
        if (found := encode(text)) != expected:
            raise ProofFailed(f"the ids of {text!r} are {found[:12]} …, ours {expected[:12]} …")
    return "ids of texts equal"


# ---- transformers ----------------------------------------------------------------------------------------------------


def check_transformers(folder: Path, reference: Reference, tokenizer: Tokenizer) -> str | None:
    """Opens the folder as a user does, in float32; None where transformers is not installed. Raises ProofFailed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    version = transformers.__version__
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager", local_files_only=True
        )
        opened = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ProofFailed(f"transformers {version} does not open it: {str(error)[:500]}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise ProofFailed(f"transformers reports {kind}: {sorted(map(str, info[kind]))[:3]}")
    texts = compare_texts(tokenizer, lambda text: opened(text)["input_ids"])

    def logits(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids])).logits[0, -MAX_ROWS:].float()

    with torch.inference_mode():
        difference = compare_logits(reference, logits, reference.tolerance())
        model.generation_config.eos_token_id = None  # goes on after the end of a text, as the reference does
        prompt = torch.tensor([reference.prompts[0]])
        settings = {"do_sample": False, "max_new_tokens": max(1, len(reference.greedy)), "pad_token_id": 0}
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        found = made[0, prompt.shape[1] :].tolist()[: len(reference.greedy)]
    greedy = compare_greedy(reference, found, difference.largest)
    return f"transformers {version}: {difference.text}, {greedy}, {texts}"


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What llama.cpp says: the logits of the last positions of each prompt, the greedy ids, the ids of each text."""

    logits: list[np.ndarray]
    greedy: list[int]
    texts: list[list[int]]


def check_llama_cpp(path: Path, reference: Reference, tokenizer: Tokenizer, tolerance: Tolerance) -> str | None:
    """Opens the file in llama.cpp, through the package cyllama; None where it is not installed. Raises ProofFailed.

    It runs in a process of its own, since llama.cpp ends the process on what it does not expect."""
    if importlib.util.find_spec("cyllama") is None:
        return None
    prompts, texts = reference.prompts, known_texts(tokenizer)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            answers = pool.submit(ask_llama_cpp, str(path), prompts, len(reference.greedy), texts).result()
        except BrokenExecutor:
            raise ProofFailed("llama.cpp ended its process while it read the file") from None
        except (ValueError, RuntimeError) as error:
            raise ProofFailed(f"llama.cpp does not read it: {error}") from None
    ids = dict(zip(texts, answers.texts, strict=True))
    compared = compare_texts(tokenizer, ids.__getitem__)
    rows = iter(answers.logits)
    difference = compare_logits(reference, lambda _: torch.from_numpy(next(rows)), tolerance)
    greedy = compare_greedy(reference, answers.greedy, difference.largest)
    version = importlib.metadata.version("cyllama")
    return f"llama.cpp (cyllama {version}): {difference.text}, {greedy}, {compared}"


def ask_llama_cpp(path: str, prompts: list[list[int]], count: int, texts: list[str]) -> Answers:
    """count: of greedy ids after the first prompt. Raises ValueError, RuntimeError."""
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):
        n_vocab = property(lambda self: self.get_vocab().n_vocab)  # get_logits_ith needs it

    llama_cpp.disable_logging()
    settings, options = llama_cpp.LlamaModelParams(), llama_cpp.LlamaContextParams()
    settings.n_gpu_layers = 0
    options.n_ctx = options.n_batch = options.n_ubatch = max(map(len, prompts)) + count + 16
    options.flash_attn_type = 0  # off: it rounds to 16 bits
    options.type_k = options.type_v = 0  # keys and values in float32
    model = Model(path, settings)
    context, vocab = llama_cpp.LlamaContext(model, options), model.get_vocab()

    def read(ids: list[int], start: int = 0) -> np.ndarray:
        if start == 0:
            context.kv_cache_clear()
        batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(ids, start, True)
        context.decode(batch)
        rows = range(max(0, len(ids) - MAX_ROWS), len(ids))
        return np.array([context.get_logits_ith(i) for i in rows], dtype=np.float32)

    logits, greedy = [read(ids) for ids in prompts], list[int]()
    rows = read(prompts[0])
    for n in range(count):
        greedy.append(int(rows[-1].argmax()))
        rows = read(greedy[-1:], len(prompts[0]) + n)
    return Answers(logits, greedy, [list(vocab.tokenize(text, True, False)) for text in texts])


# ---- The files read back ---------------------------------------------------------------------------------------------


def check_files(path: Path, config: GPTConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> str:
    """Reads what was written with our importer. config: of the class's own options. Raises ProofFailed where options,
    a bit of the weights or an id differ."""
    source = open_source(path, pickle=False, tokenizer=None, eos=None)
    compare_texts(tokenizer, lambda text: _with_start(tokenizer, source.tokenizer.encode(text).tolist()))
    read = classes.to_config(source.options, source.tokenizer.vocab_size, source.tokenizer.eos_id)
    expected, found = config.to_dict(), read.to_dict()
    if different := [key for key in found if not _equal(found[key], expected[key])]:
        listed = ", ".join(f"{key}={found[key]!r}, not {expected[key]!r}" for key in different)
        raise ProofFailed(f"read back, the options are {listed}")
    for name, tensor in read_tensors(source, read).items():
        if not torch.equal(tensor.float(), tensors[name].float()):
            raise ProofFailed(f"read back, {name!r} differs")
    return f"read back: options, {len(tensors)} tensors bit by bit, ids of texts equal"


def _equal(one: object, other: object) -> bool:
    """GGUF has its numbers in float32."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _with_start(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    first = prepended_id(tokenizer)
    return ids if first is None else [first, *ids]
