"""Texts and labels from a table: CSV, TSV, JSON lines or Parquet files, folders, the hub."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftprof.config import RunConfig
from peftprof.errors import InputError
from peftprof.run.source import LOCAL, hub_says, one_line

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SHAPES = {
    "csv": "it must be UTF-8 text, a header, then as many cells in every row",
    "json": "it must be UTF-8 text, one JSON object a line, with the same keys",
    "parquet": "it is damaged or no Parquet file; write it again",
}
# In the order in which they are looked for; pairs, the two-sentence tasks of GLUE, first.
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "passage"),
    ("sentence",),
    ("text",),
    ("content",),
    ("review",),
)
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "target")
VALIDATION_SPLITS = ("validation", "validation_matched", "dev", "valid")
COLLECTIONS = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}
MOST_LABELS = 1000
# What the readers of datasets are seen to raise for files that are not what they should be.
UNREADABLE = (OSError, ValueError, RuntimeError, TypeError, LookupError, StopIteration)
INTEGER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class Examples:
    """Texts (one or two strings each) and their labels, numbered from 0."""

    texts: list[tuple[str, ...]]
    labels: list[int]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)


@dataclass(frozen=True)
class Table:
    """A dataset's training examples, its validation examples where it has some, its labels."""

    train: Examples
    validation: Examples | None
    split: str
    source: str
    labels: tuple[str, ...]


def read(config: RunConfig) -> Table:
    """The table that `config.dataset` names.

    Raises InputError when it cannot be found or read, has no column of texts or of
    classes, or a row lacks either.
    """
    import datasets

    splits, source = _read(config.dataset, datasets)
    if "train" not in splits:
        raise InputError(
            f"dataset {config.dataset!r} has no split named train: {', '.join(splits)}"
        )
    rows = splits["train"]
    columns = _text_columns(config, rows)
    label = _label_column(config, rows)
    names = _label_names(config, rows, label)
    train = _examples(config, rows, columns, label, names)
    held = next((name for name in VALIDATION_SPLITS if name in splits), None)
    validation = _examples(config, splits[held], columns, label, names) if held else None
    return Table(train, validation, f"the dataset's own: train, {held}", source, tuple(names))


def _read(name: str, datasets: Any) -> tuple[dict[str, Any], str]:
    path = Path(os.path.expanduser(name))  # noqa: PTH111  (Path's raises for an unknown user)
    try:
        if path.is_file():
            return _from_file(name, path, datasets), f"file {path.name}"
        if path.is_dir():
            return dict(datasets.load_dataset(str(path))), f"folder {path.name}"
        if name.startswith(LOCAL) or path.suffix.lower() in FORMATS:
            raise InputError(f"there is no file or folder {name!r}; check the path of --dataset")
        return _from_hub(name, datasets)
    except (*UNREADABLE, datasets.exceptions.DatasetsError) as error:
        raise InputError(_why_not(name, path, error)) from error


def _from_file(name: str, path: Path, datasets: Any) -> dict[str, Any]:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{name} is no {', '.join(FORMATS)} file; convert it to one of these")
    options: dict[str, Any] = {}
    if kind == "csv":
        # The words None, NA and nan are text, and an empty cell is empty text.
        options["keep_default_na"] = False
        options["sep"] = "\t" if path.suffix.lower() == ".tsv" else ","
    return dict(datasets.load_dataset(kind, data_files=str(path), **options))


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
        raise InputError(_not_on_hub(name, hub_says(error))) from error
    source = f"Hugging Face hub {'/'.join(hub)} at revision {Path(seen).name}"
    return dict(datasets.load_dataset(*hub, revision=Path(seen).name)), source


def _why_not(name: str, path: Path, error: Exception) -> str:
    text = one_line(error.__cause__ or error)
    if "corresponds to no data" in text or (path.is_file() and path.stat().st_size == 0):
        return f"dataset {name!r} has no rows; it needs texts and their classes"
    if path.exists():
        shape = SHAPES.get(FORMATS.get(path.suffix.lower(), ""), "its files must be of one kind")
        return f"dataset {name!r} cannot be read ({text}); {shape}"
    return _not_on_hub(name, text)


def _not_on_hub(name: str, text: str) -> str:
    return (
        f"dataset {name!r} is no local file or folder and could not be loaded from the hub "
        f"({text}); check the name and the network, or use --dataset movie-reviews"
    )


def _text_columns(config: RunConfig, rows: Any) -> tuple[str, ...]:
    wanted = [config.text_columns] if config.text_columns else TEXT_COLUMNS
    for columns in wanted:
        if all(column in rows.column_names for column in columns):
            return columns
    raise InputError(
        f"dataset {config.dataset!r} has the columns {', '.join(rows.column_names)}; name the "
        "one with the text by --text-column"
    )


def _label_column(config: RunConfig, rows: Any) -> str:
    wanted = (config.label_column,) if config.label_column else LABEL_COLUMNS
    for column in wanted:
        if column in rows.column_names:
            return column
    raise InputError(
        f"dataset {config.dataset!r} has the columns {', '.join(rows.column_names)}; name the "
        "one with the class by --label-column"
    )


def _label_names(config: RunConfig, rows: Any, column: str) -> list[str]:
    known = getattr(rows.features[column], "names", None)
    if known:
        return list(known)
    where = f"column {column!r} of {config.dataset!r}"
    named: set[str] = set()
    for row, value in enumerate(rows[column]):
        if isinstance(value, float) and not value.is_integer():
            raise InputError(
                f"{where} holds fractions, and a classifier needs classes; round them, or name "
                "another by --label-column"
            )
        if value is not None and not isinstance(value, str | int | float):
            raise InputError(
                f"{where} holds lists or records; it must hold one class a row: name another by "
                "--label-column"
            )
        text = _label_text(value)
        if not text:
            raise InputError(f"{_row(row, config)} has no label in {column!r}; mend or drop it")
        named.add(text)
    if len(named) > MOST_LABELS:
        raise InputError(f"{where} has {len(named)} classes; name another by --label-column")
    # Numbers by value, then words by letter.
    return sorted(named, key=lambda n: (0, int(n), n) if INTEGER.fullmatch(n) else (1, 0, n))


def _row(index: int, config: RunConfig) -> str:
    return f"row {index + 1} of {config.dataset!r} (a header is not counted)"


def _label_text(value: Any) -> str:
    """A label's name; empty where there is none."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) else str(value).strip()


def _examples(
    config: RunConfig, rows: Any, columns: Sequence[str], label: str, names: Sequence[str]
) -> Examples:
    if label not in rows.column_names or any(c not in rows.column_names for c in columns):
        raise InputError(
            f"the splits of dataset {config.dataset!r} have different columns; give them the same"
        )
    named = bool(getattr(rows.features[label], "names", None))
    index = {name: i for i, name in enumerate(names)}
    texts = list(zip(*(rows[column] for column in columns), strict=True))
    labels: list[int] = []
    for row, (text, value) in enumerate(zip(texts, rows[label], strict=True)):
        if not all(isinstance(part, str) and part.strip() for part in text):
            raise InputError(
                f"{_row(row, config)} has no text in {', '.join(columns)}; mend or drop it"
            )
        number = value if named else index.get(_label_text(value), -1)
        if number is None or not 0 <= number < len(names):
            raise InputError(
                f"{_row(row, config)} has the label {value!r}, which is not among those of the "
                "split train; mend or drop it"
            )
        labels.append(int(number))
    return Examples(texts, labels)
