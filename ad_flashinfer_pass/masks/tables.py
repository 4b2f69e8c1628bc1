"""Constant tensors as functions of their indices, of which only bounds may be known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from ad_flashinfer_pass.masks.forms import NOTHING, UNIT, Array, Cells, Form, between, grain_of, number, pick

# A table whose entries depart by this share from a straight line is bounded by the line.
_NEARLY_LINEAR = 2.0**-6


class Table:
    """A constant tensor that can be read at one place or bounded over a range of places."""

    def __init__(self, tensor: Tensor) -> None:
        """``tensor`` is of any real dtype, on the CPU."""
        # Two dimensions at least, the last of which may be followed along a line.
        shape = (1,) * (2 - tensor.dim()) + tuple(tensor.shape)
        if tensor.dtype.is_floating_point:
            tensor = tensor.double()
        self.values: Array = tensor.reshape(shape).contiguous().numpy()
        self.rank = tensor.dim()
        self.is_integer = not tensor.dtype.is_floating_point
        self._levels: list[tuple[Array, Array]] = []
        self._grain = NOTHING
        self._line = self._fit()

    def read(self, cells: Cells, index: tuple[Form, ...]) -> Form:
        """The entry at ``index``; a form for each dimension of the tensor."""
        zero = number(0.0)
        index = (zero,) * (self.values.ndim - self.rank) + index
        limits = [cells.limits(form) for form in index]
        # A program never reads beyond a tensor, so what a bound allows beyond it does not occur.
        lasts = [size - 1 for size in self.values.shape]
        ends = [
            np.clip(limit, 0, last).astype(np.int64)
            for side in (0, 1)
            for limit, last in zip((pair[side] for pair in limits), lasts, strict=True)
        ]
        ends = list(np.broadcast_arrays(*ends))
        low, high = ends[: len(lasts)], ends[len(lasts) :]
        single = np.all([lo == hi for lo, hi in zip(low, high, strict=False)], axis=0)
        entry = self.values[tuple(low)].astype(np.float64)
        if single.all():
            return number(entry)
        inner = np.all([lo == hi for lo, hi in zip(low[:-1], high[:-1], strict=False)], axis=0)
        if self._line is not None and inner.all():
            base, slope, error = (array[tuple(low[:-1])] for array in self._line)
            line = index[-1].scaled(slope) + number(base)
            grain = np.where(error > 0, self._grain, line.grain)
            return pick(single, number(entry), replace(line, grain=grain, error=error))
        return pick(
            single, number(entry), between(*self._range(low, high), UNIT if self.is_integer else NOTHING)
        )

    def _fit(self) -> tuple[Array, Array, Array] | None:
        """Base, slope and relative error of straight lines along the last dimension, if it holds such.

        The slope is the step next to the entry nearest to 0, where a rounded table is most exact.
        """
        size = self.values.shape[-1]
        if size < 3 or self.values.dtype in (np.bool_, np.uint8) or not np.isfinite(self.values).all():
            return None
        values = self.values.astype(np.float64)
        at = np.clip(np.abs(values).argmin(-1), 0, size - 2)[..., None]
        start = np.take_along_axis(values, at, -1)
        slope = np.take_along_axis(values, at + 1, -1) - start
        line = start + slope * (np.arange(size) - at)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.where(values == line, 0.0, np.abs(values / line - 1)).max(-1)
        if not np.all(error <= _NEARLY_LINEAR):
            return None
        self._grain = grain_of(values).min(keepdims=True).reshape(1)
        return (start - slope * at)[..., 0], slope[..., 0], error * (1 + 1e-9)

    def _range(self, low: list[Array], high: list[Array]) -> tuple[Array, Array]:
        """Least and greatest entry within a range of the last two dimensions and one place of the others."""
        outer = np.all([lo == hi for lo, hi in zip(low[:-2], high[:-2], strict=False)] or [np.True_], axis=0)
        side = np.maximum(high[-1] - low[-1], high[-2] - low[-2])
        level = np.ceil(np.log2(side + 1)).astype(np.int64)
        lows = np.full(side.shape, self.values.min(), dtype=np.float64)
        highs = np.full(side.shape, self.values.max(), dtype=np.float64)
        for depth in np.unique(level):
            which = (level == depth) & outer
            least, greatest = self._level(int(depth))
            # A range no longer than a block lies in two neighbouring blocks.
            corners = [
                (*(lo[which] for lo in low[:-2]), rows[which] >> depth, columns[which] >> depth)
                for rows in (low[-2], high[-2])
                for columns in (low[-1], high[-1])
            ]
            lows[which] = np.minimum.reduce([least[corner] for corner in corners])
            highs[which] = np.maximum.reduce([greatest[corner] for corner in corners])
        return lows, highs

    def _level(self, depth: int) -> tuple[Array, Array]:
        """Least and greatest entries of aligned blocks of 2**depth rows and columns."""
        if not self._levels:
            self._levels.append((self.values, self.values))
        while len(self._levels) <= depth:
            least, greatest = self._levels[-1]
            self._levels.append((_halved(least, np.minimum), _halved(greatest, np.maximum)))
        return self._levels[depth]


def _halved(values: Array, reduce: np.ufunc) -> Array:
    for axis in (-1, -2):
        starts = np.arange(0, values.shape[axis], 2)
        values = reduce.reduceat(values, starts, axis=axis)
    return values
