"""A small program, and files that hold it with one part changed."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

Change = Callable[[Any], None]


class Small(nn.Module):
    """A causal language model of one layer, with a buffer and a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(100, 32)
        self.qkv = nn.Linear(32, 96)
        self.head = nn.Linear(32, 100)
        self.register_buffer("factor", torch.tensor(0.5))
        self.offsets = torch.linspace(0, 1, 32)  # no buffer: a constant of the program

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [b, s, 100]."""
        x = self.embed(input_ids) * self.factor + self.offsets
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).split(32, dim=-1))
        at = position_ids[:, None]
        visible = at[..., None, :] <= at[..., None]
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2)
        return self.head(x)


@cache
def small() -> ExportedProgram:
    tokens = torch.zeros(2, 13, dtype=torch.int64), torch.arange(13).repeat(2, 1)
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return torch.export.export(Small().eval(), tokens, dynamic_shapes=(dynamic, dynamic))


@cache
def parts() -> dict[str, bytes]:
    """What torch.export.save writes for it, by name below the one folder."""
    buffer = io.BytesIO()
    torch.export.save(small(), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


def write(file: Path, changed: Mapping[str, bytes | Change] | None = None) -> Path:
    """The program in a file; parts are replaced, or changed as JSON, or added."""
    content: dict[str, bytes] = dict(parts())
    for name, change in (changed or {}).items():
        if isinstance(change, bytes):
            content[name] = change
        else:
            data = json.loads(content[name])
            change(data)
            content[name] = json.dumps(data).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"small/{name}", data)
    return file
