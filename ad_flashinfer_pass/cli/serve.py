"""``serve``: an OpenAI-compatible endpoint."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from ad_flashinfer_pass.cli.options import (
    BUILDING,
    PROG,
    DebugOption,
    Keys,
    QuietOption,
    option,
    taking,
)
from ad_flashinfer_pass.cli.progress import Reporter
from ad_flashinfer_pass.errors import ConfigError

_SERVER = "Server"
EXAMPLES = f"""
[bold]Examples[/bold]

The demo model, and a request:

[green]{PROG} serve[/green]

[green]curl localhost:8000/v1/completions -H 'Content-Type: application/json'
-d '{{"prompt": "Once upon a time", "stream": true}}'[/green]

A model on a GPU, for 64 requests at once:

[green]{PROG} serve -m PATH --device cuda --compile-backend torch-opt --max-batch-size 64[/green]
"""


@taking(*BUILDING, "skip_loading_weights", "max_batch_size", "max_num_tokens")
def serve(
    *,
    keys: Keys,
    host: Annotated[str, option(_SERVER, "NAME", "Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option(_SERVER, "N", "Port to listen on; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, option(_SERVER, "NAME", "What clients call the model. Default: as --model says.")
    ] = None,
    api_key: Annotated[
        str | None,
        option(_SERVER, "KEY", "That clients must send. Default: none.", envvar="AD_FLASHINFER_PASS_API_KEY"),
    ] = None,
    max_waiting: Annotated[
        int, option(_SERVER, "N", "Requests that may wait beside those that run; more get status 429.")
    ] = 256,
    max_body_mb: Annotated[int, option(_SERVER, "N", "Megabytes of a request's body, at most.")] = 8,
    timeout: Annotated[float, option(_SERVER, "SECONDS", "Of one request, at most.")] = 600.0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve a model with OpenAI's API: chat and text completions, streamed or whole.

    One process, one model. SIGTERM lets running requests finish. Needs the extra serve:
    pip install 'ad-flashinfer-pass[serve]'.
    """
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve needs {', '.join(missing)}: pip install 'ad-flashinfer-pass[serve]'.")
    for name, number in (
        ("--max-waiting", max_waiting),
        ("--max-body-mb", max_body_mb),
        ("--timeout", timeout),
    ):
        if number <= 0:
            raise ConfigError(f"{name} must be positive, got {number:g}.")
    config = keys.config()
    from ad_flashinfer_pass.serving.listen import bind, listen

    bound = bind(host, port)  # before the model is built, and not after it
    from ad_flashinfer_pass.cli.generation import libraries_quiet

    with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
        reporter.phase("load_libraries")
        from ad_flashinfer_pass import build

        llm = build.build_model(config, on_event=reporter.phase)
        reporter.ready(config.device)
        if (reason := llm.engine.no_block_reuse) is not None:
            reporter.line(f"requests that begin alike do not share pages: {reason}")
    from ad_flashinfer_pass.serving.app import Limits, create_app

    name = served_model_name or config.model
    limits = Limits(
        max_waiting=max_waiting, max_body_bytes=max_body_mb * 10**6, timeout=timeout, api_key=api_key
    )
    if not quiet:
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s")
        logging.getLogger("ad_flashinfer_pass.serving").setLevel(logging.INFO)
    listen(
        create_app(llm, name, limits),
        bound,
        timeout=timeout,
        on_ready=lambda url: None if quiet else typer.echo(f"{name} at {url}/v1", err=True),
    )
