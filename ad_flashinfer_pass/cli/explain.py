"""``explain``: show every attention of a model."""

from __future__ import annotations

from typing import Annotated

from ad_flashinfer_pass.cli.options import (
    OUTPUT,
    PROG,
    ConfigOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    MaxSeqLenOption,
    ModelOption,
    QuietOption,
    RandomWeightsOption,
    TokensPerBlockOption,
    TrustOption,
    error_border,
    option,
    settings,
)
from ad_flashinfer_pass.generation import explain_model
from ad_flashinfer_pass.progress import Reporter

EXAMPLES = f"""
[bold]Examples[/bold]

The attention of the demo model:

[green]{PROG} explain[/green]

An architecture without its weights, as data:

[green]{PROG} explain -m config.json --random-weights --json | jq '.sites[0]'[/green]
"""


def explain(
    model: ModelOption = None,
    config: ConfigOption = None,
    random_weights: RandomWeightsOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    max_seq_len: MaxSeqLenOption = None,
    tokens_per_block: TokensPerBlockOption = None,
    as_json: Annotated[bool, option(OUTPUT, None, "One JSON object.", "--json")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show every attention of a model, and what the pass does with it.

    Where it stands in the source, how it was matched, the class of its mask with the evidence, what
    was folded away, the kernel of each phase, and the bytes of its cache. A model that the pass
    refuses is explained by the refusal.
    """
    keys = {
        "model": model,
        "skip_loading_weights": random_weights or None,
        "trust_remote_code": trust_remote_code or None,
        "dtype": dtype,
        "device": device,
        "max_seq_len": max_seq_len,
    }
    with error_border(debug):
        deploy = settings(config, keys, tokens_per_block)
        with Reporter(quiet=quiet, live=True, debug=debug) as reporter:
            explain_model(deploy, reporter, as_json=as_json, debug=debug)
