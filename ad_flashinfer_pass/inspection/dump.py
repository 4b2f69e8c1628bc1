"""``dump``: the graph before or after any transform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.graph.data import GraphData
from ad_flashinfer_pass.inspection.stages import resolve, run_stages


def dump(
    config: AutoDeployConfig,
    *,
    graph: Path | None = None,
    stage: str | None = None,
    sm: int | None = None,
    layer: int | None = None,
    around: str | None = None,
    hops: int = 2,
    on_event: Callable[[str], None] | None = None,
) -> GraphData:
    """The graph after a transform, as data; ``formats.FORMATS`` writes it.

    Args:
        config: the model and the settings of the pass. No weights are read.
        graph: a saved ExportedProgram in place of the model.
        stage: a transform, or a stage, which stands for its last transform. Default: the last.
        sm: compute capability of the GPU that will run it, 90 for 9.0. Default: that of ``config.device``.
        layer: only this layer, and what it reads.
        around: only what is near this node; see ``GraphData.find`` for the names that it may have.
        hops: how many edges away from it a node still counts as near.
        on_event: called with the name of each phase as it begins.

    Raises:
        ConfigError: an unknown stage, layer or node.
        LoadError: the model or the file cannot be read.
        TransformError: the pass refuses the model before the stage is reached.
    """
    run = run_stages(config, graph, [resolve(stage, config)], on_event, sm=sm)
    (found,) = run.graphs.values()
    if layer is not None:
        found = found.layer(layer)
    return found if around is None else found.around(around, hops)
