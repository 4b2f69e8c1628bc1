"""The plugin for TensorRT-LLM AutoDeploy, to be imported in every process that builds a graph."""

from ad_flashinfer_pass.autodeploy import interface, ops
from ad_flashinfer_pass.autodeploy.descriptor import BACKEND, FlashInferTrtllmAttention

interface.enter_ops(ops.ATTENTION, ops.PREPARE)

__all__ = ["BACKEND", "FlashInferTrtllmAttention"]
