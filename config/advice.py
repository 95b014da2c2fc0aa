"""What to write instead of a wrong argument. Knows the names of options that take a path or a text.

`flag_problem` is about an argument that begins with a dash, `word_problem` about one that does not.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.option import Option, did_you_mean, no_such_option, show
from config.hints import hint
from errors import quote

DASHES = "-‐‑‒–—−"  # the last ones come from word processors and web pages
QUOTES = {"“": "”", "„": "“", "”": "”", "‘": "’", "’": "’", "«": "»", '"': '"', "'": "'"}


def flag_problem(
    script: str,
    arg: str,
    rest: list[str],
    options: Mapping[str, Mapping[str, Option]],
    is_preset: Callable[[str], object],
) -> str:
    """What is wrong with a flag. Removes its value from `rest`, the arguments after it, if it stands there.

    options: script → its options.
    """
    own = options[script]
    name, _, text = arg.lstrip(DASHES).partition("=")
    if rest and rest[0] == "=" and not text:  # `--name = value`
        rest.pop(0)
    if not text and rest and _is_value(rest[0]) and not is_preset(rest[0]):  # `--name value`, `--name= value`
        text = rest.pop(0).removeprefix("=")
    key = name.replace("-", "_").lower().rpartition(".")[2]  # litgpt: --train.max_steps
    switch = own.get(key.removeprefix("no_"))
    if key in own:
        value = "" if own[key].is_switch and not text else f"={quote(text) if text else own[key].usage()}"
        why = f"write --{key}{value}"
        if not arg.startswith("--") and arg[0] != "-":
            why = f"begins with {arg[0]}, not with two hyphens; {why}"
    elif switch and switch.is_switch and key.startswith("no_"):
        why = f"write --{switch.name}=false"
    elif advice := hint(script, key, text):
        why = f"no such option; {advice}"
    elif owners := [other for other in options if key in options[other]]:
        why = f"belongs to {' and '.join(owners)}, not to {script}"
    else:
        everything = {name: option for table in options.values() for name, option in table.items()}
        why = no_such_option(name, own if did_you_mean(name, own) else everything, "--")
    return f"{show(arg)}: {why}"


def quotes_problem(option: Option, text: str) -> str | None:
    """What is wrong with a value whose quotes the shell did not take as quotes; texts may hold any quote."""
    is_text = str in option.kinds and not option.path
    if is_text or QUOTES.get(text[:1], "") != text[-1:] or len(text) < 2 or os.path.exists(text):
        return None
    return f"the quotes {text[0]} {text[-1]} are part of the value; write --{option.name}={quote(text[1:-1])}"


def word_problem(script: str, arg: str, rest: list[str], own: Mapping[str, Option], presets: Sequence[str]) -> str:
    """What is wrong with a word that names no preset. Removes the words from `rest` that belong to it."""
    name, equals, text = arg.partition("=")
    if equals and name.isidentifier():
        advice = None if name in own else hint(script, name, text)
        return f"{show(arg)}: {advice or f'write --{name}={quote(text)}'}"
    words = [arg]
    for word in rest:
        if not _is_value(word) or word in presets:
            break
        words.append(word)
    text = " ".join(words)
    if len(words) > 1 and ("prompt" in own or os.path.exists(text)):
        del rest[: len(words) - 1]
    else:
        text = arg
    where = show(text)
    if any(mark in text for mark in "“”„«»"):
        return f'{where}: a shell does not take “ and ” as quotes; type straight ones, as in --name="…"'
    if os.path.exists(text):
        flags = ("resume", "run") if is_run(text) else ("prompt_file", "data", "input")
        flags = ("init_from", "run") if is_model_folder(text) else flags
        return f"{where}: not a preset" + next((f"; write --{flag}={quote(text)}" for flag in flags if flag in own), "")
    near = did_you_mean(Path(text).stem, presets)
    if not near and "prompt" in own:
        return f"{where}: not a preset; to continue this text, write --prompt={quote(text)}"
    kind = "preset or file" if set(text) & set("./\\") and not text.endswith(".py") else "preset"
    return f"{where}: no such {kind}" + (near or f"; there are {', '.join(presets)}")


def is_run(path: str) -> bool:
    return os.path.exists(os.path.join(path, "config.json"))


def is_model_folder(path: str) -> bool:
    return is_run(path) and os.path.exists(os.path.join(path, "model.safetensors"))


def _is_value(word: str) -> bool:
    """Whether an argument looks like the value of the flag before it: a word, or a negative number."""
    return not word or word[0] not in DASHES or word[1:2].isdigit() or word[1:2] == "."
