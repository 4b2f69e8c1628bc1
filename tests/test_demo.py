"""The demo model: its size, that it loads, and that it tells stories like those it learned from."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from ad_flashinfer_pass.demo import stories, train

DEMO = Path(stories.__file__).parent
HELD_OUT_SEED = 1
NAMES = {*stories._BOYS, *stories._GIRLS, *stories._HE_ANIMALS, *stories._SHE_ANIMALS}
# The demo reaches 1.XX; one that guessed the names again each time would be at 1.5.
MAX_PERPLEXITY = 1.3


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
def continue_greedily(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> Callable[[str], list[int]]:
    """The token ids that follow a prompt, at most 256."""

    def run(prompt: str) -> list[int]:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)  # type: ignore[misc]
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    return run


@pytest.fixture(scope="module")
def corpus_words() -> set[str]:
    texts = (story.text for story in islice(stories.make_stories(train.STORY_SEED), 5000))
    return {word for text in texts for word in words(text)}


def test_all_files_together_are_at_most_two_megabytes() -> None:
    """What the demo adds to the package stays small."""
    files = [path for path in DEMO.iterdir() if path.suffix in (".json", ".jinja", ".safetensors")]
    assert sum(path.stat().st_size for path in files) <= 2_000_000


def test_is_a_llama_of_the_stated_size(model: LlamaForCausalLM) -> None:
    """The demo has Llama's architecture with grouped heads, and 0.3 to 1.1 million parameters."""
    config = model.config
    assert config.model_type == "llama"
    assert config.num_attention_heads > config.num_key_value_heads
    assert 300_000 <= sum(weight.numel() for weight in model.parameters()) <= 1_100_000


def test_loads_in_float32(model: LlamaForCausalLM) -> None:
    """Weights are stored in bfloat16 but computed with in float32 unless a dtype is asked for."""
    assert model.dtype == torch.float32


def test_once_upon_a_time_becomes_a_whole_story(
    continue_greedily: Callable[[str], list[int]],
    tokenizer: PreTrainedTokenizerBase,
    corpus_words: set[str],
) -> None:
    """The greedy continuation uses only words of the corpus, has an end, and stops by itself."""
    ids = continue_greedily("Once upon a time")
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert ids[-1] == tokenizer.eos_token_id
    assert 80 <= len(ids) <= 220
    assert set(words(text)) <= corpus_words
    assert text.endswith((".", '."', '!"'))


def test_stories_are_about_those_whom_the_prompt_names(
    continue_greedily: Callable[[str], list[int]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The hero of the prompt stays the hero: the story speaks of them and of one other at most."""
    for hero in ("Lily", "Ben", "Pip", "Willow"):
        ids = continue_greedily(f"Once upon a time, there was a little fox named {hero}.")
        text = tokenizer.decode(ids, skip_special_tokens=True)
        named = Counter(word for word in words(text) if word in NAMES)
        assert named[hero] >= 2, text
        assert len(named) <= 2, text


def test_held_out_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stories of another seed hold few surprises, far fewer than for a model that counts words."""
    docs = [tokenizer.encode(text + train.EOS) for text in held_out_texts(64)]
    input_ids, labels = train.padded(docs)
    with torch.inference_mode():
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss.item()
    assert math.exp(loss) <= MAX_PERPLEXITY
    assert math.exp(loss) < 0.1 * math.exp(unigram_loss(docs, tokenizer))


def unigram_loss(docs: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> float:
    """Nats a token of the best constant distribution for training stories, after the first token."""
    counts = Counter({token: 1 for token in range(len(tokenizer))})
    for doc in islice(train.documents(tokenizer), 2000):
        counts.update(doc)
    total = sum(counts.values())
    targets = [token for doc in docs for token in doc[1:]]
    return -sum(math.log(counts[token] / total) for token in targets) / len(targets)


def test_tells_a_story_on_request(
    continue_greedily: Callable[[str], list[int]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """A chat message that asks for a fox named Pip gets one."""
    messages = [{"role": "user", "content": "Tell me a story about a fox named Pip."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(prompt, str)
    ids = continue_greedily(prompt.removeprefix(train.BOS))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert "fox" in text
    assert "Pip" in text
    assert ids[-1] == tokenizer.eos_token_id


def test_chat_template_is_the_form_that_was_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    """The template renders a request and its story as the training text has them."""
    story = next(stories.make_stories(HELD_OUT_SEED))
    messages = [
        {"role": "user", "content": story.request},
        {"role": "assistant", "content": story.text},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == train.BOS + train.chat(story) + train.EOS


@given(st.text())
@example("naïve café, 日本語 \N{OWL}\u200d\N{FIRE}\r\n\t  \x00")
@example("")
def test_tokenizer_round_trips_any_text(text: str) -> None:
    """Every string is encoded after one <s>, and decodes to itself."""
    tokenizer = _demo_tokenizer()
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_stories_are_well_formed_and_varied() -> None:
    """No template mark is left over, and hardly any held-out story occurs in training."""
    held_out = held_out_texts(2000)
    assert not [text for text in held_out if re.search(r"[\[\]{}|]|  |\.\.|a [aeiou]", text)]
    training = {story.text for story in islice(stories.make_stories(train.STORY_SEED), 20_000)}
    assert len(training & set(held_out)) <= 2
