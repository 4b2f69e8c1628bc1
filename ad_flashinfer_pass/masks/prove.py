"""The mask prover: what an attention mask means, shown for every length that will be used.

A mask in an exported graph is a small program from sizes and positions to visibility. Nothing is
concluded from how it is written, and nothing from samples of it: ``prove`` shows that it equals a closed
form at every query, key, head, batch row and number of tokens up to ``max_seq_len``, or refuses it.
The machinery is in ``mask_prover``; docs/mask_prover.md has the argument and its limits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ad_flashinfer_pass.errors import MaskError
from ad_flashinfer_pass.masks.forms import Form, number, variable
from ad_flashinfer_pass.masks.hints import describe
from ad_flashinfer_pass.masks.program import MaskProgram
from ad_flashinfer_pass.masks.proof import HIDDEN, Point, Proof, Rough, Undecided, readable_program
from ad_flashinfer_pass.masks.reading import Reading

__all__ = ["HIDDEN", "Certificate", "MaskClass", "fingerprint", "prove"]

_LARGEST_RUN = 130
_LARGEST_PICTURE = 256
_HINT_SIZE = 24


@dataclass(frozen=True)
class MaskClass:
    """A closed form: key k is visible to query q iff k <= q, k > q - W and q // C == k // C.

    With ALiBi, slope * (k - q) is added to the logits of each head, up to a number that is the same for
    all keys of a query.
    """

    sliding_window: int | None = None
    """W: tokens that a query sees, itself included."""
    chunk: int | None = None
    """C: tokens of a chunk."""
    alibi_slopes: tuple[float, ...] | None = None
    """One a head, exact in float32; a single one stands for all heads."""

    def __str__(self) -> str:
        parts = ["causal"]
        if self.sliding_window is not None:
            parts.append(f"sliding_window={self.sliding_window}")
        if self.chunk is not None:
            parts.append(f"chunk={self.chunk}")
        if self.alibi_slopes is not None:
            parts.append(f"alibi={len(self.alibi_slopes)} slopes from {max(self.alibi_slopes, key=abs):.6g}")
        return " ".join(parts)

    def visible(self, size: int) -> Tensor:
        """bool [size, size], rows are queries."""
        q, k = torch.arange(size)[:, None], torch.arange(size)
        seen = k <= q
        if self.sliding_window is not None:
            seen &= k > q - self.sliding_window
        if self.chunk is not None:
            seen &= q // self.chunk == k // self.chunk
        return seen

    def read(self, reading: Reading) -> Form:
        """The same for the prover: 0 or 1 in each cell."""
        q, k = variable("q"), variable("k")
        seen = reading.le(k, q)
        if self.sliding_window is not None:
            seen = reading.both(seen, reading.le(q - number(self.sliding_window), k, strict=True))
        if self.chunk is not None:
            size = number(self.chunk)
            seen = reading.both(
                seen, reading.eq(reading.floor_divide(q, size), reading.floor_divide(k, size))
            )
        return seen


@dataclass(frozen=True)
class Certificate:
    """What was shown about one mask."""

    mask_class: MaskClass
    sizes: tuple[int, int]
    """Fewest and most tokens for which it was shown."""
    num_cells: int
    """Regions that were read to show it."""
    runs: tuple[tuple[int, int], ...]
    """(rows, tokens) of every run of the program that was compared with the form."""
    reads_positions: bool
    """The mask looks at the values of the positions."""
    starts_anywhere: bool
    """It is the same if the positions of a row do not start at 0."""
    shifts_rows: bool
    """It adds something to whole rows, which softmax ignores unless there are sinks."""

    @property
    def contract(self) -> str:
        """What must hold of the positions."""
        start = "" if self.starts_anywhere else " and start at 0"
        return f"positions are consecutive within a sequence{start}"

    def __str__(self) -> str:
        low, high = self.sizes
        return (
            f"{self.mask_class}: proved for {low} to {high} tokens in {self.num_cells} regions, checked by "
            f"{len(self.runs)} runs; {self.contract}"
        )


def fingerprint(mask: fx.Node) -> Hashable:
    """Equal for masks that are computed by the same steps from the same constants; raises as ``prove``."""
    return MaskProgram(mask).fingerprint()


def prove(mask: fx.Node, max_seq_len: int) -> Certificate:
    """Classify the mask that ``mask`` computes, for sequences of up to ``max_seq_len`` tokens.

    Args:
        mask: bool (True = visible) or float (added to the logits), broadcastable to
            [rows, heads, tokens, tokens].
        max_seq_len: tokens.

    Raises:
        MaskError: it is none of the closed forms, or cannot be shown to be one; names the node, its line and,
            where there is one, the first (query, key) that differs.
    """
    program = MaskProgram(mask)
    readable = readable_program(program)
    low = max(_check_sizes(program, max_seq_len), _check_sizes(readable, max_seq_len))
    # Positions that start anywhere include those that start at 0, on which the class rests.
    for starts_anywhere in (True, False) if program.reads_positions else (True,):
        proof = Proof(readable, low, max_seq_len, last_start=max_seq_len if starts_anywhere else 0)
        try:
            found, refusal = _classify(program, proof)
        except RecursionError:
            raise MaskError(
                f"{program.where}: the attention mask cannot be proved, because it is computed in too many "
                f"steps ({len(program.nodes)} ops). Compute it from index vectors without a loop."
            ) from None
        if refusal is None:
            break
    if refusal is not None:
        raise refusal
    runs = tuple(_compare_runs(program, found, low, max_seq_len))
    return Certificate(
        mask_class=found,
        sizes=(low, max_seq_len),
        num_cells=proof.num_cells,
        runs=runs,
        reads_positions=program.reads_positions,
        starts_anywhere=starts_anywhere,
        shifts_rows=proof.shifts_rows(),
    )


def _check_sizes(program: MaskProgram, max_seq_len: int) -> int:
    """The fewest tokens that the graph is for."""
    low, high = program.sizes()
    if not low <= max_seq_len <= high:
        limit = f"at most {high}" if max_seq_len > high else f"at least {low}"
        raise MaskError(
            f"{program.where}: the graph of the attention mask is valid for {limit} tokens (a buffer or a "
            f"branch of the model sets this limit), but max_seq_len is {max_seq_len}. Set it to {limit}."
        )
    return low


def _slopes(proof: Proof) -> tuple[float, ...] | None:
    return tuple(map(float, proof.slopes)) if np.any(proof.slopes) else None


def _classify(program: MaskProgram, proof: Proof) -> tuple[MaskClass, MaskError | None]:
    """The only class that the mask can have, and why it does not have it."""
    found = MaskClass()
    try:
        window, chunk = proof.window_and_chunk()
        found = MaskClass(window, chunk, _slopes(proof))
        wrong = proof.check(found.read)
    except Rough as err:
        wrong = proof.first_departure(found.read, err.point.head) or err.point
        what = f"{_what(proof, wrong)}, because {err.reason}"
        hint = "Load the model in that format, or lower max_seq_len."
        return found, _refusal(program, found, wrong, what, hint)
    except Undecided as err:
        return found, _refusal(program, found, err.point, err.reason, _hint(program, found))
    if wrong is None:
        return found, None
    hint = _hint(program, found) or f"Before query {wrong.query} it agrees."
    return found, _refusal(program, found, wrong, _what(proof, wrong), "" if _is_odd(proof, wrong) else hint)


def _refusal(program: MaskProgram, found: MaskClass, point: Point, what: str, hint: str) -> MaskError:
    head = f", head {point.head}" if point.head else ""
    return MaskError(
        f"{program.where}: the attention mask is not a form that a kernel can run: the nearest is {found}, "
        f"but with {point.size} tokens{head}, at query {point.query} and key {point.key} {what}. "
        f"{hint}".rstrip(),
        picture=_picture(program, found, point),
    )


def _picture(program: MaskProgram, found: MaskClass, point: Point) -> tuple[str, ...]:
    """The mask beside the nearest class around a point, # where a key is visible; of short sequences only."""
    size = point.size
    if size > _LARGEST_PICTURE:
        return ()
    seen, _ = _seen(program.run(3, size, torch.arange(size).repeat(3, 1)), size)
    mask, nearest = seen[0, min(point.head, seen.shape[1] - 1)], found.visible(size)
    rows = range(max(0, point.query - 3), min(size, point.query + 4))
    first, last = max(0, point.key - 12), min(size, point.key + 13)
    lines = [f"{size} tokens, keys {first} to {last - 1}: the mask, and {found}"]
    for row in rows:
        texts = ("".join(".#"[int(x)] for x in grid[row, first:last]) for grid in (mask, nearest))
        lines.append(f"query {row:>4}  {'   '.join(texts)}{'   <-' if row == point.query else ''}")
    return tuple(lines)


def _biases(proof: Proof, point: Point) -> tuple[float, float]:
    """What the mask adds relative to the query's own logit, and what it should add to a visible key."""
    own = float(proof.value_at(point.query, point.query, point.size)[0][point.head])
    return point.low - own, float(proof.slopes[point.head]) * (point.key - point.query)


def _is_odd(proof: Proof, point: Point) -> bool:
    """Whether the mask neither shows nor hides the key."""
    bias, expected = _biases(proof, point)
    return proof.dtype != torch.bool and bias > HIDDEN and abs(bias - expected) > 1e-3


def _what(proof: Proof, point: Point) -> str:
    """What the mask does at a point, in words."""
    if not _is_odd(proof, point):
        bias, _ = _biases(proof, point)
        is_hidden = bias <= HIDDEN if proof.dtype != torch.bool else point.low == 0
        return "the key is hidden" if is_hidden else "the key is visible"
    bias, expected = _biases(proof, point)
    if point.key <= point.query:
        return f"the mask adds {bias:.6g} to the logit relative to the query's own, not {expected:.6g}"
    return f"the mask adds {bias:.6g} to the logit, which does not hide a key (-inf does, or {HIDDEN:.6g})"


def _hint(program: MaskProgram, found: MaskClass) -> str:
    """What the mask looks like at a small size, if it is not the class there."""
    low, high = program.sizes()
    size = min(max(low, _HINT_SIZE), high)
    visible, _ = _seen(program.run(3, size, torch.arange(size).repeat(3, 1)), size)
    return "" if bool((visible == found.visible(size)).all()) else describe(visible)


def _seen(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Visibility, and bias relative to the query's own, of a mask that was run: [rows, heads, size, size]."""
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(*mask.shape[:2], size, size)
    if mask.dtype == torch.bool:
        return mask, torch.zeros_like(mask, dtype=torch.float64)
    bias = mask.double() - mask.double().diagonal(dim1=2, dim2=3)[..., None]
    return bias > HIDDEN, bias


def _compare_runs(program: MaskProgram, found: MaskClass, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Run the program itself, which guards against an error in the rules by which it was read.

    Raises:
        MaskError: a run contradicts the proof.
    """
    heads = 1 if found.alibi_slopes is None else len(found.alibi_slopes)
    limit = min(high, _LARGEST_RUN if heads == 1 else _LARGEST_RUN // 2)
    small = [(1, low), (2, low), (3, low + 1), (1, low + 2), (2, low + 3), (3, low + 4), (2, low + 8)]
    breaks = [c for c in (found.sliding_window, found.chunk) if c is not None]
    large = [(1, size) for size in sorted({limit, *(c + d for c in breaks for d in (-1, 0, 1, 2))})]
    slopes = torch.tensor(found.alibi_slopes or (0.0,), dtype=torch.float64)[:, None, None]
    for rows, size in small + large:
        if not low <= size <= limit or (rows > 1 and not program.has_rows):
            continue
        mask = program.run(rows, size, torch.arange(size).repeat(rows, 1))
        visible, bias = _seen(mask, size)
        expected = found.visible(size).expand(visible.shape)
        lag = torch.arange(size)[:, None] - torch.arange(size)
        error = (bias + slopes * lag).abs()[expected]
        allowed = 1e-6
        if mask.is_floating_point():
            allowed += 8 * torch.finfo(mask.dtype).eps * float(mask.double()[mask > HIDDEN].abs().max())
        if not torch.equal(visible, expected) or bool((error > allowed).any()):
            raise MaskError(
                f"{program.where}: the attention mask was proved to be {found}, but a run with {rows} x "
                f"{size} tokens contradicts it. This is a defect of the prover: please report it with the "
                "code of the mask."
            )
        yield rows, size
