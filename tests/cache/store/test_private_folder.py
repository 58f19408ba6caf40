"""Below a directory that all may write to, a folder is used only if no other user made it or can write to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cache import EmbeddedError, EmbeddedValkey, why_unsafe
from proxy.clock import SystemClock

ME = os.geteuid()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory as /tmp."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def made(folder: Path, mode: int) -> Path:
    folder.mkdir(parents=True)
    folder.chmod(mode)
    return folder


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folder_that_only_its_user_can_write_to_is_used(shared: Path, mode: int) -> None:
    """One that does not exist yet, too, also below others that do not exist."""
    assert why_unsafe(made(shared / "own", mode)) == ""
    assert why_unsafe(shared / "missing") == ""
    assert why_unsafe(shared / "missing" / "deeper") == ""


def test_a_folder_of_another_user_is_not_used(shared: Path) -> None:
    """Although root could write there."""
    assert why_unsafe(made(shared / "theirs", 0o700), ME + 1) == f"{shared}/theirs belongs to another user ({ME})"


@pytest.mark.parametrize("mode", [0o702, 0o720, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_used(shared: Path, mode: int) -> None:
    """Its own group is enough."""
    open_one = made(shared / "open", mode)
    assert why_unsafe(open_one) == f"{open_one} can be written to by other users"


def test_a_symbolic_link_is_not_followed(shared: Path, tmp_path: Path) -> None:
    """Neither the folder nor one above it may be a link, whether or not the link leads anywhere."""
    target = made(tmp_path / "target", 0o700)
    (shared / "link").symlink_to(target)
    (shared / "broken").symlink_to(tmp_path / "nowhere")
    for path, link in (("link", "link"), ("broken", "broken"), ("link/deeper", "link")):
        assert why_unsafe(shared / path) == f"{shared / link} is a symbolic link"


@pytest.mark.parametrize(("mode", "is_safe"), [(0o1777, True), (0o777, False), (0o770, True)])
def test_a_folder_is_used_if_nobody_can_replace_it(shared: Path, mode: int, *, is_safe: bool) -> None:
    """In a directory with the sticky bit only its owner can."""
    above = made(shared / "above", mode)
    expected = "" if is_safe else f"{above} can be written to by other users"
    assert why_unsafe(made(above / "own", 0o700)) == expected


@pytest.mark.skipif(not Path("/dev/fd").is_symlink(), reason="needs Linux's /dev")
def test_what_the_operator_has_chosen_elsewhere_is_used() -> None:
    """A link, or a volume that all may write to, in a directory that only its owner can write to."""
    assert why_unsafe(Path("/dev/fd")) == why_unsafe(Path("/dev/shm")) == ""


@pytest.mark.parametrize("kind", ["link", "open"])
def test_the_private_valkey_does_not_start_in_an_unsafe_folder(shared: Path, tmp_path: Path, kind: str) -> None:
    """It changes nothing there, and the error says what to do."""
    target = made(tmp_path / "target", 0o755)
    if kind == "link":
        (shared / "data").symlink_to(target)
    else:
        target = made(shared / "data", 0o777)
    mode = target.stat().st_mode
    with pytest.raises(EmbeddedError, match=r"does not use .*remove that, or set redis\.folder"):
        EmbeddedValkey(shared / "data", clock=SystemClock()).start()
    assert (target.stat().st_mode, list(target.iterdir())) == (mode, [])


@pytest.mark.skipif(ME != 0, reason="only root can make a folder that belongs to another user")
def test_root_does_not_take_over_a_folder_of_another_user(shared: Path) -> None:
    """Which its owner could fill, or change while Valkey runs."""
    folder = made(shared / "data", 0o700)
    os.chown(folder, 12_345, 12_345)
    with pytest.raises(EmbeddedError, match=r"belongs to another user \(12345\)"):
        EmbeddedValkey(folder, clock=SystemClock()).start()
    assert folder.stat().st_uid == 12_345


@pytest.mark.skipif(ME != 0, reason="only root can make a folder that belongs to another user")
def test_a_directory_of_root_above_one_s_own_is_as_good_as_one_s_own(shared: Path) -> None:
    """A service manager makes private temporary ones."""
    own = made(shared / "of root" / "own", 0o700)
    os.chown(own, 4_711, 4_711)
    assert why_unsafe(own, 4_711) == ""
    os.chown(own.parent, 4_712, 4_712)
    assert why_unsafe(own, 4_711) == f"{own.parent} belongs to another user (4712)"
