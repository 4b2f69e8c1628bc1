"""uvicorn around the endpoint."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from ad_flashinfer_pass.errors import ConfigError

# The engine's thread takes the interpreter back so often from one that turns tokens into text; Python's own
# 5 ms are as long as a step.
_SWITCH_SECONDS = 0.0005


def listen(app: FastAPI, host: str, port: int, *, timeout: float, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; then take no new connections, and let requests finish.

    Args:
        app: the endpoint.
        host: name or address.
        port: 0 takes a free one.
        timeout: seconds that requests have to finish.
        on_ready: called with the URL once connections are accepted.

    Raises:
        ConfigError: the address cannot be had.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(timeout),
    )
    try:
        socket = config.bind_socket()
    except SystemExit:  # of uvicorn, which has logged why
        raise ConfigError(f"--host {host} --port {port}: cannot listen there. Take another port.") from None
    sys.setswitchinterval(_SWITCH_SECONDS)
    shown = f"[{host}]" if ":" in host else host
    _Server(config, lambda: on_ready(f"http://{shown}:{socket.getsockname()[1]}")).run(sockets=[socket])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        self._on_ready()
