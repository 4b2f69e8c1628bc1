"""The kernel that writes a result, against torch."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass.kernels.attention import reference, store_result  # noqa: E402


@pytest.mark.parametrize(("tokens", "room"), [(5, 5), (3, 40), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_result_is_copied_and_padding_is_zero(tokens: int, room: int, dtype: torch.dtype) -> None:
    """Whatever the memory held, NaN too."""
    attended = torch.randn(tokens, 4, 72, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    out = torch.full((1, room, 4, 72), float("nan"), device=DEVICE, dtype=dtype)
    store_result.store_result(attended, out, 1.0)
    assert torch.equal(out[0, :tokens], attended)
    assert bool((out[0, tokens:] == 0).all())


@pytest.mark.parametrize("store", [store_result.store_result, reference.store_result])
def test_eight_bits_are_torchs_and_saturate(store: object) -> None:
    """Ties of rounding too: x times the reciprocal of the scale, in float32."""
    attended = torch.randn(9, 2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 30
    attended[0, 0, 0], attended[1, 0, 0] = 1e6, -1e6
    out = torch.zeros(1, 12, 2, 64, device=DEVICE).to(torch.float8_e4m3fn)
    store(attended, out, 0.37)  # type: ignore[operator]
    want = (attended * torch.tensor(1 / 0.37, device=DEVICE)).clamp(-448, 448).to(torch.float8_e4m3fn)
    # Where rounding carries into the exponent, the interpreter loses the carry.
    step = 0.0 if DEVICE.type == "cuda" or store is reference.store_result else 0.5
    torch.testing.assert_close(out[0, :9].float(), want.float(), rtol=step, atol=0.0)
    assert bool((out[0, 9:].float() == 0).all())
