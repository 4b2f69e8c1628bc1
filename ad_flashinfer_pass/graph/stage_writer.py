"""The graph after every transform, in a directory: ``AD_DUMP_GRAPHS_DIR``."""

from __future__ import annotations

import os
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.files import write_file
from ad_flashinfer_pass.graph.data import NodeNames
from ad_flashinfer_pass.graph.text_format import FIRST_LINE, to_text


class StageWriter:
    """Writes the graph after every transform into a directory, one text dump a file.

    The files are named ``NNN_<stage>_<transform>.txt`` and numbered over all graphs of the process. What an
    earlier process wrote there is removed, and nothing else.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("[0-9][0-9][0-9]*_*.txt"):
            if _is_of_a_stage(old):
                old.unlink()
        self._directory = directory
        self._names: WeakKeyDictionary[fx.Graph, NodeNames] = WeakKeyDictionary()
        self._count = 0

    @staticmethod
    def from_environment() -> StageWriter | None:
        """For the directory that AD_DUMP_GRAPHS_DIR names; in a distributed run, on rank 0 alone."""
        directory = os.environ.get("AD_DUMP_GRAPHS_DIR")
        if not directory or (torch.distributed.is_initialized() and torch.distributed.get_rank() != 0):
            return None
        if Path(directory).exists() and not Path(directory).is_dir():
            raise ConfigError(f"AD_DUMP_GRAPHS_DIR={directory} is not a directory.")
        if directory not in _writers:
            _writers[directory] = StageWriter(Path(directory))
        return _writers[directory]

    def write(self, model: nn.Module, stage: str, transform: str) -> None:
        """Write every graph in ``model``."""
        graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
        for number, gm in enumerate(graphs):
            # The first transform of a graph is taken to have found it as it is.
            maker = transform if gm.graph in self._names else None
            names = self._names.setdefault(gm.graph, NodeNames())
            names.see(gm, maker)
            suffix = f"_{number}" if number else ""
            file = self._directory / f"{self._count:03}_{stage}_{transform}{suffix}.txt"
            if file.exists() and not _is_of_a_stage(file):
                raise ConfigError(
                    f"AD_DUMP_GRAPHS_DIR: {file} is not a dump of a stage; name another folder."
                )
            write_file(file, to_text(names.data(gm, f"{_TITLE} {transform}")), f"AD_DUMP_GRAPHS_DIR: {file}")
        self._count += 1


_TITLE = "graph after"


_writers: dict[str, StageWriter] = {}


def _is_of_a_stage(file: Path) -> bool:
    """Whether a ``StageWriter`` wrote a file."""
    if file.is_symlink() or not file.is_file():
        return False
    start = f"{FIRST_LINE}\ntitle: {_TITLE} ".encode()
    with file.open("rb") as opened:
        return opened.read(len(start)) == start
