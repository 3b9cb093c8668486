"""What the variants are given: the same token ids for all of them, no padding among them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

DRAWN = 1 << 16  # ids that are drawn where there is no text
MOST = 1 << 20  # ids of a text that are looked at


@dataclass(frozen=True)
class Tokens:
    """A stream of ids [n] that sequences are cut out of; `before` and `after` frame each."""

    stream: torch.Tensor
    before: tuple[int, ...]
    after: tuple[int, ...]
    seed: int
    source: str

    @classmethod
    def drawn(cls, tokenizer: Any, seed: int, generates: bool) -> "Tokens":
        """Ids drawn evenly from the vocabulary, without the special ones."""
        special = set(tokenizer.all_special_ids)
        ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
        generator = torch.Generator().manual_seed(seed)
        stream = ordinary[torch.randint(len(ordinary), (DRAWN,), generator=generator)]
        return cls(stream, *_frame(tokenizer, generates), seed, f"tokens drawn from seed {seed}")

    @classmethod
    def of_texts(
        cls, tokenizer: Any, texts: Sequence[str], seed: int, generates: bool, source: str
    ) -> "Tokens":
        """The ids of `texts`, one after the other. Raises ValueError where there is none."""
        ids: list[int] = []
        for text in texts:
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= MOST:
                break
        # A classifier of a causal model reads the last token that is no padding.
        kept = [i for i in ids if i != tokenizer.pad_token_id]
        if not kept:
            raise ValueError("no token in any text")
        return cls(torch.tensor(kept), *_frame(tokenizer, generates), seed, source)

    def at(self, batch: int, length: int, more: int = 0) -> torch.Tensor:
        """Ids [batch, length + more]: sequences of `length`, and what follows each in the stream.

        The same for the same seed, batch and length.
        """
        body = max(0, length - len(self.before) - len(self.after))
        stream = self.stream
        while len(stream) < body + more:
            stream = stream.repeat(2)
        generator = torch.Generator().manual_seed(hash((self.seed, batch, length)) % 2**63)
        begins = torch.randint(len(stream) - body - more + 1, (batch, 1), generator=generator)
        cut = stream[begins + torch.arange(body + more)]

        def framed(ids: tuple[int, ...]) -> torch.Tensor:
            return torch.tensor(ids, dtype=torch.int64).expand(batch, len(ids))

        whole = torch.cat([framed(self.before), cut[:, :body], framed(self.after)], dim=1)
        return torch.cat([whole[:, :length], cut[:, body:]], dim=1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the stream and its frame."""
        digest = hashlib.sha256(self.stream.numpy().tobytes())
        digest.update(str((self.before, self.after, self.seed)).encode())
        return digest.hexdigest()


def _frame(tokenizer: Any, generates: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special ids that the tokenizer puts before and after a text, such as [CLS], [SEP].

    What is to be gone on with has no end.
    """
    special = list(tokenizer("")["input_ids"])
    half = (len(special) + 1) // 2
    return tuple(special[:half]), () if generates else tuple(special[half:])
