"""Traces as other makers, other years and other trainers write them."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from peftprof.breakdowns import Breakdown
from peftprof.trace import load
from tests.trace.build import ENGINE, Trace
from tests.trace.dialects import CALLS, DIALECTS, ROCM, STEP, XPU, Dialect, write
from tests.trace.nsys_files import NEW, OLD, PID, Nsys

# The story of dialects.py, by hand, in ns a step: where two streams overlap, compute counts.
ANSWER = {
    ("data", "memcpy"): 10_000,
    ("forward", "dequant"): 35_000,
    ("forward", "base_gemm"): 80_000,
    ("forward", "attention"): 40_000,
    ("forward", "elementwise"): 25_000,
    ("forward", "embedding"): 10_000,
    ("forward", "head_loss"): 25_000,
    ("backward", "base_gemm"): 160_000,
    ("backward", "attention"): 100_000,
    ("backward", "elementwise"): 10_000,
    ("backward", "embedding"): 30_000,
    ("backward", "head_loss"): 5_000,
    ("backward", "communication"): 50_000,
    ("optimizer", "optimizer"): 75_000,
}


def read(path: Path) -> Breakdown:
    """The only breakdown of a trace, which sums to its step."""
    (found,) = load([path]).breakdowns
    total = sum(row.ns for row in found.rows) + found.unattributed_ns + found.idle_ns
    assert total == pytest.approx(found.step_ns.median)
    return found


def times(found: Breakdown) -> dict[tuple[str, str], float]:
    return {(row.phase, row.category): round(row.ns) for row in found.rows}


def spent(found: Breakdown, category: str) -> float:
    return sum(row.ns for row in found.rows if row.category == category)


@pytest.mark.parametrize("name", DIALECTS)
def test_the_same_step_in_every_dialect(name: str, tmp_path: Path) -> None:
    found = read(write(DIALECTS[name], tmp_path))
    assert (found.steps, found.steps_by) == (3, "ProfilerStep#N")
    assert found.step_ns.median == STEP
    assert times(found) == ANSWER
    assert found.unattributed_ns == 0
    assert found.notes == ()
    assert found.rank == (3 if "distributedInfo" in DIALECTS[name].about else None)


@pytest.mark.parametrize("dialect", [Dialect(), Dialect(names=ROCM), Dialect(names=XPU)])
def test_device_events_alone(dialect: Dialect, tmp_path: Path) -> None:
    """What remains with activities=[CUDA]: kernels, their launches, and no operator or range."""
    nothing = replace(dialect, op="unknown", range="unknown")
    found = read(write(nothing, tmp_path))
    assert found.steps_by == "whole trace"
    assert found.unattributed_ns == 0
    by_name = {call.kernel: call.end - call.start for call in CALLS if call.kernel == "attention"}
    assert spent(found, "attention") > by_name["attention"]
    for category in (
        "dequant",
        "base_gemm",
        "head_loss",
        "optimizer",
        "communication",
        "embedding",
    ):
        assert spent(found, category) > 0, category


@pytest.mark.skipif(
    importlib.util.find_spec("hta") is None,
    reason="HolisticTraceAnalysis is not installed; pip install -e '.[hta]'",
)
@pytest.mark.parametrize("name", ["torch 1.8", "torch 2.6", "two devices"])
def test_the_independent_reader_agrees(name: str, tmp_path: Path) -> None:
    from tests.trace.test_hta import agrees

    agrees(write(DIALECTS[name], tmp_path))


def gpu_step(trace: Trace) -> None:
    trace.range("ProfilerStep#7", 0, 100_000)


def test_torch_compile(tmp_path: Path) -> None:
    """Triton kernels through the driver, products as operators; nothing but ranges round them."""
    trace = Trace()
    gpu_step(trace)
    trace.op("Torch-Compiled Region: 0/0", 1_000, 30_000)
    trace.op("CompiledFunction", 1_100, 29_900, seq=1)
    trace.range("## Call CompiledFxGraph fabc ##", 1_200, 29_800)
    trace.kernel("triton_red_fused_add_native_layer_norm_0", 2_000, 5_000, 1_500)
    trace.op("aten::mm", 2_000, 2_500)
    trace.kernel("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", 5_000, 15_000, 2_200)
    trace.kernel("triton_tem_fused_flex_attention_1", 15_000, 20_000, 3_000)
    trace.kernel("a_kernel_of_the_user_0", 20_000, 21_000, 4_000)
    trace.op(
        "autograd::engine::evaluate_function: CompiledFunctionBackward", 31_000, 60_000, ENGINE
    )
    trace.op("CompiledFunctionBackward", 31_100, 59_000, ENGINE, seq=1, fwd=1)
    trace.kernel("triton_poi_fused_convolution_relu_2", 40_000, 44_000, 32_000, ENGINE)
    found = read(trace.write(tmp_path))
    assert times(found) == {
        ("other", "elementwise"): 3_000,
        ("other", "base_gemm"): 10_000,
        ("other", "attention"): 5_000,
        ("backward", "elementwise"): 4_000,
    }
    assert [o.name for o in found.unattributed_operators] == ["a_kernel_of_the_user_0"]


def test_kernels_of_a_cuda_graph_are_told_apart_by_their_names(tmp_path: Path) -> None:
    trace = Trace()
    gpu_step(trace)
    trace.add("cuda_runtime", "cudaGraphLaunch", 1_000, 2_000, correlation=900)
    names = ("ampere_sgemm_128x64_tn", "triton_poi_fused_add_0", "fmha_cutlassF_f32_aligned_64x64")
    for i, name in enumerate(names):
        trace.add("kernel", name, 10_000 * i + 5_000, 10_000 * i + 15_000, 7, 0, correlation=900)
    assert times(read(trace.write(tmp_path))) == {
        ("other", c): 10_000 for c in ("base_gemm", "elementwise", "attention")
    }


def test_what_torch_compile_made_for_a_cpu_is_no_idle_time(tmp_path: Path) -> None:
    trace = Trace()
    gpu_step(trace)
    trace.op("Torch-Compiled Region: 0/0", 1_000, 30_000)
    trace.op("CompiledFunction", 1_000, 30_000)
    trace.range("## Call CompiledFxGraph fabc ##", 1_000, 29_000)
    trace.op("aten::addmm", 5_000, 15_000)
    found = read(trace.write(tmp_path))
    assert times(found) == {("other", "elementwise"): 18_000, ("other", "base_gemm"): 10_000}
    assert found.idle_ns == 72_000


def test_autograd_functions_of_trainers_own_what_they_launch(tmp_path: Path) -> None:
    """Megatron-LM with TransformerEngine: generic kernels in functions with telling names."""
    trace = Trace()
    gpu_step(trace)
    forward = ("_LayerNormLinear", "FusedAttnFunc", "_VocabParallelCrossEntropy")
    kernels = (
        ("void transformer_engine::normalization::ln_fwd_tuned_kernel<>", "nvjet_tst_64x8_NNT"),
        ("void cudnn_frontend::helper_kernel", "void thd_kernel<float>"),
        ("void at::native::elementwise_kernel<128, 4>", "void at::native::reduce_kernel<512, 1>"),
    )
    at = 1_000
    for name, launched in zip(forward, kernels, strict=True):
        trace.op(name, at, at + 4_000)
        for i, kernel in enumerate(launched):
            trace.kernel(
                kernel, 5 * at + 5_000 * i, 5 * at + 5_000 * i + 5_000, at + 1_000 * i + 500
            )
        at += 5_000
    assert times(read(trace.write(tmp_path))) == {
        ("other", "elementwise"): 5_000,
        ("other", "base_gemm"): 5_000,
        ("other", "attention"): 10_000,
        ("other", "head_loss"): 10_000,
    }


def test_qlora_of_bitsandbytes_before_its_operators_with_checkpointing(tmp_path: Path) -> None:
    """Libraries called through ctypes: only MatMul4Bit is round the launch; forward runs again."""
    trace = Trace()
    gpu_step(trace)
    trace.op("CheckpointFunction", 1_000, 9_000, seq=1)
    trace.op(
        "autograd::engine::evaluate_function: CheckpointFunctionBackward", 20_000, 60_000, ENGINE
    )
    trace.op("CheckpointFunctionBackward", 20_100, 59_000, ENGINE, seq=1, fwd=1)
    for at, tid in ((2_000, 1), (21_000, ENGINE)):
        trace.op("MatMul4Bit", at, at + 5_000, tid)
        trace.kernel(
            "void kDequantizeBlockwise<float, 512, 64, 8, 0>", 2 * at, 2 * at + 500, at + 500, tid
        )
        trace.kernel(
            "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>",
            2 * at + 500, 2 * at + 3_000, at + 1_000, tid,
        )  # fmt: skip
        trace.op("aten::linear", at + 2_000, at + 4_000, tid)
        trace.kernel(
            "ampere_bf16_s16816gemm_bf16_128x64", 2 * at + 3_000, 2 * at + 9_000, at + 3_000, tid
        )
    trace.range("Optimizer.step#AdamW8bit.step", 70_000, 90_000)
    trace.kernel(
        "void kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16, 0>", 80_000, 84_000, 75_000
    )
    assert times(read(trace.write(tmp_path))) == {
        ("other", "dequant"): 3_000,
        ("other", "base_gemm"): 6_000,
        ("backward", "dequant"): 3_000,
        ("backward", "base_gemm"): 6_000,
        ("optimizer", "optimizer"): 4_000,
    }


def test_lightning(tmp_path: Path) -> None:
    """Its optimizer step calls forward and backward: the innermost range says which it is."""
    trace = Trace()
    for n in range(2):
        t = 100_000 * n
        trace.range("[pl][profile]run_training_batch", t, t + 90_000)
        trace.range("[pl][profile][Strategy]DDPStrategy.batch_to_device", t + 81_000, t + 89_000)
        trace.kernel("Memcpy HtoD (Pinned -> Device)", t + 85_000, t + 86_000, t + 82_000)
        trace.range("[pl][profile][LightningModule]Tuner.optimizer_step", t + 1_000, t + 80_000)
        trace.range("Optimizer.step#AdamW.step", t + 1_500, t + 79_000)
        trace.range("[pl][profile][Strategy]DDPStrategy.training_step", t + 2_000, t + 20_000)
        trace.kernel("ampere_sgemm_128x64_tn", t + 10_000, t + 15_000, t + 3_000)
        trace.range("[pl][profile][Strategy]DDPStrategy.backward", t + 21_000, t + 60_000)
        trace.kernel("ampere_sgemm_128x64_nt", t + 30_000, t + 40_000, t + 22_000)
        trace.kernel(
            "void multi_tensor_apply_kernel<TensorListMetadata<4>>",
            t + 65_000,
            t + 70_000,
            t + 61_000,
        )
    found = read(trace.write(tmp_path))
    assert (found.steps, found.steps_by) == (2, "[pl][profile]run_training_batch")
    assert times(found) == {
        ("data", "memcpy"): 1_000,
        ("forward", "base_gemm"): 5_000,
        ("backward", "base_gemm"): 10_000,
        ("optimizer", "optimizer"): 5_000,
    }


PARTS = {
    "data": """
        data_loading|batch-generator|get_batch|Load data|next batch|dataloader
    """,
    "forward": """
        forward|Forward pass|forward-compute|model.forward|fwd|DeepSpeedEngine.forward
    """,
    "backward": """
        backward|loss.backward|backward-compute|bwd|DeepSpeedEngine.backward
        |FSDP::pre_backward (layers.0)|FullyShardedDataParallel._post_backward_hook
    """,
    "optimizer": """
        optimizer|optimizer_step|opt.step|optimizer.zero_grad|zero_grad|clip_grad_norm
        |DeepSpeedEngine.step|FP16_DeepSpeedZeroOptimizer.step
    """,
    "other": """
        database|forward_model_zoo|backwards compatible|option|LlamaModel.forward|step
    """,
}
NAMES = [(phase, name.strip()) for phase, names in PARTS.items() for name in names.split("|")]


@pytest.mark.parametrize(("phase", "name"), NAMES)
def test_what_trainers_call_the_parts_of_a_step(phase: str, name: str, tmp_path: Path) -> None:
    file = Nsys()
    file.range("iteration 12", 0, 100_000)
    file.range(name, 1_000, 50_000)
    file.kernel("ampere_sgemm_128x64_tn", 10_000, 20_000, launched=2_000)
    category = "optimizer" if phase == "optimizer" else "base_gemm"
    assert times(read(file.write(tmp_path))) == {(phase, category): 10_000}


STEPS = [
    "iteration 12",
    "Iter 3",
    "train_step_12",
    "global_step=12",
    "Epoch 0, batch 3",
    "step 4 loss=1.5",
]


@pytest.mark.parametrize("name", STEPS)
def test_what_trainers_call_a_step(name: str, tmp_path: Path) -> None:
    file = Nsys()
    file.range("Epoch 0", 0, 100_000)
    file.range(name, 10_000, 50_000)
    file.kernel("ampere_sgemm_128x64_tn", 20_000, 30_000, launched=12_000)
    assert read(file.write(tmp_path)).steps_by.startswith(name[:4])


@pytest.mark.parametrize("schema", [OLD, NEW])
def test_megatron_under_nsys(schema: dict[str, str], tmp_path: Path) -> None:
    """Ranges of the trainer alone; backward is launched by a thread that opens none."""
    file = Nsys(schema)
    for n in range(3):
        t = 1_000_000 * n
        file.range(f"iteration {n + 12}", t, t + 900_000)
        file.range("forward-compute", t + 10_000, t + 200_000)
        file.kernel(
            "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            t + 20_000,
            t + 60_000,
            t + 11_000,
            stream=20,
        )
        file.kernel(
            "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", t + 60_000, t + 160_000, t + 50_000
        )
        file.range("backward-compute", t + 210_000, t + 600_000)
        file.kernel(
            "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16",
            t + 250_000,
            t + 350_000,
            t + 220_000,
            ENGINE,
        )
        file.kernel(
            "_ZN7cutlass13device_kernelINS_4gemm6kernel13GemmUniversal",
            t + 350_000,
            t + 500_000,
            t + 230_000,
            ENGINE,
        )
        file.range("optimizer", t + 610_000, t + 850_000)
        file.kernel(
            "void multi_tensor_apply_kernel<TensorListMetadata<5, false>, AdamFunctorMaster>",
            t + 620_000,
            t + 700_000,
            t + 615_000,
        )
    found = read(file.write(tmp_path))
    assert (found.steps, found.steps_by) == (3, "iteration N")
    assert times(found) == {
        ("forward", "communication"): 40_000,
        ("forward", "base_gemm"): 100_000,
        ("backward", "attention"): 100_000,
        ("backward", "base_gemm"): 150_000,
        ("optimizer", "optimizer"): 80_000,
    }  # fmt: skip


def test_several_ranks_in_one_report_without_ranges(tmp_path: Path) -> None:
    file = Nsys()
    for rank in range(2):
        file.pid = PID + rank
        for i, name in enumerate(
            ("ampere_sgemm_128x64_tn", "Memcpy HtoD", "triton_per_fused__softmax_3")
        ):
            kind = "gpu_memcpy" if name.startswith("Mem") else "kernel"
            file.kernel(name, 10_000 * i + 1_000, 10_000 * (i + 1), 10_000 * i + 500, cat=kind)
    found = load([file.write(tmp_path)]).breakdowns
    assert len(found) == 2
    for one in found:
        assert one.unattributed_ns == 0
        assert {row.category: row.ns for row in one.rows} == {
            "base_gemm": 9_000, "memcpy": 9_000, "elementwise": 9_000,
        }  # fmt: skip


def test_stacks_of_python_do_not_disturb(tmp_path: Path) -> None:
    """`with_stack` adds functions by the hundred thousand, and modules among them."""
    trace = Trace()
    gpu_step(trace)
    for n in range(20_000):
        trace.add(
            "python_function", f"torch/nn/modules/module.py(17{n % 97}): _call_impl", n, n + 5
        )
    trace.add("python_function", "nn.Module: LlamaDecoderLayer_3", 1_000, 50_000)
    trace.op("aten::mm", 2_000, 9_000)
    trace.kernel("ampere_sgemm_128x64_tn", 10_000, 20_000, 3_000)
    found = read(trace.write(tmp_path))
    assert times(found) == {("other", "base_gemm"): 10_000}
    assert [(layer.path, layer.forward_ns) for layer in found.layers] == [
        ("LlamaDecoderLayer_3", 10_000)
    ]


def test_an_optimizer_step_that_calls_the_whole_step_is_not_the_optimizer(tmp_path: Path) -> None:
    """A closure, as Lightning gives, without ranges that tell its parts."""
    trace = Trace()
    gpu_step(trace)
    trace.range("Optimizer.step#AdamW.step", 1_000, 90_000)
    trace.op("aten::addmm", 2_000, 3_000, seq=5)
    trace.kernel("ampere_sgemm_128x64_tn", 10_000, 15_000, 2_500)
    trace.backward("AddmmBackward0", 20_000, 30_000, seq=5)
    trace.kernel("ampere_sgemm_128x64_nt", 30_000, 40_000, 21_000, ENGINE)
    trace.op("aten::_foreach_add_", 60_000, 61_000)
    trace.kernel("void multi_tensor_apply_kernel<TensorListMetadata<4>>", 62_000, 65_000, 60_500)
    assert times(read(trace.write(tmp_path))) == {
        ("other", "base_gemm"): 5_000,
        ("backward", "base_gemm"): 10_000,
        ("other", "optimizer"): 3_000,
    }


def test_hooks_that_the_engine_runs_are_no_operator(tmp_path: Path) -> None:
    """FSDP2 on a CPU waits for its collectives in hooks round the nodes."""
    trace = Trace()
    gpu_step(trace)
    trace.op("autograd::engine::evaluate_function: ViewBackward0", 1_000, 50_000, ENGINE)
    trace.op("ViewBackward0", 40_000, 50_000, ENGINE)
    trace.op("aten::reshape", 41_000, 50_000, ENGINE)
    found = read(trace.write(tmp_path))
    assert found.idle_ns == 90_000
    assert times(found)[("backward", "elementwise")] == 9_000


def test_a_copy_of_a_name_nobody_knows_is_a_copy(tmp_path: Path) -> None:
    trace = Trace()
    gpu_step(trace)
    trace.kernel("BlitKernel7", 10_000, 15_000, 2_500, cat="gpu_memcpy")
    (row,) = read(trace.write(tmp_path)).rows
    assert (row.category, row.rules[0].rule) == ("memcpy", "kind: copy or fill")
