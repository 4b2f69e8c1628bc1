"""torch.compile(model, backend="flashinfer_trtllm"): compilations, their times, and decode steps.

    python benchmarks/compile_backend.py                                     # a small Llama on the CPU
    python benchmarks/compile_backend.py --shape llama-3.1-8b --device cuda --compile-backends torch-opt \\
        --batch-sizes 1 32 --context 1024 --json benchmarks/results/compile_backend.json
    python benchmarks/compile_backend.py --architectures --compile-backends inductor    # tokens of all

For each compile backend one Llama with random weights is compiled and generates greedily: a prompt a
sequence, then decode steps, for each batch size. Beside it runs the standalone path (``transform_module``,
the same compile backend; for inductor, which that has not, torch-simple), in the same process and in
alternating rounds. Both loops keep their tokens on the device, so a step's time is the device's or the
host's, whichever is longer. ``host`` is the part that the host needs to issue a step.

--architectures compares the tokens of the architectures of tests/architectures.py with transformers' own
generate, through torch.compile; --families those of docs/architectures.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from ad_flashinfer_pass import CacheSession
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import AdFlashinferError
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from ad_flashinfer_pass.torch_compile.backend import flashinfer_trtllm

_SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
}
_WARM_UP_STEPS = 4
_MAX_ULPS = 4.0
"""Of the best logit, that a token of the one path may be below the best of the other."""


class _Progress:
    """Lines with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.perf_counter()

    def __call__(self, text: str) -> None:
        seconds = time.perf_counter() - self._start
        self._console.print(f"  {seconds:6.1f} s  {text}", highlight=False, markup=False)


class Steps(NamedTuple):
    """A run of decode steps."""

    seconds: float
    """Until the device is done."""
    host_seconds: float
    """Until all are issued."""


def llama(shape: str, num_layers: int | None, device: torch.device) -> nn.Module:
    """A Llama with random weights, bf16 on a GPU, float32 on a CPU."""
    sizes = {**_SHAPES[shape], **({"num_hidden_layers": num_layers} if num_layers else {})}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=8192, use_cache=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    rotary = type(model.model.rotary_emb)(config).to(device)
    model.to_empty(device=device)
    model.model.rotary_emb = rotary  # its buffers are computed, not drawn
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=config.hidden_size**-0.5)
    return model


class Compiled:
    """A user's loop over a compiled model."""

    def __init__(self, model: nn.Module, session: CacheSession, backend: str, **options: Any) -> None:
        self.session = session
        options |= {"session": session, "compile_backend": backend}
        self._model = torch.compile(model, backend=flashinfer_trtllm, options=options)

    def start(self, prompts: Tensor) -> Tensor:
        """Take the prompts, [b, s], one sequence a step; gives the tokens [b] that follow."""
        self.session.free()
        tokens = []
        for prompt in prompts:
            with self.session.prefill(prompt) as batch:
                tokens.append(batch.last_logits(self._model(**batch.inputs).logits).argmax(-1))
        return torch.cat(tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        """Of one token more for each sequence, [b, vocab]."""
        with self.session.decode(tokens) as batch:
            return batch.last_logits(self._model(**batch.inputs).logits)


class Standalone:
    """The same steps through ``transform_module``, without a scheduler."""

    def __init__(self, model: CachedModel) -> None:
        self._model = model
        self._info = model.sequence_info
        self._length = 0
        self._pages: list[list[int]] = []

    def start(self, prompts: Tensor) -> Tensor:
        """As ``Compiled.start``."""
        each = self._info.max_blocks_per_seq
        self._pages = [list(range(1 + i * each, 1 + (i + 1) * each)) for i in range(len(prompts))]
        self._length = prompts.shape[1]
        used = -(-self._length // self._info.tokens_per_block)
        steps = [
            SequenceStep(prompt.tolist(), 0, pages[:used])
            for prompt, pages in zip(prompts, self._pages, strict=True)
        ]
        return torch.cat([self._model.step([step]).argmax(-1) for step in steps])

    def logits(self, tokens: Tensor) -> Tensor:
        """As ``Compiled.logits``; the next step overwrites them."""
        used = self._length // self._info.tokens_per_block + 1
        self._info.tokens[: len(tokens)] = tokens
        self._model.nest(
            [SequenceStep([-1 - i], self._length, pages[:used]) for i, pages in enumerate(self._pages)]
        )
        self._length += 1
        return self._model.forward()[: len(tokens)]


def run(loop: Compiled | Standalone, prompts: Tensor, num_steps: int) -> Steps:
    """Generate greedily; some steps are run before the clock starts."""
    wait: Callable[[], None] = torch.cuda.synchronize if prompts.is_cuda else (lambda: None)
    tokens = [loop.start(prompts)]  # all are kept, as a user's loop keeps them
    for _ in range(_WARM_UP_STEPS):
        tokens.append(loop.logits(tokens[-1]).argmax(-1))
    wait()
    start = time.perf_counter()
    for _ in range(num_steps):
        tokens.append(loop.logits(tokens[-1]).argmax(-1))
    issued = time.perf_counter()
    wait()
    end = time.perf_counter()
    return Steps(end - start, issued - start)


def differences(
    standalone: Standalone, compiled: Compiled, prompts: Tensor, num_steps: int
) -> dict[str, Any]:
    """How often the best tokens of the two differ, given the same tokens so far, and by how much.

    Both take the standalone path's tokens. Graphs that differ sum in other orders, and a random model's best
    logits are often equal in bfloat16, so what counts is by how much the other token's logit is below the
    best: in units in the last place of the best.
    """
    tokens, num_different, largest = standalone.start(prompts), 0, 0.0
    compiled.start(prompts)
    for _ in range(num_steps):
        theirs, ours = standalone.logits(tokens), compiled.logits(tokens)
        tokens = theirs.argmax(-1)
        best = ours.max(-1).values.float()
        margin = best - ours.gather(1, tokens[:, None])[:, 0].float()
        ulps = margin / (torch.exp2(best.abs().log2().floor()) * torch.finfo(ours.dtype).eps)
        num_different += int((ours.argmax(-1) != tokens).sum())
        largest = max(largest, float(ulps.max()))
    return {"num_tokens": num_steps * len(prompts), "num_different": num_different, "largest_ulps": largest}


def compare(model: nn.Module, backend: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Compile times and decode steps of one compile backend."""
    device = torch.device(args.device)
    batch = max(args.batch_sizes)
    settings: dict[str, Any] = {
        "max_batch_size": batch,
        "max_seq_len": args.context + args.steps + _WARM_UP_STEPS + 1,
        "max_num_tokens": max(args.context, batch),
        "device": args.device,
    }
    torch._dynamo.reset()
    progress = _Progress(console)
    session = CacheSession(**settings, on_event=progress)
    is_captured = args.device.startswith("cuda") and backend not in ("inductor", "torch-simple")
    graphs = {"cuda_graph_batch_sizes": args.batch_sizes} if is_captured else {}
    compiled = Compiled(model, session, backend, **graphs)
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.vocab_size  # type: ignore[union-attr]
    prompts = torch.randint(3, vocab_size, (batch, args.context), generator=generator)  # type: ignore[arg-type]
    prompts = prompts.to(device)
    start = time.perf_counter()
    for size in args.batch_sizes:
        progress(f"torch.compile, {backend}: first steps of B{size}")
        run(compiled, prompts[:size], 1)
    first = time.perf_counter() - start
    num_compiles = len(session.compiles)
    rest = first - sum(record.seconds for record in session.compiles)
    console.print(f"{backend}: first calls {first:.1f} s; {rest:.1f} s of it Dynamo and the steps themselves")
    _print_compiles(session, console)

    progress("standalone")
    start = time.perf_counter()
    their_backend = "torch-simple" if backend == "inductor" else backend
    if is_captured:
        settings |= {"cuda_graph_token_buckets": [], "cuda_graph_batch_sizes": args.batch_sizes}
    config = AutoDeployConfig(**settings | {"compile_backend": their_backend})
    standalone = Standalone(transform_module(model, config, on_event=progress)[0])
    console.print(f"standalone ({their_backend}): built in {time.perf_counter() - start:.1f} s")
    rows = []
    for size in args.batch_sizes:
        rounds: list[list[Steps]] = []
        for _ in range(args.rounds):
            progress(f"B{size}, round {len(rounds) + 1} of {args.rounds}")
            rounds.append([run(loop, prompts[:size], args.steps) for loop in (standalone, compiled)])
        theirs, ours = zip(*rounds, strict=True)
        row: dict[str, Any] = {"batch": size, **differences(standalone, compiled, prompts[:size], args.steps)}
        for name, runs in (("standalone", theirs), ("torch.compile", ours)):
            row[f"{name}_ms"] = 1e3 * statistics.median(r.seconds for r in runs) / args.steps
            row[f"{name}_host_ms"] = 1e3 * statistics.median(r.host_seconds for r in runs) / args.steps
        row["ratio"] = row["torch.compile_ms"] / row["standalone_ms"]
        rows.append(row)
        console.print(
            f"B{size}: standalone {row['standalone_ms']:.3f} ms a step (host "
            f"{row['standalone_host_ms']:.3f}), torch.compile {row['torch.compile_ms']:.3f} ms (host "
            f"{row['torch.compile_host_ms']:.3f}), ratio {row['ratio']:.3f}; "
            f"{row['num_different']} of {row['num_tokens']} tokens differ, by {row['largest_ulps']:.1f} ulps"
        )
    later = len(session.compiles) - num_compiles
    console.print(f"compiled again in {args.rounds * len(args.batch_sizes)} further runs: {later}")
    if is_captured:
        console.print(f"torch.compile: {session.num_replays} replays, eagerly {session.eager_steps}")
    return {
        "compile_backend": backend,
        "compiles": [record._asdict() for record in session.compiles],
        "first_calls_seconds": first,
        "compiled_again": later,
        "num_replays": session.num_replays,
        "eager_steps": session.eager_steps,
        "steps": rows,
    }


def _print_compiles(session: CacheSession, console: Console) -> None:
    table = Table("what", "for", "seconds")
    for record in session.compiles:
        table.add_row(record.what, record.shape, f"{record.seconds:.2f}" if record.seconds else "")
    console.print(table)


def families(backend: str, console: Console) -> bool:
    """Whether all families that transform standalone generate the tokens of transformers, or are refused."""
    from tests import architectures as models
    from tests.torch_compile.test_generate import NUM_NEW_TOKENS, PROMPTS, generate, logits_of

    rows = json.loads((Path(__file__).parents[1] / "docs" / "architectures.json").read_text())["rows"]
    outcomes: Counter[str] = Counter()
    for row in rows:
        if row["outcome"] != "same":
            continue
        torch._dynamo.reset()
        model = models.random_model(models.small_config(row["family"]), row["attention"])
        session = CacheSession(max_batch_size=8, max_seq_len=128, max_num_tokens=256)
        expected = models.generated_by_transformers(model, PROMPTS, NUM_NEW_TOKENS)
        model.set_experts_implementation("ad_flashinfer")
        try:
            found = generate(logits_of(model, session, backend), session, PROMPTS, NUM_NEW_TOKENS)
            outcome, detail = "same" if found == expected else "OTHER TOKENS", ""
        except AdFlashinferError as err:
            outcome, detail = "refused", f"{type(err).__name__}: {err}"
        num_graphs = sum(record.what == "dynamo" for record in session.compiles)
        outcomes[outcome] += 1
        line = f"{row['family']}: {outcome}, {num_graphs} graphs of Dynamo's {detail}"
        console.print(line, markup=False, soft_wrap=True)
    console.print(dict(outcomes))
    return not outcomes["OTHER TOKENS"]


def architectures(backend: str, console: Console) -> bool:
    """Whether all architectures generate the tokens of transformers."""
    from tests import architectures as models
    from tests.torch_compile.test_generate import NUM_NEW_TOKENS, PROMPTS, generate, logits_of

    all_same = True
    for name, config in models.CONFIGS.items():
        torch._dynamo.reset()
        model = models.random_model(config())
        expected = models.generated_by_transformers(model, PROMPTS, NUM_NEW_TOKENS)
        model.set_experts_implementation("ad_flashinfer")
        session = CacheSession(max_batch_size=8, max_seq_len=64)
        start = time.perf_counter()
        found = generate(logits_of(model, session, backend), session, PROMPTS, NUM_NEW_TOKENS)
        seconds = time.perf_counter() - start
        same = found == expected
        all_same &= same
        counts = ", ".join(
            f"{record.what} ({record.shape}) {record.seconds:.1f} s" for record in session.compiles
        )
        console.print(f"{name}: {'same tokens' if same else 'OTHER TOKENS'}, {seconds:.1f} s: {counts}")
    return all_same


def main() -> int:
    """Run and print; 1 if tokens differ by more than rounding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=_SHAPES, default="small")
    parser.add_argument("--num-layers", type=int, help="default: those of the shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile-backends", nargs="+", default=["torch-simple", "torch-opt", "inductor"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--context", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=32, help="timed decode steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--architectures", action="store_true", help="compare tokens, for each architecture")
    parser.add_argument("--families", action="store_true", help="the same for each of docs/architectures.md")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    console = Console(width=140)
    if args.families:
        return int(not all([families(backend, console) for backend in args.compile_backends]))
    if args.architectures:
        return int(not all([architectures(backend, console) for backend in args.compile_backends]))
    model = llama(args.shape, args.num_layers, torch.device(args.device))
    results = [compare(model, backend, args, console) for backend in args.compile_backends]
    if args.json is not None:
        machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
        record = {
            "machine": machine,
            "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
            "date": date.today().isoformat(),
            "command": f"python {' '.join(sys.argv)}",
            "shape": {"name": args.shape, **_SHAPES[args.shape], "context": args.context},
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row["largest_ulps"] > _MAX_ULPS for result in results for row in result["steps"]))


if __name__ == "__main__":
    sys.exit(main())
