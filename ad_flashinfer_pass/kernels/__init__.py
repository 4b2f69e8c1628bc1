"""Kernel providers, one file each."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def _own_folder() -> str:
    """A folder of this user alone, below that for temporary files; the same each time if it can be."""
    folder = Path(tempfile.gettempdir()) / f"ad_flashinfer_pass-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return str(folder) if is_own else tempfile.mkdtemp()


try:
    Path.home()
except RuntimeError:
    # A user without a home, as containers have. FlashInfer, imported below this package alone, asks for one.
    os.environ["HOME"] = _own_folder()
