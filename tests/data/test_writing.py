"""Files and folders are written whole or not at all, with the mode of the umask."""

import os
import stat

import pytest

from star_dss_plugin.data.writing import atomic_file, atomic_folder, write_text
from star_dss_plugin.errors import OutputError


@pytest.fixture
def umask():
    """Set an unusual umask, so that its effect shows."""
    set_umask = os.umask
    before = set_umask(0o027)
    yield
    set_umask(before)


def mode(path):
    """Return the permissions of a file or folder."""
    return stat.S_IMODE(path.stat().st_mode)


def test_files_and_folders_have_the_mode_of_the_umask(tmp_path, umask, monkeypatch):
    # Setting it, even for a moment, would change it for the other threads of the process.
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the process's umask was set"))
    write_text(tmp_path / "file", "a")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inner").write_bytes(b"")
    assert (mode(tmp_path / "file"), mode(tmp_path / "folder")) == (0o640, 0o750)


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "deep" / "file"
    write_text(path, "before\n")

    def fail_half_way():
        with atomic_file(path) as file:
            file.write(b"half")
            file.flush()
            assert path.read_text() == "before\n"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "before\n"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_an_unfinished_folder_is_removed(tmp_path):
    def fail_half_way():
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "inner").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_replaced(tmp_path):
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "first").touch()
    with pytest.raises(OSError, match="not empty|exists"), atomic_folder(tmp_path / "folder"):
        pass
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["first"]


def test_names_may_have_the_largest_length_of_the_file_system(tmp_path):
    path = tmp_path / ("ä" * 127)
    write_text(path, "a")
    assert path.read_text() == "a"


def test_text_is_written_as_utf8_without_changed_line_ends(tmp_path):
    write_text(tmp_path / "file", "é\n\r\n")
    assert (tmp_path / "file").read_bytes() == b"\xc3\xa9\n\r\n"


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written.*name an output"):
        write_text(tmp_path / "file" / "inner", "a")
