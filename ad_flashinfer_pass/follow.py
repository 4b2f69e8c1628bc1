"""``python -m ad_flashinfer_pass.follow``: one of the other ranks of a model, started by the first."""

from __future__ import annotations

import os
import signal
import sys

from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.errors import AdFlashinferError
from ad_flashinfer_pass.runtime.ranks import start_as_follower


def main() -> None:
    """Build a rank's part of the model and follow the first one; what is wrong is said in one line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first rank ends the others
    try:
        build_model(start_as_follower(sys.stdin.buffer))
    except (AdFlashinferError, RuntimeError, MemoryError, OSError) as err:
        line = " ".join(str(err).split()) or type(err).__name__
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(1)  # the others may hold what a clean end would wait for


if __name__ == "__main__":
    main()
