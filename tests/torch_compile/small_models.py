"""A model written by hand, with F.scaled_dot_product_attention and no cache, and what it generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ad_flashinfer_pass import CacheSession
from ad_flashinfer_pass.torch_compile.backend import flashinfer_trtllm

VOCAB, WIDTH, HEADS, MAX_LEN = 61, 32, 4, 64
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
Between = Callable[[Tensor], Tensor]


def keep(x: Tensor) -> Tensor:
    """Nothing between two places of the model."""
    return x


def break_graph(x: Tensor) -> Tensor:
    """A graph break."""
    torch._dynamo.graph_break()
    return x


class Attention(nn.Module):
    """Causal self-attention.

    Args:
        inside: what happens to K between its projection and the attention.
    """

    def __init__(self, inside: Between) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, width] to the same."""
        b, s, _ = x.shape
        q, k, v = (y.view(b, s, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, self.inside(k), v, is_causal=True)
        return self.out(out.transpose(1, 2).reshape(b, s, WIDTH))


class Net(nn.Module):
    """Token ids and positions, by names of its own, to logits.

    Args:
        num_layers: of attention.
        between: what happens to the hidden states between two layers.
        inside: see ``Attention``.
        dropout: of the hidden states.
        num_rounds: how often all layers run, with the same weights.
    """

    def __init__(
        self,
        num_layers: int = 2,
        *,
        between: Between = keep,
        inside: Between = keep,
        dropout: float = 0.0,
        num_rounds: int = 1,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(MAX_LEN, WIDTH)
        self.layers = nn.ModuleList(Attention(inside) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)
        self.between, self.dropout, self.num_rounds = between, nn.Dropout(dropout), num_rounds
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.eval()

    def forward(self, idx: Tensor, pos: Tensor) -> Tensor:
        """int64 [b, s] twice to [b, s, vocab]."""
        x = self.tokens(idx) + self.positions(pos)
        for _ in range(self.num_rounds):
            for layer in self.layers:
                x = self.between(x + self.dropout(layer(self.norm(x))))
        return self.head(x)


def session(**changes: Any) -> CacheSession:
    """A small session."""
    sizes: dict[str, Any] = {
        "max_batch_size": 4,
        "max_seq_len": MAX_LEN,
        "kv_cache_config": {"tokens_per_block": 16},
    }
    return CacheSession(**{**sizes, **changes})


def compiled(model: nn.Module, of: CacheSession, **options: Any) -> Callable[..., Any]:
    """The model through the backend; op by op, unless options say otherwise."""
    settings = {"session": of, "compile_backend": "torch-simple", **options}
    return torch.compile(model, backend=flashinfer_trtllm, options=settings)


def generate(
    of: CacheSession,
    prefill: Callable[..., Tensor],
    decode: Callable[..., Tensor] | None = None,
    num_new_tokens: int = 6,
    prompts: Sequence[Sequence[int]] = PROMPTS,
) -> list[list[int]]:
    """Greedy continuations; the session is empty afterwards."""
    decode = prefill if decode is None else decode
    steps = []
    with of.prefill(prompts) as batch:
        steps.append(batch.last_logits(prefill(*batch.inputs.values())).argmax(-1))
    while len(steps) < num_new_tokens:
        with of.decode(steps[-1]) as batch:
            steps.append(batch.last_logits(decode(*batch.inputs.values())).argmax(-1))
    of.free()
    return torch.stack(steps, 1).tolist()


def expected(
    model: nn.Module, prompts: Sequence[Sequence[int]] = PROMPTS, num_new_tokens: int = 6
) -> list[list[int]]:
    """Greedy continuations from the whole text at each step."""
    texts = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for text in texts:
            for _ in range(num_new_tokens):
                logits = model(torch.tensor([text]), torch.arange(len(text))[None])
                text.append(int(logits[0, -1].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
