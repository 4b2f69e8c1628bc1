"""A user's program, for mypy and pyright: test_public_api.py has them read it. It is not run.

Each line that is ignored must be an error: both report an ignore that is not needed.
"""

from collections.abc import Generator
from typing import Literal

from torch import nn
from typing_extensions import assert_type

from ad_flashinfer_pass import (
    LLM,
    AdFlashinferError,
    AutoDeployConfig,
    CachedModel,
    ConfigError,
    GenerationResult,
    GuidedDecodingParams,
    KvCacheConfig,
    RequestError,
    SamplingParams,
    TransformConfig,
    TransformError,
    build_model,
    transform_module,
)

config = AutoDeployConfig(
    model="demo",
    max_batch_size=8,
    compile_backend="torch-simple",
    kv_cache_config=KvCacheConfig(dtype="fp8", tokens_per_block=32),
    transforms={
        "fuse_gemms": TransformConfig(enabled=False),
        "tune_attention": TransformConfig(decode="xqa"),
    },
)
assert_type(config.max_batch_size, int)
assert_type(config.max_seq_len, int | None)
assert_type(config.kv_cache_config.tokens_per_block, int)
assert_type(config.compile_backend, Literal["torch-simple", "torch-cudagraph", "torch-opt"])
assert_type(config.transforms["fuse_gemms"].enabled, bool)
AutoDeployConfig(max_batch_siz=8)  # type: ignore[call-arg]
AutoDeployConfig(max_batch_size="many")  # type: ignore[arg-type]
AutoDeployConfig(compile_backend="torch")  # type: ignore[arg-type]
KvCacheConfig(dtype="int4")  # type: ignore[arg-type]

try:
    llm = build_model(config)
except ConfigError as err:
    assert_type(err, ConfigError)
    raise
except TransformError as err:
    assert_type(err.transform, str)
    raise
except AdFlashinferError:
    raise
assert_type(llm, LLM)

params = SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=64, stop=["."])
results = llm.generate(["Once upon a time", "The little dog"], params)
assert_type(results, list[GenerationResult])
assert_type(results[0].text, str | None)
assert_type(results[0].token_ids, list[int])
assert_type(results[0].error, str | None)
llm.generate("Once upon a time", max_new_tokens=64, temperature=0.8)
llm.generate([[1, 2, 3], [4]], [params, SamplingParams()], seed=3)
llm.generate("Once upon a time", n=3, logprobs=2, logit_bias={5: 1.0}, bad_words_ids=[[3, 4]], min_tokens=2)
llm.generate("A dog:", guided_decoding=GuidedDecodingParams(json={"type": "object"}))
llm.generate("A dog:", guided_decoding={"type": "object"})  # type: ignore[arg-type]
llm.generate("Once upon a time", max_tokens=64)  # type: ignore[call-arg]
llm.generate("Once upon a time", temperature="hot")  # type: ignore[arg-type]
llm.generate("Once upon a time", {"temperature": 0.8})  # type: ignore[arg-type]

assert_type(llm.generate_iter("Once upon a time", params), Generator[GenerationResult, None, None])
for result in llm.generate_iter(
    ["Once upon a time"], on_progress=lambda progress: print(progress.num_finished)
):
    assert_type(result, GenerationResult)

chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
assert_type(llm.chat(chat, params), list[GenerationResult])
llm.chat([chat, [{"role": "user", "content": "And you?"}]], max_new_tokens=8)
assert_type(llm.encode_chat(chat), list[int])

try:
    for piece in llm.stream("Once upon a time", max_new_tokens=64):
        assert_type(piece, str)
    for piece in llm.stream(llm.encode_chat(chat), params):
        print(piece, end="")
except RequestError as err:
    print(err)


def serve(module: nn.Module) -> LLM:
    """A module of one's own."""
    model, reports = transform_module(module, config)
    assert_type(model, CachedModel)
    print(reports[0].name)
    return LLM(model, default_sampling=params)
