"""Small graphs for the capture rules: what each breaks, if anything.

``x`` is float32 [8, 8] on the device, ``i`` int64 [8] on it with values 0 to 7, ``h`` float32 [8, 8] on the
host, ``j`` int64 [8] on it with values 0 to 7, ``s`` float32 [] on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[..., Any]


class Example(NamedTuple):
    """A graph."""

    run: Run
    inputs: str
    """Letters of the inputs."""
    rules: frozenset[str] = frozenset()
    """That it breaks."""
    is_random: bool = False


def _breaks(run: Run, inputs: str, *rules: str) -> Example:
    return Example(run, inputs, frozenset(rules))


def _put_by_mask(x: Tensor) -> Tensor:
    return torch.index_put(x, [x > 0], torch.zeros((), device=x.device))


def _put_many_by_mask(x: Tensor) -> Tensor:
    y = x.clone()
    return torch.index_put(y, [x[:, 0] > 0], x[:1])


def _own_generator(x: Tensor) -> Tensor:
    return x + torch.rand(8, device=x.device, generator=torch.Generator(x.device))


def _written(x: Tensor) -> Tensor:
    x.add_(1)
    return x * 2


def _view_written(x: Tensor) -> Tensor:
    x[0].mul_(2)
    return x + 1


def _piece_written(x: Tensor) -> Tensor:
    x.unbind()[0].mul_(2)
    return x + 1


def _fresh_written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.add_(x)
    return y


def _positive(x: Tensor) -> Tensor:
    """A positive definite matrix."""
    return x @ x.T + 8 * torch.eye(8, device=x.device)


def _put_a_number_by_mask(x: Tensor) -> Tensor:
    """index_put of one mask and one number on the host, which is run as masked_fill."""
    y = x.clone()
    y[y > 0] = 3.0
    return y


def _put_a_number_in_a_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:2] = 3.0
    return y


def _asserted(x: Tensor) -> Tensor:
    torch._assert_async((x == x).all())
    return x + 1


EXAMPLES: dict[str, Example] = {
    # Captured, and right when replayed.
    "relu": Example(lambda x: x.relu(), "x"),
    "matmul": Example(lambda x: x @ x.T, "x"),
    "softmax": Example(lambda x: x.softmax(-1), "x"),
    "layer_norm": Example(lambda x: F.layer_norm(x, [8]), "x"),
    "attention": Example(lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]), "x"),
    "embedding": Example(lambda x, i: F.embedding(i, x), "xi"),
    "index_select": Example(lambda x, i: x.index_select(0, i), "xi"),
    "index_by_places": Example(lambda x, i: x[i], "xi"),
    "index_put_by_places": Example(lambda x, i: x.index_put([i], x[:1], accumulate=True), "xi"),
    "gather": Example(lambda x, i: x.gather(0, i[None]), "xi"),
    "scatter_add": Example(lambda x, i: x.scatter_add(0, i[None], x), "xi"),
    "index_add": Example(lambda x, i: x.index_add(0, i, x), "xi"),
    "where": Example(lambda x: torch.where(x > 0, x, -x), "x"),
    "masked_fill": Example(lambda x: x.masked_fill(x > 0, 0.0), "x"),
    "nonzero_static": Example(lambda x: torch.nonzero_static(x > 0, size=8), "x"),
    "topk": Example(lambda x: x.topk(2)[0], "x"),
    "sort": Example(lambda x: x.sort(-1)[0], "x"),
    "argmax": Example(lambda x: x.argmax(-1), "x"),
    "cumsum": Example(lambda x: x.cumsum(0), "x"),
    "cat": Example(lambda x: torch.cat((x, x)), "x"),
    "searchsorted": Example(lambda x: torch.searchsorted(x.sort(-1)[0], x), "x"),
    "one_hot_of_classes": Example(lambda i: F.one_hot(i, 8), "i"),
    "repeat_by_number": Example(lambda x: x.repeat_interleave(2, 0), "x"),
    "arange": Example(lambda x: x + torch.arange(8, device=x.device), "x"),
    "zeros": Example(lambda x: torch.zeros_like(x) + x, "x"),
    "inverse_without_check": Example(lambda x: torch.linalg.inv_ex(x @ x.T)[0], "x"),
    "written_of_its_own": Example(_fresh_written, "x"),
    "dropout": Example(lambda x: F.dropout(x, 0.5, True), "x", is_random=True),
    "rand": Example(lambda x: torch.rand_like(x), "x", is_random=True),
    "bernoulli": Example(lambda x: torch.bernoulli(x.sigmoid()), "x", is_random=True),
    "lu_without_check": Example(lambda x: torch.linalg.lu_factor_ex(_positive(x))[0], "x"),
    "qr": Example(lambda x: torch.linalg.qr(x)[1].abs(), "x"),
    "determinant": Example(lambda x: torch.linalg.det(_positive(x)), "x"),
    "histogram_between": Example(lambda x: torch.histc(x, 4, -1.0, 1.0), "x"),
    "masked_scatter": Example(lambda x: x.masked_scatter(x > 0, x * 2), "x"),
    "median": Example(lambda x: x.median(), "x"),
    "quantile": Example(lambda x: x.quantile(0.5), "x"),
    "put_a_number_by_mask": Example(_put_a_number_by_mask, "x"),
    "put_a_number_in_a_slice": Example(_put_a_number_in_a_slice, "x"),
    "number_of_its_own": Example(lambda x: x + torch.tensor(2.0), "x"),
    "zeros_on_the_host": Example(lambda x: (torch.zeros_like(x, device="cpu"), x + 1)[1], "x"),
    "to_host_without_waiting": Example(lambda x: x.to("cpu", non_blocking=True), "x"),
    "repeat_to_a_size": Example(lambda x, i: x.repeat_interleave(torch.ones_like(i), 0, output_size=8), "xi"),
    "assert_on_the_device": Example(_asserted, "x"),
    "multinomial": Example(lambda x: torch.multinomial(x.abs() + 0.1, 2), "x", is_random=True),
    "exponential": Example(lambda x: torch.empty_like(x).exponential_(), "x", is_random=True),
    # Not captured, or wrong when replayed.
    "item": _breaks(lambda x: x + x.sum().item(), "x", "host-sync", "python-scalar"),
    "item_of_integers": _breaks(lambda x, i: x * i.max().item(), "xi", "host-sync", "python-scalar"),
    "inverse": _breaks(lambda x: torch.linalg.inv(x @ x.T + torch.eye(8, device=x.device)), "x", "host-sync"),
    "cholesky": _breaks(
        lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(8, device=x.device)), "x", "host-sync"
    ),
    "solve": _breaks(
        lambda x: torch.linalg.solve(x @ x.T + torch.eye(8, device=x.device), x), "x", "host-sync"
    ),
    "nonzero": _breaks(lambda x: x.nonzero(), "x", "dynamic-shape"),
    "masked_select": _breaks(lambda x: x.masked_select(x > 0), "x", "dynamic-shape"),
    "index_by_mask": _breaks(lambda x: x[x > 0], "x", "dynamic-shape"),
    "index_put_number": _breaks(lambda x, i: x.index_put([i], torch.tensor(1.0)), "xi", "pageable-copy"),
    "index_put_number_of_an_input": _breaks(lambda x, i, s: x.index_put([i], s), "xis", "pageable-copy"),
    "index_by_places_on_the_host": _breaks(lambda x, j: x[j], "xj", "pageable-copy"),
    "index_by_numbers_on_the_host": _breaks(lambda x: x[torch.arange(4)], "x", "pageable-copy"),
    "index_put_one_value_by_mask": _breaks(_put_by_mask, "x", "dynamic-shape"),
    "index_put_by_mask": _breaks(_put_many_by_mask, "x", "dynamic-shape"),
    "unique": _breaks(lambda i: torch.unique(i), "i", "dynamic-shape"),
    "bincount": _breaks(lambda i: torch.bincount(i), "i", "dynamic-shape"),
    "repeat_by_tensor": _breaks(lambda x, i: x.repeat_interleave(i, 0), "xi", "dynamic-shape"),
    "size_by_value": _breaks(
        lambda x, i: torch.zeros(i.max().item(), device=x.device),
        "xi",
        "host-sync",
        "data-allocation",
        "python-scalar",
    ),
    "singular_values": _breaks(lambda x: torch.linalg.svdvals(x), "x", "host-sync"),
    "pseudo_inverse": _breaks(lambda x: torch.linalg.pinv(x), "x", "host-sync"),
    "matrix_exp": _breaks(lambda x: torch.linalg.matrix_exp(x * 0.1), "x", "host-sync"),
    "spectral_norm": _breaks(lambda x: torch.linalg.matrix_norm(x, 2), "x", "host-sync"),
    "lu_with_check": _breaks(lambda x: torch.linalg.lu_factor(_positive(x))[0], "x", "host-sync"),
    "lu_of_a_rectangle": _breaks(lambda x: torch.linalg.lu_factor_ex(x[:4])[0], "x", "host-sync"),
    "masked_fill_by_a_scalar_on_the_device": _breaks(
        lambda x: x.masked_fill(x > 0, x.sum()), "x", "host-sync"
    ),
    "histogram_of_all": _breaks(lambda x: torch.histc(x, 4), "x", "host-sync"),
    "tolist": _breaks(lambda x, i: x + sum(i.tolist()), "xi", "host-sync", "python-scalar"),
    "unique_consecutive": _breaks(lambda i: torch.unique_consecutive(i), "i", "dynamic-shape"),
    "argwhere": _breaks(lambda x: torch.argwhere(x > 0), "x", "dynamic-shape"),
    "to_host": _breaks(lambda x: x.cpu() + 1, "x", "device-to-host"),
    "to_host_and_back": _breaks(lambda x: x.cpu().to(x.device) + 1, "x", "device-to-host", "pageable-copy"),
    "from_host_without_waiting": _breaks(
        lambda x, h: x + h.to(x.device, non_blocking=True), "xh", "pageable-copy"
    ),
    "from_host": _breaks(lambda x, h: x + h.to(x.device), "xh", "pageable-copy"),
    "masked_fill_by_a_scalar_on_host": _breaks(lambda x, s: x.masked_fill(x > 0, s), "xs", "host-value"),
    "put_a_scalar_on_host_by_mask": _breaks(lambda x, s: x.index_put([x > 0], s), "xs", "host-value"),
    "where_scalar_on_host": _breaks(lambda x, s: torch.where(x > 0, x, s), "xs", "host-value"),
    "scalar_on_host": _breaks(lambda x, s: x * s, "xs", "host-value"),
    "own_generator": _breaks(_own_generator, "x", "generator"),
    "input_written": _breaks(_written, "x", "input-mutation"),
    "view_of_input_written": _breaks(_view_written, "x", "input-mutation"),
    "piece_of_input_written": _breaks(_piece_written, "x", "input-mutation"),
    # Last: its failed capture keeps cuSOLVER from the next one.
    "eigenvalues": _breaks(lambda x: torch.linalg.eigvalsh(_positive(x)), "x", "host-sync"),
}


def inputs_of(letters: str, device: str, seed: int = 0) -> list[Tensor]:
    """Random inputs."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "x": lambda: torch.randn(8, 8, generator=generator).to(device),
        "i": lambda: torch.randint(8, (8,), generator=generator).to(device),
        "h": lambda: torch.randn(8, 8, generator=generator),
        "j": lambda: torch.randint(8, (8,), generator=generator),
        "s": lambda: torch.randn((), generator=generator),
    }
    return [made[letter]() for letter in letters]
