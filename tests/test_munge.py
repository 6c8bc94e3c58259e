"""An absent munged is reported at once; other ways to reach SLURM are not blocked."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from pathlib import Path

import fake_schedulers
import pytest

from jobs.slurm import munge

Conf = Callable[..., Path]
counter = itertools.count()


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conf:
    """Writes the slurm.conf that SLURM's commands would read. sinfo is missing, so SLURM does not answer."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.chdir(tmp_path)  # a socket's path is short

    def write(*lines: str) -> Path:
        (tmp_path / "slurm.conf").write_text("\n".join(["ClusterName=c", *lines, ""]))
        return tmp_path

    return write


def new_path() -> str:
    """A path where nothing is; verdicts are cached by path."""
    return f"/nowhere/munge-{next(counter)}"


def test_a_missing_socket_and_one_without_a_listener_are_named(conf: Conf) -> None:
    conf("AuthType=auth/munge", "# AuthInfo=socket=/elsewhere", "AuthInfo=cred_expire=5,socket=m.sock,ttl=9")
    assert "(m.sock: No such file or directory)" in munge.absent()
    with socket.socket(socket.AF_UNIX) as munged:
        munged.bind("m.sock")
        assert "(m.sock: Connection refused)" in munge.absent()
        munged.listen()
        assert munge.absent() == ""


def test_the_socket_may_be_named_in_an_included_file_or_be_the_default(conf: Conf) -> None:
    folder, named, default = conf("include auth.conf"), new_path(), new_path()
    (folder / "auth.conf").write_text(f"authinfo = socket={named}\n")
    assert f"({named}: " in munge.absent(default)
    (folder / "auth.conf").write_text("")
    assert f"({default}: " in munge.absent(default)


def test_a_cluster_without_munge_or_with_its_configuration_elsewhere_is_let_through(
    conf: Conf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = conf("AuthType=auth/slurm")
    assert munge.absent(new_path()) == ""
    conf(f"AuthInfo=socket={new_path()}")
    for body in ("echo main", "echo Unable to contact slurm controller >&2; exit 1"):
        fake_schedulers.write_tool(folder / "bin", "sinfo", body)
        assert munge.absent() == "", "SLURM answers, or reports by itself what is wrong"
    fake_schedulers.write_tool(folder / "bin", "sinfo", "echo Munge encode failed >&2; exit 1")
    assert munge.absent()
    monkeypatch.setenv("SLURM_CONF", str(folder / "none.conf"))
    assert munge.absent() == "", "SLURM itself reports that it has no configuration"
