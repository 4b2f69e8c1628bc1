"""What serving adds to the engine, of Llama-3.1-8B's shape on a GPU, in one run.

    python benchmarks/serve.py --json benchmarks/results/serve.json

Random bfloat16 weights, random prompts, and a tokenizer of random words. ``overhead``: tokens per second of
64 streams, of the engine alone and through HTTP on the same machine, where another process is the client.
``prefix``: time to the first token of prompts of 8,192 tokens that are new, and of some whose first nine
tenths are known; one at a time, through HTTP. ``grammar``: a step of 32 requests whose text is a JSON
object of some schema, and of the same requests without; drawn, the engine alone.

``--smoke`` runs all of it with a small shape on the CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ad_flashinfer_pass.deployment.bench import machine
from ad_flashinfer_pass.runtime.cuda_graph import default_batch_sizes
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.structure import GuidedDecodingParams
from ad_flashinfer_pass.serving.app import create_app

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that it can import from
from benchmarks.decode import llama_8b
from benchmarks.experts import PACKAGES, SMALL, build_model, installed

_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "size": {"type": "number"},
    },
    "required": ["name", "tags", "size"],
}
Load = list[tuple[list[int], int]]
"""Requests: the prompt, and how many new tokens."""


def random_tokenizer(vocab_size: int, end: int) -> PreTrainedTokenizerBase:
    """Bytes, then words of two to eight letters, some with a space before."""
    rng = random.Random(0)
    words = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(words) < vocab_size:
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))
        words[rng.choice(("", "Ġ")) + "".join(letters)] = None
    vocab = dict(zip(list(words)[:vocab_size], range(vocab_size), strict=True))
    last = next(word for word, index in vocab.items() if index == end)
    del vocab[last]
    vocab["</s>"] = end
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def random_load(llm: LLM, number: int, prompt: int, new: int, seed: int) -> Load:
    """Requests of one kind."""
    rng = random.Random(seed)
    return [([rng.randrange(5, llm.model.vocab_size - 5) for _ in range(prompt)], new) for _ in range(number)]


def engine_rate(llm: LLM, load: Load) -> float:
    """New tokens per second of the engine alone, all requests at once."""
    start = time.perf_counter()
    for prompt, new in load:
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        llm.engine.add_request(prompt, params, detokenize=False)
    while llm.engine.has_work:
        llm.engine.step()
    return sum(new for _, new in load) / (time.perf_counter() - start)


async def stream(url: str, prompt: list[int], new: int) -> tuple[float, float]:
    """When the first token and the end of a streamed completion came."""
    where = urlparse(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    body = {"prompt": prompt, "max_tokens": new, "stream": True, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    first, rest = 0.0, b""
    while b"[DONE]" not in rest:
        part = await reader.read(65536)
        if not part:
            raise RuntimeError(f"the stream ended early: {rest!r}")
        rest = rest[-16:] + part
        if not first and b"data:" in rest:
            first = time.perf_counter()
    writer.close()
    return first, time.perf_counter()


def client() -> None:
    """Another process: reads a URL and requests, and answers with how long they took."""
    for line in sys.stdin:
        url, load = json.loads(line)

        async def ask(url: str = url, load: Load = load) -> list[float]:
            start = time.perf_counter()
            times = await asyncio.gather(*(stream(url, prompt, new) for prompt, new in load))
            return [max(end for _, end in times) - start, *(first - start for first, _ in times)]

        print(json.dumps(asyncio.run(ask())), flush=True)


class Served:
    """The model behind HTTP, with a client process."""

    def __init__(self, llm: LLM) -> None:
        config = uvicorn.Config(create_app(llm, "model"), port=0, log_config=None, access_log=False)
        socket = config.bind_socket()
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [socket]})
        self._url = f"http://127.0.0.1:{socket.getsockname()[1]}"

    def __enter__(self) -> Served:
        self._switch = sys.getswitchinterval()
        sys.setswitchinterval(0.0005)  # as serve does
        self._thread.start()
        command = [sys.executable, __file__, "--client"]
        self._client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.communicate()
        self._server.should_exit = True
        self._thread.join()
        sys.setswitchinterval(self._switch)

    def run(self, load: Load) -> tuple[float, list[float]]:
        """Seconds for all requests at once, and to the first token of each."""
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        print(json.dumps([self._url, load]), file=self._client.stdin, flush=True)
        seconds, *first = json.loads(self._client.stdout.readline())
        return seconds, first


def step_ms(llm: LLM, load: Load, form: GuidedDecodingParams | None) -> float:
    """The median time between two steps in which all requests decode."""
    for index, (prompt, new) in enumerate(load):
        params = SamplingParams(max_new_tokens=new, temperature=1.0, seed=index, guided_decoding=form)
        llm.engine.add_request(prompt, params, detokenize=False)
    times, before = [], time.perf_counter()
    while llm.engine.has_work:
        num_tokens = sum(output.token_id is not None for output in llm.engine.step())
        now = time.perf_counter()
        if num_tokens == len(load):
            times.append(now - before)
        before = now
    return 1e3 * statistics.median(times[1:] or times)


def main() -> int:
    """Parse arguments, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--compile-backend", default="torch-opt")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--smoke", action="store_true", help="a small shape on the CPU")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.client:
        client()
        return 0
    scale = 16 if args.smoke else 1
    streams, args.max_num_tokens = args.streams // scale, 8192 // scale
    args.context, args.new, args.batches = 8192 // scale, 1024 // scale, default_batch_sizes(streams)
    device = torch.device("cpu") if args.smoke else torch.device("cuda", 0)
    small = {**SMALL, "vocab_size": 1024, "max_position_embeddings": 4096}
    shape = LlamaConfig(architectures=["LlamaForCausalLM"], **small) if args.smoke else llama_8b(args.layers)
    built, seconds = build_model(shape, args, device)
    vocab_size = built.model.vocab_size
    end = vocab_size - 1
    tokenizer = random_tokenizer(vocab_size, end)
    llm = LLM(built.model, tokenizer, [end], steps_ahead=0 if args.smoke else 1)
    results: dict[str, Any] = {
        "machine": machine(device),
        "versions": {name: found for name in (*PACKAGES, "xgrammar") if (found := installed(name))},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "start_seconds": seconds,
    }

    def show(name: str, row: dict[str, Any]) -> None:
        results[name] = row
        print(json.dumps({name: row}), flush=True)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    prompt, new = 256 // scale, 512 // scale
    engine_rate(llm, random_load(llm, streams, prompt, 16, 0))
    alone = max(engine_rate(llm, random_load(llm, streams, prompt, new, 1 + run)) for run in range(2))
    batch = 32 // scale
    load = random_load(llm, batch, prompt, 64, 10)
    start = time.perf_counter()
    form = GuidedDecodingParams(json=_SCHEMA)
    llm.engine.grammars.compile(form).result()
    compiled = time.perf_counter() - start
    step_ms(llm, load, form)
    free, guided = step_ms(llm, load, None), step_ms(llm, load, form)
    show(
        "grammar",
        {
            "batch": batch,
            "step_ms": free,
            "guided_step_ms": guided,
            "more": guided / free - 1,
            "compile_s": compiled,
        },
    )
    with Served(llm) as served:
        served.run(random_load(llm, streams, prompt, 16, 20))
        runs = [served.run(random_load(llm, streams, prompt, new, 21 + run)) for run in range(2)]
        rate = streams * new / min(seconds for seconds, _ in runs)
        show(
            "overhead",
            {
                "streams": streams,
                "tokens_per_s": alone,
                "served_tokens_per_s": rate,
                "less": 1 - rate / alone,
                "first_token_ms": 1e3 * statistics.median(runs[-1][1]),
            },
        )
        cold, known = [], []
        (common, _), *others = random_load(llm, 6, args.context, 1, 30)
        served.run([(common, 1)])
        for other, _ in others:
            cold.append(served.run([(other, 1)])[1][0])
            shared = len(common) * 9 // 10
            known.append(served.run([([*common[:shared], *other[shared:]], 1)])[1][0])
        first, again = (1e3 * statistics.median(times) for times in (cold, known))
        show(
            "prefix",
            {
                "tokens": len(common),
                "first_token_ms": first,
                "known_first_token_ms": again,
                "times": first / again,
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
