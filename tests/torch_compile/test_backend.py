"""What the backend takes, what it refuses, and that a model split by graph breaks keeps its caches apart."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ad_flashinfer_pass import CacheSession, registry
from ad_flashinfer_pass.errors import (
    AdFlashinferError,
    CapacityError,
    ExportError,
    PackingError,
    SessionError,
)
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.runtime import inductor
from ad_flashinfer_pass.torch_compile.backend import flashinfer_trtllm
from tests import architectures
from tests.torch_compile.small_models import (
    Attention,
    Net,
    break_graph,
    compiled,
    expected,
    generate,
    keep,
    session,
)

ROOT = Path(__file__).parents[2]
DYNAMO_SEES_DTYPES = Version(torch.__version__).release >= (2, 13)
"""Of the weights, when they change."""


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    config = architectures.CONFIGS["llama_gqa4"]()
    config.num_hidden_layers = 1
    return architectures.random_model(config)


def test_the_installed_package_offers_the_backend_by_name(tmp_path: Path) -> None:
    """torch finds the entry point of setup.cfg, lists it, and imports the package when it is asked for."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    info = tmp_path / "ad_flashinfer_pass-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ad-flashinfer-pass\nVersion: 9\n")
    entries = setup["options.entry_points"]["torch_dynamo_backends"]
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{entries}\n")
    code = (
        "import sys, torch\n"
        "print('flashinfer_trtllm' in torch._dynamo.list_backends(), 'ad_flashinfer_pass' in sys.modules)\n"
        "torch.compile(torch.nn.Linear(2, 2), backend='flashinfer_trtllm')\n"
        "print('ad_flashinfer_pass.torch_compile.backend' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False", "True"]


def test_a_model_written_by_hand() -> None:
    """Names of its own for its inputs, SDPA with is_causal, no mask: one graph for all steps."""
    model, of = Net(), session()
    assert generate(of, compiled(model, of)) == expected(model)
    assert [record.what for record in of.compiles] == ["dynamo", "pass"]


def test_a_factor_that_is_written_in_place_is_applied_once() -> None:
    """Into K: as part of the scale alone, or of K alone."""
    model, of = Net(1, inside=lambda k: k.mul_(0.35)), session()
    assert generate(of, compiled(model, of)) == expected(model)


@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamic_may_be_set(dynamic: bool) -> None:
    """With True, Dynamo also makes inputs of the model's floats; a new value of one is used."""
    model, of = Net(1), session()
    options: dict[str, Any] = {"session": of, "compile_backend": "torch-simple"}
    call = torch.compile(model, backend=flashinfer_trtllm, dynamic=dynamic, fullgraph=True, options=options)
    assert generate(of, call) == expected(model)
    assert [record.what for record in of.compiles] == ["dynamo", "pass"]
    model.norm.eps = 1.0
    assert generate(of, call) == expected(model)


def test_two_sessions_serve_one_model() -> None:
    model, first, second = Net(1), session(), session()
    calls = compiled(model, first), compiled(model, second)
    with first.prefill([[1, 2, 3]]) as batch:
        calls[0](*batch.inputs.values())
    assert generate(second, calls[1]) == expected(model)
    assert (first.lengths, second.lengths) == ({0: 3}, {})


def test_a_function_and_a_module_compiled_in_place() -> None:
    """Other ways to ask for it."""
    model, of = Net(1), session()
    options: dict[str, Any] = {"session": of, "compile_backend": "torch-simple"}

    @torch.compile(backend=flashinfer_trtllm, options=options)
    def logits(tokens: Tensor, positions: Tensor) -> Tensor:
        return model(tokens, positions) * 1.0

    assert generate(of, logits) == expected(model)
    wanted = expected(model)
    model.compile(backend=flashinfer_trtllm, options=options)
    assert generate(of, model) == wanted


def test_weights_keep_their_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo guards them: a transform that changed one would have the model compiled twice."""
    seen: list[bool] = []

    def transform(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
        seen.append(ctx.keeps_strides)
        return model, TransformReport("tune_experts")

    monkeypatch.setitem(registry._TRANSFORMS, "tune_experts", transform)
    of, net = session(), Net(1)
    with of.prefill([[1, 2, 3]]) as batch:
        compiled(net, of)(*batch.inputs.values())
    assert seen == [True]


def test_a_new_dtype_is_another_graph() -> None:
    model, of = Net(1), session()
    call = compiled(model, of)
    with of.prefill([[1, 2, 3]]) as batch:
        call(*batch.inputs.values())
    model.half()
    said = r"has 3 tokens and the caches of layers\.0 hold 0 of them"
    if not DYNAMO_SEES_DTYPES:
        said = r"another dtype.*call torch\._dynamo\.reset\(\)"
    with pytest.raises(SessionError, match=said):
        generate_one_more(of, call)
    of.free()
    if not DYNAMO_SEES_DTYPES:
        torch._dynamo.reset()
    assert generate(of, call) == expected(model)


def generate_one_more(of: CacheSession, call: Callable[..., Tensor]) -> None:
    with of.decode([4]) as batch:
        call(*batch.inputs.values())


def test_a_reset_of_dynamo_keeps_the_sequences() -> None:
    model, of = Net(1), session()
    call = compiled(model, of)
    with of.prefill([[1, 2, 3]]) as batch:
        tokens = batch.last_logits(call(*batch.inputs.values())).argmax(-1)
    torch._dynamo.reset()
    with of.decode(tokens) as batch:
        more = batch.last_logits(call(*batch.inputs.values())).argmax(-1)
    assert [[int(tokens), int(more)]] == expected(model, [[1, 2, 3]], 2)


def test_a_graph_that_dynamo_did_not_make_is_refused() -> None:
    of = session()
    compiler = partial(flashinfer_trtllm, options={"session": of})
    call = torch.compile(Net(1), backend=aot_autograd(fw_compiler=compiler))
    with (
        pytest.raises(BackendCompilerFailed, match=r"Dynamo did not make.*give it to torch\.compile itself"),
        of.prefill([[1, 2, 3]]) as batch,
    ):
        call(*batch.inputs.values())


def test_layers_that_run_twice_have_a_cache_each_time() -> None:
    model, of = Net(num_rounds=2), session()
    assert generate(of, compiled(model, of)) == expected(model)
    (group,) = of._groups.values()
    assert len(group.caches) == 4


def test_pieces_between_graph_breaks_have_their_layers_caches() -> None:
    """Two layers are one code and one graph of Dynamo's, with other weights."""
    model, of = Net(between=break_graph), session()
    with pytest.warns(UserWarning, match="A graph break split the model into pieces"):
        found = generate(of, compiled(model, of))
    assert found == expected(model)
    assert len(of._groups) == 2


def test_a_layer_that_runs_twice_across_a_graph_break_is_refused() -> None:
    model, of = Net(1, between=break_graph, num_rounds=2), session()
    with pytest.raises(
        SessionError, match=r"has already run in this batch\..*across a graph break cannot be told"
    ):
        generate(of, compiled(model, of))
    assert of.lengths == {}


def test_a_graph_break_between_projection_and_attention_is_refused() -> None:
    model, of = Net(1, inside=break_graph), session()
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(SessionError, match=r"takes K or V that no weight of its graph makes\. A graph break"),
    ):
        generate(of, compiled(model, of))


def test_a_mask_from_before_a_graph_break_is_refused(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: break_graph(forward(self, x)))
    of = session()
    with pytest.raises(AdFlashinferError, match="graph break"), of.prefill([[1, 2, 3]]) as batch:
        compiled(llama, of)(**batch.inputs, use_cache=False)


def test_models_share_the_pages_of_a_session() -> None:
    """Two models in one batch, and one model compiled twice, whose prefill the other's decode continues."""
    first, second, of = Net(1), Net(2), session()
    one, two = compiled(first, of), compiled(second, of)
    with of.prefill([[1, 2, 3], [4, 5]]) as batch:
        inputs = tuple(batch.inputs.values())
        tokens = [batch.last_logits(model(*inputs)).argmax(-1).tolist() for model in (one, two)]
    prompts = [[1, 2, 3], [4, 5]]
    for model, found in ((first, tokens[0]), (second, tokens[1])):
        assert [[token] for token in found] == expected(model, prompts, 1)
    of.free()

    assert generate(of, two, compiled(second, of)) == expected(second)
    assert {len(group.caches) for group in of._groups.values()} == {1, 2}


def refused(model: nn.Module, error: type[Exception], match: str, **kwargs: Any) -> None:
    """The first call of a model raises, and the session is as before."""
    of = session()
    with pytest.raises(error, match=match), of.prefill([[1, 2, 3]]) as batch:
        compiled(model, of)(**{**batch.inputs, "use_cache": False, **kwargs})
    assert of.lengths == {}
    assert of.num_free_pages == 4 * 4
    assert of.cache_bytes == 0, "refused before there was any memory to write to"


def test_a_cache_of_the_models_own_is_refused(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        cache = llama(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    refused(
        llama,
        SessionError,
        r"cache of its own \(.*past_key_values.*without past_key_values",
        past_key_values=cache,
    )
    for empty in (DynamicCache(), DynamicCache(config=llama.config)):
        refused(llama, SessionError, r"cache of its own \(.*past_key_values\)", past_key_values=empty)
    static = StaticCache(config=llama.config, max_cache_len=32)
    refused(llama, SessionError, "cache of its own", past_key_values=static, use_cache=True)


def test_use_cache_is_no_harm(llama: PreTrainedModel) -> None:
    """The default of transformers; the logits are those of a call without."""
    of = session()
    with of.prefill([[1, 2, 3]]) as batch:
        found = compiled(llama, of)(**batch.inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(found, llama(torch.tensor([[1, 2, 3]])).logits)


def test_a_mask_or_other_tokens_are_refused(llama: PreTrainedModel) -> None:
    ones = torch.ones((1, 3), dtype=torch.int64)
    refused(
        llama,
        SessionError,
        r"attention_mask, torch.int64 \[1, 3\], is not one of batch.inputs",
        attention_mask=ones,
    )
    refused(
        llama, SessionError, r"input_ids, torch.int64 \[1, 3\], is not one of batch.inputs", input_ids=ones
    )
    refused(
        llama, PackingError, "called without position_ids: give it those of batch.inputs", position_ids=None
    )


def test_training_and_gradients_are_refused(llama: PreTrainedModel) -> None:
    of = session()
    with (
        pytest.raises(SessionError, match="KV cache has no gradient"),
        of.prefill([[1, 2]]) as batch,
        torch.enable_grad(),
    ):
        compiled(llama, of)(**batch.inputs, use_cache=False)
    of = session()
    with (
        pytest.raises(SessionError, match=r"training mode: call model.eval\(\) first"),
        of.prefill([[1, 2]]) as batch,
    ):
        compiled(Net(dropout=0.1).train(), of)(*batch.inputs.values())


@pytest.mark.parametrize("backend", ["torch-simple", "torch-opt"])
def test_inference_mode_may_be_on_and_off(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made while it is on can be written to when it is off."""
    monkeypatch.setattr(inductor, "compile_pieces", lambda model: (model, []))
    model = Net(1)
    with torch.inference_mode():
        of = session()
        call = compiled(model, of, compile_backend=backend)
        assert generate(of, call) == expected(model)
    assert generate(of, call) == expected(model)


def test_the_smallest_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compile_pieces", lambda model: (model, []))
    model, of = Net(1), session(max_batch_size=1, max_seq_len=1)
    with of.prefill([[5]]) as batch:
        logits = batch.last_logits(compiled(model, of, compile_backend="torch-opt")(*batch.inputs.values()))
    assert [[int(logits.argmax())]] == expected(model, [[5]], 1)


def test_a_call_must_be_within_a_batch_and_with_its_inputs() -> None:
    of = session()
    model = compiled(Net(1), of)
    tokens = torch.zeros((1, 3), dtype=torch.int64)
    with (
        pytest.raises(SessionError, match=r"called outside a batch: use `with session.prefill"),
    ):
        model(tokens, tokens)  # gradients are on, too
    torch._dynamo.reset()
    with of.prefill([[1, 2, 3]]) as batch:
        old = tuple(batch.inputs.values())
        model(*old)
        with pytest.raises(
            SessionError, match=r"layers\.0 has already run in this batch\. Call a compiled model once"
        ):
            model(*old)
    with pytest.raises(SessionError, match="input_ids is not that of the open batch"), of.decode([4]):
        model(*old)
    assert of.lengths == {0: 3}


def test_a_model_that_missed_a_step_is_refused() -> None:
    of = session()
    one, two = compiled(Net(1), of), compiled(Net(1), of)
    with of.prefill([[1, 2, 3]]) as batch:
        one(*batch.inputs.values())
    with (
        pytest.raises(
            SessionError, match=r"sequence 0 has 3 tokens and the caches of layers.0 hold 0 of them"
        ),
        of.decode([4]) as batch,
    ):
        two(*batch.inputs.values())
    assert of.lengths == {0: 3}


@pytest.mark.parametrize(
    ("options", "mode", "match"),
    [
        pytest.param({}, "max-autotune", 'needs options={"session": .*put "mode": .max-autotune', id="mode"),
        pytest.param({"session": 3}, None, "CacheSession.*got 3", id="no_session"),
        pytest.param(
            {"compile_backnd": 1}, None, "unknown option 'compile_backnd'; did you mean", id="unknown"
        ),
        pytest.param({"compile_backend": "fast"}, None, "compile_backend: input should be", id="backend"),
        pytest.param({"mode": "fast"}, None, "unknown mode 'fast'; known: default", id="inductor_mode"),
        pytest.param({"mode": "reduce-overhead"}, None, "lengths change from step to step", id="graphs"),
        pytest.param(
            {"mode": "default", "compile_backend": "torch-simple"}, None, "mode is Inductor's", id="both"
        ),
        pytest.param({"cuda_graph_batch_sizes": [1]}, None, "for backends that capture", id="sizes"),
    ],
)
def test_options_are_checked(options: dict[str, Any], mode: str | None, match: str) -> None:
    """By the first call, as torch.compile calls its backends then."""
    of = session()
    given = {"session": of, **options} if options else None
    model = torch.compile(Net(1), backend=flashinfer_trtllm, options=given, mode=mode)
    with pytest.raises(BackendCompilerFailed, match=match), of.prefill([[1, 2, 3]]) as batch:
        model(*batch.inputs.values())


def test_a_batch_in_which_nothing_ran_says_so() -> None:
    of = session()
    with (
        pytest.raises(SessionError, match="no attention with a cache ran in this batch"),
        of.prefill([[1, 2]]),
    ):
        pass
    assert of.lengths == {}
    assert of.num_free_pages == 16


def test_no_pool_is_allocated_that_does_not_fit() -> None:
    of = session(kv_cache_config={"tokens_per_block": 16, "free_gpu_memory_fraction": 1e-9})
    with pytest.raises(CapacityError, match=r"1 caches of 17 pages need .* bytes, but .* are free"):
        generate(of, compiled(Net(1), of))


class Counting(Net):
    """Its code asks how many tokens there are.

    Args:
        count: the result is twice as large for so many.
    """

    def __init__(self, count: int) -> None:
        super().__init__(1)
        self.count = count

    def forward(self, idx: Tensor, pos: Tensor) -> Tensor:
        """As before, and twice that for one number of tokens."""
        return super().forward(idx, pos) * (2 if idx.shape[1] == self.count else 1)


@pytest.mark.parametrize("count", [3, 5, 200])
def test_a_branch_on_the_number_of_tokens_is_refused(count: int) -> None:
    """A step packs sequences, so it says nothing about any of them; also where no step has so many yet."""
    of = session()
    call = compiled(Counting(count), of)
    with (
        pytest.raises(
            ExportError, match=rf"right only for .*\b{count}.* tokens are not, by .*idx\.shape\[1\]"
        ),
        of.prefill([[4, 5, 6]]) as batch,
    ):
        call(*batch.inputs.values())
    assert (of.lengths, of.cache_bytes) == ({}, 0)


class ShortCut(Attention):
    """A window, whose mask is left out where it hides nothing, as code for one sequence may do."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, width] to the same."""
        b, s, _ = x.shape
        q, k, v = (y.view(b, s, 4, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        lag = torch.arange(s)[:, None] - torch.arange(s)
        mask = (lag >= 0) & (lag < 4) if s > 4 else None
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(out.transpose(1, 2).reshape(b, s, -1))


@pytest.mark.parametrize("first", [3, 9])
def test_a_window_that_short_steps_leave_out_is_refused(first: int) -> None:
    """A decode step has few tokens, of sequences of any length; transformers has models that do this."""
    model, of = Net(1), session()
    model.layers[0] = ShortCut(keep).eval()
    call = compiled(model, of)
    with (
        pytest.raises(ExportError, match=r"right only for .* 4, which \d tokens are not, by .*if s > 4"),
        of.prefill([[7] * first]) as batch,
    ):
        call(*batch.inputs.values())
