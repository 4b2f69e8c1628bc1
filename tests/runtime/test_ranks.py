"""One model in two processes, over gloo: as in one, and all end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from ad_flashinfer_pass import cli
from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import AdFlashinferError, RankError
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import GuidedDecodingParams
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests import architectures
from tests.forks import followers_are_forked, fork
from tests.runtime import toy_tokenizers
from tests.signals import hear_signals

_PROMPTS = ["Once upon a time", "The dog", "One day, Lily and her mum went to the park. " * 3]
_COMMAND = ["generate", "--device", "cpu", "--max-seq-len", "96", "--tp", "2"]


@pytest.fixture(scope="module", autouse=True)
def _forked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        followers_are_forked(patch)
        yield


def built(**config: Any) -> LLM:
    return build_model(
        AutoDeployConfig(device="cpu", max_seq_len=96, max_batch_size=2, max_num_tokens=24, **config)
    )


@pytest.fixture(scope="module")
def one() -> LLM:
    return built()


@pytest.fixture(scope="module", params=[True, False], ids=["step_by_step", "ahead"])
def two(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Of two ranks; ahead, the second rank gets the tokens of the first in each step."""
    llm = built(world_size=2, disable_overlap_scheduler=request.param)
    yield llm
    assert llm.model.ranks is not None
    llm.model.ranks.close()
    with pytest.raises(RankError, match="lost each other"):
        llm.model.ranks.tell("step", 0)


def test_two_ranks_generate_what_one_does(one: LLM, two: LLM) -> None:
    """Chunks of prompts, requests that wait, pages that are shared and cleared, stops."""
    assert two.model.paged[0].shape[2] * 2 == one.model.paged[0].shape[2]
    for sampling in (
        {},
        {"temperature": 0.9, "top_p": 0.9, "seed": 3},
        {"repetition_penalty": 1.3, "stop": ["."]},
        {"logprobs": 2, "prompt_logprobs": 1, "temperature": 0.5, "seed": 1},
        {"guided_decoding": GuidedDecodingParams(regex="[a-f]{3,9}")},
    ):
        given: dict[str, Any] = {"max_new_tokens": 24, **sampling}
        wanted, found = one.generate(_PROMPTS, **given), two.generate(_PROMPTS, **given)
        assert [(each.token_ids, each.text, each.error) for each in found] == [
            (each.token_ids, each.text, each.error) for each in wanted
        ]


def test_single_steps_go_to_all_ranks(one: LLM, two: LLM) -> None:
    """Those of a caller without an engine."""
    for start in (0, 5):
        steps = [SequenceStep(list(range(20 + start, 25 + start)), start, [1])]
        assert (one.model.step(steps) - two.model.step(steps)).abs().max() < 1e-4


def test_a_step_that_is_refused_reaches_no_other_rank(one: LLM, two: LLM) -> None:
    """The next one runs on all."""
    with pytest.raises(ValueError, match="2 tokens need 1 pages or more"):
        two.model.step([SequenceStep([1, 2], 0, [])])
    steps = [SequenceStep([1, 2], 0, [1])]
    assert (one.model.step(steps) - two.model.step(steps)).abs().max() < 1e-4


def test_ranks_share_states(tmp_path: Path) -> None:
    """Each has those of its heads, in the slots that the first one gives: of requests that wait, and begin
    where others ended."""
    config = architectures.small_config("qwen3_next", fewest_layers=2, vocab_size=304)
    architectures.random_model(config).save_pretrained(tmp_path)
    toy_tokenizers.byte_level().save_pretrained(tmp_path)
    prompts = [*_PROMPTS[:2], "One day, Lily and her mum went out."]
    one, two = (built(model=str(tmp_path), world_size=n) for n in (1, 2))
    assert two.model.ranks is not None
    assert 2 * two.model.caches["recurrent_state_0"].nbytes == one.model.caches["recurrent_state_0"].nbytes
    wanted, found = (llm.generate(prompts, max_new_tokens=24, ignore_eos=True) for llm in (one, two))
    two.model.ranks.close()
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert [len(each.token_ids) for each in found] == [24] * 3


def test_what_nobody_expects_in_a_rank_is_said() -> None:
    """Not that its interpreter failed to end."""
    code = (
        "from tests.runtime.test_ranks import built\n"
        "llm = built(world_size=2)\n"
        "llm.model.ranks.tell('nest', 'nonsense')\n"
        "import time; time.sleep(60)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.startswith(
        "error: rank 1 of 2 ended (exit code 1): AttributeError: 'str' object has no"
    )
    assert run.stderr.count("\n") == 1


def test_a_rank_that_dies_ends_all_with_one_line() -> None:
    """However it dies; whoever waits for it would wait for ever."""

    def kill_the_other() -> None:
        llm = built(world_size=2)
        assert llm.model.ranks is not None
        os.kill(llm.model.ranks._followers[0].pid, signal.SIGKILL)
        Event().wait()

    process = fork(kill_the_other, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (1, "error: rank 1 of 2 ended (signal 9): it said nothing\n")


def test_ctrl_c_ends_all() -> None:
    """It goes to all processes of a terminal; the first rank says so, the others say nothing."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ad_flashinfer_pass", *_COMMAND, "-n", "9", "--json", "-q", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write("The dog\n" * 5000)
    process.stdin.close()
    assert process.stdout.readline().startswith("{")
    os.killpg(process.pid, signal.SIGINT)
    process.stdout.read()
    assert process.wait(60) == 130
    assert process.stderr.read().startswith("interrupted: ")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_ranks_that_torchrun_started(one: LLM) -> None:
    """Each runs the command; the first one answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in places.items()}
        environment = {**variables, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}

        def run(environment: dict[str, str] = environment) -> None:
            os.environ.update(environment)
            cli.main([*_COMMAND, "-n", "12", "-q", "Once upon a time"])

        processes.append(fork(run, stdout=subprocess.PIPE, text=True))
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    text = one.generate(["Once upon a time"], max_new_tokens=12)[0].text
    assert first.rstrip("\n").endswith(f"{text}")
    assert second == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"device": "cuda"}, "world_size: got 2, but there are 0 GPUs here"),
        ({"device": "cpu", "world_size": 3}, "3 ranks cannot have equal parts"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    """Before a process is started, or by all of them, once."""
    with pytest.raises(AdFlashinferError, match=message):
        build_model(AutoDeployConfig(**{"world_size": 2, "max_seq_len": 64, **config}))
