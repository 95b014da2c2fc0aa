"""bench/gpu_profile.py without a GPU: kinds of kernels, sums over them, replays on the stand-in for torch.cuda."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

import generation.cuda_graphs as cuda_graphs
from bench import gpu_kernels, gpu_profile, train_speed
from bench.gpu import Deadline
from bench.gpu_kernels import Kernel, busy_and_gaps, group_of, groups_of_step, shorten, summarize
from bench.gpu_report import profile as report
from tests import cuda_stub
from tests.test_bench_attention import needs_interpreter
from tests.test_generation import tiny_model

CPU = torch.device("cpu")
NAMES = {  # as CUPTI gives them
    "_forward_kernel": "attention, ours",
    "_query_gradient_kernel": "attention, ours",
    "_key_value_gradient_kernel": "attention, ours",
    "_loss_kernel": "loss, ours",
    "triton_poi_fused__to_copy_gelu_3": "Inductor's fused",
    "triton_per_fused_native_layer_norm_attention_0": "Inductor's fused",
    "triton_red_fused_sum_12": "Inductor's fused",
    "triton_tem_fused_mm_1": "matrix products",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_cublas": "matrix products",
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_tn": "matrix products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(Params)":
        "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::cublasSplitKParams<float>)": "matrix products",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, float>(cublasGemvParamsEx<int>)": "matrix products",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(AttentionKernel<cutlass::bfloat16_t>::Params)": "attention, PyTorch's",
    "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64>>()": "attention, PyTorch's",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": "multi-tensor",
    "Memcpy DtoH (Device -> Pinned)": "copies and casts",
    "Memset (Device)": "copies and casts",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(TensorIteratorBase&)>":
        "copies and casts",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>>": "copies and casts",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "sorting, top-k, scans",
    "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<Policy900>": "sorting, top-k, scans",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>": "norms",
    "void (anonymous namespace)::softmax_warp_forward<float, float>": "softmax, reductions",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "softmax, reductions",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "elementwise, indexing",
    "something_new": "other",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_grouped_by_its_name(name):
    assert group_of(name) == NAMES[name]


def test_a_kernel_of_our_own_that_is_renamed_changes_its_group_here_too():
    import model

    names = [kernel.__name__ for kernel in model.KERNELS.values()] + [model._loss_kernel.__name__]
    assert [group_of(name) for name in names] == ["attention, ours"] * 3 + ["loss, ours"]


def test_names_are_shortened_to_what_tells_them_apart():
    name = "void at::native::(anonymous namespace)::vectorized_elementwise_kernel<4, Add<float>, 3ul>(int, Add<float>)"
    assert shorten(name) == "vectorized_elementwise_kernel<4, Add<float>, 3ul>"
    assert shorten("Memcpy DtoH (Device -> Pinned)") == "Memcpy DtoH"
    assert len(shorten("x" * 500)) == gpu_kernels.NAME_LENGTH


def test_overlapping_kernels_are_busy_once_and_gaps_are_between_what_runs():
    kernels = [Kernel("a", 0, 10), Kernel("b", 2, 4), Kernel("c", 8, 15), Kernel("d", 20, 21), Kernel("e", 21.5, 22)]
    busy, gaps = busy_and_gaps(kernels)
    assert busy == 15 + 1 + 0.5
    assert gaps == [{"us": 5, "after": "c", "before": "d"}, {"us": 0.5, "after": "d", "before": "e"}]


STEP = [
    Kernel("nvjet_x", 0, 60),
    Kernel("_loss_kernel", 60, 70),
    Kernel("multi_tensor_apply_kernel<LpNormFunctor>", 70, 72),
    Kernel("Memcpy DtoH (Device -> Pageable)", 72, 73),
    Kernel("nvjet_x", 80, 90),
    Kernel("multi_tensor_apply_kernel<FusedAdamMathFunctor>", 90, 94),
]


def test_what_follows_the_wait_of_a_training_step_is_the_optimizers():
    groups = ["matrix products", "loss, ours", "multi-tensor", "copies and casts"]
    assert groups_of_step(STEP) == [*groups, "optimizer: matrix products", "optimizer: multi-tensor"]
    assert groups_of_step(STEP[:3]) == groups[:3]  # no copy to the host: nothing is taken for the optimizer's


def test_the_sums_are_those_of_one_step():
    later = [kernel._replace(start=kernel.start + 1000, end=kernel.end + 1000) for kernel in STEP]
    found = summarize([STEP, later], 2, wall_us=100.0, grouped=groups_of_step)
    assert (found["wall_us"], found["busy_us"], found["idle_us"], found["launches"]) == (100.0, 87.0, 13.0, 6)
    assert {row["group"]: (row["us"], row["launches"], row["share"]) for row in found["groups"]} == {
        "matrix products": (60, 1, 0.6),
        "loss, ours": (10, 1, 0.1),
        "optimizer: matrix products": (10, 1, 0.1),
        "optimizer: multi-tensor": (4, 1, 0.04),
        "multi-tensor": (2, 1, 0.02),
        "copies and casts": (1, 1, 0.01),
    }
    shown = [(row["name"], row["group"], row["us"], row["us_each"]) for row in found["kernels"][:3]]
    assert shown[0] == ("nvjet_x", "matrix products", 60, 60)
    assert ("nvjet_x", "optimizer: matrix products", 10, 10) in shown
    tokens = summarize([STEP], 2, wall_us=60.0)  # one record of two decode steps
    assert (tokens["busy_us"], tokens["launches"], tokens["groups"][0]["us"]) == (43.5, 3, 35)


def test_products_have_their_shapes_and_rates():
    a, b, c = torch.zeros(8, 16), torch.zeros(16, 4), torch.zeros(4)
    rows = gpu_kernels.products_of(lambda: (torch.addmm(c, a, b), torch.mm(a, b), torch.mm(a, b)), CPU, 1.0)
    assert {row["operator"]: (row["shapes"], row["launches"]) for row in rows} == {
        "aten::mm": ("(8, 16) x (16, 4)", 2),
        "aten::addmm": ("(8, 16) x (16, 4)", 1),
    }


# ---- Decoding --------------------------------------------------------------------------------------------------------


def test_the_replays_of_a_loop_are_counted_by_the_slots_that_its_steps_read():
    replays = {"64 slots": {"us": 100.0}, "128 slots": {"us": 200.0}, "draw": {"us": 7.0}}
    assert gpu_profile.replays_of_a_loop(replays, 64) == 107
    assert gpu_profile.replays_of_a_loop(replays, 128) == 157
    assert gpu_profile.replays_of_a_loop({}, 128) is None


@pytest.fixture
def cuda(monkeypatch):
    stub = cuda_stub.install(monkeypatch)
    monkeypatch.setattr(gpu_profile, "REPLAYS", 5)
    cuda_graphs.drop_kept()
    yield stub
    cuda_graphs.drop_kept()


@pytest.mark.parametrize("rows", [1, 4])
def test_the_graphs_of_the_loop_are_replayed_alone(cuda, rows):
    """Many times, and no row grows beyond its slots; what they recorded serves the next request."""
    model = tiny_model(block_size=150, eos_id=None)
    figures = gpu_profile.time_decoding(model, rows, 140, torch.float64)
    assert list(figures["replays"]) == ["64 slots", "128 slots", "150 slots", "draw"]
    assert all(row["host_us"] > 0 and row["us"] > 0 for row in figures["replays"].values())
    assert figures["replays_us"] > 0
    cuda.log.clear()
    gpu_profile.profile_decoding(model, rows, torch.float64, figures)
    assert "capture" not in cuda.log
    assert all(row["busy_us"] > 0 and row["launches"] > 1 for row in figures["replays"].values())
    assert figures["loop"]["launches"] > 1
    (decoder,) = cuda_graphs._kept[model]
    with gpu_profile.recorded(model, rows, torch.float64) as runs:
        for _ in range(200):
            runs["150 slots"]()
        assert decoder.whole.lengths.tolist() == [0] * rows


def test_nothing_is_recorded_on_a_cpu():
    with gpu_profile.recorded(tiny_model(), 1, torch.float64) as runs:
        assert runs == {}


def test_both_presets_are_compiled_ahead_and_none_is_begun_when_the_time_is_up(monkeypatch):
    commands, begun, deadline = [], [], Deadline(1.0)

    def start(command, **options):
        commands.append(command)
        return SimpleNamespace(wait=lambda seconds: 0)

    def begin(preset, *arguments):
        begun.append(preset)
        deadline._end = time.monotonic() + 1

    monkeypatch.setattr(train_speed.subprocess, "Popen", start)
    monkeypatch.setattr(train_speed, "lower_both_passes", lambda: None)
    monkeypatch.setattr(gpu_profile, "profile_training", begin)
    result = {"smoke": False, "training": {}, "unavailable": {}}
    gpu_profile.measure_training(result, CPU, deadline, lambda: None)
    assert [command[-2:] for command in commands] == [
        ["--presets=gpt2_124m", "--attention=triton"],
        ["--presets=modern_124m", "--attention=triton"],
    ]
    assert all("--rows=32" in command for command in commands)
    assert begun == ["gpt2_124m"]
    assert result["unavailable"] == {"training modern_124m": "out of time"}


# ---- The script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trial(monkeypatch):
    """What main changes in the process is undone."""
    before = torch.get_float32_matmul_precision()
    for name, value in (("TRITON_INTERPRET", "1"), ("TEARDOWN_CUPTI", "0"), ("DISABLE_CUPTI_LAZY_REINIT", "1")):
        monkeypatch.setenv(name, value)
    yield
    torch.set_float32_matmul_precision(before)


@needs_interpreter
def test_a_trial_measures_everything(trial, tmp_path, capsys):
    assert gpu_profile.main(["--smoke", f"--out={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*-gpu_profile.json")
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["unavailable"] == {}
    assert list(figures["training"]) == ["gpt2_124m", "modern_124m"]
    assert list(figures["decoding"]) == ["one sample", "16 samples"]
    for row in figures["training"].values():
        assert row["wall_us"] > 0
        assert row["groups"]
        assert {"(64, 32) x (32, 50304)", "(50304, 64) x (64, 32)"} < {each["shapes"] for each in row["products"]}
    assert all(row["loop"]["groups"] for row in figures["decoding"].values())
    printed = capsys.readouterr().out
    assert "modern_124m, a compiled step: " in printed
    assert "decoding, 16 samples: the longest kernels" in printed


def test_without_a_profiler_the_wall_times_are_kept(trial, tmp_path, capsys, monkeypatch):
    """Where CUPTI is blocked there are no kernels."""
    monkeypatch.setattr(gpu_profile, "measure_training", lambda *arguments: None)
    monkeypatch.setattr(torch.profiler.profile, "events", lambda record: [])
    assert gpu_profile.main(["--smoke", f"--out={tmp_path}"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("left out: decoding, one sample, profile, decoding, 16 samples, profile: the profiler shows")
    (path,) = tmp_path.glob("*-gpu_profile.json")
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert all(row["loop_us"] > 0 and "loop" not in row for row in figures["decoding"].values())
    assert "decoding, one sample, profile: not measured: the profiler shows no kernels" in "\n".join(report(figures))
