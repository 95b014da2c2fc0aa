"""checkpoint.py and files.py: atomic under kills and full disks, all damage detected, foreign files validated."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoint
from checkpoint import (
    Checkpoint,
    SaveFailed,
    find_checkpoint,
    list_checkpoints,
    open_checkpoint,
    open_latest,
    prune_checkpoints,
    resolve_model_folder,
    save_checkpoint,
    saved_steps,
    set_later_aside,
)
from errors import UserError
from files import DamagedFile, json_bytes, read_json
from model_folder import FILES, SET_ASIDE, open_model_folder
from tensor_files import DTYPES
from tests.conftest import ROOT

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are injected into forked processes")
EVERY_FILE = [*sorted(FILES), "manifest.json"]


def save(run: Path, step: int, value: float | None = None, **state: object) -> Path:
    """A small checkpoint whose parts all hold `value` (by default the step)."""
    value = step if value is None else value
    return save_checkpoint(
        run,
        step,
        model={"wte.weight": torch.full((5, 4), value), "scale": torch.tensor(value)},
        config={"n_layer": 2, "value": value},
        tokenizer={"name": "bytes", "value": value},
        optimizer={"wte.weight/exp_avg": torch.full((5, 4), value), "wte.weight/step": torch.tensor(value)},
        state={"samples": 7 * step, "value": value, **state},
    )


def value_of(opened: Checkpoint) -> float:
    """The value given to save(), after a check that all parts agree on it."""
    tensors = [*opened.model_tensors().values(), *opened.optimizer_tensors().values()]
    values = {
        opened.state["value"],
        opened.config["value"],
        opened.tokenizer["value"],
        *(v for t in tensors for v in t.flatten().tolist()),
    }
    assert len(values) == 1, values
    return values.pop()


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---- Round trip ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text("abcxyz_./0123", min_size=1, max_size=20),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=5,
    ),
    st.integers(0, 2**32),
)
def test_random_tensors_come_back_bit_for_bit(tmp_path, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (100 * torch.randn(shape, generator=generator)).to(dtype) for name, (dtype, shape) in shapes.items()
    }
    path = save_checkpoint(tmp_path, 1, model=tensors, config={}, tokenizer={}, optimizer=tensors, state={})
    for loaded in (open_checkpoint(path).model_tensors(), open_checkpoint(path).optimizer_tensors()):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert loaded[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8)), name


def test_tensor_files_are_those_of_the_library_byte_for_byte(tmp_path):
    """All dtypes, in its order of dtypes and names; no dimension, no element, views, transposed and shared memory."""
    whole = torch.arange(24.0).view(6, 4)
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "b": torch.ones(3, dtype=torch.bool),
        "names/sort by bytes": whole[1:3],
        "Names": whole,
        "żółw": whole.T,
        "e\u0301": whole[:, ::2],
        'quote " backslash \\': torch.nn.Parameter(torch.ones(2)),
        **{f"{dtype}": torch.arange(-3, 4).to(dtype) for dtype in DTYPES.values()},
        **{f"a {dtype}": torch.arange(5).to(dtype) for dtype in reversed(DTYPES.values())},
    }
    for some in (tensors, {}, dict(reversed(tensors.items())), {"one": torch.ones(3, 5).to(torch.bfloat16)}):
        path = save_checkpoint(tmp_path, 1, model=some, config={}, tokenizer={}, optimizer={}, state={})
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in some.items()}
        assert (path / "model/model.safetensors").read_bytes() == safetensors.torch.save(copies)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_and_reading_need_no_second_copy_of_the_tensors(tmp_path):
    """The peak memory of a process that saves tensors of 50 MB twice, with a transposed one of 5 MB, and reads them."""
    program = """
import sys, torch
from pathlib import Path
from checkpoint import open_checkpoint, save_checkpoint

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1e3

def extra(action):
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = memory("VmRSS")
    result = action()
    return memory("VmHWM") - before, result

tensors = {f"t{i}": torch.ones(1_250_000) for i in range(10)}
tensors["t0"] = torch.ones(1000, 1250).T
rest = {"config": {}, "tokenizer": {}, "state": {}}
run = Path(sys.argv[1])
save_checkpoint(run, 0, model={"a": torch.ones(9).T}, optimizer={}, **rest)  # loads what is loaded on first use
saving, path = extra(lambda: save_checkpoint(run, 1, model=tensors, optimizer=tensors, **rest))
opened = open_checkpoint(path)
reading, _ = extra(opened.model_tensors)
print(saving, reading)
"""
    child = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    saving, reading = map(float, child.stdout.split())
    assert 4 < saving < 20  # MB: the transposed one
    assert 40 < reading < 65


def test_views_are_saved_with_their_own_values(tmp_path):
    whole = torch.arange(24.0).view(6, 4)
    model = {"rows": whole[:3], "transposed": whole.T, "parameter": torch.nn.Parameter(torch.ones(2))}
    path = save_checkpoint(
        tmp_path, 1, model={"transposed": model["transposed"]}, config={}, tokenizer={}, optimizer={}, state={}
    )
    assert open_checkpoint(path).model_tensors()["transposed"].equal(whole.T)
    path = save_checkpoint(
        tmp_path, 2, model={k: model[k] for k in ("rows", "parameter")}, config={}, tokenizer={}, optimizer={}, state={}
    )
    loaded = open_checkpoint(path).model_tensors()
    assert loaded["rows"].equal(whole[:3])
    loaded["rows"].zero_()  # not memory-mapped: the file does not change
    assert open_checkpoint(path).model_tensors()["rows"].equal(whole[:3])


def test_equal_states_give_equal_files(tmp_path):
    first, second = save(tmp_path / "一 run", 3), save(tmp_path / "b", 3)
    for name in EVERY_FILE:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "state.json").read_text() == '{\n "samples": 21,\n "step": 3,\n "value": 3\n}\n'
    assert (
        json.loads((first / "manifest.json").read_text())["files"]["state.json"]["bytes"]
        == (first / "state.json").stat().st_size
    )


def test_nan_in_the_state_raises_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        save(tmp_path, 1, val_loss=float("nan"))
    assert not (tmp_path / "checkpoints").exists()


# ---- Finding and pruning ---------------------------------------------------------------------------------------------


def test_find_latest_best_and_named_checkpoints(tmp_path):
    for step, val_loss in ((10, 3.0), (20, 2.0), (30, 2.0), (40, 2.5), (100_000_000, None)):
        save(tmp_path, step, **({} if val_loss is None else {"val_loss": val_loss}))
    for path in list_checkpoints(tmp_path):
        time = 2e9 - open_checkpoint(path).step  # file times in the wrong order
        os.utime(path, (time, time))
    assert [path.name for path in list_checkpoints(tmp_path)][-2:] == ["step-00000040", "step-100000000"]
    assert find_checkpoint(tmp_path, "latest").name == "step-100000000"
    assert find_checkpoint(tmp_path, "best").name == "step-00000020"
    assert (
        find_checkpoint(tmp_path, "step-30")
        == find_checkpoint(tmp_path, "step-00000030")
        == tmp_path / "checkpoints/step-00000030"
    )
    for wrong in ("step-31", "newest", "../step-30", "step-" + "9" * 300):
        with pytest.raises(UserError, match=r"best, latest, step-10, step-20, step-30, step-40"):
            find_checkpoint(tmp_path, wrong)


def test_best_is_latest_without_losses_and_skips_damaged_checkpoints(tmp_path, capsys):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path, "best").name == "step-00000002"
    (save(tmp_path, 3, val_loss=1.0) / "state.json").write_text('{"val_loss": 0.1, "step": 3}')
    save(tmp_path, 4, val_loss=2.0)
    assert find_checkpoint(tmp_path, "best").name == "step-00000004"
    assert "not considered as the best" in capsys.readouterr().err


def test_prune_keeps_the_newest_two_the_best_and_foreign_files(tmp_path):
    for step, val_loss in ((1, 5.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)):
        save(tmp_path, step, val_loss=val_loss)
    home = tmp_path / "checkpoints"
    for name in (
        "step-00000009.writing/model",
        "step-00000001.removing",
        "step-00000003.replaced",
        "step-00000001.mine",
        "notes",
    ):
        (home / name).mkdir(parents=True)
    (home / "step-00000007").write_text("a file")
    prune_checkpoints(tmp_path)
    ours = ["step-00000001", "step-00000002", "step-00000004", "step-00000005"]  # the first may be gone back to
    assert steps(tmp_path) == sorted([*ours, "step-00000001.mine", "step-00000007", "notes"])
    assert [path.name for path in list_checkpoints(tmp_path)] == ours


def test_prune_keeps_milestones_and_what_a_diverged_run_can_go_back_to(tmp_path):
    """At any time a checkpoint that a hundred steps have followed, once there was one."""
    kept = dict[int, list[int]]()
    for step in range(0, 400, 30):
        save(tmp_path, step, val_loss=1.0 + step)  # the first one is the best
        prune_checkpoints(tmp_path, keep_interval=120)
        kept[step] = saved_steps(tmp_path)
    assert kept[90] == [0, 60, 90]
    for step, steps_now in kept.items():
        assert {step, *range(0, step + 1, 120)} <= {*steps_now}
        assert step < 100 or any(old <= step - 100 for old in steps_now)
        assert len([old for old in steps_now if old % 120]) <= 5


def test_prune_keeps_unreadable_checkpoints(tmp_path, capsys):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, val_loss=float(step))
    (tmp_path / "checkpoints/step-00000001/state.json").rename(tmp_path / "kept")
    prune_checkpoints(tmp_path)
    assert steps(tmp_path) == ["step-00000001", "step-00000002", "step-00000003", "step-00000004"]
    assert "step-00000001/state.json" in capsys.readouterr().err


def test_missing_and_empty_run_directories_name_the_command(tmp_path):
    for find in (lambda run: find_checkpoint(run, "best"), open_latest, resolve_model_folder):
        with pytest.raises(UserError, match=r"no run.*does not exist; train first: python train\.py --run="):
            find(tmp_path / "no run")
        with pytest.raises(UserError, match=r"has no checkpoint yet"):
            find(tmp_path)
    with pytest.raises(
        UserError, match=r"models/gpt2 does not exist; it is made by: .* interop import MODEL --out=models/gpt2"
    ):
        resolve_model_folder(Path("models/gpt2"))


def test_resolve_model_folder_takes_a_run_a_checkpoint_and_a_model_folder(tmp_path, monkeypatch):
    save(tmp_path, 1, val_loss=1.0)
    path = save(tmp_path, 2, val_loss=2.0)
    assert resolve_model_folder(tmp_path).parent.name == "step-00000001"
    assert (
        resolve_model_folder(tmp_path, "latest")
        == resolve_model_folder(path)
        == resolve_model_folder(path / "model")
        == path / "model"
    )
    copy = shutil.copytree(path / "model", tmp_path / "a copy")
    folder = open_model_folder(resolve_model_folder(copy))
    assert (folder.config["value"], folder.tokenizer["value"], folder.model_tensors()["scale"]) == (2, 2, 2)
    flip(path / "model/config.json", -4)
    monkeypatch.chdir(path / "model")  # inside a checkpoint the crc32 is checked, however the path is written
    for name in (path / "model", Path()):
        with pytest.raises(DamagedFile, match=r"config\.json: damaged: its crc32 is"):
            open_model_folder(name)


# ---- Damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


def test_advice_belongs_to_the_file(tmp_path, capsys, monkeypatch):
    """Another checkpoint helps only where a checkpoint is damaged, and not where a run in progress removed it."""
    (tmp_path / "curves.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"Restore it from a copy$"):
        read_json(tmp_path / "curves.json")
    path = save(tmp_path, 1)
    newer = save(tmp_path, 2)
    opened = open_checkpoint(path)
    flip(path / "optimizer.safetensors", -3)
    with pytest.raises(DamagedFile, match=r"use another checkpoint"):
        opened.optimizer_tensors()
    shutil.rmtree(path)
    for read in (opened.optimizer_tensors, opened.model_tensors, lambda: open_checkpoint(path)):
        with pytest.raises(DamagedFile, match=r"A run in progress has removed .* run the same command again$"):
            read()
    real = open_checkpoint

    def pruned(path: Path, team: None = None) -> Checkpoint:
        if path == newer:
            save(tmp_path, 3)
            shutil.rmtree(newer)
        return real(path)

    monkeypatch.setattr(checkpoint, "open_checkpoint", pruned)
    assert open_latest(tmp_path).step == 3
    assert "WARNING" not in capsys.readouterr().err


def assert_skipped(run: Path, damaged: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest checkpoint is refused with the file named; open_latest skips it with a warning."""
    with pytest.raises(DamagedFile, match=r"--checkpoint=step-N") as caught:
        open_checkpoint(find_checkpoint(run, "latest"))
    assert damaged in str(caught.value)
    assert value_of(open_latest(run)) == 10
    assert damaged in capsys.readouterr().err


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("cut", ["0", "7", "8", "mid header", "mid data", "-1", "missing", "longer", "folder", "link"])
def test_truncated_missing_and_foreign_files_are_named(tmp_path, capsys, name, cut):
    save(tmp_path, 10)
    file = save(tmp_path, 20) / name
    size = file.stat().st_size
    if cut in ("missing", "folder", "link"):
        moved = file.rename(tmp_path / "elsewhere")
        if cut == "folder":
            file.mkdir()
        elif cut == "link" and os.name != "nt":  # Windows makes links only for administrators
            file.symlink_to(moved)
    elif cut == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        os.truncate(
            file,
            {"mid header": 30, "mid data": size - 20, "-1": size - 1 - (name == "manifest.json")}.get(cut) or int(cut),
        )
    assert_skipped(tmp_path, name.rpartition("/")[2], capsys)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_one_flipped_bit_anywhere_is_found(tmp_path, name):
    path = save(tmp_path, 20)
    size = (path / name).stat().st_size
    for position in range(0, size, max(1, size // 60)):
        flip(path / name, position, 1 << position % 8)
        with pytest.raises(DamagedFile):
            open_checkpoint(path)
        flip(path / name, position, 1 << position % 8)
    assert value_of(open_checkpoint(path)) == 20


def test_damage_after_opening_is_found_when_the_tensors_are_read(tmp_path):
    path = save(tmp_path, 1)
    opened = open_checkpoint(path)
    flip(path / "model/model.safetensors", -1)
    flip(path / "optimizer.safetensors", -1)
    with pytest.raises(DamagedFile, match=r"model\.safetensors"):
        opened.model_tensors()
    with pytest.raises(DamagedFile, match=r"optimizer\.safetensors"):
        opened.optimizer_tensors()


def test_other_files_in_a_checkpoint_are_ignored(tmp_path):
    path = save(tmp_path, 1)
    (path / ".DS_Store").write_bytes(b"\0")
    (path / "model" / "README.md").write_text("mine")
    assert value_of(open_checkpoint(path)) == 1


def test_later_checkpoints_are_set_aside_and_never_looked_for(tmp_path, capsys):
    save(tmp_path, 10)
    flip(save(tmp_path, 20) / "state.json", 3)
    assert open_latest(tmp_path).step == 10
    aside = tmp_path / "checkpoints" / SET_ASIDE
    assert set_later_aside(tmp_path, 10) == [aside / "step-00000020"]
    save(tmp_path, 15)
    assert find_checkpoint(tmp_path, "latest").name == "step-00000015"
    save(tmp_path, 20)
    assert set_later_aside(tmp_path, 15) == [aside / "step-00000020-2"]  # nothing is written over
    prune_checkpoints(tmp_path)
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000020", "step-00000020-2"]
    for path in list_checkpoints(tmp_path):
        flip(path / "optimizer.safetensors", -1)
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged"):
        open_latest(tmp_path)


# ---- Hostile files ---------------------------------------------------------------------------------------------------


def forge_manifest(path: Path, **changes: object) -> None:
    manifest = {**read_json(path / "manifest.json"), **changes}
    del manifest["crc32"]
    (path / "manifest.json").write_bytes(json_bytes({**manifest, "crc32": zlib.crc32(json_bytes(manifest))}))


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/passwd", "model/\0", "model/../state.json", "x" * 300, "\x1b[31mred"]
)
def test_a_manifest_with_other_files_is_refused(tmp_path, name):
    path = save(tmp_path, 1)
    entry = {"bytes": 1, "crc32": 1}
    files = read_json(path / "manifest.json")["files"]
    for forged in (
        {**files, name: entry},
        {**{k: v for k, v in files.items() if k != "state.json"}, name: entry},
        [name],
        name,
    ):
        forge_manifest(path, files=forged)
        with pytest.raises(DamagedFile, match="and nothing else") as caught:
            open_checkpoint(path)
        assert str(caught.value).isprintable()


def test_malformed_manifests_are_damage(tmp_path):
    path = save(tmp_path, 1)
    files = read_json(path / "manifest.json")["files"]
    for entry in (None, [], "x", {"bytes": "1", "crc32": None}, {}, {**files["state.json"], "more": 1}):
        forge_manifest(path, files={**files, "state.json": entry})
        with pytest.raises(DamagedFile):
            open_checkpoint(path)
    deep = b'{"format":' + b"[" * 900 + b"]" * 900 + b"}"
    for data in (
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b"[" * 100_000,
        deep,
        b'{"a": ' + b"9" * 5000 + b"}",
    ):
        (path / "manifest.json").write_bytes(data)
        with pytest.raises(DamagedFile):
            open_checkpoint(path)


def test_another_format_version_is_an_error_and_not_skipped_as_damage(tmp_path):
    save(tmp_path, 1)
    forge_manifest(save(tmp_path, 2), version=3)
    with pytest.raises(UserError, match="format version 3 found, 1 or 2 expected") as caught:
        open_latest(tmp_path)
    assert not isinstance(caught.value, DamagedFile)


def safetensors_file(header: object, data: bytes = bytes(16)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def tensor(shape: object, begin: int = 0, end: int = 16, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "header of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "overlap": safetensors_file({"a": tensor([4]), "b": tensor([4])}),
    "hole": safetensors_file({"a": tensor([2], 0, 8)}),
    "beyond the end": safetensors_file({"a": tensor([8], 0, 32)}),
    "overflow": safetensors_file({"a": tensor([2**62, 4])}),
    "empty but huge": safetensors_file({"a": tensor([0, 2**62, 2**62], 0, 0), "b": tensor([4])}),
    "negative": safetensors_file({"a": tensor([-4])}),
    "unknown dtype": safetensors_file({"a": tensor([4], dtype="PICKLE")}),
    "4-bit dtype": safetensors_file({"a": tensor([32], dtype="F4")}),
    "NUL in a name": safetensors_file({"a\0": tensor([4])}),
    "long name": safetensors_file({"a" * 300: tensor([4])}),
    "escape in a name": safetensors_file({"\x1b[31m": tensor([4])}),
    "not utf-8": safetensors_file(b'{"\xff": 1}'),
    "deep": safetensors_file(b"[" * 100_000),
    "list": safetensors_file([]),
    "pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94"
    b"\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_weights_are_refused(tmp_path, attack):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[attack])
    for name in ("config.json", "sprout_tokenizer.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DamagedFile, match=r"model\.safetensors") as caught:
        open_model_folder(tmp_path).model_tensors()
    assert str(caught.value).isprintable()


@needs_fork
def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DamagedFile, match="expected a regular file"):
        read_json(tmp_path / "config.json")


# ---- Kills and full disks --------------------------------------------------------------------------------------------


def run_child(action) -> int:
    """Runs `action` in a forked process and returns its exit code."""
    child = os.fork()
    if child == 0:
        try:
            code = action() or 0
        except BaseException as error:  # noqa: BLE001 - a child must not return into pytest
            print(f"child: {error!r}", file=sys.stderr)
            code = 99
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
READS = ("open", "os.listdir", "os.scandir")


def fail_at(point: int, fault, module=checkpoint, events: tuple[str, ...] = (*READS, *CHANGES)) -> None:
    """Replaces the point-th system call on the disk from now on by `fault`: of `events`, fsync and writes, which get
    half-way first. module: what writes."""
    left = point

    def count(half=lambda: None) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            half()
            fault()

    def audit(event: str, args: tuple) -> None:
        if event in events:
            count()

    real_write = module.write_parts

    def fsync(descriptor: int) -> None:
        count()

    def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, int]:
        data = b"".join(parts)
        count(lambda: path.write_bytes(data[: len(data) // 2]))
        return real_write(path, [data])

    os.fsync, module.write_parts = fsync, write_parts  # never undone: this is a forked process
    sys.addaudithook(audit)


@pytest.fixture
def no_fsync(monkeypatch):
    """fsync matters after a power cut, not after a kill, and would take most of the test's time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def base_run(folder: Path) -> None:
    """Checkpoints 10 (the best), 20 and 30, and the leftovers of an earlier kill."""
    for step, val_loss in ((10, 1.0), (20, 2.0), (30, 3.0)):
        save(folder, step, val_loss=val_loss)
    shutil.copytree(folder / "checkpoints/step-00000010", folder / "checkpoints/step-00000040.writing")
    shutil.copytree(folder / "checkpoints/step-00000010", folder / "checkpoints/step-00000005.removing")


def check_consistent(run: Path, step: int, at_least: float) -> float:
    """Asserts that all complete checkpoints are intact and the best exists. Returns the value of the newest one."""
    for path in list_checkpoints(run):
        value_of(open_checkpoint(path))
    assert find_checkpoint(run, "best").name == "step-00000010"
    value = value_of(open_latest(run))
    assert value in (at_least, 77), (step, value)
    return value


@needs_fork
@pytest.mark.parametrize("step", [40, 30])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_state(tmp_path, no_fsync, step):
    """step 40 is new; step 30 is saved a second time."""
    base_run(tmp_path / "base")
    seen = []
    for point in range(step // 10 % 2, 1000, 2):  # every second one, the others with the other step: forking is slow
        run = shutil.copytree(tmp_path / "base", tmp_path / f"run{point}")

        def save_and_prune(point=point, run=run) -> None:
            fail_at(point, lambda: os._exit(9))
            save(run, step, 77)
            prune_checkpoints(run)

        code = run_child(save_and_prune)
        seen.append(check_consistent(run, step, 30))
        if code == 0:
            break
        assert code == 9
        save(run, step, 77)  # the run continues
        prune_checkpoints(run)
        assert check_consistent(run, step, 77) == 77
        assert steps(run) == [f"step-000000{n}" for n in ((10, 30, 40) if step == 40 else (10, 20, 30))]
        shutil.rmtree(run)
    assert point >= 60, "kill points"
    assert seen == sorted(seen), "the new state must persist once reached"
    assert {seen[0], seen[-1]} == {30, 77}


@needs_fork
@pytest.mark.parametrize("step", [40, 30])
def test_an_error_at_any_moment_is_a_save_failed_or_a_warning(tmp_path, no_fsync, step):
    base_run(tmp_path / "base")
    failures = 0
    for point in range(step // 10 % 2, 1000, 2):  # every second call, the others with the other step: forking is slow
        run = shutil.copytree(tmp_path / "base", tmp_path / f"run{point}")

        def save_and_prune(point=point, run=run) -> int:
            raised = []

            def fault() -> None:
                raised.append(True)
                full_disk()

            fail_at(point, fault)
            try:
                save(run, step, 77)
            except SaveFailed as error:
                return 3 if "are unchanged" in str(error) else 5
            prune_checkpoints(run)
            return 0 if raised else 4

        code = run_child(save_and_prune)
        assert check_consistent(run, step, 30) == (30 if code == 3 else 77)
        if code == 4:
            break
        failures += code == 3
        assert code in (0, 3)
        assert code == 0 or f"step-000000{step}.writing" not in steps(run)
        shutil.rmtree(run)
    assert failures >= 10


@needs_fork
def test_a_file_size_limit_is_a_save_failed_that_can_be_retried(tmp_path):
    import resource

    save(tmp_path, 10)

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        big = {"w": torch.zeros(100_000)}
        try:
            save_checkpoint(tmp_path, 20, model=big, config={}, tokenizer={}, optimizer={}, state={})
        except SaveFailed as error:
            return 3 if "too large" in str(error) else 5
        return 0

    assert run_child(limited) == 3
    assert steps(tmp_path) == ["step-00000010"]
    assert value_of(open_latest(tmp_path)) == 10
    save(tmp_path, 20)
    assert value_of(open_latest(tmp_path)) == 20


def test_too_little_disk_space_raises_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 500_000, 500_000))
    with pytest.raises(
        SaveFailed, match=r"step 20 could not be saved in .*checkpoints.* MB are needed and 0\.5 MB are free"
    ):
        save(tmp_path, 20)
    assert steps(tmp_path) == ["step-00000010"]


def test_a_checkpoint_that_fails_verification_is_removed(tmp_path, monkeypatch):
    save(tmp_path, 10, 1.0)
    real = checkpoint.write_parts

    def write_damaged(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, int]:
        entry = real(path, parts)
        if path.name == "optimizer.safetensors":
            flip(path, -1)
        return entry

    monkeypatch.setattr(checkpoint, "write_parts", write_damaged)
    for step in (10, 20):
        with pytest.raises(SaveFailed, match=r"optimizer\.safetensors"):
            save(tmp_path, step, 2.0)
        assert steps(tmp_path) == ["step-00000010"]
        assert value_of(open_latest(tmp_path)) == 1.0


def watch_syncs(monkeypatch) -> tuple[list[bool], set[int]]:
    """Whether everything in a directory was synced before each rename of it, and the inodes that were synced since."""
    synced, complete = set(), []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        complete.append({path.stat().st_ino for path in [source, *source.rglob("*")]} <= synced)
        real_rename(source, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    return complete, synced


@needs_fork
def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    complete, synced = watch_syncs(monkeypatch)
    save(tmp_path, 10)
    assert complete == [True]
    assert synced == {(tmp_path / "checkpoints").stat().st_ino}
