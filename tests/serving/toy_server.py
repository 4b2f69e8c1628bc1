"""A server of the toy model: ``python -m tests.serving.toy_server`` prints its URL."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.serving.app import Limits, create_app
from tests.runtime.toy_model import ToyModel


class LettersTokenizer:
    """Letters a to z as 1 to 26, and every token of the toy model as a letter."""

    chat_template = None
    unk_token_id = None
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """As a tokenizer does."""
        return {"input_ids": [ord(char) - ord("a") + 1 for char in text]}

    def __len__(self) -> int:
        return 48

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[None]:
        """There are no tokens of bytes."""
        return [None for _ in tokens]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """A letter a token."""
        return "".join(chr(ord("A") + token) for token in token_ids)


def toy_llm(model: ToyModel | None = None, steps_ahead: int = 1) -> LLM:
    """Few pages, so that requests preempt one another."""
    model = model or ToyModel(num_pages=40, has_states=False, max_batch_size=4)
    return LLM(model, LettersTokenizer(), (), steps_ahead=steps_ahead)  # type: ignore[arg-type]


class Gated(ToyModel):
    """Its steps wait for ``gate`` to be open."""

    def __init__(self, gate: Any) -> None:
        super().__init__(num_pages=40, has_states=False, max_batch_size=2)
        self.gate = gate

    def forward(self) -> Tensor:
        """As ``CachedModel.forward``."""
        self.gate.wait()
        return super().forward()


if __name__ == "__main__":
    from ad_flashinfer_pass.serving.listen import bind, listen

    listen(
        create_app(toy_llm(), "toy", Limits()),
        bind("127.0.0.1", 0),
        timeout=60,
        on_ready=lambda url: print(url, flush=True),
    )
