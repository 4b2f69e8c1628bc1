"""Random schedules of the engine, many more than the tests have time for.

    python benchmarks/schedules.py --examples 100000 --jobs 16

Each is a run of ``tests/runtime/test_engine_machine.py``: requests with shared beginnings, penalties,
preemption, cancellations, failures and Ctrl-C, over engines of any shape. All must give the tokens of each
request alone, and all pages back.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that it can import from
from tests.runtime.test_engine_machine import EngineMachine

_AT_ONCE = 250


def run(number: int) -> None:
    """As many schedules as are run at once, with a seed of their own."""
    kinds = settings(
        max_examples=_AT_ONCE,
        stateful_step_count=40,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(number)(EngineMachine), settings=kinds)


def main() -> int:
    """Parse arguments and run; an error names the schedule."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=8)
    args = parser.parse_args()
    numbers = range(-(-args.examples // _AT_ONCE))
    with ProcessPoolExecutor(args.jobs) as pool:
        for done, _ in enumerate(pool.map(run, numbers), 1):
            print(f"{done * _AT_ONCE} schedules", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
