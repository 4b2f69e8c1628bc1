"""Throughput and latency of a model under concurrent requests, compared with the floor that its memory sets.

The floor of a decode step is the time in which the device's memory moves what every step must: each weight
once, K and V of every token in the batch, and the states of its sequences, read and written. Of the experts
it counts those that a batch is expected to choose if all are equally likely. The bandwidth is measured in the
same run, by a large copy. No step can be faster than the floor; a step that is close to it has nothing left
to gain.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

import torch

from ad_flashinfer_pass import __version__
from ad_flashinfer_pass.collector import new_objects_alone
from ad_flashinfer_pass.deployment.dataset import Request
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.files import write_file
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.engine import Drafts, Engine
from ad_flashinfer_pass.runtime.inductor import EagerPieces, eager_pieces
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from rich.console import RenderableType

_COPY_BYTES = {"cuda": 2**32, "cpu": 2**28}
"""Far more than a cache holds."""


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of times, in milliseconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """Percentiles of times in seconds, at least one."""
        ordered = sorted(seconds)
        return cls(*(1e3 * ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in (0.5, 0.9, 0.99)))


@dataclass(frozen=True)
class Row:
    """What was measured at one concurrency."""

    concurrency: int
    num_requests: int
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    """Prompt tokens over the time to the last first token; of use where output_len is 1."""
    step_ms: float | None
    """Median time between two steps that give a request tokens: of ``concurrency`` sequences, whose tokens
    are decoded or whose drafts are verified. None where ``output_len`` is 1."""
    floor_ms: float
    """Weights, and K and V at the middle of the output, over the bandwidth of a copy; of experts those that
    so many tokens are expected to choose."""
    first_token: Percentiles
    between_tokens: Percentiles | None
    request: Percentiles
    plain_tokens_per_s: float | None = None
    """``output_tokens_per_s`` of the same requests without drafts; None without a drafter."""
    tokens_a_step: float | None = None
    """Tokens that a sequence got in a step that verified drafts, in the mean; None without a drafter."""
    acceptance: Sequence[float] = ()
    """How often the first draft was taken, the second one, and so on."""


@dataclass(frozen=True)
class Result:
    """A run of ``bench``."""

    machine: str
    versions: dict[str, str]
    date: str
    copy_bytes_per_s: float
    """Bytes read plus bytes written by a large copy."""
    input_len: int
    """The mean, where lengths differ; likewise of the output."""
    output_len: int
    rows: list[Row]
    eager_steps: dict[str, int]
    """Steps that ran eagerly although graphs were captured, by reason."""
    eager_pieces: EagerPieces | None
    """Of ``torch-opt``; None with another ``compile_backend``."""
    request_rate: float | None = None
    """Requests that arrive in a second, of a dataset; None: all at once."""


@dataclass
class _Timeline:
    """Host times at which tokens of one request were known."""

    start: float
    tokens: list[float]


def bench(
    llm: LLM,
    *,
    input_len: int,
    output_len: int,
    concurrencies: Sequence[int],
    requests_each: int = 1,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Result:
    """Measure a model at several concurrencies.

    Args:
        llm: the model; nothing else may use it meanwhile.
        input_len: number of tokens of each prompt; they are random.
        output_len: number of tokens that each request generates; end tokens do not end it.
        concurrencies: requests that run at once; as soon as one ends, another starts.
        requests_each: how many requests follow one another in each of those places. 1 gives steps of exactly
            that batch size.
        on_progress: called with (concurrency, requests done, requests in all).

    Returns:
        A row for each concurrency, in order, after a short round that is not counted.

    Raises:
        ConfigError: a number does not fit the limits that the model was built for.
    """
    _check_limits(llm, "input_len + output_len", input_len + output_len, concurrencies)
    sizes = llm.model.vocab_size, input_len, output_len
    loads = [(number, _random(number * requests_each, *sizes)) for number in concurrencies]
    return _measured(llm, loads, on_progress)


def bench_dataset(
    llm: LLM,
    requests: Sequence[Request],
    *,
    concurrencies: Sequence[int],
    request_rate: float = float("inf"),
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Result:
    """Measure a model under requests of different lengths that arrive over time.

    Args:
        llm: the model; nothing else may use it meanwhile.
        requests: in the order of their arrival.
        concurrencies: requests that run at once, at most; a row for each. The time to a first token counts
            from the arrival.
        request_rate: what is said of the arrivals in the result.
        on_progress: called with (concurrency, requests done, requests in all).

    Raises:
        ConfigError: a request does not fit the limits that the model was built for.
    """
    longest = max(len(request.prompt) + request.output_len for request in requests)
    _check_limits(llm, "the longest request", longest, concurrencies)
    found = _measured(llm, [(number, requests) for number in concurrencies], on_progress)
    return replace(found, request_rate=request_rate if request_rate < float("inf") else None)


def _check_limits(llm: LLM, what: str, num_tokens: int, concurrencies: Sequence[int]) -> None:
    model = llm.model
    assert isinstance(model, CachedModel)
    info = model.sequence_info
    limits = [(what, num_tokens, info.max_seq_len, "max_seq_len")]
    limits += [("concurrency", number, info.max_batch_size, "max_batch_size") for number in concurrencies]
    for name, number, limit, key in limits:
        if not 1 <= number <= limit:
            raise ConfigError(f"{name} must lie within 1..{key}={limit}, got {number}; raise {key}.")


def _measured(
    llm: LLM,
    loads: Sequence[tuple[int, Sequence[Request]]],
    on_progress: Callable[[int, int, int], None] | None,
) -> Result:
    model = llm.model
    assert isinstance(model, CachedModel)
    bandwidth = copy_bandwidth(model.device)
    rows = []
    for number, requests in loads:
        input_len = round(statistics.mean(len(request.prompt) for request in requests))
        output_len = round(statistics.mean(request.output_len for request in requests))
        warm = _random(number, model.vocab_size, min(input_len, 16), min(output_len, 4))
        _run(llm.engine, warm, number, None)
        before, start = llm.engine.metrics.drafts, time.perf_counter()
        timelines = _run(llm.engine, requests, number, on_progress)
        floor = step_bytes(model, number, input_len + output_len // 2) / bandwidth
        row = _row(number, sum(len(r.prompt) for r in requests), start, timelines, floor)
        after = llm.engine.metrics.drafts
        if before is not None and after is not None:
            row = _with_drafts(
                row, after.since(before), _plain_speed(llm.engine, requests, number, on_progress)
            )
        rows.append(row)
    return Result(
        machine=machine(model.device),
        versions={"ad-flashinfer-pass": __version__, **{n: version(n) for n in ("torch", "transformers")}},
        date=datetime.date.today().isoformat(),
        copy_bytes_per_s=bandwidth,
        input_len=input_len,
        output_len=output_len,
        rows=rows,
        eager_steps=model.eager_steps,
        eager_pieces=eager_pieces(model.module),
    )


def _random(number: int, vocab_size: int, input_len: int, output_len: int) -> list[Request]:
    """Requests of one kind, that arrive at once."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocab_size, (number, input_len), generator=generator).tolist()
    return [Request(prompt, output_len, 0.0) for prompt in prompts]


@new_objects_alone()
def _run(
    engine: Engine,
    requests: Sequence[Request],
    concurrency: int,
    on_progress: Callable[[int, int, int], None] | None,
) -> list[_Timeline]:
    """Keep up to ``concurrency`` requests running, once they have arrived, until all are done."""
    timelines: dict[int, _Timeline] = {}
    start, done = time.perf_counter(), 0
    salt = token_hex()  # prompts come again with another concurrency, and are to be computed then, too
    while done < len(requests):
        while len(timelines) < min(len(requests), done + concurrency):
            request = requests[len(timelines)]
            wait = start + request.arrival - time.perf_counter()
            if wait > 0:
                if len(timelines) > done:
                    break
                time.sleep(wait)
            params = SamplingParams(max_new_tokens=request.output_len, ignore_eos=True)
            began = start + request.arrival if request.arrival else time.perf_counter()
            timelines[engine.add_request(request.prompt, params, cache_salt=salt)] = _Timeline(began, [])
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.token_id is not None:
                timelines[output.request_id].tokens.append(now)
            if output.completion is not None:
                if output.completion.error is not None:
                    raise RuntimeError(f"a request of the benchmark failed: {output.completion.error}")
                done += 1
                if on_progress is not None:
                    on_progress(concurrency, done, len(requests))
    return list(timelines.values())


def _plain_speed(
    engine: Engine,
    requests: Sequence[Request],
    concurrency: int,
    on_progress: Callable[[int, int, int], None] | None,
) -> float:
    """Generated tokens a second without drafts."""
    engine.may_draft, start = False, time.perf_counter()
    timelines = _run(engine, requests, concurrency, on_progress)
    engine.may_draft = True
    end = max(line.tokens[-1] for line in timelines)
    return sum(len(line.tokens) for line in timelines) / (end - start)


def _with_drafts(row: Row, drafts: Drafts, plain: float) -> Row:
    return replace(
        row,
        plain_tokens_per_s=plain,
        tokens_a_step=drafts.tokens_a_step,
        acceptance=[round(share, 4) for share in drafts.acceptance],
    )


def _row(concurrency: int, prompt_tokens: int, start: float, timelines: list[_Timeline], floor: float) -> Row:
    gaps = [b - a for line in timelines for a, b in zip(line.tokens, line.tokens[1:], strict=False)]
    steps = [gap for gap in gaps if gap]  # tokens of one step are known at the same time
    end = max(line.tokens[-1] for line in timelines)
    last_first = max(line.tokens[0] for line in timelines)
    return Row(
        concurrency=concurrency,
        num_requests=len(timelines),
        output_tokens_per_s=sum(len(line.tokens) for line in timelines) / (end - start),
        prompt_tokens_per_s=prompt_tokens / (last_first - start),
        step_ms=1e3 * statistics.median(steps) if steps else None,
        floor_ms=1e3 * floor,
        first_token=Percentiles.of([line.tokens[0] - line.start for line in timelines]),
        between_tokens=Percentiles.of(gaps) if gaps else None,
        request=Percentiles.of([line.tokens[-1] - line.start for line in timelines]),
    )


def step_bytes(model: CachedModel, batch_size: int, context: int) -> int:
    """Bytes that a decode step must move: weights, K and V of ``context`` tokens, states both ways."""
    weights = model.weights.bytes_at(batch_size)
    page_bytes = sum(cache[0].nbytes for cache in model.paged)
    pages = page_bytes * context * batch_size // model.sequence_info.tokens_per_block
    return weights + pages + 2 * batch_size * sum(cache[0].nbytes for cache in model.states)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written in a second by a large copy, the best of five."""
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's kind and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def as_tables(result: Result) -> list[RenderableType]:
    """A row for each concurrency, and the speed of a copy."""
    from rich.table import Table

    title = f"{result.machine}: {result.input_len} tokens in, {result.output_len} out"
    table = Table(title=title)
    for name in ("at once", "step ms", "floor ms", "of floor", "tokens/s", "prompt tokens/s"):
        table.add_column(name, justify="right")
    for name in ("first token ms", "between tokens ms", "request ms"):
        table.add_column(f"{name}\np50 / p90 / p99", justify="right")
    for row in result.rows:
        times = (row.first_token, row.between_tokens, row.request)
        table.add_row(
            str(row.concurrency),
            "-" if row.step_ms is None else f"{row.step_ms:.2f}",
            f"{row.floor_ms:.2f}",
            "-" if row.step_ms is None else f"{row.floor_ms / row.step_ms:.0%}",
            f"{row.output_tokens_per_s:,.0f}",
            f"{row.prompt_tokens_per_s:,.0f}",
            *("-" if p is None else f"{p.p50:.1f} / {p.p90:.1f} / {p.p99:.1f}" for p in times),
        )
    drafts = [_told(row) for row in result.rows if row.tokens_a_step is not None]
    pieces = [] if result.eager_pieces is None else [str(result.eager_pieces)]
    return [table, f"A copy moves {result.copy_bytes_per_s / 1e12:.3g} TB/s.", *drafts, *pieces]


def _told(row: Row) -> str:
    """What the drafts of a row were worth."""
    shares = ", ".join(f"{share:.0%}" for share in row.acceptance)
    return (
        f"{row.concurrency} at once: {row.output_tokens_per_s:,.0f} tokens/s, without drafts "
        f"{row.plain_tokens_per_s:,.0f}; {row.tokens_a_step:.2f} tokens a sequence in a step that verifies, "
        f"drafts taken by position: {shares}."
    )


def draw(result: Result, file: Path) -> None:
    """Step time by concurrency with the floor, as .png or .svg; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    numbers = [row.concurrency for row in result.rows]
    steps = [float("nan") if row.step_ms is None else row.step_ms for row in result.rows]
    axes.plot(numbers, steps, marker="o", label="decode step")
    axes.plot(
        numbers, [row.floor_ms for row in result.rows], linestyle="--", color="gray", label="floor: memory"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences in a step")
    axes.set_ylabel("milliseconds")
    axes.set_title(f"{result.machine}, {result.input_len} tokens in, {result.output_len} out", fontsize=10)
    axes.legend()
    drawn = BytesIO()
    figure.savefig(drawn, format=file.suffix[1:], dpi=150)
    write_file(file, drawn.getvalue(), f"--plot {file}")
