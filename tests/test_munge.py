"""A munged that is away is told at once; no other way to speak to SLURM is stood in the way of."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.slurm import munge

Conf = Callable[..., Path]


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conf:
    """Writes the slurm.conf that SLURM's commands would read; sinfo is not there, so SLURM does not answer."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setattr(munge, "_silent", {})

    def write(*lines: str) -> Path:
        (tmp_path / "slurm.conf").write_text("\n".join(["ClusterName=c", *lines, ""]))
        return tmp_path

    return write


def test_a_socket_that_is_not_there_or_that_nobody_listens_at_is_named(
    conf: Conf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = conf("AuthType=auth/munge", "# AuthInfo=socket=/elsewhere", "AuthInfo=cred_expire=5,socket=m.sock,ttl=9")
    monkeypatch.chdir(folder)  # a socket's path is short
    assert munge.absent() == "munged does not run on this machine (m.sock: No such file or directory)"
    with socket.socket(socket.AF_UNIX) as munged:
        munged.bind("m.sock")
        assert munge.absent() == "munged does not run on this machine (m.sock: Connection refused)"
        munged.listen()
        assert munge.absent() == ""


def test_the_socket_may_be_named_by_an_included_file_or_be_libmunges_own(
    conf: Conf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = conf("include auth.conf")
    (folder / "auth.conf").write_text("authinfo = socket=/nowhere/at.all\n")
    assert "/nowhere/at.all: " in munge.absent()
    (folder / "auth.conf").write_text("")
    monkeypatch.setattr(munge, "SOCKET", "/nowhere/either")
    assert "/nowhere/either: " in munge.absent()


def test_who_uses_no_munge_or_keeps_it_where_we_do_not_look_is_let_through(
    conf: Conf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = conf("AuthType=auth/slurm")
    assert munge.absent() == ""
    conf("AuthInfo=socket=/nowhere/at.all")
    (folder / "bin").mkdir()
    for said in ("echo main", "echo Unable to contact slurm controller >&2; exit 1"):
        (folder / "bin" / "sinfo").write_text(f"#!/bin/sh\n{said}\n")
        (folder / "bin" / "sinfo").chmod(0o755)
        assert munge.absent() == "", "SLURM answers, or says itself what is wrong"
    (folder / "bin" / "sinfo").write_text("#!/bin/sh\necho Munge encode failed >&2; exit 1\n")
    assert munge.absent().startswith("munged does not run on this machine (/nowhere/at.all")
    monkeypatch.setenv("SLURM_CONF", str(folder / "none.conf"))
    assert munge.absent() == "", "SLURM itself says that it has no configuration"
