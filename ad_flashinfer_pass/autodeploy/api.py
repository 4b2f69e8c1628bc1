"""What this AutoDeploy has: found by looking, never by version number.

The generations differ in names more than in ideas; docs/autodeploy.md lists which file of which version shows
what is looked for here.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

from torch import fx

from ad_flashinfer_pass.autodeploy.ops import ATTENTION, PREPARE
from ad_flashinfer_pass.autodeploy_hook import PACKAGES


def _find() -> str:
    """The package: the one that is being imported already, else the first that can be."""
    for name in PACKAGES:
        if name in sys.modules:
            return name
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as err:
            if not name.startswith(str(err.name)):
                raise
        else:
            return name
    raise ModuleNotFoundError(
        f"ad_flashinfer_pass.autodeploy needs TensorRT-LLM's AutoDeploy, one of {', '.join(PACKAGES)}. "
        "Install tensorrt-llm; the rest of this package works without it."
    )


PACKAGE = _find()


def _optional(path: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"{PACKAGE}.{path}")
    except ModuleNotFoundError as err:
        if not f"{PACKAGE}.{path}".startswith(str(err.name)):
            raise
        return None


attention: Any = importlib.import_module(f"{PACKAGE}.custom_ops.attention_interface")
transform: Any = importlib.import_module(f"{PACKAGE}.transform.interface")

KVPagedResourceHandler: Any = getattr(attention, "KVPagedResourceHandler", None)
"""None up to 1.2: caches are made by callables."""

HAS_HOST_NAMES = hasattr(attention.SequenceInfo, "register_host_prepare_for_attention_forward")
"""Whether inputs have ``_host`` twins; before, ``batch_info`` is the host's."""


def _pools_have_metadata() -> bool:
    """Whether every pool of a sliding window gets its own call of the metadata op.

    In between there were versions that had such pools and called it once, for the first: there all layers are
    given one pool of full length, which is right everywhere.
    """
    if KVPagedResourceHandler is None:
        return False
    if "sliding_window" not in inspect.signature(KVPagedResourceHandler.__init__).parameters:
        return False
    kvcache = _optional("transform.library.kvcache")
    insert = getattr(kvcache, "_InsertCachedOperator", None)
    return insert is not None and "meta_nodes_extra_by_group" in inspect.getsource(insert)


HAS_WINDOW_POOLS = _pools_have_metadata()


def register_dynamic_ops() -> None:
    """Enter our ops where piecewise graphs look for dynamic ones, in whichever form this version has."""
    utils: Any = _optional("compile.piecewise_utils")
    if utils is None:
        return
    if hasattr(utils, "_DYNAMIC_OP_POLICIES"):
        utils._DYNAMIC_OP_POLICIES.setdefault(ATTENTION, utils.DynamicOpPolicy.OUT_BUFFER)
        utils._DYNAMIC_OP_POLICIES.setdefault(PREPARE, utils.DynamicOpPolicy.EAGER)
        return
    persistent = getattr(utils, "_PERSISTENT_BUFFER_OPS", utils._METADATA_PREP_OPS)
    for names, name in ((utils._CACHED_ATTENTION_OPS, ATTENTION), (persistent, PREPARE)):
        if name not in names:
            names.append(name)
    if hasattr(utils, "_SKIP_OUT_DYNAMIC_OPS"):  # computed from the lists when they were made
        utils._SKIP_OUT_DYNAMIC_OPS.add(PREPARE)


def op_args(node: fx.Node, *names: str) -> list[Any]:
    """Arguments of an op by name, given or default; None for a name that its schema lacks."""
    op: Any = node.target
    schema = op._schema if hasattr(op, "_schema") else next(iter(op._schemas.values()))
    given = {arg.name: value for arg, value in zip(schema.arguments, node.args, strict=False)}
    given = {arg.name: arg.default_value for arg in schema.arguments} | given | dict(node.kwargs)
    return [given.get(name) for name in names]
