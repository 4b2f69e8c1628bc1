"""What the server does when there is too much, too late or too wrong, on the toy model."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ad_flashinfer_pass.serving.app import Limits, create_app  # noqa: E402
from tests.runtime.toy_model import ToyModel, greedy_alone  # noqa: E402
from tests.serving.running import running  # noqa: E402
from tests.serving.toy_server import Gated, LettersTokenizer, toy_llm  # noqa: E402

BODY = {"prompt": "abc", "max_tokens": 6}


def text_of(prompt: str, num_tokens: int) -> str:
    tokens = greedy_alone(LettersTokenizer()(prompt)["input_ids"], num_tokens)
    return LettersTokenizer().decode(tokens)


def test_too_many_requests_are_told_to_come_again() -> None:
    """Two run, one waits; a fourth gets 429, and the others what is theirs."""
    gate = Event()
    llm = toy_llm(Gated(gate))
    with running(create_app(llm, "toy", Limits(max_waiting=1))) as url, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(httpx.post, f"{url}/v1/completions", json=BODY) for _ in range(3)]
        while "ad_flashinfer_pass_open_requests 3.0" not in httpx.get(f"{url}/metrics").text:
            pass
        answer = httpx.post(f"{url}/v1/completions", json=BODY)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        gate.set()
        assert {each.result().json()["choices"][0]["text"] for each in waiting} == {text_of("abc", 6)}
        assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200
        assert httpx.post(f"{url}/v1/completions", json={**BODY, "n": 4}).status_code == 400


def test_a_request_has_its_time_and_no_more() -> None:
    """If the stream has begun, the error comes in the stream."""
    gate = Event()
    with running(create_app(toy_llm(Gated(gate)), "toy", Limits(timeout=0.05))) as url:
        streamed = httpx.post(f"{url}/v1/completions", json={**BODY, "stream": True})
        answer = httpx.post(f"{url}/v1/completions", json=BODY)
        gate.set()
    assert answer.status_code == 504
    assert "not done within 0.05 seconds" in answer.json()["error"]["message"]
    assert "not done within" in streamed.text
    assert "[DONE]" not in streamed.text


def test_a_grammar_that_takes_too_long_is_not_waited_for() -> None:
    llm = toy_llm()
    llm.engine.grammars.compile = lambda params: Future()  # type: ignore[method-assign]
    body = {**BODY, "structured_outputs": {"regex": "a"}}
    with running(create_app(llm, "toy", Limits(timeout=0.05))) as url:
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 504
        assert "open_requests 0.0" in httpx.get(f"{url}/metrics").text


class Barred(ToyModel):
    """Most tokens have no probability."""

    def forward(self) -> Tensor:
        """As ``CachedModel.forward``."""
        logits = super().forward().clone()
        logits[:, 10:] = -torch.inf
        return logits


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_logprob_of_a_token_that_cannot_be_is_a_number(is_streamed: bool) -> None:
    """JSON has no infinity, and clients that are strict refuse it."""
    body = {"prompt": "axc", "max_tokens": 2, "logprobs": 12, "echo": True, "stream": is_streamed}
    with running(create_app(toy_llm(Barred(has_states=False)), "toy", Limits())) as url:
        answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    whole = json.loads(answer.text.removeprefix("data: ").partition("\n")[0], parse_constant=pytest.fail)
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][1] == min(logprobs["top_logprobs"][-1].values()) == -9999.0


def test_the_key_is_asked_for() -> None:
    """For everything of the API, not for health and metrics."""
    with running(create_app(toy_llm(), "toy", Limits(api_key="secret"))) as url:
        for header, status in ((None, 401), ("Bearer wrong", 401), ("Bearer secret", 200)):
            headers = {"Authorization": header} if header else {}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
            answer = httpx.post(f"{url}/v1/completions", json=BODY, headers=headers)
            assert answer.status_code == status
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/metrics").status_code == 200


def test_a_failing_step_is_the_error_of_its_requests() -> None:
    """What the model's library raises ends those that were in the step, and nothing else."""
    model = ToyModel(has_states=False)
    with running(create_app(toy_llm(model, steps_ahead=0), "toy")) as url:
        model.fail_next = RuntimeError("boom")
        answer = httpx.post(f"{url}/v1/completions", json=BODY)
        assert (answer.status_code, "boom" in answer.text) == (500, True)
        assert httpx.post(f"{url}/v1/completions", json=BODY).json()["choices"][0]["text"] == text_of(
            "abc", 6
        )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_ends_the_engine_and_everybody_hears_of_it() -> None:
    """Nobody waits for a thread that is gone."""
    model = ToyModel(has_states=False)
    with running(create_app(toy_llm(model), "toy")) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        model.fail_next = ZeroDivisionError("a bug")
        assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 503
        assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503


def test_random_requests_leave_no_page_behind() -> None:
    """Some are streamed, some leave in the middle; with shared beginnings, and preemption."""
    rng = random.Random(0)
    llm = toy_llm()

    def ask(url: str, prompt: str, num_tokens: int, kind: str) -> None:
        body: Any = {"prompt": prompt, "max_tokens": num_tokens, "stream": kind != "whole"}
        if kind == "leaves":
            with client.stream("POST", f"{url}/v1/completions", json=body) as stream:
                next(stream.iter_lines())
            return
        answer = client.post(f"{url}/v1/completions", json=body)
        assert answer.status_code == 200
        if kind == "whole":
            assert answer.json()["choices"][0]["text"] == text_of(prompt, num_tokens)

    with (
        running(create_app(llm, "toy")) as url,
        httpx.Client(timeout=60) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        asked = []
        for _ in range(300):
            prompt = "ab" * rng.randrange(1, 12) + "".join(rng.choices("cdef", k=rng.randrange(1, 9)))
            kind = rng.choice(["whole", "streamed", "leaves"])
            asked.append(pool.submit(ask, url, prompt, rng.randrange(1, 60), kind))
        for each in asked:
            each.result()
    metrics = llm.engine.metrics
    assert (metrics.num_running, metrics.num_waiting, metrics.pages_in_use) == (0, 0, 0)
    assert metrics.num_cached_tokens > 0
    assert isinstance(llm.model, ToyModel)
    assert llm.model.num_dirty_pages == metrics.pages_kept


def test_sigterm_lets_requests_finish(tmp_path: Path) -> None:
    """A stream that has begun ends as it should; whoever comes after that is refused."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.serving.toy_server"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        body = {"prompt": "abc", "max_tokens": 140, "stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"completion_tokens": 140' in rest[-2]
        assert server.wait() == -signal.SIGTERM
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
