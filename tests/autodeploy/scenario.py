"""A two-layer model and a morning of requests, to run on a generation's stand-in and on the plugin."""

from __future__ import annotations

import math
import random
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.autodeploy.standin import DEVICE, PACKAGE, Generation, capture, insertion, interface, plugin

PAGE, WINDOW, MAX_SEQ_LEN, MAX_BATCH, MAX_TOKENS = 32, 48, 160, 8, 256
HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 2, 64, 64
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
DUMMY = interface.Request([1], 0, [5])
"""maybe_pad_for_cuda_graph (AD/shim/ad_executor.py): one request with its own page, in every padding row."""


class Attention(nn.Module):
    """As AutoDeploy hands it to a backend: rope and attention are its ops, layout bsnd."""

    def __init__(self, window: int | None, rope: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.window, self.rope, self.options = window, rope, options
        width = HEADS * HEAD_DIM
        self.qkv = nn.Linear(width, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, positions: Tensor, tables: Any, kv: Any) -> tuple[Tensor, Any]:
        q, k, v = self.qkv(x).unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], 2)
        q, k = self.rotated(q, k, positions, *tables)
        if kv is not None:
            k, v = kv
        out = torch.ops.auto_deploy.torch_attention.default(
            q, k, v, sliding_window=self.window, layout="bsnd", **self.options
        )
        return self.out(out.flatten(2)), (k, v)

    def rotated(
        self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Any, Any]:
        explicit = torch.ops.auto_deploy.torch_rope_with_explicit_cos_sin.default
        if self.rope == "table":
            return _pair(torch.ops.auto_deploy.flashinfer_rope.default(q, k, positions, table, True))
        if self.rope == "explicit":  # cat((x, x)), as in transformers
            halves = (table.chunk(2, -1)[0][positions], table.chunk(2, -1)[1][positions])
            cos, sin = (torch.ops.aten.cat.default([half, half], -1) for half in halves)
        else:  # rows of a buffer, as in AutoDeploy's own modeling files
            kind = {"dtype": torch.float32, "layout": torch.strided, "device": cos.device}
            tables = (torch.ops.aten.to.dtype_layout(x, **kind) for x in (cos, sin))
            cos, sin = (torch.ops.aten.index.Tensor(x, [positions]) for x in tables)
        if self.rope == "two_calls":  # as for Gemma4, whose K some layers do not have
            q = explicit(q, q, cos, sin, 2)[0]
            return q, explicit(q, k, cos, sin, 2)[1]
        return _pair(explicit(q, k, cos, sin, 2))


def _pair(values: Any) -> tuple[Any, Any]:
    return values[0], values[1]


class Model(nn.Module):
    """Token embedding, attention layers, head.

    Args:
        generation: which AutoDeploy.
        rope: how the layers rotate; see ``Attention.rotated``.
        shared: a last layer reads the cache of the first.
        options: of the attentions.
        no_window: what the layers without a window say.
    """

    def __init__(
        self,
        generation: Generation,
        rope: str = "table",
        shared: bool = False,
        options: dict[str, Any] | None = None,
        no_window: int | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * HEAD_DIM
        self.embed = nn.Embedding(VOCAB, width)
        layers = []
        for layer, window in enumerate((no_window, WINDOW, no_window)[: 3 if shared else 2]):
            own: dict[str, Any] = {"is_causal": True} if options is None else dict(options)
            own |= {"layer_idx": layer} if generation.layer_idx else {}
            own |= {"shared_kv_source_layer_idx": 0} if layer == 2 else {}
            layers.append(Attention(window, rope, own))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, VOCAB, bias=False)
        inverse = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.arange(MAX_SEQ_LEN)[:, None] * inverse
        self.table: Tensor
        self.register_buffer("table", torch.cat((angles.cos(), angles.sin()), -1))
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), -1))
        self.register_buffer("sin", torch.cat((angles.sin(), angles.sin()), -1))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        first = None
        tables = (self.table, self.cos, self.sin)
        for index, layer in enumerate(self.layers):
            y, kv = layer(x, position_ids, tables, first if index == 2 else None)
            first = kv if index == 0 else first
            x = x + y
        return self.head(x)


class Deployment:
    """The model, transformed by the plugin on one generation, with its caches.

    Args:
        generation: which AutoDeploy; it must be installed.
        kv_dtype: ``kv_cache_config.dtype``.
        max_tokens: of a step.
        model_class: of the model.
        options: of ``Model``.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        kv_dtype: str = "auto",
        max_tokens: int = MAX_TOKENS,
        model_class: type[Model] = Model,
        **options: Any,
    ) -> None:
        self.generation, self.plugin = generation, plugin()
        model = model_class(generation, **options).to(DEVICE, DTYPE)
        for name in ("table", "cos", "sin"):
            setattr(model, name, getattr(model, name).float())
        self.dense = model
        self.gm = fx.symbolic_trace(model)
        ids = torch.zeros(2, 4, dtype=torch.int, device=DEVICE)
        insertion.propagate_shapes(self.gm, ids, ids.long())
        self.info = interface.SequenceInfo(generation, MAX_SEQ_LEN, MAX_BATCH, max_tokens, PAGE)
        config = SimpleNamespace(dtype=kv_dtype, max_attention_window=None, tokens_per_block=PAGE)
        self.cm = interface.CachedSequenceInterface(generation, self.info, DEVICE, config)
        registry = sys.modules[f"{PACKAGE}.custom_ops.attention_interface"].AttentionRegistry
        kvcache = sys.modules[f"{PACKAGE}.transform.library.kvcache"]
        insert = kvcache._InsertCachedOperator(self.cm, registry.get(self.plugin.BACKEND))
        self.num_sites = insert.apply(self.gm)
        self.gm.graph.eliminate_dead_code()
        self.gm.recompile()
        self.utils = sys.modules[f"{PACKAGE}.compile.piecewise_utils"]

    @property
    def num_rotations(self) -> int:
        """Rotations that stand in the graph still."""
        ops = torch.ops.auto_deploy
        rotations = (ops.flashinfer_rope.default, ops.torch_rope_with_explicit_cos_sin.default)
        return sum(node.target in rotations for node in self.gm.graph.nodes)

    def run(self) -> Tensor:
        """The eager forward of the step in ``info``."""
        return self.gm(**self.cm.named_args)


class Requests:
    """Sequences of random tokens with shuffled pages, and the dense model's logits at every position."""

    def __init__(self, deployment: Deployment, lengths: list[int], num_pages: int, seed: int) -> None:
        self.deployment = deployment
        draw = random.Random(seed)
        pages = [page for page in range(1, num_pages) if page != DUMMY.pages[0]]
        draw.shuffle(pages)
        self.tokens = [[draw.randrange(VOCAB) for _ in range(n)] for n in lengths]
        self.pages = [[pages.pop() for _ in range(-(-n // PAGE))] for n in lengths]
        self.pages[0][0] = 0  # which is a page like every other in AutoDeploy
        self.done = [0] * len(lengths)
        self.dummy_ran = False
        with torch.no_grad():
            self.expected = [self._dense(tokens) for tokens in self.tokens]

    def _dense(self, tokens: list[int]) -> Tensor:
        ids = torch.tensor([tokens], device=DEVICE)
        return self.deployment.dense(ids, torch.arange(len(tokens), device=DEVICE)[None])[0]

    def step(self, new: dict[int, int], *, num_extend: int = 0, how: Any = None, pad: int = 0) -> None:
        """Run ``new`` tokens of each sequence, ordered prefill, extend, decode, and compare their logits.

        Args:
            new: number of tokens by sequence.
            num_extend: how many of those before the decodes are extends.
            how: a CapturedGraph or PiecewiseGraph to replay, or a function to run; default: eagerly.
            pad: the batch size or the token bucket of that graph.
        """
        info, batch = self.deployment.info, []
        for i, n in new.items():
            past = self.done[i]
            batch.append(interface.Request(self.tokens[i][past : past + n], past, self.pages[i]))
        if isinstance(how, capture.CapturedGraph):
            self.dummy_ran |= pad > len(batch)
            batch += [DUMMY] * (pad - len(batch))
        info.nest_sequences(batch, num_extend=num_extend)
        with torch.no_grad():
            run = self.deployment.run if how is None else how
            logits = how.replay(pad) if hasattr(how, "replay") else run()
        logits = logits.flatten(0, 1)
        row = 0
        for i, n in new.items():
            want = self.expected[i][self.done[i] : self.done[i] + n]
            close(logits[row : row + n], want, f"sequence {i}, positions {self.done[i]} on, of {new}")
            self.done[i] += n
            row += n

    def check_untouched(self) -> None:
        """Whatever is no token's still holds what it held, in every layer's part of the pool.

        Except that on a GPU what is behind a prefill's last token in its page may be cleared.
        """
        for pool in self.deployment.cm.pools:
            pages = pool if pool.dim() == 6 else pool[:, None]
            written = torch.zeros(pages.shape[0], PAGE, dtype=torch.bool)
            for owned, length in zip(self.pages, self.done, strict=True):
                for position in range(length):
                    written[owned[position // PAGE], position % PAGE] = True
            if self.dummy_ran:
                written[DUMMY.pages[0], 0] = True
            slots = pages.permute(0, 4, 1, 2, 3, 5)
            rest = slots[~written.to(DEVICE)].float()
            held = rest.isnan() if math.isnan(interface.POISON) else rest == interface.POISON
            own = torch.zeros_like(written)
            own[[page for one in self.pages for page in one]] = DEVICE.type == "cuda"
            cleared = own[~written].to(DEVICE)[:, None, None, None, None] & (rest == 0)
            assert bool((held | cleared).all()), "something was written that is no token's"


def close(got: Tensor, want: Tensor, what: str) -> None:
    """Equal up to rounding: float32 on a CPU, bfloat16 through two layers on a GPU."""
    bound = 2e-5 if DTYPE is torch.float32 else 4e-2
    error = (got.float() - want.float()).abs().max() / want.float().abs().max()
    assert not bool(got.isnan().any()), f"NaN at {what}"
    assert float(error) < bound, f"off by {float(error):.3g} of the largest logit at {what}"


def morning(requests: Requests, *, decode: Any = None, mixed: Any = None) -> None:
    """Prefill, mixed, chunked prefill with a one-token prompt, extend, decode."""
    bucket = 128 if mixed is not None else 0
    requests.step({0: 40, 1: 33}, how=mixed, pad=bucket)
    requests.step({2: 64, 0: 1, 1: 1}, how=mixed, pad=bucket)
    requests.step({2: 56, 3: 1, 0: 1, 1: 1}, how=mixed, pad=bucket)
    requests.step({0: 4, 1: 1, 2: 1, 3: 1}, num_extend=1, how=mixed, pad=bucket)
    for _ in range(4):
        requests.step({3: 1, 0: 1, 2: 1}, how=decode, pad=4)
    requests.step({1: 1}, how=decode, pad=1)
    requests.step({0: 1, 1: 1, 2: 1, 3: 1}, how=decode, pad=8)
    requests.step({1: 16, 0: 1}, how=mixed, pad=bucket)


def schedule(requests: Requests, draw: random.Random, *, decode: Any, mixed: dict[int, Any]) -> None:
    """Steps in random order until every sequence is done: of 1 token to the largest bucket, in any mix.

    Args:
        requests: sequences of any length.
        draw: decides.
        decode: captured decode of batch sizes 1, 2, 4 and 8, for steps of decodes alone.
        mixed: by token bucket, captured piecewise; a step takes the smallest that it fits into.
    """
    lengths = [len(tokens) for tokens in requests.tokens]
    while any(done < length for done, length in zip(requests.done, lengths, strict=True)):
        left = [i for i, length in enumerate(lengths) if requests.done[i] < length]
        chosen = draw.sample(left, draw.randint(1, len(left)))
        room = draw.randint(len(chosen), max(mixed))
        prefill: dict[int, int] = {}
        extend: dict[int, int] = {}
        decodes: dict[int, int] = {}
        for at, i in enumerate(chosen):
            rest = lengths[i] - requests.done[i]
            n = min(
                rest,
                draw.choice((1, 1, draw.randint(2, 5), draw.randint(1, 90))),
                room - (len(chosen) - at - 1),
            )
            room -= n
            kind = (
                decodes
                if n == 1
                else extend
                if requests.done[i] and n <= 4 and draw.random() < 0.5
                else prefill
            )
            kind[i] = n
        new = {**prefill, **extend, **decodes}
        if not prefill and not extend:
            size = next(size for size in (1, 2, 4, 8) if size >= len(decodes))
            requests.step(new, how=decode, pad=size)
        elif not prefill:  # extends alone count as decode; without a graph for them they are eager
            requests.step(new, num_extend=len(extend))
        else:
            bucket = min(size for size in mixed if size >= sum(new.values()))
            requests.step(new, num_extend=len(extend), how=mixed[bucket], pad=bucket)
