"""Weights of 4 bits beside the functions of other libraries that read the same."""

from __future__ import annotations

import pytest
import torch

from ad_flashinfer_pass.kernels.linear import four_bits


def drawn(*shape: int, high: int = 256) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_unpacks_what_it_packs() -> None:
    """Word j of 16 bits has elements j, j + 16, j + 32, j + 48 of 64; other rows are in order."""
    for packed in (drawn(3, 5, 16), drawn(3, 5, 64)):
        assert torch.equal(four_bits.pack(four_bits.unpack(packed)), packed)
    assert four_bits.unpack(torch.tensor([0xA7, 0x10], dtype=torch.uint8)).tolist() == [7, 10, 0, 1]
    values = drawn(128, high=16)
    word = int(four_bits.pack(values).view(torch.int16)[16 + 5]) & 0xFFFF
    assert [word >> shift & 15 for shift in (0, 4, 8, 12)] == values[64 + 5 :: 16].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_mxfp4_is_that_of_transformers(dtype: torch.dtype) -> None:
    """Bit by bit, signs of zeros included, but for scales beyond float32's."""
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    packed, scale = drawn(2, 6, 64), drawn(2, 6, 4, high=250)
    ours = four_bits.pack(four_bits.halves(packed))
    found = four_bits.dequantized(ours, scale, None, dtype)
    wanted = theirs.convert_moe_packed_tensors(packed.unflatten(-1, (4, 16)), scale, dtype=dtype).mT
    assert torch.equal(found, wanted)
    assert torch.equal(found.signbit(), wanted.signbit())


@pytest.mark.parametrize("group", [8, 32, 64])
@pytest.mark.parametrize("has_zero_point", [False, True])
def test_integers_are_those_of_compressed_tensors(group: int, has_zero_point: bool) -> None:
    """Which stores -8 to 7, and packs eight of them in an int32."""
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    values = drawn(6, 64, high=16).to(torch.int8) - 8
    scale = torch.rand(6, 64 // group, generator=torch.Generator().manual_seed(1)) + 0.1
    zero = drawn(6, 64 // group, high=16).to(torch.int8) - 8 if has_zero_point else None
    settings = quantization.QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=group, symmetric=not has_zero_point
    )
    wanted = forward.dequantize(values, scale, zero, settings)
    packed = four_bits.pack(four_bits.halves(compressors.pack_to_int32(values, 4).view(torch.uint8)))
    zero_point = None if zero is None else (zero + 8).to(torch.uint8)
    assert torch.equal(four_bits.dequantized(packed, scale, zero_point, torch.float32), wanted)
