"""The demo model: its size, that it loads, and that it tells stories like those it was trained on."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from ad_flashinfer_pass.demo import stories

DEMO = Path(stories.__file__).parent
HELD_OUT_SEED = 1
NAMES = {*stories._BOYS, *stories._GIRLS, *stories._HE_ANIMALS, *stories._SHE_ANIMALS}

# The expected loss of a model that knew the grammar is about 0.2 nats a token (perplexity 1.2); the
# demo reaches 1.3, names drawn twice as often as they should be would give 2.
MAX_PERPLEXITY = 1.5


def held_out_texts(count: int) -> list[str]:
    return [story.text for story in islice(stories.make_stories(HELD_OUT_SEED), count)]


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(DEMO).eval()


@pytest.fixture(scope="module")
def continue_greedily(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Tensor]:
    """The token ids that follow a prompt, at most 256."""

    def run(prompt: str) -> Tensor:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)  # type: ignore[misc]
        return ids[0, inputs["input_ids"].shape[1] :]

    return run
