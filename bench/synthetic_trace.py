"""Writes a training trace of any length, as torch.profiler would: for benchmarks of reading.

Every number is made up by rule (a transformer's forward, backward and optimizer on one CPU
thread each for forward and autograd, one stream, one side stream for collectives); the
content says nothing about any device. The same arguments give the same file.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LAYERS = 24
MAIN, ENGINE, DEVICE, STREAM, SIDE = 4000, 4001, 0, 7, 20
HEAD = """
{
  "schemaVersion": 1,
  "deviceProperties": [
    {
      "id": 0, "name": "Synthetic GPU", "totalGlobalMem": 85899345920,
      "computeMajor": 9, "computeMinor": 0,
      "maxThreadsPerBlock": 1024, "maxThreadsPerMultiprocessor": 2048,
      "regsPerBlock": 65536, "warpSize": 32, "sharedMemPerBlock": 49152, "numSms": 132
    }
  ],
  "record_shapes": 1,
  "traceEvents": [
"""
TAIL = """  ],
  "traceName": "synthetic.json",
  "displayTimeUnit": "ms",
  "baseTimeNanoseconds": 0
}
"""

# Operator, the operators in it that launch something, and what their kernels are called.
LINEAR = (
    "aten::linear",
    "aten::addmm",
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
)
NORM = (
    "aten::layer_norm",
    "aten::native_layer_norm",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>"
    "(int, float, c10::BFloat16 const*, c10::BFloat16 const*, float*, float*)",
)
GELU = (
    "aten::gelu",
    "aten::gelu",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl"
    "(at::TensorIteratorBase&, at::native::GeluType)::{lambda()#2}, at::detail::Array<char*, 2> >"
    "(int, at::detail::Array<char*, 2>)",
)
DROPOUT = (
    "aten::dropout",
    "aten::native_dropout",
    "void at::native::(anonymous namespace)::fused_dropout_kernel_vec<c10::BFloat16, float, "
    "unsigned int, 1, 8, bool>(at::cuda::detail::TensorInfo<c10::BFloat16 const, unsigned int>)",
)
ADD = (
    "aten::add",
    "aten::add",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, "
    "at::detail::Array<char*, 3> >(int, at::native::CUDAFunctor_add<c10::BFloat16>)",
)
ATTENTION = (
    "aten::scaled_dot_product_attention",
    "aten::_flash_attention_forward",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, "
    "cutlass::bfloat16_t, Flash_kernel_traits<64, 128, 128, 4, cutlass::bfloat16_t> >, true>"
    "(pytorch_flash::Flash_fwd_params)",
)
ALL_REDUCE = (
    "record_param_comms",
    "c10d::allreduce_",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL",
)
ADAM = (
    "aten::_foreach_addcdiv_",
    "aten::_foreach_addcdiv_",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<"
    "at::native::TensorListMetadata<4> >",
)
MLP = (LINEAR, GELU, LINEAR, DROPOUT, ADD, NORM)
LAYER = (LINEAR, LINEAR, LINEAR, ATTENTION, LINEAR, DROPOUT, ADD, NORM, *MLP)
SHAPES = (
    '"Input Strides": [[1024, 1], [1, 1024], [1]], '
    '"Input type": ["c10::BFloat16", "c10::BFloat16", "c10::BFloat16"], '
    '"Input Dims": [[4096, 1024], [1024, 1024], [1024]]'
)


class _Trace:
    """The state of the pretended machine: two clocks and the next ids, in nanoseconds."""

    def __init__(self) -> None:
        self.cpu = 1_000_000
        self.gpu = self.cpu
        # As in a run that has gone on for a while; HTA 0.5.0 needs wide correlation ids.
        self.external, self.correlation, self.sequence = 0, 1_000_000, 0
        self.sequences: list[int] = []

    def _x(self, cat: str, name: str, pid: int, tid: int, start: int, ns: int, args: str) -> str:
        return (
            f'  {{\n    "ph": "X", "cat": "{cat}", "name": "{name}", "pid": {pid}, "tid": {tid},\n'
            f'    "ts": {start // 1000}.{start % 1000:03}, "dur": {ns // 1000}.{ns % 1000:03},\n'
            f'    "args": {{\n      {args}\n    }}\n  }},\n'
        )

    def _arrow(self, ph: str, cat: str, id_: int, pid: int, tid: int, time: int) -> str:
        end = ', "bp": "e"' if ph == "f" else ""
        return (
            f'  {{\n    "ph": "{ph}", "id": {id_}, "pid": {pid}, "tid": {tid}, '
            f'"ts": {time // 1000}.{time % 1000:03},\n'
            f'    "cat": "{cat}", "name": "{cat}"{end}\n  }},\n'
        )

    def _arguments(self, sequence: int, forward_thread: int, more: str = "") -> str:
        return (
            f'"External id": {self.external}, "Record function id": 0, '
            f'"Sequence number": {sequence}, "Fwd thread id": {forward_thread}, '
            f'{more}"Ev Idx": {self.external}'
        )

    def launch(self, kernel: str, tid: int, ns: int, stream: int = STREAM) -> Iterator[str]:
        self.correlation += 1
        c, at = self.correlation, self.cpu
        yield self._x(
            "cuda_runtime", "cudaLaunchKernel", MAIN, tid, at, 3000,
            f'"External id": {self.external}, "cbid": 211, "correlation": {c}',
        )  # fmt: skip
        yield self._arrow("s", "ac2g", c, MAIN, tid, at)
        begin = max(self.gpu, at + 4000)
        yield self._x(
            "kernel", kernel, DEVICE, stream, begin, ns,
            f'"External id": {self.external}, "queued": 0, "device": 0, "context": 1, '
            f'"stream": {stream}, "correlation": {c}, "registers per thread": 64, '
            '"shared memory": 0, "blocks per SM": 3.878788, "warps per SM": 15.515152, '
            '"grid": [512, 1, 1], "block": [128, 1, 1], "est. achieved occupancy %": 24',
        )  # fmt: skip
        yield self._arrow("f", "ac2g", c, DEVICE, stream, begin)
        self.gpu = begin + ns + 500
        self.cpu += 3500

    def operator(self, names: tuple[str, str, str], tid: int, ns: int) -> Iterator[str]:
        """An operator that calls another that launches a kernel of `ns` nanoseconds."""
        outer, inner, kernel = names
        start = self.cpu
        self.external += 1
        body = []
        self.cpu += 2000
        inner_start = self.cpu
        self.cpu += 1500
        body += self.launch(kernel, tid, ns)
        self.cpu += 1000
        args = self._arguments(self.sequence, 0, f"{SHAPES}, ")
        if inner != outer:
            body.append(
                self._x("cpu_op", inner, MAIN, tid, inner_start, self.cpu - inner_start, args)
            )
        self.cpu += 500
        yield self._x("cpu_op", outer, MAIN, tid, start, self.cpu - start, args)
        yield from body
        self.cpu += 700

    def forward(self, names: tuple[str, str, str], ns: int) -> Iterator[str]:
        at = self.cpu
        yield from self.operator(names, MAIN, ns)
        self.sequence += 1
        self.sequences.append(self.sequence)
        yield self._arrow("s", "fwdbwd", self.sequence, MAIN, MAIN, at)

    def backward(self, names: tuple[str, str, str], ns: int) -> Iterator[str]:
        start, sequence = self.cpu, self.sequences.pop()
        self.external += 1
        node = names[1].removeprefix("aten::").title().replace("_", "") + "Backward0"
        self.cpu += 1000
        node_start = self.cpu
        self.cpu += 500
        body = []
        for _ in range(2 if names is LINEAR else 1):
            inside = f"{names[1]}_backward"
            called = ("aten::mm", "aten::mm") if names is LINEAR else (inside, inside)
            body += self.operator((*called, names[2]), ENGINE, ns)
        args = self._arguments(sequence, 1)
        yield self._x(
            "cpu_op", f"autograd::engine::evaluate_function: {node}", MAIN, ENGINE, start,
            self.cpu + 500 - start, args,
        )  # fmt: skip
        yield self._x("cpu_op", node, MAIN, ENGINE, node_start, self.cpu - node_start, args)
        yield self._arrow("f", "fwdbwd", sequence, MAIN, ENGINE, start)
        yield from body
        self.cpu += 1000

    def step(self, number: int) -> Iterator[str]:
        """One training step; its range is written last, as the profiler does not sort."""
        begin = self.cpu
        self.cpu += 20_000
        work = [names for _ in range(LAYERS) for names in LAYER]
        for i, names in enumerate(work):
            yield from self.forward(names, 9000 + 137 * (i % 31))
        for i, names in enumerate(reversed(work)):
            yield from self.backward(names, 11_000 + 149 * (i % 29))
            if i % len(LAYER) == 0:
                gpu, self.gpu = self.gpu, self.cpu
                yield from self.operator(ALL_REDUCE, ENGINE, 40_000)
                self.gpu = gpu
        start = self.cpu
        for _ in range(LAYERS):
            yield from self.operator(ADAM, MAIN, 30_000)
        yield self._x(
            "user_annotation", "Optimizer.step#AdamW.step", MAIN, MAIN, start,
            self.cpu - start, '"External id": 0',
        )  # fmt: skip
        self.cpu = max(self.cpu, self.gpu)
        yield self._x(
            "user_annotation", f"ProfilerStep#{number}", MAIN, MAIN, begin,
            self.cpu - begin, '"External id": 0',
        )  # fmt: skip
        self.cpu += 50_000


def write(path: Path, events: int) -> int:
    """Write a trace of whole steps with at least `events` entries; the number written.

    A name that ends in `.gz` is compressed.
    """
    trace, count, number = _Trace(), 0, 0

    def into(file: IO[str]) -> None:
        nonlocal count, number
        file.write(HEAD)
        while count < events:
            entries = list(trace.step(number))
            count, number = count + len(entries), number + 1
            if count >= events:
                entries[-1] = entries[-1].removesuffix(",\n") + "\n"
            file.write("".join(entries))
        file.write(TAIL)

    if path.name.endswith(".gz"):
        with gzip.open(path, "wt", compresslevel=4, encoding="utf-8") as file:
            into(file)
    else:
        with path.open("w", encoding="utf-8") as file:
            into(file)
    return count
