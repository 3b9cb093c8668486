"""Texts to token ids, once: kept in the cache and read from there by the next run.

A file of the cache is named by a digest of everything its content depends on: the texts,
the tokenizer as it is serialised, the cut, the version of the library. It holds whole
numbers in safetensors; one that is damaged is made again.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peftprof.run.fetch import cache_folder
from peftprof.run.tables import Examples

KEPT = 64  # files; those used longest ago go first


def tokenise(
    examples: Examples, tokenizer: Any, names: Sequence[str], max_length: int
) -> dict[str, list[torch.Tensor]]:
    """For each of the tokenizer's outputs among `names` a row of ids, int64, per example.

    An example without any token is one padding token: some tokenizers add none of their own.
    """
    path = _path(examples, tokenizer, names, max_length)
    columns = None if path is None else _read(path, len(examples.texts))
    if columns is None:
        columns = _encode(examples, tokenizer, names, max_length)
        if path is not None:
            _write(path, columns)
    lengths = columns.pop("lengths").tolist()
    return {name: list(flat.long().split(lengths)) for name, flat in columns.items()}


def _encode(
    examples: Examples, tokenizer: Any, names: Sequence[str], max_length: int
) -> dict[str, torch.Tensor]:
    encoded = tokenizer(
        *([list(column) for column in zip(*examples.texts, strict=True)]),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids="token_type_ids" in names,
    )
    rows: dict[str, list[list[int]]] = {name: encoded[name] for name in encoded if name in names}
    for i, ids in enumerate(rows["input_ids"]):
        if not ids:
            for name in rows:
                rows[name][i] = [tokenizer.pad_token_id if name == "input_ids" else 0]
    lengths = [len(ids) for ids in rows["input_ids"]]
    flat = {
        name: torch.tensor([value for row in column for value in row], dtype=torch.int32)
        for name, column in rows.items()
    }
    return flat | {"lengths": torch.tensor(lengths, dtype=torch.int32)}


def _path(examples: Examples, tokenizer: Any, names: Sequence[str], max_length: int) -> Path | None:
    """Where the tokens of these arguments are kept; None for a tokenizer in Python code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.sha256(f"1 {tokenizers.__version__} {max_length} {sorted(names)}".encode())
    digest.update(f"{tokenizer.pad_token_id} {tokenizer.truncation_side} ".encode())
    serialised = json.loads(backend.to_str())
    # What the last call asked for, not what the tokenizer is.
    serialised["truncation"] = serialised["padding"] = None
    digest.update(json.dumps(serialised, sort_keys=True).encode())
    for texts in examples.texts:
        for text in texts:
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "big") + raw)
        digest.update(b";")
    return cache_folder() / "tokens" / f"{digest.hexdigest()}.safetensors"


def _read(path: Path, examples: int) -> dict[str, torch.Tensor] | None:
    try:
        columns = load_file(path)
        os.utime(path)
    except (OSError, SafetensorError):
        return None
    lengths = columns.get("lengths")
    if lengths is None or len(lengths) != examples or "input_ids" not in columns:
        return None
    total = int(lengths.sum())
    return columns if all(len(c) == total for n, c in columns.items() if n != "lengths") else None


def _write(path: Path, columns: dict[str, torch.Tensor]) -> None:
    # A cache that cannot be written costs the next run a second, and this one nothing.
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder) / path.name
            save_file(columns, new)
            new.replace(path)
        kept = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for old in kept[:-KEPT]:
            old.unlink(missing_ok=True)
