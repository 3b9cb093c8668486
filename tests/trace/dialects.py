"""One training step as the profilers of other makers and other years write it.

Every dialect tells the same story with the same times, so every one has the same answer.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

STEP = 1_000_000  # ns from step to step
CPU, MAIN, ENGINE = 4242, 4242, 4310
COMPUTE, TALK, COPY = 7, 20, 24  # streams


@dataclass(frozen=True)
class Call:
    """An operator and the device work it launches; `around` are operators that called it.

    Times are ns after the step begins; `at` is the operator's own, which lasts 2 us.
    """

    at: int
    op: str
    kernel: str  # its role, a key of a dialect's names
    start: int
    end: int
    around: tuple[str, ...] = ()
    backward: bool = False
    kind: str = "kernel"
    stream: int = COMPUTE


LINEAR = ("aten::linear",)


def _engine(node: str) -> tuple[str, ...]:
    return (f"autograd::engine::evaluate_function: {node}", node)


CALLS = (
    Call(
        12_000, "aten::copy_", "Memcpy", 15_000, 25_000, ("aten::to",), kind="memcpy", stream=COPY
    ),
    Call(50_000, "aten::embedding", "gather", 60_000, 70_000),
    Call(60_000, "aten::native_layer_norm", "norm", 70_000, 85_000, ("aten::layer_norm",)),
    Call(70_000, "bitsandbytes::dequantize_4bit", "dequant", 85_000, 120_000),
    Call(80_000, "aten::addmm", "gemm", 120_000, 200_000, LINEAR),
    Call(
        90_000, "aten::_flash_attention_forward", "attention", 200_000, 240_000,
        ("aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention"),
    ),
    Call(100_000, "aten::gelu", "elementwise", 240_000, 250_000),
    Call(110_000, "aten::_log_softmax", "softmax", 250_000, 270_000, ("aten::cross_entropy_loss",)),
    Call(
        120_000, "aten::nll_loss_forward", "loss", 270_000, 275_000, ("aten::cross_entropy_loss",)
    ),
    Call(
        210_000, "aten::nll_loss_backward", "loss", 275_000, 280_000,
        _engine("NllLossBackward0"), backward=True,
    ),
    Call(
        220_000, "aten::_flash_attention_backward", "attention", 280_000, 380_000,
        (*_engine("ScaledDotProductFlashAttentionBackward0"),
         "aten::_scaled_dot_product_flash_attention_backward"), backward=True,
    ),
    Call(230_000, "aten::mm", "gemm", 380_000, 540_000, _engine("AddmmBackward0"), backward=True),
    Call(
        240_000, "aten::sum", "reduction", 540_000, 550_000,
        _engine("AddmmBackward0"), backward=True,
    ),
    Call(
        250_000, "c10d::allreduce_", "allreduce", 500_000, 600_000,
        ("record_param_comms",), backward=True, stream=TALK,
    ),
    Call(
        260_000, "aten::embedding_dense_backward", "embedding", 610_000, 640_000,
        _engine("EmbeddingBackward0"), backward=True,
    ),
    Call(410_000, "aten::_foreach_mul_", "foreach", 650_000, 680_000),
    Call(420_000, "aten::_foreach_addcdiv_", "foreach", 680_000, 720_000),
    Call(430_000, "aten::zero_", "Memset", 720_000, 725_000, kind="memset"),
)  # fmt: skip
RANGES = (
    ("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 5_000, 30_000),
    ("DistributedDataParallel.forward", 40_000, 130_000),
    ("Optimizer.step#AdamW.step", 400_000, 450_000),
)

CUDA = {
    "launch": "cudaLaunchKernel",
    "copy": "cudaMemcpyAsync",
    "Memcpy": "Memcpy HtoD (Pageable -> Device)",
    "Memset": "Memset (Device)",
    "gather": "void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long>",
    "norm": "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>",
    "dequant": "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)",
    "gemm": "ampere_bf16_s16816gemm_bf16_128x64_ldg8_relu_f2f_stages_64x3_tn",
    "attention": "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>",
    "elementwise": "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernel>",
    "reduction": "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>",
    "softmax": "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, LogSoftMaxForward>",
    "loss": "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float>",
    "allreduce": "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    "embedding": "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<float>",
    "foreach": "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorList>",
}
ROCM = CUDA | {
    "launch": "hipExtModuleLaunchKernel",
    "copy": "hipMemcpyWithStream",
    "Memcpy": "CopyHostToDevice",
    "Memset": "__amd_rocclr_fillBufferAligned.kd",
    "dequant": "void kDequantizeBlockwise<hip_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)",
    "gemm": "Cijk_Ailk_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT256x256x64_MI16x16x1_SN_LDSB0",
    "attention": "void ck_tile::kentry<1, ck_tile::FmhaBwdDQDKDVKernel<ck_tile::BlockFmha>>",
    "allreduce": "ncclDevKernel_Generic_1(ncclDevKernelArgsStorage<4096ul>)",
}
XPU = {
    "launch": "urEnqueueKernelLaunch",
    "copy": "urEnqueueUSMMemcpy",
    "Memcpy": "Memcpy M2D(HOST -> DEVICE)",
    "Memset": "Memset (DEVICE)",
    "gather": "at::native::xpu::IndexKernel<at::native::xpu::IndexSelectFunctor>",
    "norm": "at::native::xpu::VectorizedLayerNormKernel<float, float>",
    "dequant": "dequant_4bit_kernel",
    "gemm": "gemm_kernel",
    "attention": "micro_sdpa",
    "elementwise": "at::native::xpu::VectorizedElementwiseKernel<4, at::native::xpu::GeluErf>",
    "reduction": "at::native::xpu::ReduceKernel<1, at::native::xpu::ReduceOp<float>>",
    "softmax": "at::native::xpu::DispatchSoftmaxForwardKernelFunctor<4, float, true>",
    "loss": "at::native::xpu::NllLossForwardReduce2DKernelFunctor<float>",
    "allreduce": "oneccl_allreduce_kernel",
    "embedding": "at::native::xpu::EmbeddingBackwardKernel<float>",
    "foreach": "at::native::xpu::MultiTensorApplyKernelFunctor<float>",
}


@dataclass(frozen=True)
class Dialect:
    """How a maker's profiler writes; the defaults are a recent PyTorch on CUDA."""

    names: dict[str, str] = field(default_factory=lambda: CUDA)
    op: str = "cpu_op"
    range: str = "user_annotation"
    call: str = "cuda_runtime"
    kernel: str = "kernel"
    memcpy: str = "gpu_memcpy"
    memset: str = "gpu_memset"
    whole_us: bool = False  # times in whole microseconds
    text_ids: bool = False
    zero: int = 0  # ns before the first step
    first_id: int = 1_000  # of launches
    sequence: bool = True
    correlation: bool = True
    arrows: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    devices: tuple[int, ...] = (0,)


MODERN = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "Test GPU"}]}
OLD = Dialect(
    op="Operator", range="Operator", call="Runtime", kernel="Kernel", memcpy="Memcpy",
    memset="Memset", whole_us=True, text_ids=True, zero=1_620_000_000_000_000_000,
    about={"schemaVersion": 1},
)  # fmt: skip
DIALECTS = {
    "torch 1.8": OLD,
    "torch 1.8 without sequence numbers": replace(OLD, sequence=False),
    "torch 1.13": Dialect(whole_us=True, zero=1_680_000_000_000_000_000, about=MODERN),
    "torch 2.0": Dialect(whole_us=True, zero=1_690_000_000_000_000_000, arrows=True, about=MODERN),
    "torch 2.3": Dialect(zero=1_712_000_000_000_000_047, about=MODERN | {"with_stack": 0}),
    "torch 2.6": Dialect(
        zero=3_912_345_678_901, arrows=True,
        about=MODERN | {
            "baseTimeNanoseconds": 1_790_857_026_000_000_000, "trace_id": "018F",
            "distributedInfo": {"backend": "nccl", "rank": 3, "world_size": 8},
        },
    ),
    "arrows alone": Dialect(correlation=False, arrows=True, about=MODERN),
    "driver API": Dialect(
        names=CUDA | {"launch": "cuLaunchKernelEx"}, call="cuda_driver", about=MODERN
    ),
    "ROCm": Dialect(names=ROCM, first_id=1 << 40, whole_us=True, about=MODERN),
    "ROCm, ids of 64 bits": Dialect(names=ROCM, first_id=(1 << 64) - 4096, about=MODERN),
    "XPU": Dialect(names=XPU, call="xpu_runtime", about={"deviceProperties": []}),
    "another device": Dialect(
        names=CUDA | {"launch": "LaunchKernel"}, call="privateuse1_runtime", about={}
    ),
    "two devices": Dialect(devices=(0, 1), about=MODERN),
}  # fmt: skip


def write(dialect: Dialect, folder: Path, steps: int = 3) -> Path:
    """The trace of `steps` steps; on several devices each runs the same at the same time."""
    path = folder / "rank3.1712000000.pt.trace.json"
    events = list(_events(dialect, steps))
    path.write_text(json.dumps({**dialect.about, "traceEvents": events}))
    return path


def _events(dialect: Dialect, steps: int) -> Iterator[dict[str, Any]]:
    identity = 0
    for n in range(steps):
        t = n * STEP
        yield _event(dialect, dialect.range, f"ProfilerStep#{n}", t, t + 900_000)
        for name, start, end in RANGES:
            yield _event(dialect, dialect.range, name, t + start, t + end)
        for call in CALLS:
            identity += 1
            yield from _operators(dialect, call, t, identity)
            for device in dialect.devices:
                yield from _launched(dialect, call, t, identity, device)


def _operators(dialect: Dialect, call: Call, t: int, identity: int) -> Iterator[dict[str, Any]]:
    stack = [*call.around, call.op]
    numbers = {"Sequence number": identity, "Fwd thread id": int(call.backward)}
    for depth, op in enumerate(stack):
        margin = 1000 * (len(stack) - depth)
        external = _identity(dialect, identity * 8 + depth)
        args: dict[str, Any] = {"External id": external} | (numbers if dialect.sequence else {})
        tid = ENGINE if call.backward else MAIN
        start, end = t + call.at - margin, t + call.at + 2_000 + margin
        yield _event(dialect, dialect.op, op, start, end, tid, **args)


def _launched(
    dialect: Dialect, call: Call, t: int, identity: int, device: int
) -> Iterator[dict[str, Any]]:
    """The API call inside the operator, what it launched, and an arrow from one to the other."""
    number = dialect.first_id + identity * len(dialect.devices) + device
    depth = len(call.around)
    # The spelling of 1.8, and of all since for what runs on a device.
    args: dict[str, Any] = {"external id": _identity(dialect, identity * 8 + depth)}
    if dialect.text_ids:
        args = {"External id": args["external id"]}
    if dialect.correlation:
        args["correlation"] = number
    api = dialect.names["copy" if call.kind == "memcpy" else "launch"]
    tid = ENGINE if call.backward else MAIN
    cpu = t + call.at
    yield _event(dialect, dialect.call, api, cpu, cpu + 1_000, tid, **args)
    category = {"kernel": dialect.kernel, "memcpy": dialect.memcpy, "memset": dialect.memset}
    stream: int | str = f"stream {call.stream}" if dialect.text_ids else call.stream
    name, start, end = dialect.names[call.kernel], t + call.start, t + call.end
    args |= {"device": device, "stream": call.stream}
    yield _event(dialect, category[call.kind], name, start, end, stream, device, **args)
    if dialect.arrows:
        for ph, pid, thread, time in (("s", CPU, tid, cpu), ("f", device, stream, start)):
            arrow = {"ph": ph, "id": identity, "cat": "ac2g", "name": "ac2g", "bp": "e"}
            yield arrow | {"pid": pid, "tid": thread, "ts": _micro(dialect, dialect.zero + time)}


def _event(
    dialect: Dialect, cat: str, name: str, start: int, end: int, tid: int | str = MAIN,
    pid: int = CPU, **args: Any,
) -> dict[str, Any]:  # fmt: skip
    event = {"ph": "X", "cat": cat, "name": name, "pid": pid, "args": args}
    event["tid"] = str(tid) if dialect.text_ids else tid
    times = {"ts": dialect.zero + start, "dur": end - start}
    return event | {key: _micro(dialect, time) for key, time in times.items()}


def _micro(dialect: Dialect, time: int) -> int | float:
    return time // 1000 if dialect.whole_us else time / 1000


def _identity(dialect: Dialect, number: int) -> int | str:
    return str(number) if dialect.text_ids else number
