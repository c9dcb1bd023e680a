from __future__ import annotations

import csv
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from graphopt import files
from graphopt.errors import GraphOptError, OutputError
from graphopt.files import beside, locked, replaced, reserved, scratch, work_path, write_csv


def test_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with replaced(target) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_after_an_interruption(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with replaced(target) as temporary:
            temporary.write_text("half")
            raise interruption

    with pytest.raises(interruption):
        write()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.mlpackage"
    target.mkdir()
    (target / "old").write_text("")
    with replaced(target) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mlpackage"]


def test_rows_are_written_under_their_heading(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"x": 1, "y": "ü"}], ["x", "y"])
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{"x": "1", "y": "ü"}]


def put(target: Path, text: str) -> None:
    with replaced(target) as temporary:
        temporary.write_text(text)


def put_folder(target: Path, text: str) -> None:
    with replaced(target) as temporary:
        temporary.mkdir()
        for number in range(20):
            (temporary / str(number)).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what stands at the place ---------------------------------------------------------------------
def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    put(link, "new")
    assert (link.is_symlink(), real.read_text()) == (True, "new")


def test_a_link_to_a_folder_is_followed_and_the_folder_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    put_folder(real, "old")
    link.symlink_to(real)
    put_folder(link, "new")
    assert (link.is_symlink(), (real / "3").read_text()) == (True, "new")
    assert names(tmp_path) == ["link", "real"]


def test_a_link_to_nothing_makes_what_it_names(tmp_path: Path) -> None:
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "away" / "real.txt")
    put(link, "new")
    assert (tmp_path / "away" / "real.txt").read_text() == "new"
    assert link.is_symlink()


def test_a_link_to_itself_is_an_error_of_ours(tmp_path: Path) -> None:
    link = tmp_path / "link.txt"
    link.symlink_to(link)
    with pytest.raises(OutputError):
        put(link / "x", "new")
    assert names(tmp_path) == ["link.txt"]


def test_a_folder_takes_no_files_place_and_the_reverse(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    put_folder(folder, "old")
    with pytest.raises(OutputError, match="file is a file, and a folder is to be written"):
        put_folder(file, "new")
    with pytest.raises(OutputError, match="folder is a folder, and a file is to be written"):
        put(folder, "new")
    assert (file.read_text(), (folder / "0").read_text()) == ("old", "old")
    assert names(tmp_path) == ["file", "folder"]


def test_a_file_in_place_of_a_folder_above_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match="cannot be written"):
        put(tmp_path / "file" / "a.txt", "new")
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("length", [254, 255, 256])
@pytest.mark.parametrize("letter", ["a", "ü"])
def test_names_may_be_as_long_as_the_system_takes(tmp_path: Path, length: int, letter: str) -> None:
    stem = letter * ((length - 4) // len(letter.encode()))
    target = tmp_path / (stem + "x" * (length - 4 - len(stem.encode())) + ".txt")
    assert len(os.fsencode(target.name)) == length
    if length > 255:
        with pytest.raises(OutputError):
            put(target, "new")
        assert names(tmp_path) == []
        return
    put(target, "new")
    put(target, "newer")
    assert target.read_text() == "newer"
    assert names(tmp_path) == [target.name]


# --- disks ----------------------------------------------------------------------------------------
def limited(write: Callable[[], None], size: int) -> BaseException | None:
    """What `write` raises where files may have `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        write()
    except GraphOptError as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    return None


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    error = limited(lambda: put(target, "x" * 10_000), 4_096)
    assert isinstance(error, OutputError)
    assert "what was there is as it was" in str(error)
    assert (target.read_text(), names(tmp_path)) == ("old", ["a.txt"])


def test_space_is_tried_before_it_is_needed(tmp_path: Path) -> None:
    target = tmp_path / "a"
    assert limited(lambda: reserved(target, 10_000), 4_096) is not None
    reserved(target, 10_000)
    with pytest.raises(OutputError, match="bytes are needed"):
        reserved(target, 1 << 60)
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_is_read_only_is_an_error_of_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError):
        put(tmp_path / "a.txt", "new")


def test_an_error_of_the_system_is_named_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OutputError, match="Read-only file system") as caught:
        put(tmp_path / "a.txt", "new")
    assert caught.value.errno == errno.EROFS
    assert names(tmp_path) == []


# --- kills and others -----------------------------------------------------------------------------
def ends_in(work: Callable[[], None]) -> int | None:
    """The exit code of a process that does `work`."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


def write_half(path: Path) -> None:
    with replaced(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def leave_work(path: Path) -> None:
    with scratch(path), replaced(path) as temporary:
        work_path(temporary).write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def hold(path: Path) -> None:
    with locked(path):
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    target, other = tmp_path / "a.txt", tmp_path / "b.txt"
    assert ends_in(partial(write_half, target)) == -signal.SIGKILL
    assert ends_in(partial(write_half, other)) == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    put(target, "new")
    left = names(tmp_path)
    assert left[-1] == "a.txt"
    assert len(left) == 2, "what is left of another file is not touched"


def test_what_a_killed_writer_needed_beside_its_file_goes_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    assert ends_in(partial(leave_work, target)) == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    with scratch(target) as folder, replaced(target) as temporary:
        work_path(temporary).touch()
        temporary.touch()
        # another writer of the same path touches neither
        put(target, "other")
        assert folder.is_dir()
        assert work_path(temporary).exists()
        work_path(temporary).unlink()
    assert names(tmp_path) == ["a.txt"]


def test_what_lies_beside_the_longest_name_has_a_shorter_one(tmp_path: Path) -> None:
    assert beside(tmp_path / "a.txt", "lock").name == ".a.txt.lock"
    beside(tmp_path / ("n" * 255), "partial").mkdir()
    with scratch(tmp_path / ("n" * 255)) as folder:
        assert folder.is_dir()


def test_a_folder_that_a_killed_writer_had_set_aside_comes_back(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    target = tmp_path / "a.pkg"
    put_folder(target, "old")
    target.rename(tmp_path / f".a.old.{files._HOST}-{gone.pid}-00000000.pkg")

    def fail() -> None:
        with replaced(target):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == ["a.pkg"]
    assert (target / "0").read_text() == "old"


def write_often(write: Callable[[Path, str], None], target: Path, text: str) -> None:
    for _ in range(30):
        write(target, text)


@pytest.mark.parametrize("write", [put, put_folder])
def test_writers_of_one_path_each_leave_a_whole_artifact(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    target = tmp_path / "a"
    write(target, "0")
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=write_often, args=(write, target, str(number)))
        for number in range(3)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if write is put:
            assert len(target.read_text()) == 1
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == ["a"]
    parts = {path.read_text() for path in target.iterdir()} if target.is_dir() else {"x"}
    assert len(parts) == 1


def test_a_lock_names_its_owner_and_ends(tmp_path: Path) -> None:
    target = tmp_path / "table.jsonl"
    with (
        locked(target),
        pytest.raises(OutputError, match=f"process {os.getpid()} on"),
        locked(target),
    ):
        pass
    assert names(tmp_path) == []
    with locked(target):
        pass


def test_a_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    target = tmp_path / "table.jsonl"
    assert ends_in(lambda: hold(target)) == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    with locked(target):
        pass
    assert names(tmp_path) == []


def test_of_many_threads_one_has_the_lock(tmp_path: Path) -> None:
    inside, most, refused = 0, 0, 0
    guard = threading.Lock()

    def run() -> None:
        nonlocal inside, most, refused
        for _ in range(100):
            try:
                with locked(tmp_path / "x"):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1
            except OutputError:
                with guard:
                    refused += 1

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused < 400
