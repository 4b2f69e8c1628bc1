"""Generate with a model of transformers and a loop of your own.

    python docs/examples/torch_compile.py [--compile-backend torch-simple]

Nothing of the model is changed, and nothing of this package is imported but the session.
"""

import argparse
from importlib import resources

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ad_flashinfer_pass import CacheSession

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--compile-backend", default="inductor")
parser.add_argument("--max-new-tokens", type=int, default=24)
args = parser.parse_args()

path = resources.files("ad_flashinfer_pass.demo")  # a small model that the package carries; or one of yours
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path).eval()

session = CacheSession(max_batch_size=4, max_seq_len=256)
options = {"session": session, "compile_backend": args.compile_backend}
compiled = torch.compile(model, backend="flashinfer_trtllm", options=options)

# Prompts of any lengths, without padding and without a mask.
prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "The little dog", "Lily")]
with session.prefill(prompts) as batch:
    logits = compiled(**batch.inputs, use_cache=False).logits  # [1, tokens of all prompts, vocab]
    tokens = batch.last_logits(logits).argmax(-1)  # [3]
texts = [[token] for token in tokens.tolist()]

for _ in range(args.max_new_tokens - 1):
    with session.decode(tokens) as batch:
        logits = compiled(**batch.inputs, use_cache=False).logits
        tokens = batch.last_logits(logits).argmax(-1)
    for text, token in zip(texts, tokens.tolist(), strict=True):
        text.append(token)

for prompt, text in zip(prompts, texts, strict=True):
    print(tokenizer.decode(prompt + text, skip_special_tokens=True))
for record in session.compiles:
    print(f"{record.what}: {record.shape}")
