"""NF4 weights as bitsandbytes stores them, and a dequantiser in plain PyTorch.

The memory layout is drawn in ``kernels/README.md``. Nothing here is tied to a device:
the same code runs on a CPU and on a GPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Packed bytes handled at a time. Every byte needs 16 bytes of working memory (an int64
# index and two fp32 values), so the working memory is 2 MiB on a CPU. Measured with two
# threads on 768 x 3072, fp32 out: 16 KiB of packed bytes 2.4 ms, 64 KiB 1.0 ms, 128 KiB
# 0.77 ms, 256 KiB between 0.69 ms and 2.6 ms. Below, starting the threads costs the most;
# above, fresh pages for the working memory do. A GPU pays for launches instead.
_CHUNK_BYTES_CPU: Final = 1 << 17
_CHUNK_BYTES_OTHER: Final = 1 << 21
# Threads share a gather by rows only, so the bytes are laid out in this many rows.
_MAX_ROWS: Final = 16


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A quantised weight [N, K]: 4-bit codes, and a scale for each ``blocksize`` of them.

    packed     any storage dtype, flat: two codes a byte, element 2j in the high nibble
    absmax     fp32 [blocks], or uint8 [blocks] when the scales are quantised themselves
    code       fp32 [16]: the value of each 4-bit code
    absmax2    fp32 [ceil(blocks / blocksize2)]  }
    code2      fp32 [256]                        } nested (double) quantisation only
    offset     fp32, 0-d                         }
    """

    packed: Tensor
    shape: tuple[int, int]
    blocksize: int
    absmax: Tensor
    code: Tensor
    absmax2: Tensor | None = None
    code2: Tensor | None = None
    offset: Tensor | None = None
    blocksize2: int = 256
    # The two values of each byte side by side, fp32 [256, 2] seen as float64 [256]: one
    # 8-byte move looks up both. 2 KiB a weight.
    _pairs: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every size and dtype, and build the table of byte values."""
        packed = self.packed.detach().reshape(-1).view(torch.uint8)
        object.__setattr__(self, "packed", packed)
        if len(self.shape) != 2:
            raise ValueError(f"shape must be (N, K), got {(*self.shape,)}")
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        for name in ("absmax", "code", "absmax2", "code2", "offset"):
            tensor = getattr(self, name)
            if tensor is not None:  # kernels read them as they lie in memory
                object.__setattr__(self, name, tensor.detach().contiguous())
        self._check_codes()
        self._check_scales()
        code = self.code.detach()
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
        object.__setattr__(self, "_pairs", pairs.view(torch.float64).reshape(-1))

    def tensors(self) -> list[Tensor]:
        """The tensors as an operator takes them; ``rebuilt`` is the way back."""
        found = [self.packed, self.absmax, self.code, self._pairs]
        if self.absmax2 is not None and self.code2 is not None and self.offset is not None:
            found += [self.absmax2, self.code2, self.offset]
        return found

    def layout(self) -> list[int]:
        """The numbers beside ``tensors``: N, K, blocksize, blocksize2."""
        return [*self.shape, self.blocksize, self.blocksize2]

    @classmethod
    def rebuilt(cls, tensors: list[Tensor], layout: list[int]) -> "NF4Weight":
        """The weight of ``tensors`` and ``layout``, which were checked when it was made."""
        self = object.__new__(cls)
        N, K, blocksize, blocksize2 = layout
        names = ("packed", "absmax", "code", "_pairs", "absmax2", "code2", "offset")
        fields = dict.fromkeys(names) | dict(zip(names, tensors, strict=False))
        self.__dict__.update(fields, shape=(N, K), blocksize=blocksize, blocksize2=blocksize2)
        return self

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised too."""
        return self.absmax2 is not None

    @property
    def numel(self) -> int:
        """Number of weights, N * K."""
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        """Number of quantisation blocks; the last may be partial."""
        return -(-self.numel // self.blocksize)

    @property
    def device(self) -> torch.device:
        """Where the packed codes are."""
        return self.packed.device

    def _check_codes(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"shape must be (N, K) with both at least 1, got {self.shape}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")
        needed = (self.numel + 1) // 2
        # A storage dtype wider than a byte rounds the size up to whole elements.
        if not needed <= self.packed.numel() < needed + 8:
            raise ValueError(
                f"packed holds {self.packed.numel()} bytes, a weight of shape {self.shape} "
                f"needs {needed}"
            )
        self._check("code", self.code, torch.float32, 16)

    def _check_scales(self) -> None:
        extras = {"absmax2": self.absmax2, "code2": self.code2, "offset": self.offset}
        missing = [name for name, tensor in extras.items() if tensor is None]
        if 0 < len(missing) < len(extras):
            raise ValueError(f"nested quantisation needs {', '.join(missing)} too")
        if self.absmax2 is None or self.code2 is None or self.offset is None:
            self._check("absmax", self.absmax, torch.float32, self.blocks)
            return
        if self.blocksize2 < 1:
            raise ValueError(f"blocksize2 must be at least 1, got {self.blocksize2}")
        self._check("absmax", self.absmax, torch.uint8, self.blocks)
        self._check("absmax2", self.absmax2, torch.float32, -(-self.blocks // self.blocksize2))
        self._check("code2", self.code2, torch.float32, 256)
        self._check("offset", self.offset, torch.float32, 1)

    def _check(self, name: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> None:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.numel() != numel:
            raise ValueError(
                f"{name} must have {numel} elements for shape {self.shape} and blocksize "
                f"{self.blocksize}, got {tensor.numel()}"
            )
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, packed is on {self.device}")


def block_scales(weight: NF4Weight) -> Tensor:
    """The fp32 scale of each block, [blocks].

    Nested: code2[q] * absmax2 + offset, the product rounded before the sum as the two
    kernels of bitsandbytes do.
    """
    if weight.absmax2 is None or weight.code2 is None or weight.offset is None:
        return weight.absmax.reshape(-1)
    scales = weight.code2.reshape(-1).index_select(0, weight.absmax.reshape(-1).int())
    whole = scales.numel() // weight.blocksize2
    split = whole * weight.blocksize2
    absmax2 = weight.absmax2.reshape(-1)
    scales[:split].view(whole, weight.blocksize2).mul_(absmax2[:whole, None])
    if split < scales.numel():
        scales[split:].mul_(absmax2[whole])
    return scales.add_(weight.offset.reshape(()))


Native = Callable[["NF4Weight", Tensor, torch.dtype], Tensor]
_native: Native | None = None


def set_native_dequantize(native: Native | None) -> Native | None:
    """Let ``native(weight, scales [blocks], dtype)`` dequantise on CPUs; None: no other code.

    Compiled code does in one pass what library operations do in several. It is asked where
    each row of the weight is whole blocks; whoever sets it has seen that its numbers are
    those of ``dequantize_torch``. Returns what was set before.
    """
    global _native
    before = _native
    _native = native
    return before


def native_dequantize() -> Native | None:
    """What ``set_native_dequantize`` set."""
    return _native


def dequantize_torch(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in ``dtype``: fp32 code times fp32 scale, rounded once.

    Beside the result this needs a few MiB of working memory, whatever the weight's size.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type, got {dtype}")
    numel, device, blocksize = weight.numel, weight.device, weight.blocksize
    scales = block_scales(weight)  # [blocks]
    if _native is not None and device.type == "cpu" and weight.shape[1] % blocksize == 0:
        return _native(weight, scales, dtype)
    out = torch.empty(numel, dtype=dtype, device=device)

    n_bytes = (numel + 1) // 2
    rows, limit = _working_set(device, n_bytes)
    chunk = min(limit, n_bytes)  # the limits are whole numbers of blocks
    capacity = math.ceil(chunk / rows) * rows
    index = torch.empty(capacity, dtype=torch.int64, device=device)
    looked_up = torch.empty(capacity, dtype=torch.float64, device=device)
    values = looked_up.view(torch.float32)  # [2 * capacity]
    table = weight._pairs.expand(rows, 256)

    for start in range(0, n_bytes, chunk):
        stop = min(start + chunk, n_bytes)
        index[: stop - start].copy_(weight.packed[start:stop])
        columns = math.ceil((stop - start) / rows)
        used = columns * rows
        index[stop - start : used].zero_()  # gather reads them, nothing reads the result
        torch.gather(
            table, 1, index[:used].view(rows, columns), out=looked_up[:used].view(rows, columns)
        )
        first = 2 * start
        last = min(2 * stop, numel)  # an odd count leaves the last nibble unused
        _scale_into(
            out[first:last],
            values[: last - first],
            scales[first // blocksize : -(-last // blocksize)],
            blocksize,
        )
    return out.view(weight.shape)


def _working_set(device: torch.device, n_bytes: int) -> tuple[int, int]:
    """Rows of a gather, and packed bytes handled at a time."""
    if torch.compiler.is_compiling():
        return 1, n_bytes  # a loop would be unrolled into the graph
    if device.type == "cpu":
        return min(torch.get_num_threads(), _MAX_ROWS), _CHUNK_BYTES_CPU
    return 1, _CHUNK_BYTES_OTHER


def _scale_into(out: Tensor, values: Tensor, scales: Tensor, blocksize: int) -> None:
    """out [n] = values [n] * the scale of each block; the last block may be partial."""
    whole = values.numel() // blocksize
    split = whole * blocksize
    by_block = values[:split].view(whole, blocksize)
    if out.dtype == torch.float32:
        torch.mul(by_block, scales[:whole, None], out=out[:split].view(whole, blocksize))
    else:
        out[:split].view(whole, blocksize).copy_(by_block.mul_(scales[:whole, None]))
    if split < values.numel():
        out[split:].copy_(values[split:].mul_(scales[whole]))
