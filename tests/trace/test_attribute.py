"""Small traces with known answers, one rule of attribution each."""

from pathlib import Path

import numpy as np
import pytest

from peftprof.breakdowns import CATEGORIES, PHASES
from peftprof.trace import kineto, rules
from peftprof.trace.attribute import Attribution, attribute
from peftprof.trace.events import NONE
from tests.trace.build import CPU, ENGINE, GPU, MAIN, Trace


def read(trace: Trace, tmp_path: Path) -> Attribution:
    found = attribute(kineto.read(trace.write(tmp_path)))
    busy = np.zeros(len(found.windows), np.int64)
    np.add.at(busy, found.pieces.step, found.pieces.ns)
    assert (busy + found.idle_ns.sum(axis=1) == found.windows.length).all()
    return found


def times(found: Attribution) -> dict[tuple[str, str], int]:
    """Nanoseconds by phase and category, over all steps."""
    names = (*CATEGORIES, "unattributed")
    total: dict[tuple[str, str], int] = {}
    for row, ns in zip(found.pieces.row.tolist(), found.pieces.ns.tolist(), strict=True):
        key = PHASES[found.meaning.phase[row]], names[found.meaning.category[row]]
        total[key] = total.get(key, 0) + ns
    return {key: ns for key, ns in total.items() if ns}


def idle(found: Attribution) -> dict[str, int]:
    total = found.idle_ns.sum(axis=0).tolist()
    return {phase: ns for phase, ns in zip(PHASES, total, strict=True) if ns}


def test_cpu_time_is_self_time_and_the_rest_is_idle_by_phase(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("step:4", 0, 1000)
    trace.range("phase:forward", 100, 600)
    trace.op("aten::layer_norm", 150, 550)
    trace.op("aten::copy_", 200, 250)
    trace.range("phase:optimizer", 700, 900)
    trace.op("aten::mul", 700, 800)
    found = read(trace, tmp_path)
    assert times(found) == {
        ("forward", "elementwise"): 350,
        ("forward", "memcpy"): 50,
        ("optimizer", "optimizer"): 100,
    }
    assert idle(found) == {"forward": 100, "optimizer": 100, "other": 300}


def test_other_threads_count_only_while_the_steps_thread_runs_no_operator(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("step:0", 0, 100)
    trace.op("aten::mul", 10, 40)
    trace.op("aten::copy_", 0, 60, tid=9)
    trace.op("aten::copy_", 50, 80, tid=10)
    found = read(trace, tmp_path)
    assert times(found) == {("other", "elementwise"): 30, ("other", "memcpy"): 50}
    assert found.overlap_ns.tolist() == [40]


def test_time_between_steps_is_nobodys(tmp_path: Path) -> None:
    trace = Trace()
    for start in (0, 1000):
        trace.range("step:1", start, start + 100)
        trace.op("aten::mul", start + 50, start + 150)
    found = read(trace, tmp_path)
    assert times(found) == {("other", "elementwise"): 100}
    assert found.calls.step.tolist() == [0, 1]


def test_profiler_steps_stand_in_where_there_are_no_steps_of_ours(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("ProfilerStep#3", 0, 100)
    trace.op("aten::mul", 0, 60)
    assert times(read(trace, tmp_path)) == {("other", "elementwise"): 60}
    trace.range("step:0", 0, 40)
    assert times(read(trace, tmp_path)) == {("other", "elementwise"): 40}


def backward_trace(linked_by: str) -> Trace:
    """Forward and backward of an adapter's linear on an autograd thread."""
    trace = Trace()
    trace.range("step:0", 0, 1000)
    trace.range("phase:forward", 0, 400)
    trace.range("phase:backward", 400, 1000)
    trace.range("layer:encoder.0", 50, 300)
    number = 7 if linked_by == "sequence" else None
    trace.op("aten::dropout", 60, 100, seq=number)
    trace.range("op:lora_A", 100, 200)
    trace.op("aten::linear", 110, 190, seq=number)
    trace.op("aten::mm", 120, 180, seq=number)
    trace.op("aten::mul", 210, 290, seq=None if number is None else 8)
    if linked_by == "sequence":
        trace.backward("MmBackward0", 500, 700, seq=7)
    else:
        trace.op("autograd::engine::evaluate_function: MmBackward0", 500, 700, tid=ENGINE)
        trace.op("MmBackward0", 500, 690, tid=ENGINE)
        trace.arrow("fwdbwd", 1, (120, MAIN, CPU), (500, ENGINE, CPU))
    trace.op("aten::mm", 520, 600, tid=ENGINE)
    trace.op("aten::add_", 700, 720, tid=ENGINE)
    return trace


@pytest.mark.parametrize("linked_by", ["sequence", "arrow"])
def test_backward_inherits_the_range_and_layer_of_its_forward(
    tmp_path: Path, linked_by: str
) -> None:
    found = read(backward_trace(linked_by), tmp_path)
    got = times(found)
    assert got["forward", "adapter_gemm"] == 80
    assert got["backward", "adapter_gemm"] >= 190
    assert got["backward", "elementwise"] == 20  # on the engine's thread, without a range
    assert ("backward", "base_gemm") not in got
    events = found.events
    gradient = max(i for i in range(len(events)) if events.named(i) == "aten::mm")
    assert events.names[found.meaning.layer[gradient]] == "layer:encoder.0"


def test_an_operator_inside_the_optimizer_is_optimizer_but_our_ranges_come_first(
    tmp_path: Path,
) -> None:
    trace = Trace()
    trace.range("step:0", 0, 100)
    trace.range("phase:optimizer", 0, 100)
    trace.op("aten::mm", 0, 10)
    trace.range("op:dequant", 20, 40)
    trace.op("aten::mm", 20, 40)
    assert times(read(trace, tmp_path)) == {
        ("optimizer", "optimizer"): 10,
        ("optimizer", "dequant"): 20,
    }


def test_what_the_head_does_is_head_and_loss_but_for_ranges_of_ours(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("step:0", 0, 100)
    trace.range("layer:head.classifier", 0, 60)
    trace.op("aten::linear", 0, 20, seq=1)
    trace.range("op:lora_A", 30, 50)
    trace.op("aten::linear", 30, 50, seq=2)
    trace.range("layer:header", 60, 70)
    trace.op("aten::linear", 60, 70)
    trace.backward("AddmmBackward0", 80, 90, seq=1, tid=MAIN)
    assert times(read(trace, tmp_path)) == {
        ("other", "head_loss"): 20,
        ("other", "adapter_gemm"): 20,
        ("other", "base_gemm"): 10,
        ("backward", "head_loss"): 10,
    }


def test_the_outermost_owner_takes_all_it_calls(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("step:0", 0, 100)
    trace.op("aten::scaled_dot_product_attention", 0, 50)
    trace.op("aten::mm", 0, 20)
    trace.op("aten::softmax", 20, 50)
    trace.op("aten::softmax", 60, 100)
    assert times(read(trace, tmp_path)) == {
        ("other", "attention"): 50,
        ("other", "elementwise"): 40,
    }


def test_bitsandbytes_linear_splits_into_dequant_and_product(tmp_path: Path) -> None:
    """As bitsandbytes 0.50 dispatches it on a CPU and, for many rows, on a GPU."""
    trace = Trace()
    trace.range("step:0", 0, 1000)
    trace.op("MatMul4Bit", 0, 400, seq=3)
    trace.op("bitsandbytes::gemm_4bit", 20, 400)
    trace.op("bitsandbytes::dequantize_blockwise", 30, 50)
    trace.op("aten::empty_like", 30, 35)
    trace.op("aten::add", 50, 60)
    trace.op("bitsandbytes::dequantize_4bit", 60, 100)
    trace.op("aten::linear", 100, 390)
    trace.op("aten::addmm", 110, 380)
    trace.op("aten::copy_", 110, 120)
    trace.backward("MatMul4BitBackward", 500, 800, seq=3)
    trace.op("bitsandbytes::dequantize_blockwise", 510, 530, tid=ENGINE)
    trace.op("aten::add_", 530, 540, tid=ENGINE)
    trace.op("aten::matmul", 600, 790, tid=ENGINE)
    found = read(trace, tmp_path)
    assert times(found) == {
        ("other", "dequant"): 70,
        ("other", "base_gemm"): 310,
        ("backward", "dequant"): 30,
        ("backward", "base_gemm"): 190,
    }
    assert idle(found) == {"other": 1000 - 600}  # the Python bodies are idle


def test_views_take_the_category_of_what_they_serve(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("step:0", 0, 100)
    trace.op("aten::linear", 0, 50)
    trace.op("aten::t", 0, 20)
    trace.op("aten::view", 60, 70)
    assert times(read(trace, tmp_path)) == {
        ("other", "base_gemm"): 50,
        ("other", "elementwise"): 10,
    }


def test_gradients_added_up_and_collectives_are_not_the_operators_that_called_them(
    tmp_path: Path,
) -> None:
    trace = Trace()
    trace.range("step:0", 0, 200)
    trace.op("aten::embedding", 0, 10, seq=1)
    trace.backward("EmbeddingBackward0", 50, 100, seq=1)
    trace.events[-1]["dur"] = 0.01  # the node ends at 60, its wrapper at 100
    trace.op("aten::add_", 60, 75, tid=ENGINE)
    trace.op("c10d::allreduce_", 80, 100, tid=ENGINE)
    trace.op("aten::copy_", 85, 90, tid=ENGINE)
    assert times(read(trace, tmp_path)) == {
        ("other", "embedding"): 10,
        ("backward", "embedding"): 15,
        ("backward", "elementwise"): 15,
        ("backward", "communication"): 20,
    }


def test_what_no_rule_places_is_unattributed(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("step:0", 0, 100)
    trace.op("mystery::op", 0, 30)
    assert times(read(trace, tmp_path)) == {("other", "unattributed"): 30}


def test_calls_are_counted_where_work_enters_a_category(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("step:0", 0, 100)
    trace.op("aten::linear", 0, 50)
    trace.op("aten::addmm", 10, 50)
    trace.op("aten::mul", 60, 70)
    trace.op("aten::mul", 80, 80)  # no time, but a call
    trace.range("op:dequant", 81, 100)
    trace.op("aten::mul", 82, 84)
    trace.op("aten::add", 85, 90)
    found = read(trace, tmp_path)
    entered = [found.events.named(row) for row in found.entries.row]
    assert entered == ["aten::linear", "aten::mul", "aten::mul", "op:dequant"]
    assert len(found.calls.row) == 6


def gpu_trace() -> Trace:
    trace = Trace()
    trace.range("step:0", 0, 100)
    trace.range("phase:forward", 0, 50)
    trace.range("phase:backward", 50, 100)
    trace.range("step:1", 200, 300)
    trace.range("phase:forward", 200, 300)
    return trace


def test_a_kernel_belongs_to_its_launch_not_to_the_time_it_ran(tmp_path: Path) -> None:
    trace = gpu_trace()
    trace.op("aten::mm", 10, 30)
    trace.kernel("ampere_sgemm_64x64_nn", 500, 600, launched=20)
    trace.kernel("void elementwise_kernel", 620, 650, launched=60)
    trace.kernel("Memcpy HtoD", 1000, 1100, launched=250, cat="gpu_memcpy")
    found = read(trace, tmp_path)
    assert times(found) == {
        ("forward", "base_gemm"): 100,
        ("backward", "elementwise"): 30,
        ("forward", "memcpy"): 100,
    }
    assert found.windows.start.tolist() == [500, 1000]
    assert found.windows.end.tolist() == [1000, 1100]
    assert idle(found) == {"backward": 20, "other": 350}


def test_streams_that_overlap_count_once_compute_first(tmp_path: Path) -> None:
    trace = gpu_trace()
    trace.kernel("ncclKernel_AllReduce", 500, 700, launched=20, stream=40)
    trace.kernel("elementwise_kernel", 550, 600, launched=20)
    trace.kernel("Memcpy HtoD", 690, 720, launched=20, stream=8, cat="gpu_memcpy")
    trace.kernel("elementwise_kernel", 1000, 1001, launched=250)
    found = read(trace, tmp_path)
    got = times(found)
    assert got["forward", "communication"] == 150
    assert got["forward", "elementwise"] == 51
    assert got["forward", "memcpy"] == 20
    assert found.overlap_ns.tolist() == [60, 0]


def test_a_kernel_that_runs_into_the_next_step_is_cut_there(tmp_path: Path) -> None:
    trace = gpu_trace()
    trace.kernel("ncclKernel_AllReduce", 500, 900, launched=20, stream=40)
    trace.kernel("elementwise_kernel", 800, 850, launched=250)
    found = read(trace, tmp_path)
    busy = [int(found.pieces.ns[found.pieces.step == i].sum()) for i in (0, 1)]
    assert busy == [300, 50]  # the last window ends with what was launched in it
    assert found.windows.end.tolist() == [800, 850]


def test_a_kernel_without_a_launch_counts_but_has_no_phase(tmp_path: Path) -> None:
    trace = gpu_trace()
    trace.kernel("elementwise_kernel", 500, 550, launched=20)
    trace.kernel("flash_fwd_kernel", 600, 650, launched=None)
    trace.kernel("elementwise_kernel", 700, 750, launched=20)
    found = read(trace, tmp_path)
    assert times(found) == {("forward", "elementwise"): 100, ("other", "attention"): 50}


def test_a_step_that_launched_nothing_is_part_of_the_one_before(tmp_path: Path) -> None:
    trace = gpu_trace()
    trace.range("step:2", 400, 500)
    trace.kernel("elementwise_kernel", 150, 160, launched=20)
    trace.kernel("elementwise_kernel", 900, 950, launched=450)
    found = read(trace, tmp_path)
    assert found.windows.start.tolist() == [150, 900]
    assert found.windows.end.tolist() == [900, 950]


def test_the_last_window_reaches_to_the_end_of_its_step_on_the_cpu(tmp_path: Path) -> None:
    trace = gpu_trace()
    trace.kernel("elementwise_kernel", 150, 160, launched=20)
    trace.kernel("elementwise_kernel", 210, 220, launched=205)
    found = read(trace, tmp_path)
    assert found.windows.end.tolist() == [210, 300]


def test_kernels_of_a_graph_share_its_launch(tmp_path: Path) -> None:
    trace = gpu_trace()
    trace.add("cuda_runtime", "cudaGraphLaunch", 60, 65, correlation=77)
    for start in (500, 600):
        trace.add("kernel", "elementwise_kernel", start, start + 50, 7, GPU, correlation=77)
    assert times(read(trace, tmp_path)) == {("backward", "elementwise"): 100}


def test_an_operator_and_its_kernel_agree(tmp_path: Path) -> None:
    """The same names in a CPU trace and, as launching operators, in a GPU trace."""
    names = ["aten::layer_norm", "aten::mm", "aten::embedding", "aten::nll_loss", "aten::bmm"]
    cpu, gpu = Trace(), Trace()
    for i, name in enumerate(names):
        for trace in (cpu, gpu):
            trace.range(f"step:{i}", 100 * i, 100 * i + 100)
            trace.op(name, 100 * i, 100 * i + 100)
        gpu.kernel("some_kernel", 100 * i + 1000, 100 * i + 1100, launched=100 * i + 5)
    assert times(read(cpu, tmp_path)) == times(read(gpu, tmp_path))


KERNELS = {
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn": "base_gemm",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>": "base_gemm",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "base_gemm",
    "void gemv2T_kernel_val<int, int, float>": "base_gemm",
    "Cijk_Alik_Bljk_HHS_BH_MT128x128x32": "base_gemm",
    "void gemm_4bit_simt<__nv_bfloat16, 64>": "base_gemm",
    "void kgemm_4bit_inference_naive<float, 128, 32>": "base_gemm",
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)": "dequant",
    "_nf4_dequant_kernel": "dequant",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernel>": "elementwise",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>": "elementwise",
    "void (anonymous namespace)::softmax_warp_forward<float>": "elementwise",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "elementwise",
    "void at::native::fused_dropout_kernel_vec<float>": "elementwise",
    "triton_poi_fused_add_gelu_0": "elementwise",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<>": "optimizer",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*)": "communication",
    "Memcpy HtoD (Pageable -> Device)": "memcpy",
    "Memset (Device)": "memcpy",
    "__amd_rocclr_copyBuffer": "memcpy",
    "void ck::kernel_gemm_xdl_cshuffle_v1<ck::GridwiseGemm_k0mk1_k0nk1>": "base_gemm",
    "_ZN2at6native18elementwise_kernelILi128E": "elementwise",
    "triton_tem_fused_addmm_relu_3": "base_gemm",
    "triton_tem_fused_flex_attention_0": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
    "_rms_norm_forward_kernel": "elementwise",
    "_swiglu_forward_kernel": "elementwise",
    "liger_cross_entropy_kernel": "head_loss",
    "_rope_embedding": "elementwise",
    "void transformer_engine::normalization::ln_fwd_tuned_kernel<>": "elementwise",
    "void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctorMaster<>>": "optimizer",
    "void vllm::rms_norm_kernel<c10::BFloat16>": "elementwise",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "elementwise",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>": "memcpy",
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_known_by_name(name: str) -> None:
    ruleset = rules.load()
    category = ruleset.category_of[rules.match(ruleset.kernels, [(name, "")]).rule[0]]
    assert category != NONE
    assert CATEGORIES[category] == KERNELS[name]
