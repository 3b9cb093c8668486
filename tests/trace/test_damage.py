"""Damaged and hostile files end in a result or in one clear line, in bounds of time and memory."""

import json
import math
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from peftprof.errors import PeftprofError
from peftprof.records import encode
from peftprof.report import breakdown, console, export, page, perfetto, tables
from peftprof.trace import Loaded, load
from peftprof.trace.attribute import Attribution
from tests.trace import bombs, crowds
from tests.trace.damage import Damaged, damaged
from tests.trace.seeds import Seeds, healthy

HOSTILE = [(maker, what) for maker in (bombs.hostile, crowds.hostile) for what in maker]
FILES = 5000 - len(HOSTILE)
SHARES = 10
MAX_SECONDS = 30  # of the processor for one file, read and shown in every way; most take 0.02
MAX_GROWTH = 1 << 30
MAX_ADDRESSES = 3 << 30  # of a whole process, its libraries included
SMALL = 20 << 20  # a picture or tracks that this test looks into

READ = "read"


@pytest.fixture(scope="module")
def seeds() -> Seeds:
    return healthy()


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, str], Path]:
    """`hostile_file(maker, what)`: its path; made once, for some take seconds to make."""
    root = tmp_path_factory.mktemp("hostile")
    made: dict[str, Path] = {}

    def make(maker: Any, what: str) -> Path:
        if what not in made:
            (root / what).mkdir()
            made[what] = maker.made(what).write(root / what)
        return made[what]

    return make


def outcome(item: Damaged, folder: Path) -> str:
    """Write, read and show `item`: READ, or the line that said why not."""
    folder.mkdir()
    return outcome_of(item.write(folder), folder)


def outcome_of(path: Path, folder: Path) -> str:
    kept: list[tuple[str, Attribution]] = []
    try:
        loaded = load([path], timelines=True, keep=lambda *found: kept.append(found))
    except PeftprofError as error:
        is_one_clear_line(str(error), path)
        return str(error).replace(str(path), "PATH")
    adds_up(loaded)
    is_shown(loaded)
    tracks = folder / "tracks.json"
    perfetto.write(kept, tracks)
    if tracks.stat().st_size < SMALL:
        for event in json.loads(tracks.read_text())["traceEvents"]:
            assert 0 <= event.get("dur", 0) < math.inf
    return READ


def is_one_clear_line(message: str, path: Path) -> None:
    assert message.isprintable()
    assert str(path) in message
    assert 10 < len(message.replace(str(path), "")) < 300


def adds_up(loaded: Loaded) -> None:
    assert loaded.breakdowns
    for run in loaded.breakdowns:
        parts = [*(row.ns for row in run.rows), run.idle_ns, run.unattributed_ns]
        assert math.isclose(math.fsum(parts), run.step_ns.median, rel_tol=1e-9)
        assert run.step_ns.median > 0
        assert all(0 <= number < math.inf for number in numbers(encode(run)))


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def is_shown(loaded: Loaded) -> None:
    json.loads(export.to_json(loaded))
    shown = console.plain(breakdown.render(loaded))
    for text in (shown, tables.to_csv(loaded), tables.to_markdown(loaded)):
        assert text.replace("\n", "").isprintable()
    html = page.render(loaded)
    html.encode()  # no half of a surrogate pair
    for unclean in ("<script>evil", "\x1b", "\0", "\u202e"):
        assert unclean not in html


class Bounds:
    """Time and memory from here on; `check` after each file."""

    def __init__(self) -> None:
        self.slowest = 0.0
        self._peak = self._resident()
        self._at = time.process_time()

    def check(self) -> None:
        now = time.process_time()
        self.slowest = max(self.slowest, now - self._at)
        assert now - self._at < MAX_SECONDS
        assert self._resident() - self._peak < MAX_GROWTH
        self._at = now

    def restart(self) -> None:
        self._at = time.process_time()

    @staticmethod
    def _resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_a_damaged_file_ends_in_a_result_or_in_one_line(
    tmp_path: Path, seeds: Seeds, share: int
) -> None:
    bounds, ends = Bounds(), Counter[bool]()
    for number in range(share, FILES, SHARES):
        item = damaged(number, seeds)
        bounds.restart()
        try:
            ends[outcome(item, tmp_path / str(number)) == READ] += 1
            bounds.check()
        except Exception as error:
            error.add_note(f"file {number}: {item.what[:300]}")
            raise
    # Neither all whole nor all beyond reading: most of the code has seen them.
    assert min(ends[True], ends[False]) > 0.2 * ends.total()


@pytest.mark.slow
@pytest.mark.parametrize(("maker", "what"), HOSTILE, ids=[what for _, what in HOSTILE])
def test_a_hostile_file_is_bounded(
    tmp_path: Path, hostile_file: Callable[[Any, str], Path], maker: Any, what: str
) -> None:
    path = hostile_file(maker, what)
    bounds = Bounds()
    outcome_of(path, tmp_path)
    bounds.check()


FORMS: tuple[tuple[str, ...], ...] = (
    (), ("--json",), ("--markdown",), ("--csv",), ("--html", "page.html"),
    ("--perfetto", "tracks.json.gz"), ("--svg", "picture.svg"), ("--all", "--top", "1000"),
)  # fmt: skip


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESSES, MAX_ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


def command(
    path: Path, options: Sequence[str] = (), cwd: Path | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """`peftprof breakdown` in a process of its own, which may take only so much."""
    run = [sys.executable, "-m", "peftprof", "breakdown", str(path), *options]
    return subprocess.run(run, capture_output=True, cwd=cwd, timeout=120, preexec_fn=limited)


def ended_well(done: "subprocess.CompletedProcess[bytes]") -> None:
    said = done.stderr.decode()
    assert "Traceback" not in said
    if done.returncode == 0:
        assert said == ""
        assert done.stdout
    else:
        assert done.returncode == 2
        assert said.startswith("peftprof: ")
        assert said.endswith("\n")
        assert said[:-1].isprintable()
        assert done.stdout == b""


@pytest.mark.slow
def test_the_command_line_ends_with_0_or_with_2_and_one_line(
    tmp_path: Path, seeds: Seeds, hostile_file: Callable[[Any, str], Path]
) -> None:
    codes = Counter[int]()

    def end(path: Path, options: tuple[str, ...], what: str) -> None:
        done = command(path, options, cwd=tmp_path)
        try:
            ended_well(done)
        except AssertionError as error:
            error.add_note(f"{what[:300]} {options}: {done.stderr[-500:]!r}")
            raise
        codes[done.returncode] += 1

    def broken(number: int) -> None:
        item, folder = damaged(number, seeds), tmp_path / str(number)
        folder.mkdir()
        end(item.write(folder), FORMS[number % len(FORMS)], item.what)

    def hostile(number: int, maker: Any, what: str) -> None:
        end(hostile_file(maker, what), FORMS[number % 6], what)

    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(broken, number) for number in range(40)]
        made += [pool.submit(hostile, n, *which) for n, which in enumerate(HOSTILE, 40)]
        for one in made:
            one.result()
    assert set(codes) == {0, 2}
