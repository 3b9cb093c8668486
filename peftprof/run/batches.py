"""Step n's batch as a pure function of n, so that resuming and profiling see the same ones."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from peftprof.errors import InputError
from peftprof.run.tables import Examples


@dataclass(frozen=True)
class Batch:
    """One padded batch: `inputs` go to the model, [batch, longest] each; labels [batch]."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    real_tokens: int
    padded_tokens: int

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        moved = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        labels = self.labels.to(device, non_blocking=True)
        return Batch(moved, labels, self.real_tokens, self.padded_tokens)


class Batches:
    """Examples tokenised once, in batches padded to their longest.

    Raises InputError when `max_length` leaves no room for text.

    `tokenizer` is a transformers tokenizer; `names` are the model's input names.
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: Any,
        names: Sequence[str],
        max_length: int,
        batch_size: int,
        seed: int,
    ) -> None:
        pair = len(examples.texts[0]) > 1
        special = tokenizer.num_special_tokens_to_add(pair=pair)
        if max_length <= special + pair:
            raise InputError(
                f"--max-length {max_length} leaves no room for text beside the {special} special "
                "tokens of the tokenizer; make it larger"
            )
        encoded = tokenizer(
            *([list(column) for column in zip(*examples.texts, strict=True)]),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids="token_type_ids" in names,
        )
        # Some tokenizers add no token of their own; padding then stands for the empty text.
        empty = [i for i, ids in enumerate(encoded["input_ids"]) if not ids]
        for i in empty:
            encoded["input_ids"][i] = [tokenizer.pad_token_id]
        self.columns = {
            name: [torch.tensor(row, dtype=torch.long) for row in encoded[name]]
            for name in encoded
            if name in names
        }
        self.padding = {"input_ids": tokenizer.pad_token_id}
        self.labels = examples.labels
        self.lengths = [len(ids) for ids in encoded["input_ids"]]
        self.batch_size = batch_size
        self.seed = seed
        self._epoch: tuple[int, list[int]] | None = None

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch; the last batch may be smaller, and none is dropped."""
        return -(-len(self.labels) // self.batch_size)

    def at(self, step: int) -> Batch:
        """The training batch of optimiser step `step` (from 0), a function of the seed alone."""
        epoch, place = divmod(step, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            # The seed of an epoch is a digest, so that seed 1 epoch 1 is not seed 2 epoch 0.
            digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
            order = torch.randperm(len(self.labels), generator=generator).tolist()
            self._epoch = epoch, order
        start = place * self.batch_size
        return self._collate(self._epoch[1][start : start + self.batch_size])

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, shortest first, so that evaluation pads little."""
        order = sorted(range(len(self.labels)), key=lambda i: (self.lengths[i], i))
        for start in range(0, len(order), batch_size):
            yield self._collate(order[start : start + batch_size])

    def _collate(self, indices: Sequence[int]) -> Batch:
        inputs = {
            name: pad_sequence(
                [rows[i] for i in indices],
                batch_first=True,
                padding_value=self.padding.get(name, 0),
            )
            for name, rows in self.columns.items()
        }
        lengths = torch.tensor([self.lengths[i] for i in indices])
        longest = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        labels = torch.tensor([self.labels[i] for i in indices])
        return Batch(inputs, labels, int(lengths.sum()), len(indices) * longest)
