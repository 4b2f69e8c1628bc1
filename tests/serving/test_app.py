"""A real server on the demo model, asked by OpenAI's own client and by others."""

from __future__ import annotations

import asyncio
import json
import re
import select
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

import torch  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ad_flashinfer_pass.build import build_model  # noqa: E402
from ad_flashinfer_pass.config import AutoDeployConfig  # noqa: E402
from ad_flashinfer_pass.models.loading import load_model  # noqa: E402
from ad_flashinfer_pass.runtime.llm import LLM  # noqa: E402
from ad_flashinfer_pass.serving.app import Limits, create_app  # noqa: E402
from tests.serving.running import running  # noqa: E402

TEXT = "Once upon a time there was a little dog who"
CHAT: Any = [{"role": "user", "content": "Tell me of a dog."}]
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "top_p": 0.9, "seed": 5},
    "several": {"temperature": 0.9, "seed": 5, "n": 3},
    "stopped": {"stop": [" the", "dog"]},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {"300": 4}},
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return build_model(AutoDeployConfig(device="cpu", max_batch_size=8, max_seq_len=256))


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with running(create_app(llm, "demo", Limits(max_body_bytes=20_000))) as url:
        yield url
    metrics = llm.engine.metrics
    assert (metrics.num_running, metrics.num_waiting, metrics.pages_in_use) == (0, 0, 0)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone() -> str:
    """The demo model's own continuation, by transformers."""
    loaded = load_model(AutoDeployConfig(device="cpu"))
    tokenizer: Any = loaded.tokenizer
    model: Any = loaded.module
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    found = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(found, skip_special_tokens=True))


def test_a_completion_is_the_models_own(client: Any, alone: str) -> None:
    """As transformers' generate continues the text, with what it took."""
    answer = client.completions.create(model="demo", prompt=TEXT, max_tokens=24)
    assert answer.choices[0].text == alone
    assert (answer.object, answer.choices[0].finish_reason) == ("text_completion", "length")
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


@pytest.mark.parametrize("name", PARAMS)
def test_streaming_equals_not_streaming(client: Any, name: str) -> None:
    """Texts, reasons, log-probabilities and usage, of both endpoints."""
    shared: Any = {"model": "demo", "max_tokens": 24, **PARAMS[name]}
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    whole = client.completions.create(prompt=TEXT, logprobs=2, **shared)
    chunks = list(client.completions.create(prompt=TEXT, logprobs=2, **shared, **options))
    for choice in whole.choices:
        parts = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        tokens = [token for part in parts if part.logprobs for token in part.logprobs.tokens]
        assert tokens == choice.logprobs.tokens
    assert len(whole.choices) == shared.get("n", 1)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

    answer = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **shared)
    pieces = list(
        client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **shared, **options)
    )
    for choice in answer.choices:
        parts = [each for chunk in pieces for each in chunk.choices if each.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        entries = [one for part in parts if part.logprobs for one in part.logprobs.content]
        assert [one.token for one in entries] == [one.token for one in choice.logprobs.content]
        assert all(len(one.top_logprobs) == 2 for one in entries)
    if name == "stopped":
        assert whole.choices[0].finish_reason == "stop"
        assert "the" not in whole.choices[0].text
    if name == "several":
        assert len({choice.text for choice in whole.choices}) == 3


def test_a_prompt_that_is_known_is_not_computed_again(client: Any) -> None:
    """And usage says so; not for another salt."""
    text = " ".join([TEXT] * 5)
    counts = []
    for salt in ("a", "a", "b"):
        answer = client.completions.create(
            model="demo", prompt=text, max_tokens=2, extra_body={"cache_salt": salt}
        )
        counts.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert counts[0] == counts[2] == 0
    assert counts[1] > answer.usage.prompt_tokens - 33


def test_several_prompts_and_echo(client: Any) -> None:
    """Texts and token ids; with log-probabilities of the prompt, if they are asked for."""
    both = client.completions.create(model="demo", prompt=[TEXT, "The cat"], max_tokens=4, echo=True)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text.startswith("The cat")
    scored = client.completions.create(model="demo", prompt="The cat", max_tokens=1, echo=True, logprobs=0)
    found = scored.choices[0].logprobs.token_logprobs
    assert len(found) == scored.usage.total_tokens
    assert found[0] is None
    assert all(value <= 0 for value in found[1:])


def test_tools_go_to_the_template(url: str) -> None:
    """The template decides what it makes of them; calls and their results may stand in the chat."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    messages = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    body = {"messages": messages, "tools": [tool], "max_tokens": 2}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    # The demo model's template knows no tool messages, and may say so.
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or "the model's chat template refuses this chat" in answer.text
    assert httpx.post(f"{url}/v1/chat/completions", json={**body, "messages": CHAT}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("completions", {"prompt": "a", "modl": "x"}, 400, "modl"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature must be 0"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias must map token ids"),
        ("completions", {"prompt": [[99999999]]}, 400, "the model's vocabulary"),
        ("completions", {"prompt": "a " * 400}, 400, "must fit max_seq_len=256"),
        ("completions", {"prompt": "a" * 30_000}, 413, "larger than 20000 bytes"),
        ("completions", {"prompt": "a", "model": "other"}, 404, "'demo' is"),
        ("completions", {"prompt": []}, 400, "at least one prompt"),
        ("completions", {"prompt": "a", "n": 10**6}, 400, "n:"),
        ("completions", {"prompt": "a", "n": 128, "best_of": 1, "stream": 3}, 400, "stream"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "must have content"),
        ("chat/completions", {"messages": CHAT, "top_logprobs": 1}, 400, "needs logprobs"),
        (
            "chat/completions",
            {
                "messages": CHAT,
                "chat_template_kwargs": {"chat_template": "{% for _ in range(9) %}{% endfor %}"},
            },
            400,
            "must be variables of the template, got 'chat_template'",
        ),
        ("chat/completions", {"messages": CHAT, "tool_choice": "required"}, 400, "tool_choice"),
        ("embeddings", {}, 404, "/v1/embeddings"),
    ],
)
def test_what_is_wrong_is_named(url: str, path: str, body: Any, status: int, says: str) -> None:
    """In OpenAI's form, with a request id."""
    answer = httpx.post(f"{url}/v1/{path}", json=body, headers={"X-Request-Id": "my-1"})
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"] == "my-1"


@pytest.mark.parametrize("name", ["chat", "tokenizer", "of_mine"])
def test_a_variable_of_a_template_may_have_any_other_name(url: str, name: str) -> None:
    body = {"messages": CHAT, "max_tokens": 1, "chat_template_kwargs": {name: "x"}}
    assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200


LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4)
VALUES = (
    LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=4), LEAVES | st.lists(LEAVES))
)
FIELDS = (
    "prompt messages max_tokens temperature top_p n stop logit_bias logprobs seed top_k stop_token_ids tools"
)
FIELDS += " min_tokens stream_options bad_words chat_template_kwargs echo min_p repetition_penalty"


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS.split()), VALUES, max_size=4),
    path=st.sampled_from(["completions", "chat/completions"]),
    is_whole=st.booleans(),
)
def test_no_body_is_the_servers_fault(url: str, fields: dict[str, Any], path: str, is_whole: bool) -> None:
    """Any JSON, and any bytes, are answered or refused."""
    body = {"prompt": "a", "max_tokens": 1} if path == "completions" else {"messages": CHAT, "max_tokens": 1}
    text = json.dumps({**body, **fields}).encode()
    answer = HTTP.post(f"{url}/v1/{path}", content=text if is_whole else text[:-1])
    assert answer.status_code in ((200, 400) if is_whole else (400,)), answer.text


HTTP = httpx.Client(timeout=60)


def test_200_clients_at_once(url: str, alone: str) -> None:
    """Eight run, the others wait; each gets what it would get alone."""

    async def ask() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            body = {"prompt": TEXT, "max_tokens": 6}
            answers = await asyncio.gather(
                *(client.post(f"{url}/v1/completions", json=body) for _ in range(200))
            )
        return [answer.json()["choices"][0]["text"] for answer in answers]

    (text,) = set(asyncio.run(ask()))
    assert alone.startswith(text)


def in_use(url: str) -> float:
    lines = HTTP.get(f"{url}/metrics").text.splitlines()
    names = ("ad_flashinfer_pass_running ", "ad_flashinfer_pass_waiting ", "ad_flashinfer_pass_pages_in_use ")
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


def test_clients_that_leave_free_what_they_had(url: str) -> None:
    """While a stream runs, and before an answer that is not streamed."""
    body: Any = {"prompt": TEXT, "max_tokens": 200, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as stream:
        next(stream.iter_lines())
    raw = raw_request(url, body)
    while in_use(url) == 0 and not select.select([raw], [], [], 0)[0]:
        pass
    raw.close()
    while in_use(url) > 0:
        pass


def raw_request(url: str, body: Any) -> socket.socket:
    where, content = urlparse(url), json.dumps(body)
    raw = socket.create_connection((where.hostname, where.port or 0))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    raw.sendall((head + content).encode())
    return raw


def test_a_client_that_does_not_read_holds_up_nobody(url: str, client: Any, alone: str) -> None:
    """Its tokens wait for it; others are answered meanwhile."""
    raw = raw_request(url, {"prompt": TEXT, "max_tokens": 24, "stream": True})
    answer = client.completions.create(model="demo", prompt=TEXT, max_tokens=24)
    assert answer.choices[0].text == alone
    text = b""
    while b"[DONE]" not in text:
        text += raw.recv(65536)
    raw.close()


def test_models_and_health(client: Any, url: str) -> None:
    """What is served, and that it is."""
    assert [model.id for model in client.models.list()] == ["demo"]
    assert HTTP.get(f"{url}/health").status_code == 200
    assert "ad_flashinfer_pass_first_token_seconds_count" in HTTP.get(f"{url}/metrics").text


def test_the_form_of_an_answer(client: Any, url: str) -> None:
    """A JSON schema as OpenAI says it, a regular expression as vLLM does; a broken one is refused."""
    pytest.importorskip("xgrammar")
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Rex", "Tom"]}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "dog", "schema": schema}}
    answer = client.chat.completions.create(
        model="demo", messages=CHAT, response_format=form, max_tokens=100, temperature=1.0, seed=1
    )
    if answer.choices[0].finish_reason == "stop":
        found = json.loads(answer.choices[0].message.content)
        assert found["name"] in ("Rex", "Tom")
        assert isinstance(found["age"], int)
    body = {"prompt": TEXT, "structured_outputs": {"regex": "(yes|no), [a-z]{3}"}}
    text = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"]
    assert re.fullmatch("(yes|no), [a-z]{3}", text)
    refused = httpx.post(f"{url}/v1/completions", json={**body, "structured_outputs": {"regex": "(("}})
    assert refused.status_code == 400
    assert "guided_decoding cannot be compiled" in refused.text
