"""Reads attention out of a graph: what SDPA calls and eager matmul-softmax-matmul chains compute."""

from ad_flashinfer_pass.matching.eager import (
    SOFTMAX,
    read_eager,
    written_out_log_sum_exp,
    written_out_softmax,
)
from ad_flashinfer_pass.matching.parts import AttentionMatch, MaskTerm, NotAttention, Operand
from ad_flashinfer_pass.matching.sdpa import SDPA, read_sdpa

__all__ = [
    "SDPA",
    "SOFTMAX",
    "AttentionMatch",
    "MaskTerm",
    "NotAttention",
    "Operand",
    "read_eager",
    "read_sdpa",
    "written_out_log_sum_exp",
    "written_out_softmax",
]
