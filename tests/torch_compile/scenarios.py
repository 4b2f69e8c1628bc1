"""What a model must do through torch.compile on any device, by whatever compile backend."""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch
from torch import nn
from torch._dynamo.utils import counters

from ad_flashinfer_pass import CacheSession
from tests import architectures
from tests.torch_compile import small_models
from tests.torch_compile.small_models import Net
from tests.torch_compile.test_generate import NUM_NEW_TOKENS, PROMPTS, generate, logits_of

CAPTURED = ("torch-cudagraph", "torch-opt")


def sizes_of(backend: str) -> dict[str, list[int]]:
    """The option that says what is captured."""
    return {"cuda_graph_batch_sizes": [1, 4]} if backend in CAPTURED else {}


def session_on(device: str) -> CacheSession:
    """A small session."""
    return CacheSession(
        max_batch_size=8, max_seq_len=64, device=device, kv_cache_config={"tokens_per_block": 16}
    )


@cache
def llama() -> tuple[nn.Module, list[list[int]]]:
    """One layer, and what transformers generates with it."""
    config = architectures.CONFIGS["llama_gqa4"]()
    config.num_hidden_layers = 1
    model = architectures.random_model(config)
    return model, architectures.generated_by_transformers(model, PROMPTS, NUM_NEW_TOKENS)


def check_llama(backend: str, device: str) -> CacheSession:
    """The tokens of transformers in a ragged batch and alone; the second batch compiles nothing."""
    model, expected = llama()
    session = session_on(device)
    logits = logits_of(model.to(device), session, backend, **sizes_of(backend))
    assert generate(logits, session, PROMPTS, NUM_NEW_TOKENS) == expected
    assert generate(logits, session, PROMPTS[3:], NUM_NEW_TOKENS) == expected[3:]
    num_graphs, num_records = counters["stats"]["unique_graphs"], len(session.compiles)
    assert generate(logits, session, PROMPTS[1:3], NUM_NEW_TOKENS) == expected[1:3]
    assert generate(logits, session, PROMPTS[:1], NUM_NEW_TOKENS) == expected[:1]
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert len(session.compiles) == num_records
    print(*session.compiles, sep="\n")
    once = {"torch-simple": [], "inductor": ["inductor"] * 2}.get(backend, [backend])
    assert Counter(record.what for record in session.compiles) == Counter(["dynamo", "pass", *once])
    if backend in CAPTURED:
        check_replays(session)
    return session


def check_replays(session: CacheSession) -> None:
    """Every decode step was one, also that of a prompt of one token; no prefill was."""
    assert session.num_replays == 4 * (NUM_NEW_TOKENS - 1) + 1
    assert sum(session.eager_steps.values()) == 3
    assert all(reason.startswith("prefill") for reason in session.eager_steps)


def check_by_hand(backend: str, device: str) -> None:
    """A module with SDPA and no cache."""
    model = Net()
    expected = small_models.expected(model)
    session = session_on(device)
    compiled = small_models.compiled(model.to(device), session, compile_backend=backend, **sizes_of(backend))
    assert small_models.generate(session, compiled) == expected
    assert [record.what for record in session.compiles][:2] == ["dynamo", "pass"]
    if backend in CAPTURED:
        assert (session.num_replays, sum(session.eager_steps.values())) == (5, 1)


def check_two_models(backend: str, device: str) -> None:
    """Both run in each batch, the second compiled in the middle of a generation by the first."""
    first, second = Net(1), Net(2)
    expected = [small_models.expected(model, num_new_tokens=1) for model in (first, second)]
    session = session_on(device)
    one, two = (
        small_models.compiled(model.to(device), session, compile_backend=backend, **sizes_of(backend))
        for model in (first, second)
    )
    with session.prefill(small_models.PROMPTS) as batch:
        inputs = tuple(batch.inputs.values())
        tokens = [batch.last_logits(model(*inputs)).argmax(-1) for model in (one, two)]
    assert [t[:, None].tolist() for t in tokens] == expected
    texts = [[*prompt, int(token)] for prompt, token in zip(small_models.PROMPTS, tokens[0], strict=True)]
    for _ in range(4):
        with session.decode(torch.tensor([text[-1] for text in texts], device=device)) as batch:
            inputs = tuple(batch.inputs.values())
            logits = [batch.last_logits(model(*inputs)) for model in (one, two)]
        for model, rows in zip((first, second), logits, strict=True):
            for row, text in zip(rows, texts, strict=True):
                ids = torch.tensor([text], device=device)
                with torch.no_grad():
                    wanted = model(ids, torch.arange(len(text), device=device)[None])[0, -1]
                torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-3)
        for text, row in zip(texts, logits[0], strict=True):
            text.append(int(row.argmax()))
    if backend in CAPTURED:
        assert session.num_replays == 2 * 4
