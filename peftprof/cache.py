"""Where peftprof keeps what it fetched, prepared or measured, and how a file gets there whole."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where fetched and prepared files are kept: $PEFTPROF_CACHE, else the user's cache."""
    if named := os.environ.get("PEFTPROF_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftprof"


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` under another name, then rename it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        new = Path(folder) / path.name
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
