"""Folders of control pages: whose node lives, and which go."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cotenant.devices import proctree
from cotenant.devices.nvidia import pagefolder
from cotenant.devices.nvidia.gates import Gates
from cotenant.devices.nvidia.page import VARIABLE
from cotenant.domain.errors import DeviceError

Make = Callable[..., Gates]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Gates] = []

    def make(node: str) -> Gates:
        made.append(Gates(node, Path("/nowhere/libcuda.so.1"), base=tmp_path))
        made[-1].open()
        return made[-1]

    yield make
    for found in made:
        found.close()


def left(base: Path, name: str = "cotenant-gates-of-a-dead-node") -> Path:
    """A page in a folder that nobody has touched for a day."""
    page = base / name / "page"
    page.parent.mkdir(mode=0o700)
    page.write_bytes(b"page")
    age(page.parent)
    return page


def age(folder: Path) -> None:
    os.utime(folder, (1.0, 1.0))


def test_what_a_killed_node_left_goes_when_another_opens(make: Make, tmp_path: Path) -> None:
    page, other = left(tmp_path), left(tmp_path, "something-else")
    mine = make("mine")
    assert not page.parent.exists()
    assert other.exists() and mine.folder.exists()


def test_the_folder_of_a_node_that_lives_stays_also_without_pages(make: Make) -> None:
    lives = make("lives")
    age(lives.folder)
    make("another")
    assert lives.folder.exists()
    lives.launch("j")


def test_a_node_that_was_killed_has_locked_nothing(make: Make, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from cotenant.devices.nvidia.gates import Gates; import time;"
        f"g = Gates('killed', Path('/nowhere'), base=Path({str(tmp_path)!r})); g.open();"
        "g.launch('j'); print(g.folder, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    age(folder)
    make("first")
    assert len(list(folder.iterdir())) == 1
    process.kill()
    process.communicate()
    make("second")
    assert not folder.exists()


def test_pages_that_processes_have_stay(make: Make, tmp_path: Path) -> None:
    page = left(tmp_path)
    job = subprocess.Popen(["sleep", "600"], env={VARIABLE: str(page)})
    try:
        while not proctree.marked(VARIABLE, str(page)):
            time.sleep(0.01)  # it is there before its environment is
        make("mine")
        assert page.exists()
    finally:
        job.kill()
        job.wait()


def test_a_folder_that_changed_a_moment_ago_stays(make: Make, tmp_path: Path) -> None:
    page = left(tmp_path)
    os.utime(page.parent)
    make("mine")
    assert page.exists()


def test_what_is_no_folder_of_ours_stays(make: Make, tmp_path: Path) -> None:
    elsewhere = left(tmp_path, "elsewhere")
    link, file = tmp_path / "cotenant-gates-link", tmp_path / "cotenant-gates-file"
    link.symlink_to(elsewhere.parent)
    os.utime(link, (1.0, 1.0), follow_symlinks=False)
    file.touch()
    age(file)
    make("mine")
    assert elsewhere.exists() and link.is_symlink() and file.exists()


def test_two_nodes_do_not_have_one_folder(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagefolder, "TAKE_WITHIN_S", 0.05)
    make("same")
    with pytest.raises(DeviceError, match="another node"):
        make("same")


def test_nodes_that_start_at_the_same_moment_have_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagefolder, "SETTLED_S", -1e9)
    failures: list[BaseException] = []

    def come_and_go(node: str) -> None:
        try:
            for _ in range(40):
                found = Gates(node, Path("/nowhere"), base=tmp_path)
                found.open()
                found.launch("j")
                found.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(f"node{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not list(tmp_path.iterdir())
