"""Step n's batch as a pure function of n, so that resuming and profiling see the same ones."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from peftprof.errors import InputError
from peftprof.records import Computed
from peftprof.run import distributed
from peftprof.run.tables import Examples
from peftprof.run.tokens import tokenise
from peftprof_kernels import Group, grouped

# What one more part of a split batch costs, in the units of `grouped`. Chosen, not measured.
SPLIT_COST = 8_000


@dataclass(frozen=True)
class Segments:
    """Where the sequences of packed tokens are, in tokens from 0.

    `groups` are what attention works on; `first` and `last` [sequences] are the places of
    each sequence's first and last token.
    """

    groups: tuple[Group, ...]
    first: torch.Tensor
    last: torch.Tensor

    def to(self, device: torch.device) -> "Segments":
        """The same, its tensors on `device`."""
        first, last = (t.to(device, non_blocking=True) for t in (self.first, self.last))
        return Segments(tuple(g.to(device) for g in self.groups), first, last)


@dataclass(frozen=True)
class Part:
    """What goes through the model at once: `inputs` go to its forward, labels [sequences].

    Padded: inputs [sequences, longest] with an attention mask, and no segments. Packed:
    inputs [1, tokens], sequences by length one after the other, with position ids.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    segments: Segments | None = None

    def to(self, device: torch.device) -> "Part":
        """The part on `device`; from pinned memory the copy to a GPU does not wait."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            source = tensor.pin_memory() if device.type == "cuda" else tensor
            return source.to(device, non_blocking=True)

        segments = None if self.segments is None else self.segments.to(device)
        inputs = {name: moved(tensor) for name, tensor in self.inputs.items()}
        return Part(inputs, moved(self.labels), segments)


@dataclass(frozen=True)
class Batch:
    """The examples of one optimiser step, in one part or several.

    `real_tokens` are the examples' own, `padded_tokens` what the model computes: padding
    included, where there is any. Of several processes each has its share: `samples`, which
    may be none, of the `whole` batch.
    """

    parts: tuple[Part, ...]
    samples: int
    real_tokens: int
    padded_tokens: int
    whole: int

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        parts = tuple(part.to(device) for part in self.parts)
        return Batch(parts, self.samples, self.real_tokens, self.padded_tokens, self.whole)


class Batches:
    """Examples tokenised once, in batches: packed, split by length, or padded to their longest.

    Raises InputError when `max_length` leaves no room for text.

    `tokenizer` is a transformers tokenizer; `names` are the model's input names;
    `first_position` is the number of a sequence's first position; packed tokens are rounded
    up to a `multiple` by tokens that belong to no sequence.
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: Any,
        names: Sequence[str],
        max_length: int,
        batch_size: int,
        seed: int,
        padding: str = "pad",
        first_position: int = 0,
        multiple: int = 1,
    ) -> None:
        pair = len(examples.texts[0]) > 1
        special = tokenizer.num_special_tokens_to_add(pair=pair)
        if max_length <= special + pair:
            raise InputError(
                f"--max-length {max_length} leaves no room for text beside the {special} special "
                "tokens of the tokenizer; make it larger"
            )
        self.columns = tokenise(examples, tokenizer, names, max_length)
        self.fill = {"input_ids": tokenizer.pad_token_id}
        self.labels = examples.labels
        self.lengths = [len(ids) for ids in self.columns["input_ids"]]
        self.batch_size = batch_size
        self.seed = seed
        self.padding = padding
        self.first_position = first_position
        self.multiple = multiple
        self._epoch: tuple[int, list[int]] | None = None

    @classmethod
    def of_lengths(
        cls,
        lengths: Sequence[int],
        names: Sequence[str],
        padding: str,
        first_position: int = 0,
        multiple: int = 1,
    ) -> "Batches":
        """Examples of these lengths that say nothing: all tokens and labels are 0."""
        made = object.__new__(cls)
        rows = [torch.zeros(length, dtype=torch.long) for length in lengths]
        made.columns = {n: rows for n in ("input_ids", "token_type_ids") if n in names}
        made.fill, made.labels, made.lengths = {}, [0] * len(rows), list(lengths)
        made.batch_size, made.seed, made.padding = len(rows), 0, padding
        made.first_position, made.multiple, made._epoch = first_position, multiple, None
        return made

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch; the last batch may be smaller, and none is dropped."""
        return -(-len(self.labels) // self.batch_size)

    def indices(self, step: int) -> list[int]:
        """The examples of optimiser step `step` (from 0), a function of the seed alone."""
        epoch, place = divmod(step, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            # The seed of an epoch is a digest, so that seed 1 epoch 1 is not seed 2 epoch 0.
            digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
            order = torch.randperm(len(self.labels), generator=generator).tolist()
            self._epoch = epoch, order
        start = place * self.batch_size
        return self._epoch[1][start : start + self.batch_size]

    def at(self, step: int) -> Batch:
        """The training batch of optimiser step `step` (from 0), or this process's share of it."""
        return self._share(self.indices(step))[1]

    def in_order(self, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """Every example once, by length, so that evaluation pads little.

        Longest first: what follows fits into the memory that a batch leaves. With each batch
        go the numbers of its examples, in the order of its parts' labels. Of several processes
        each gets its share of every batch.
        """
        order = self._by_length()
        for start in range(0, len(order), batch_size):
            yield self._share(order[start : start + batch_size])

    def largest(self, batch_size: int) -> Computed:
        """The most that `in_order` has computed at once."""
        order = self._by_length()
        parts = self._share(order[:batch_size])[1].parts
        sizes = [Computed(len(p.labels), p.inputs["input_ids"].numel()) for p in parts]
        return max(sizes, key=lambda size: size.tokens, default=Computed(0, 0))

    def _by_length(self) -> list[int]:
        return sorted(range(len(self.labels)), key=lambda i: (-self.lengths[i], i))

    def _share(self, indices: list[int]) -> tuple[list[int], Batch]:
        """This process's examples of a batch, by length so that tokens are shared out too."""
        whole = len(indices)
        if distributed.size() > 1:
            indices = distributed.share(sorted(indices, key=lambda i: self.lengths[i]))
        return indices, self.collate(indices, whole)

    def collate(self, indices: Sequence[int], whole: int | None = None) -> Batch:
        """A batch of these examples, or its share that they are. Packed and split, by length."""
        parts: tuple[Part, ...] = ()
        if not indices:
            pass
        elif self.padding == "pad":
            parts = (self._padded(indices),)
        else:
            indices = sorted(indices, key=lambda i: self.lengths[i])
            lengths = [self.lengths[i] for i in indices]
            if self.padding == "packed":
                parts = (self._packed(indices, lengths),)
            else:
                bounds = itertools.accumulate(
                    (group.count for group in grouped(lengths, SPLIT_COST)), initial=0
                )
                parts = tuple(self._padded(indices[a:b]) for a, b in itertools.pairwise(bounds))
        return Batch(
            parts,
            samples=len(indices),
            real_tokens=sum(self.lengths[i] for i in indices),
            padded_tokens=sum(part.inputs["input_ids"].numel() for part in parts),
            whole=len(indices) if whole is None else whole,
        )

    def _padded(self, indices: Sequence[int]) -> Part:
        inputs = {
            name: pad_sequence(
                [rows[i] for i in indices],
                batch_first=True,
                padding_value=self.fill.get(name, 0),
            )
            for name, rows in self.columns.items()
        }
        lengths = torch.tensor([self.lengths[i] for i in indices])
        longest = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return Part(inputs, self._labels(indices))

    def _packed(self, indices: Sequence[int], lengths: Sequence[int]) -> Part:
        sizes = torch.tensor(lengths)
        ends = sizes.cumsum(0)
        total = int(ends[-1])
        rest = -total % self.multiple
        inputs = {
            name: torch.cat(
                [*(rows[i] for i in indices), torch.full((rest,), self.fill.get(name, 0))]
            )[None]
            for name, rows in self.columns.items()
        }
        begins = (ends - sizes).repeat_interleave(sizes)
        places = torch.arange(total + rest)
        places[:total] -= begins
        places[total:] = 0
        inputs["position_ids"] = (places + self.first_position)[None]
        segments = Segments(grouped(lengths), ends - sizes, ends - 1)
        return Part(inputs, self._labels(indices), segments)

    def _labels(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.tensor([self.labels[i] for i in indices])
