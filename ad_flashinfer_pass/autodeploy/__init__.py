"""The plugin for TensorRT-LLM AutoDeploy: importing this registers ``attn_backend: flashinfer_trtllm``.

It must be imported in every process that builds a graph; docs/autodeploy.md shows how. ``tensorrt_llm`` (or
``llmc``, AutoDeploy on its own) is imported here and nowhere else in this package.
"""

from ad_flashinfer_pass.autodeploy.api import register_dynamic_ops
from ad_flashinfer_pass.autodeploy.descriptor import BACKEND, FlashInferTrtllmAttention
from ad_flashinfer_pass.autodeploy.fuse_rope import FUSE_ROPE, FuseRopeIntoFlashInferTrtllm

register_dynamic_ops()

__all__ = ["BACKEND", "FUSE_ROPE", "FlashInferTrtllmAttention", "FuseRopeIntoFlashInferTrtllm"]
