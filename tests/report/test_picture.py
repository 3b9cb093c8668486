"""Where a report may be written, and where it may not."""

from pathlib import Path

import pytest

from peftprof.errors import FolderError
from peftprof.report.picture import check_apart, check_writable, save


def test_a_report_replaces_files_and_nothing_else(tmp_path: Path) -> None:
    for path in (Path("/dev/null"), tmp_path, tmp_path / "none" / "x.html", Path()):
        with pytest.raises(FolderError, match="no file that can be written"):
            check_writable(path)
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "target.html")
    with pytest.raises(FolderError, match="--html"):
        save("x", link, "--html")
    save("x", tmp_path / "page.html", "--html")
    save("y", tmp_path / "page.html", "--html")
    assert (tmp_path / "page.html").read_text() == "y"


def test_outputs_are_apart_from_each_other_and_from_what_is_read(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text("{}")
    page = tmp_path / "page.html"
    check_apart({"--html": page, "--svg": tmp_path / "page.svg"}, [trace])
    with pytest.raises(FolderError, match="over what is read"):
        check_apart({"--html": tmp_path / "." / "trace.json"}, [trace])
    with pytest.raises(FolderError, match="over what --html writes"):
        check_apart({"--html": page, "--svg": page}, [trace])


def test_a_runs_own_files_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FolderError, match="a run's own file"):
        check_apart({"--perfetto": tmp_path / "run.json"}, [tmp_path])
    check_apart({"--perfetto": tmp_path / "tracks.json"}, [tmp_path])
