"""The files that a study's folder gets for people."""

from pathlib import Path

from peftprof.report import picture
from peftprof.report.study.figures import figures
from peftprof.report.study.markdown import to_markdown
from peftprof.report.study.page import to_html
from peftprof.studies import Judged


def write(judged: Judged, folder: Path) -> Path:
    """Write figures/*.svg, summary.md and index.html, each whole; the folder.

    Raises FolderError when one cannot be written.
    """
    drawn = figures(judged)
    picture.make_folder(folder / "figures")
    for old in (folder / "figures").glob("*.svg"):  # of a report that had more
        if old.name not in {figure.file for figure in drawn}:
            old.unlink()
    for figure in drawn:
        picture.save(figure.svg, folder / "figures" / figure.file, "the figure")
    named = [(figure.file, figure.caption) for figure in drawn]
    picture.save(to_markdown(judged, named), folder / "summary.md", "the summary")
    picture.save(to_html(judged, drawn), folder / "index.html", "the page")
    return folder
