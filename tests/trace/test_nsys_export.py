"""Reports of nsys are exported by nsys: the one program that cannot be the real one here."""

from pathlib import Path

import pytest

from peftprof.errors import TraceError
from peftprof.trace import nsys_export
from tests.trace.nsys_files import one, small


def fake_nsys(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "bin" / "nsys"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "--output=x.nsys-rep"
    path.write_bytes(b"a report")
    return path


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


def test_a_report_is_exported(
    tmp_path: Path, report: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small().write(tmp_path, "made.sqlite")
    fake_nsys(
        tmp_path, monkeypatch,
        f'echo "$@" > {tmp_path}/said; eval "last=\\${{$#}}"; test -f "$last" || exit 1\n'
        f'while [ "$1" != --output ]; do shift; done; cp {tmp_path}/made.sqlite "$2"',
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found = nsys_export.export(Path(report.name), into)
    assert found == into / "--output=x.sqlite"
    assert len(one(found)) == 5
    assert (tmp_path / "said").read_text().split() == [
        "export", "--type", "sqlite", "--force-overwrite", "true", "--output", str(found),
        str(report),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'cannot read\nthis report' >&2; exit 3", "cannot read this report"),
        ("exit 3", "exit code 3"),
        ("exit 0", "no file written"),
        ("exec sleep 60", "took more than 0.3 s"),
    ],
)
def test_nsys_that_fails(
    tmp_path: Path,
    report: Path,
    into: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    words: str,
) -> None:
    fake_nsys(tmp_path, monkeypatch, script)
    with pytest.raises(TraceError, match=words) as caught:
        nsys_export.export(report, into, max_seconds=0.3 if "sleep" in script else 60)
    assert "\n" not in str(caught.value)
    assert str(report) in str(caught.value)


def test_no_nsys_and_no_report(report: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(into))
    with pytest.raises(TraceError, match="nsys export --type sqlite"):
        nsys_export.export(report, into)
    with pytest.raises(TraceError, match="no file"):
        nsys_export.export(into / "missing.qdrep", into)
