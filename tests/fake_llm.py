"""A stand-in for the built model, so that the command can be tested without one.

Also runnable: ``python -m tests.fake_llm ARGS`` is the command with this model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.llm import GenerationResult, Progress
from ad_flashinfer_pass.runtime.sampling import SamplingParams


class FakeTokenizer:
    chat_template: str | None = "{{ messages }}"

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: Any) -> list[int]:
        """A token id a message: its length, which shows what the command passed on."""
        return [len(message["content"]) for message in messages]


class FakeLLM:
    """Continues a prompt with itself in capitals; refuses a prompt with ``refuse`` in it.

    ``interrupt`` in a prompt is Ctrl-C at that prompt, ``sleep`` waits for one, ``crash`` is a bug.
    """

    def __init__(self, tokenizer: FakeTokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.inputs: list[Any] = []
        self.sampling: SamplingParams | None = None
        self.default_sampling = SamplingParams()
        self.engine = SimpleNamespace(
            metrics=SimpleNamespace(
                num_generated_tokens=7,
                num_pages=9,
                num_preemptions=1,
                eager_steps={"prefill": 2},
                drafts=None,
            )
        )

    def generate_iter(
        self,
        prompts: Sequence[Any],
        sampling_params: SamplingParams,
        *,
        on_progress: Callable[[Progress], None],
    ) -> Iterator[GenerationResult]:
        """As ``LLM.generate_iter``."""
        self.inputs, self.sampling = list(prompts), sampling_params
        for index, prompt in enumerate(prompts):
            on_progress(
                Progress(
                    num_finished=index,
                    num_total=len(prompts),
                    num_new_tokens=index,
                    pages_in_use=3,
                    num_pages=9,
                    num_preemptions=0,
                )
            )
            yield self._result(index, prompt)

    def stream(self, prompt: Any, sampling_params: SamplingParams) -> Iterator[str]:
        """As ``LLM.stream``."""
        self.inputs, self.sampling = [prompt], sampling_params
        result = self._result(0, prompt)
        if result.error is not None:
            raise RequestError(result.error)
        yield from result.text or ""

    def _result(self, index: int, prompt: Any) -> GenerationResult:
        text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
        if "interrupt" in text:
            raise KeyboardInterrupt
        if "sleep" in text:
            print("sleeping", file=sys.stderr, flush=True)
            time.sleep(60)
        if "crash" in text:
            raise ZeroDivisionError("a bug")
        is_refused = "refuse" in text
        return GenerationResult(
            index=index,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=[1, 2],
            token_ids=[] if is_refused else [3, 4],
            text=None if is_refused or self.tokenizer is None else text.upper(),
            finish_reason="error" if is_refused else "stop",
            error="it was\nrefused" if is_refused else None,
        )


class FakeBuild:
    """Stands for ``build_model`` and remembers what it was called with."""

    def __init__(self) -> None:
        self.tokenizer: FakeTokenizer | None = FakeTokenizer()
        self.error: Exception | None = None
        self.config: AutoDeployConfig | None = None
        self.llm: FakeLLM | None = None

    def __call__(self, config: AutoDeployConfig, *, on_event: Callable[[str], None]) -> FakeLLM:
        """As ``build_model``."""
        self.config = config
        on_event("load_model")
        if self.error is not None:
            raise self.error
        on_event("export_model")
        self.llm = FakeLLM(self.tokenizer)
        return self.llm


if __name__ == "__main__":
    build = ModuleType("ad_flashinfer_pass.build")
    build.build_model = FakeBuild()  # type: ignore[attr-defined]
    sys.modules[build.__name__] = build
    sys.modules["ad_flashinfer_pass"].build = build  # type: ignore[attr-defined]
    from ad_flashinfer_pass.cli import main

    main()
