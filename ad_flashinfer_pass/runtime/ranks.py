"""The ranks of one model: how they are started, and how they follow the first.

The first rank schedules, and tells the others each step in one small message, from CPU to CPU, before it runs
it. Each computes its part; where steps run ahead of the host, the first one's tokens go to the others from
device to device. The ranks are processes of one machine. The first one starts them, unless torchrun has; all
end when it ends, and when one of them does.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError, RankError

logger = logging.getLogger(__name__)

_MESSAGE = 4096
"""Bytes of a message; what does not fit follows in a second one."""
_MULTICAST_OFF = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
"""NVLink multicast is not used: not every machine of linked GPUs has it."""
_GRACE = 2.0
"""Seconds that this rank has to say itself what ended another one, too."""
_PATIENCE = timedelta(days=365)
"""A rank waits for the next step as long as the first one has no request."""


class Ranks:
    """This process among the ranks of a model.

    Args:
        followers: the processes that were started for the other ranks; none if somebody else started them.
    """

    def __init__(self, followers: Sequence[subprocess.Popen[bytes]] = ()) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._on_cuda = "nccl" in dist.get_backend_config()
        self._followers = followers
        self._told: list[tuple[Any, ...]] = []
        self._is_lost = self._is_closed = False
        self.is_followed = False
        """Whether the others have built their parts, and wait for steps."""

    def add(self, *what: object) -> None:
        """Let the others do something before the next step."""
        self._told.append(what)

    def tell(self, *what: object) -> None:
        """Tell the others what was added, and this, in one message.

        Raises:
            RankError: they are lost.
        """
        if self._is_lost or self._is_closed:
            raise RankError("the ranks of this model have lost each other; build the model again.")
        said, self._told = pickle.dumps([*self._told, what]), []
        self._is_lost = True  # unless it gets through
        self._send(said)
        self._is_lost = False

    def lose(self) -> None:
        """A step failed on the way: what the others do next is not known."""
        self._is_lost = True

    def share_tokens(self, tokens: Tensor) -> None:
        """Give the others the tokens of the first rank, on the device."""
        dist.broadcast(tokens, 0)

    def hear(self) -> list[tuple[Any, ...]]:
        """Wait for the next message of the first rank."""
        head = torch.empty(_MESSAGE, dtype=torch.uint8)
        dist.broadcast(head, 0)
        size = int(head[:8].view(torch.int64))
        rest = torch.empty(max(0, size + 8 - _MESSAGE), dtype=torch.uint8)
        if len(rest):
            dist.broadcast(rest, 0)
        whole: list[tuple[Any, ...]] = pickle.loads(torch.cat([head[8:], rest])[:size].numpy().tobytes())
        return whole

    def close(self) -> None:
        """End the other ranks."""
        if self._is_closed:
            return
        # Followers of ours end when their stdin does; those of NCCL are to let go of each other first, and
        # those that somebody else started know of nothing else.
        if self.is_followed and not self._is_lost and (self._on_cuda or not self._followers):
            with suppress(RuntimeError):  # they are gone already
                self.tell("end")
        self._is_closed = True
        if dist.is_initialized() and not (self._is_lost and self._on_cuda):  # else NCCL would wait for them
            dist.destroy_process_group()
        for process in self._followers:
            assert process.stdin is not None
            process.stdin.close()  # what waits for a step, or hangs, ends by that
            process.wait()

    def _send(self, said: bytes) -> None:
        head = torch.zeros(max(_MESSAGE, len(said) + 8), dtype=torch.uint8)
        head[:8].view(torch.int64)[0] = len(said)
        head[8 : 8 + len(said)] = torch.from_numpy(np.frombuffer(said, dtype=np.uint8).copy())
        dist.broadcast(head[:_MESSAGE], 0)
        if len(head) > _MESSAGE:
            dist.broadcast(head[_MESSAGE:].contiguous(), 0)

    def watch(self) -> None:
        """End this process when one of the others ends."""
        for rank, process in enumerate(self._followers, 1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        lines = [line.decode(errors="replace").strip() for line in process.stderr]
        code = process.wait()
        for _ in range(int(_GRACE / 0.1)):
            if self._is_closed:
                return
            time.sleep(0.1)
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        said = next((line for line in reversed(lines) if line), "it said nothing")
        print(
            f"error: rank {rank} of {self.size} ended ({why}): {said.removeprefix('error: ')}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(1)  # what waits for a rank that is gone waits for ever


_CURRENT: list[Ranks] = []


def join(config: AutoDeployConfig) -> tuple[AutoDeployConfig, Ranks]:
    """Be one of the ranks that compute a model; the first starts the others if nobody has.

    Returns:
        The config with the device of this rank, and the ranks.

    Raises:
        ConfigError: there are fewer GPUs than ranks, or a group of another size.
    """
    size = config.world_size
    while _CURRENT:
        _CURRENT.pop().close()
    if config.device.startswith("cuda") and (count := torch.cuda.device_count()) < size:
        raise ConfigError(
            f"world_size: got {size}, but there are {count} GPUs here; set at most as many, or device: cpu."
        )
    if ":" in config.device:
        raise ConfigError(
            f"device: got {config.device} with world_size {size}: rank N runs on cuda:N; set device: cuda."
        )
    followers: list[subprocess.Popen[bytes]] = []
    if not dist.is_initialized():
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            _init("env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), config.device)
        else:
            followers = _start(config)
    ranks = Ranks(followers)
    if ranks.size != size:
        raise ConfigError(f"world_size: got {size}, but {ranks.size} ranks were started; give both alike.")
    _CURRENT.append(ranks)
    ranks.watch()
    if config.device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', ranks.rank))}"
        config = AutoDeployConfig(**{**given(config), "device": device})
    return config, ranks


def given(config: AutoDeployConfig) -> dict[str, Any]:
    """The keys of a config that were given."""
    return {name: getattr(config, name) for name in config.model_fields_set}


def _start(config: AutoDeployConfig) -> list[subprocess.Popen[bytes]]:
    """The other ranks, in processes that end with this one."""
    folder = tempfile.mkdtemp()
    address = f"file://{Path(folder) / 'ranks'}"
    keys = config.model_dump(mode="json", include=config.model_fields_set)
    command = [sys.executable, "-m", "ad_flashinfer_pass.follow"]
    _only_here()
    followers = []
    for rank in range(1, config.world_size):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stdin is not None
        start = {"config": keys, "rank": rank, "address": address}
        process.stdin.write(json.dumps(start).encode() + b"\n")
        process.stdin.flush()
        followers.append(process)
    _init(address, 0, config.world_size, config.device)
    return followers


def _only_here() -> None:
    """Let gloo use the loopback: names of hosts need not be known where one machine is enough."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _init(address: str, rank: int, size: int, device: str) -> None:
    os.environ.update(_MULTICAST_OFF)
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=size, timeout=_PATIENCE)


def start_as_follower(given: IO[bytes]) -> AutoDeployConfig:
    """Join the ranks as the first one says in a line; this process ends when the rest of it ends.

    Returns:
        The config of the model.
    """
    start = json.loads(given.readline())
    config = AutoDeployConfig(**start["config"])
    _only_here()
    threading.Thread(target=_end_with, args=(given,), daemon=True).start()
    _init(start["address"], start["rank"], config.world_size, config.device)
    return config


def _end_with(given: IO[bytes]) -> None:
    given.read()
    os._exit(0)


@atexit.register
def _close() -> None:
    while _CURRENT:
        _CURRENT.pop().close()
