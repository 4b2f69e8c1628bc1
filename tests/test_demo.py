"""The demo model: its size, that it loads, and that it tells stories like those it learned from."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

import ad_flashinfer_pass.demo
from demo import stories, train

DEMO = Path(ad_flashinfer_pass.demo.__file__).parent
HELD_OUT_SEED = 1
NAMES = {*stories._BOYS, *stories._GIRLS, *stories._HE_ANIMALS, *stories._SHE_ANIMALS}
# Measured: 1.2. A model that does not look back for the names stays at 1.5.
MAX_PERPLEXITY = 1.3


class Continuation(NamedTuple):
    text: str
    num_tokens: int
    ends: bool


Tell = Callable[[str], Continuation]


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(DEMO).eval()


@pytest.fixture(scope="module")
def tell(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Tell:
    """Continues a prompt, greedily, by at most 256 tokens."""

    def run(prompt: str) -> Continuation:
        inputs = tokenizer(prompt, return_tensors="pt")
        generate: Any = model.generate  # not callable to a type checker in some versions of transformers
        ids = generate(**inputs, max_new_tokens=256, do_sample=False)
        new_ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
        text = str(tokenizer.decode(new_ids, skip_special_tokens=True))
        return Continuation(text, len(new_ids), new_ids[-1] == tokenizer.eos_token_id)

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
    """The demo has Llama's architecture, grouped heads, and 0.3 to 1.1 million parameters."""
    config = model.config
    assert config.model_type == "llama"
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert 300_000 <= sum(weight.numel() for weight in model.parameters()) <= 1_100_000


def test_loads_in_float32(model: LlamaForCausalLM) -> None:
    """Weights are stored in bfloat16, but computed with in float32 unless a dtype is asked for."""
    assert model.dtype == torch.float32


def test_once_upon_a_time_becomes_a_whole_story(tell: Tell, corpus_words: set[str]) -> None:
    """The greedy continuation uses only words of the corpus, has an end, and stops by itself."""
    told = tell("Once upon a time")
    assert told.ends
    assert 80 <= told.num_tokens <= 200
    assert set(words(told.text)) <= corpus_words
    assert told.text.endswith((".", '."', '!"'))


@pytest.mark.parametrize("hero", ["Lily", "Ben", "Pip", "Willow"])
def test_the_hero_of_the_prompt_stays_the_hero(hero: str, tell: Tell) -> None:
    """The story speaks of whom the prompt names, and of one friend at most."""
    told = tell(f"Once upon a time, there was a little fox named {hero}.")
    named = Counter(word for word in words(told.text) if word in NAMES)
    assert named[hero] >= 2
    assert len(named) <= 2


def test_tells_the_story_that_was_asked_for(tell: Tell, tokenizer: PreTrainedTokenizerBase) -> None:
    """A chat message that asks for a story about Pip gets one."""
    messages = [{"role": "user", "content": "Tell me a story about a fox named Pip."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    told = tell(str(prompt).removeprefix(train.BOS))
    assert words(told.text).count("Pip") >= 2
    assert told.ends


@pytest.mark.parametrize(
    "prompt", ["One day, Lily found a big box.", "Hello!", "Why is the sky blue?", "日本語。"]
)
def test_any_prompt_leads_to_a_story(prompt: str, tell: Tell, corpus_words: set[str]) -> None:
    """After a prompt unlike the corpus the words are the corpus's again, and there is an end."""
    told = tell(prompt)
    assert told.ends
    assert 80 <= told.num_tokens <= 200
    assert set(words(told.text)) <= corpus_words


def test_held_out_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stories of another seed hold few surprises, far fewer than for one that counts tokens."""
    held_out = islice(stories.make_stories(HELD_OUT_SEED), 64)
    pairs = [(train.BOS, story.text + train.EOS) for story in held_out]
    input_ids, labels = train.padded(pairs, tokenizer)
    with torch.inference_mode():
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss.item()
    assert math.exp(loss) <= MAX_PERPLEXITY
    assert math.exp(loss) < 0.1 * math.exp(unigram_loss(labels[labels >= 0], tokenizer))


def unigram_loss(targets: Tensor, tokenizer: PreTrainedTokenizerBase) -> float:
    """Nats a token, by the frequencies of tokens in training stories."""
    counts = torch.ones(len(tokenizer))
    for story in islice(stories.make_stories(train.STORY_SEED), 2000):
        ids = tokenizer.encode(story.text + train.EOS, add_special_tokens=False)
        counts += torch.bincount(torch.tensor(ids), minlength=len(tokenizer))
    return -(counts / counts.sum()).log()[targets].mean().item()


def test_chat_template_is_the_form_that_was_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    """The template renders a request and its story as the training text has them."""
    story = next(stories.make_stories(HELD_OUT_SEED))
    messages = [
        {"role": "user", "content": story.request},
        {"role": "assistant", "content": story.text},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == train.chat_prompt(story.request) + story.text + train.EOS


@settings(deadline=None)  # the machine may be busy
@given(text=st.text())
@example(text="na\u00efve \N{OWL}\u200d\N{FIRE} \u65e5\u672c\r\n\t  \x00")
@example(text="<s> </s>")
def test_tokenizer_round_trips_any_text(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every string is encoded after one <s>, and decodes to itself."""
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_stories_are_well_formed_and_varied() -> None:
    """No template mark or wrong article is left, and stories of two seeds hardly ever agree."""
    held_out = [story.text for story in islice(stories.make_stories(HELD_OUT_SEED), 2000)]
    assert not [text for text in held_out if re.search(r"[\[\]{}|]|  |\.\.|\ba [aeiou]", text)]
    training = {story.text for story in islice(stories.make_stories(train.STORY_SEED), 5000)}
    assert len(training & set(held_out)) <= 2


def test_committed_tokenizer_is_the_one_that_the_script_makes(tmp_path: Path) -> None:
    """The vocabulary and merges in the repository come out of train.py again."""
    train.train_tokenizer().save_pretrained(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert made == json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same seeds give the same weights."""
    first, second = (trained_two_steps(tokenizer) for _ in range(2))
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def trained_two_steps(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    torch.manual_seed(train.WEIGHT_SEED)
    model = train.make_model(tokenizer)
    train.train(model, tokenizer, num_steps=2)
    return model.state_dict()


def test_saved_model_loads_as_it_was(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """What save() writes, transformers reads: weights rounded to bfloat16, held in float32."""
    model = train.make_model(tokenizer)
    train.save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), loaded[name]), name
