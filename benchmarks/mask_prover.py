"""Random masks against the mask prover: how many it classifies, how many it refuses, and that none is wrong.

    python benchmarks/mask_prover.py [--masks 10000] [--seed 0] [--tokens 24]

Each mask is composed at random of causal, window, chunk, padding, prefix-LM, document and dilated parts, with
off-by-ones, differences at one place, row or head, biases, and several ways to write each. What it truly is
comes from running it at every number of tokens, up to 24 with 1 to 3 rows. Exit code 1 if a class is wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ad_flashinfer_pass import masks
from ad_flashinfer_pass.errors import MaskError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script can only import from its own folder
from tests.masks.mask_programs import is_right, random_mask, truth

RIGHT, WRONG = "right class", "wrong class"
REFUSED, MISSED = "refused, has no class", "refused, has a class"


def verdict(seed: int, tokens: int) -> tuple[str, str, float]:
    """The verdict on one mask, the class or the refusal, and the seconds that the prover took."""
    node, gm = random_mask(random.Random(seed).choice, tokens)
    wanted = truth(gm, tokens)
    start = time.perf_counter()
    try:
        found = masks.prove(node, tokens).mask_class
    except MaskError as refusal:
        return REFUSED if wanted is None else MISSED, str(refusal), time.perf_counter() - start
    seconds = time.perf_counter() - start
    return RIGHT if is_right(found, wanted) else WRONG, str(found), seconds


def main() -> None:
    """Try the masks and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--masks", type=int, default=10_000, help="how many masks to try")
    parser.add_argument("--seed", type=int, default=0, help="of the first mask; the others follow it")
    parser.add_argument("--tokens", type=int, default=24, help="max_seq_len of the proofs")
    args = parser.parse_args()
    torch.set_num_threads(1)

    console = Console(stderr=True)
    counts: Counter[str] = Counter()
    seconds = []
    for seed in track(range(args.seed, args.seed + args.masks), "masks", console=console):
        outcome, text, taken = verdict(seed, args.tokens)
        counts[outcome] += 1
        seconds.append(taken)
        if outcome in (WRONG, MISSED):
            console.print(f"mask {seed}: {outcome}: {text}", highlight=False)

    title = f"{args.masks} masks from seed {args.seed}, {args.tokens} tokens, torch {torch.__version__}"
    table = Table("verdict", "masks", "share", title=title)
    for outcome in (RIGHT, REFUSED, MISSED, WRONG):
        table.add_row(outcome, str(counts[outcome]), f"{counts[outcome] / args.masks:.1%}")
    seconds.sort()
    median, slowest = seconds[len(seconds) // 2], seconds[-1]
    Console().print(table)
    Console().print(f"One proof took {median * 1e3:.0f} ms in the middle and {slowest * 1e3:.0f} ms at most.")
    sys.exit(1 if counts[WRONG] else 0)


if __name__ == "__main__":
    main()
