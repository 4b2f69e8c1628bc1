"""Small tokenizers of the kinds that models come with, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_TEXT = [
    "the quick brown fox jumps over the lazy dog, then the dog sleeps.",
    "naïve café, größer, 日本語 and 中文, 👩‍👩‍👧 and 🙂🙂, ﬁn.",
]
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def byte_level() -> PreTrainedTokenizerBase:
    """As Llama 3, Qwen and GPT-2: a token is some bytes, which may be part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def byte_fallback() -> PreTrainedTokenizerBase:
    """As Llama 2, Mistral and Gemma: pieces with a mark for spaces, bytes for all else."""
    pieces = ["\u2581", "\u2581\u2581", "\u2581the", "\u2581dog", "dog", "é", "s", ",", "\u2581a"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *pieces]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **_SPECIAL)


def metaspace() -> PreTrainedTokenizerBase:
    """As T5 and other unigram models: a space belongs to the word after it."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "\u2581the", "\u2581dog", "dog", "s", ",", "日"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **_SPECIAL)


_TEMPLATE = """\
{% for message in messages %}
{%- if message.role == "tool" %}{{ raise_exception("no tools here") }}{% endif %}
{{- message.role[0] + message.content }}
{%- endfor %}
{%- if add_generation_prompt %}a{% endif %}"""


def chatting() -> PreTrainedTokenizerBase:
    """Letters a to z as 1 to 26, and a chat template: each role's first letter before what it says."""
    vocab = {"<unk>": 0, **{chr(ord("a") + i): i + 1 for i in range(26)}}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=_TEMPLATE)
