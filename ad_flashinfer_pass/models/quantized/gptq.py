"""GPTQ: integers of 4 bits by groups of the inputs, eight inputs in an int32.

qweight [depth / 8, rows] holds in a word, from the lowest bits on, eight inputs; qzeros [depth / group,
rows / 8] eight outputs, each less 1 but in checkpoint_format gptq_v2; scales are [depth / group, rows]; g_idx
[depth] names the group of each input. A weight is (number - zero) * scale. Sources:
auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py of AutoGPTQ/AutoGPTQ, gptqmodel/nn_modules/qlinear of
ModelCloud/GPTQModel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ad_flashinfer_pass.kernels.linear import four_bits
from ad_flashinfer_pass.models.quantized.layout import Exact, Group, Layout, Nothing, is_name
from ad_flashinfer_pass.models.quantized.scheme import (
    FINITE,
    Operands,
    Part,
    Parts,
    Scheme,
    words_to_numbers,
)


@dataclass(frozen=True)
class Gptq(Scheme):
    """Of a linear."""

    group: int | None
    """Inputs that share a scale. None: all."""
    is_less_1: bool
    """Zero points are stored so."""
    is_symmetric: bool
    """All zero points are 8."""

    weight: ClassVar[str] = ".qweight"

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """[rows, depth]."""
        if len(shape) != 2 or 8 * shape[0] % (self.group or 8) or shape[1] % 8:
            return None
        return (shape[1], 8 * shape[0])

    def parts(self, *sizes: int) -> dict[str, Part]:
        """g_idx is there or not."""
        rows, depth = sizes
        groups = depth // (self.group or depth)
        return {
            ".qweight": Part([[depth // 8, rows]], ("I32",)),
            ".qzeros": Part([[groups, rows // 8]], ("I32",)),
            ".scales": Part([[groups, rows]], rule=FINITE),
            ".g_idx": Part([[depth]], ("I32",), is_optional=True),
        }

    def fault(self, parts: Parts) -> tuple[str, str] | None:
        """Groups must lie in order, and a zero point that is stored less 1 must not be 0."""
        depth = 8 * parts[".qweight"].shape[0]
        order = torch.arange(depth, dtype=torch.int32) // (self.group or depth)
        if ".g_idx" in parts and not torch.equal(parts[".g_idx"], order):
            return ".g_idx", "has groups out of order (desc_act, act-order), which is not supported"
        zero_point = words_to_numbers(parts[".qzeros"])
        if self.is_less_1 and (zero_point == 15).any():
            return ".qzeros", "has a zero point of 15, which is stored less 1 and stands for 0 or 16"
        if self.is_symmetric and (zero_point + self.is_less_1 != four_bits.ZERO_POINT).any():
            return ".qzeros", "has another zero point than 8, though the files say sym"
        return None

    def operands(self, parts: Parts) -> Operands:
        """By rows, in order."""
        zero_point = None
        if not self.is_symmetric:
            zero_point = (words_to_numbers(parts[".qzeros"]) + self.is_less_1).T.contiguous()
        weight = four_bits.pack(words_to_numbers(parts[".qweight"].T))
        return Operands(weight, parts[".scales"].T.contiguous(), zero_point=zero_point)


class Section(Exact):
    """quantization_config, or quantize_config.json; what only quantizers and kernels read may be anything."""

    quant_method: Literal["gptq"] = "gptq"
    bits: Literal[4]
    group_size: int
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    format: Literal["gptq", "gptq_v2"] | None = None
    is_marlin_format: Literal[False] = False
    pack_dtype: Literal["int32"] = "int32"
    lm_head: bool = False
    dynamic: Nothing = None
    desc_act: Any = None
    static_groups: Any = None
    sym: bool = False
    true_sequential: Any = None
    damp_percent: Any = None
    damp_auto_increment: Any = None
    act_group_aware: Any = None
    mse: Any = None
    meta: Any = None
    model_name_or_path: Any = None
    model_file_base_name: Any = None
    tokenizer: Any = None
    dataset: Any = None
    backend: Any = None
    batch_size: Any = None
    block_name_to_quantize: Any = None
    modules_in_block_to_quantize: Any = None
    module_name_preceding_first_block: Any = None
    cache_block_outputs: Any = None
    model_seqlen: Any = None
    max_input_length: Any = None
    pad_token_id: Any = None
    use_cuda_fp16: Any = None
    use_exllama: Any = None
    disable_exllama: Any = None
    exllama_config: Any = None

    def layout(self) -> Layout:
        """What it says; which linears are quantized, their tensors say."""
        if self.group_size != -1 and (self.group_size <= 0 or self.group_size % 8):
            raise ValueError(f"its group_size is {self.group_size}")
        scheme = Gptq(
            None if self.group_size == -1 else self.group_size,
            "gptq_v2" not in (self.checkpoint_format, self.format),
            self.sym,
        )
        return Layout(
            (Group(("Linear",), scheme),), (), is_name, head_is_plain=not self.lm_head, names_all=False
        )
