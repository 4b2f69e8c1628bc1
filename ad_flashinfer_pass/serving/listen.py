"""uvicorn around the endpoint."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from ad_flashinfer_pass.errors import ConfigError

# The engine's thread takes the interpreter back so often from one that turns tokens into text; Python's own
# 5 ms are as long as a step.
_SWITCH_SECONDS = 0.0005


def bind(host: str, port: int) -> socket.socket:
    """The address to listen on; until ``listen``, connections are refused.

    Args:
        host: name or address.
        port: 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    where = f"--host {host} --port {port}"
    if not 0 <= port < 2**16:
        raise ConfigError(f"{where}: a port must lie in 0..65535.")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as err:
        bound.close()
        raise ConfigError(f"{where}: {err.strerror}. Take another address or port.") from None
    return bound


def listen(app: FastAPI, bound: socket.socket, *, timeout: float, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; then take no new connections, and let requests finish.

    Args:
        app: the endpoint.
        bound: see ``bind``.
        timeout: seconds that requests have to finish.
        on_ready: called with the URL once connections are accepted.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    host, port = bound.getsockname()[:2]
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(timeout),
    )
    shown = f"[{host}]" if ":" in host else host
    _Server(config, lambda: on_ready(f"http://{shown}:{port}")).run(sockets=[bound])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()
