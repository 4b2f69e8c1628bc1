"""A user without a home, as containers have with an arbitrary uid."""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from importlib import reload
from pathlib import Path

import pytest

from ad_flashinfer_pass import kernels
from ad_flashinfer_pass.kernels import measure


def test_no_home_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is cached goes to a folder of this user alone; one that somebody else prepared is not taken."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setenv("HOME", "set, so that it is put back")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for _ in range(2):  # the same the second time
        monkeypatch.delenv("HOME")
        with pytest.raises(RuntimeError):
            Path.home()
        reload(kernels)
        assert Path.home() == tmp_path / f"ad_flashinfer_pass-{os.getuid()}"
        assert stat.S_IMODE(Path.home().stat().st_mode) == 0o700
    measure.write_choices({"a": 1})
    assert measure.read_choices() == {"a": 1}
    assert list(tmp_path.rglob("kernels.json")) == [measure.cache_file()]

    Path.home().chmod(0o777)
    monkeypatch.delenv("HOME")
    reload(kernels)
    assert Path.home().parent == tmp_path
    assert stat.S_IMODE(Path.home().stat().st_mode) == 0o700
