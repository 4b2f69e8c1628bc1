"""A server in this process, on a port of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The URL of a server of this app, which ends with the context as by SIGTERM."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False)
    socket = config.bind_socket()
    socket.listen()  # who comes before the server has started waits for it
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
