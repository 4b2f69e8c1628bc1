"""``python -m ad_flashinfer_pass.follow``: one of the other ranks of a model, started by the first."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import TracebackType

from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.errors import AdFlashinferError
from ad_flashinfer_pass.runtime.ranks import start_as_follower


def _end_all(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of an error that nobody expects: at once, because a clean end would wait for the first rank."""
    # Within the hook of torch.distributed, which holds sys.stderr back until this one returns.
    traceback.print_exception(kind, error, trace, file=sys.__stderr__)
    os._exit(1)


def main() -> None:
    """Build a rank's part of the model and follow the first one; what is wrong is said in one line."""
    sys.excepthook = _end_all
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first rank ends the others
    try:
        build_model(start_as_follower(sys.stdin.buffer))
    except (AdFlashinferError, RuntimeError, MemoryError, OSError) as err:
        line = " ".join(str(err).split()) or type(err).__name__
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(1)  # the others may hold what a clean end would wait for


if __name__ == "__main__":
    main()
