"""Makes the demo model: ``python -m demo.train --output DIR``.

Everything comes from two seeds and the grammar in ``stories.py``: a byte-level BPE tokenizer, then
a Llama of 0.9 M parameters, trained in float32 on one thread of a CPU in about ten minutes. Weights
are stored in bfloat16, to be small, and config.json asks for float32, in which a CPU computes best.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from demo.stories import Story, make_stories

STORY_SEED = 0
WEIGHT_SEED = 0
VOCAB_SIZE = 1024
TOKENIZER_STORIES = 5000
BATCH_STORIES = 8
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Storyteller:\n{{ message['content'] }}{{ eos_token }}"
    "{% else %}User: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Storyteller:\n{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded, and decodes to itself; ``<s>`` is put in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stories = islice(make_stories(STORY_SEED), TOKENIZER_STORIES)
    texts = (chat_prompt(story.request).removeprefix(BOS) + story.text for story in stories)
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The untrained model; head_dim 64 so that GPU attention kernels can run it."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def chat_prompt(request: str) -> str:
    """A request for a story, as ``CHAT_TEMPLATE`` puts it."""
    return f"{BOS}User: {request}\nStoryteller:\n"


def prompted(stories: Iterable[Story]) -> Iterator[tuple[str, str]]:
    """Prompts and what should follow.

    Half have no prompt, a quarter are requests, and a quarter are an odd sentence with a story that makes
    the best of it, so that the model finds its way back from whatever it is given.
    """
    for index, story in enumerate(stories):
        if index % 4 == 0:
            yield chat_prompt(story.request), story.text + EOS
        elif index % 4 == 1:
            end = " " if story.oddity[-1:] in ".!?" else ". "
            yield BOS + story.oddity, end + story.body + EOS
        else:
            yield BOS, story.text + EOS


def padded(pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Input ids and labels, int64 [pairs, longest]; labels are -100 but for the texts to learn.

    A row is one story. Packed rows would be faster, but the names of another story in view keep the
    model from learning to look back for its own.
    """
    rows, labels = [], []
    for prompt, text in pairs:
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        text_ids = tokenizer.encode(text, add_special_tokens=False)
        rows.append(torch.tensor(prompt_ids + text_ids))
        labels.append(torch.tensor([-100] * len(prompt_ids) + text_ids))
    return (
        pad_sequence(rows, batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=-100),
    )


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, num_steps: int) -> None:
    """Train in place, each step on new stories; prints the loss and the time that is left."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model.train()
    pairs = prompted(make_stories(STORY_SEED))
    start = time.monotonic()
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps)
        input_ids, labels = padded(islice(pairs, BATCH_STORIES), tokenizer)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == num_steps - 1:
            seconds = (time.monotonic() - start) / (step + 1) * (num_steps - step - 1)
            print(
                f"step {step + 1}/{num_steps}  loss {loss.item():.4f}  {seconds:.0f} s left",
                flush=True,
            )
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write config, weights (bfloat16, the tied head once) and tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.bfloat16() for name, weight in model.named_parameters()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(output)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    ).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Parse the command line, train and save."""
    parser = argparse.ArgumentParser(description="Train the demo model on made-up stories.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write to")
    parser.add_argument("--steps", type=int, default=2800, help="of 8 stories each")
    args = parser.parse_args()

    torch.set_num_threads(1)  # sums are then in one order, so the same seeds give the same model
    torch.manual_seed(WEIGHT_SEED)
    tokenizer = train_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, args.steps)
    save(model, tokenizer, args.output)


if __name__ == "__main__":
    main()
