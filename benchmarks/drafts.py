"""Speculative decoding of the Llama-3.1-8B shape on a GPU: what a verification costs, and what drafts gain.

    python benchmarks/drafts.py --json benchmarks/results/drafts.json

bfloat16, prompts of 1,024 tokens. ``steps``: a step that verifies beside one that decodes, both replayed
with the choice of tokens, and guesses, over full contexts. ``forced``: tokens a second of the engine where
each step gives a sequence so many tokens, whatever is guessed, beside plain decoding, with all that the
engine and the n-gram drafter do. ``texts``: the n-gram drafter on a text that goes in circles of 64 tokens,
and on one in which no token comes twice.

The weights are random, but for the last linears of attention and MLP, which are zero, and lm_head, whose
rows are embeddings: the next token is a fixed permutation of the last one, so that the text is known. They
are read all the same.

With ``--drafter eagle3`` the n-gram drafter's place is taken by an EAGLE-3 head of that shape, with a
vocabulary of 32,000 tokens. Its weights are random, so that only ``steps`` and ``forced`` mean something. The
head reads plain steps, too: what they cost without one is what the run with the other drafter says.

``--smoke`` runs all of it with a small shape on the CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, SpeculativeConfig
from ad_flashinfer_pass.deployment.bench import copy_bandwidth, machine, step_bytes
from ad_flashinfer_pass.heads.eagle3 import random_eagle3
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.sequence_info import RowParams, SequenceInfo, SequenceStep

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that it can import from
from benchmarks.decode import llama_8b
from benchmarks.experts import PACKAGES, installed

CIRCLE = 64
"""Tokens of the text that copies itself."""
SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


class Forced:
    """Makes steps that verify give a number of tokens, from within captured graphs."""

    def __init__(self, device: torch.device) -> None:
        self._number = torch.zeros((), dtype=torch.int64, device=device)

    def set(self, number: int) -> None:
        """Tokens that each step gives a sequence from now on; 0: what the drafts deserve."""
        self._number.fill_(number)

    def install(self) -> None:
        """Let every draft be right, or wrong, just before it is compared."""
        accept = SequenceInfo.accept

        def accept_changed(info: SequenceInfo, sampled: Tensor) -> None:
            chosen = sampled.view(-1, 1 + info.num_drafts)
            self._change(info.drafts[: len(chosen)], chosen)
            accept(info, sampled)

        SequenceInfo.accept = accept_changed  # type: ignore[method-assign, assignment]
        if self._number.is_cuda:
            from ad_flashinfer_pass.kernels import drafts

            launch = drafts.accept

            def launch_changed(
                num_rows: int, num_drafts: int, tokens: Tensor, views: Mapping[str, Tensor], **sizes: int
            ) -> None:
                shape = (-1, 1 + num_drafts)
                self._change(views["input_ids"][:num_rows].view(shape), tokens[:num_rows].view(shape))
                launch(num_rows, num_drafts, tokens, views, **sizes)

            drafts.accept = launch_changed

    def _change(self, drafts: Tensor, chosen: Tensor) -> None:
        places = torch.arange(1, drafts.shape[1], device=drafts.device)
        wanted = torch.where(places < self._number, chosen[:, :-1], -1)
        drafts[:, 1:] = torch.where(self._number > 0, wanted, drafts[:, 1:])


def permutation(vocab_size: int) -> Tensor:
    """int64 [vocab_size], the next token: a circle of the first ones, and one of all others."""
    generator = torch.Generator().manual_seed(0)
    others = torch.randperm(vocab_size - CIRCLE, generator=generator) + CIRCLE
    following = torch.empty(vocab_size, dtype=torch.int64)
    following[:CIRCLE] = (torch.arange(CIRCLE) + 1) % CIRCLE
    following[others] = others.roll(-1)
    return following


def known_model(shape: LlamaConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights, of which the next token is ``permutation``."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embeddings = model.model.embed_tokens.weight
    model.lm_head.weight[permutation(shape.vocab_size).to(device)] = embeddings
    return model


def build(args: argparse.Namespace, device: torch.device) -> CachedModel:
    """The model with its graphs."""
    shape = LlamaConfig(architectures=["LlamaForCausalLM"], **SMALL) if args.smoke else llama_8b(args.layers)
    on_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    module, draft, has_head = known_model(shape, device, dtype), None, args.drafter == "eagle3"
    if has_head:
        one = {"vocab_size": 512 if args.smoke else 32000, "num_hidden_layers": 1}
        draft = random_eagle3(LlamaConfig(**{**shape.to_dict(), **one}), module, dtype).to(device)
    model, reports = transform_module(
        module,
        AutoDeployConfig(
            device=str(device),
            compile_backend=args.compile_backend if on_cuda else "torch-simple",
            max_batch_size=max(args.batches),
            max_seq_len=args.context + args.new + 64,
            max_num_tokens=args.max_num_tokens,
            cuda_graph_batch_sizes=args.batches,
            cuda_graph_token_buckets=[args.max_num_tokens],  # prompts are not timed
            kv_cache_config=KvCacheConfig(dtype=args.kv_dtype),
            speculative_config=SpeculativeConfig(
                drafter=args.drafter, model="given" if has_head else None, num_tokens=args.num_tokens
            ),
        ),
        draft=draft,
        on_event=lambda name: print(f"  {name}", file=sys.stderr, flush=True),
    )
    for report in reports:
        for note in report.notes:
            if "drafts" in note or "verification" in note:
                print(f"  {note}", flush=True)
    return model


def prompts(args: argparse.Namespace, number: int, vocab_size: int, kind: str) -> list[list[int]]:
    """Random tokens; with ``circle`` the end goes in circles already."""
    rows = []
    for row in range(number):
        generator = torch.Generator().manual_seed(row)
        tokens = (torch.randperm(vocab_size - CIRCLE, generator=generator) + CIRCLE)[: args.context].tolist()
        if kind == "circle":
            turns = min(2 * CIRCLE, args.context // 2)
            tokens[-turns:] = [(row + i) % CIRCLE for i in range(turns)]
        rows.append(tokens)
    return rows


def speed(model: CachedModel, rows: list[list[int]], num_new: int, *, drafts: bool, always: bool) -> Any:
    """Tokens a second from the first to the last, all that the engine does included, and its metrics."""
    drafter, cost = model.drafter, model.verify_cost
    model.drafter = drafter if drafts else None
    model.verify_cost = {1: 0.0} if always else cost
    engine = Engine(model, steps_ahead=int(model.device.type == "cuda"), enable_block_reuse=False)
    model.drafter, model.verify_cost = drafter, cost
    params = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
    for prompt in rows:
        engine.add_request(prompt, params)
    start, begun, count, ended = 0.0, set[int](), 0, 0.0
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            assert output.completion is None or output.completion.error is None, output
            if output.token_id is None:
                continue
            if len(begun) == len(rows):
                count, ended = count + 1, now
            else:
                begun.add(output.request_id)
                start = now
    return count / (ended - start), engine.metrics


def step_ms(model: CachedModel, number: int, context: int, *, verifies: bool, rounds: int = 30) -> float:
    """Median time of a step and what ends it, enqueued one by one."""
    info = model.sequence_info
    pages = -(-(context + info.num_drafts + 2 * rounds * (1 + info.num_drafts)) // info.tokens_per_block)
    pages = min(pages, info.max_blocks_per_seq, (model.num_pages - 1) // number)
    tables = [list(range(1 + i * pages, 1 + (i + 1) * pages)) for i in range(number)]
    new = [5] * (1 + info.num_drafts if verifies else 1)
    model.nest(
        [
            SequenceStep(new, context, table, slot=1 + i, max_cached=context + 1)
            for i, table in enumerate(tables)
        ],
        [RowParams()] * number,
        verifies=verifies,
    )
    on_cuda = model.device.type == "cuda"
    times = []
    for _ in range(rounds):
        if not on_cuda:
            start = time.perf_counter()
            model.forward()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        model.forward()
        assert model.sample_and_advance(is_greedy=True), "the step was not captured"
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[rounds // 3 :])


def main() -> int:
    """Parse arguments, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--drafter", choices=["ngram", "eagle3"], default="ngram")
    parser.add_argument("--num-tokens", type=int, default=3, help="drafts of a sequence in a step")
    parser.add_argument("--forced", type=int, nargs="*", default=[2, 3, 4], help="tokens that a step gives")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=256, help="tokens generated for each prompt")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-dtype", default="auto", help="auto or fp8")
    parser.add_argument("--compile-backend", default="torch-opt")
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--smoke", action="store_true", help="a small shape on the CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.smoke:
        args.batches, args.context, args.new, args.max_num_tokens = [1, 4], 160, 48, 256
    device = torch.device("cpu") if args.smoke else torch.device("cuda", 0)
    bandwidth = copy_bandwidth(device)
    forced = Forced(device)
    forced.install()
    start = time.perf_counter()
    model = build(args, device)
    results: dict[str, Any] = {
        "machine": machine(device),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "copy_bytes_per_s": bandwidth,
        "drafter": args.drafter,
        "num_tokens": args.num_tokens,
        "kv_dtype": args.kv_dtype,
        "build_seconds": time.perf_counter() - start,
        "cost_on_padding": dict(model.verify_cost),
        "steps": [],
        "forced": [],
        "texts": [],
    }

    def note(part: str, **values: Any) -> None:
        results[part].append(values)
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{part}: {', '.join(shown)}", flush=True)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    for number in args.batches:
        decode = step_ms(model, number, args.context, verifies=False)
        verify = step_ms(model, number, args.context, verifies=True)
        floor = 1e3 * step_bytes(model, number, args.context) / bandwidth
        note("steps", batch=number, decode_ms=decode, verify_ms=verify, ratio=verify / decode, floor_ms=floor)
    vocab_size = model.vocab_size
    for number in args.batches:
        random = prompts(args, number, vocab_size, "random")
        circle = prompts(args, number, vocab_size, "circle")
        forced.set(0)
        plain, _ = speed(model, random, args.new, drafts=False, always=False)
        for tokens in args.forced:
            if tokens > 1 + args.num_tokens:
                continue
            forced.set(tokens)
            fast, metrics = speed(model, random, args.new, drafts=True, always=True)
            got = metrics.drafts.tokens_a_step
            note(
                "forced",
                batch=number,
                tokens=tokens,
                got=got,
                tokens_per_s=fast,
                plain=plain,
                times=fast / plain,
            )
        forced.set(0)
        for kind, rows in (("circle", circle), ("random", random)) if args.drafter == "ngram" else ():
            plain, _ = speed(model, rows, args.new, drafts=False, always=False)
            fast, metrics = speed(model, rows, args.new, drafts=True, always=False)
            note(
                "texts",
                batch=number,
                text=kind,
                tokens_per_s=fast,
                plain=plain,
                times=fast / plain,
                got=metrics.drafts.tokens_a_step,
                num_steps=metrics.num_steps,
                num_verify_steps=metrics.num_verify_steps,
            )
    results["eager_steps"] = model.eager_steps
    print(f"eager steps: {model.eager_steps}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
