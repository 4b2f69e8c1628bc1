"""``bench``: what it counts, what it refuses, and its picture. No assertion is about time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.table import Table

from ad_flashinfer_pass import build
from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.config import AutoDeployConfig, SpeculativeConfig
from ad_flashinfer_pass.deployment import bench, dataset
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.llm import LLM
from tests.faults.harness import contents, disk_full_after


@pytest.fixture(scope="module")
def llm() -> LLM:
    return build.build_model(AutoDeployConfig(max_batch_size=3, max_seq_len=24))


@pytest.fixture(scope="module")
def result(llm: LLM) -> bench.Result:
    seen: list[tuple[int, int, int]] = []
    found = bench.bench(
        llm,
        input_len=12,
        output_len=5,
        concurrencies=[1, 3],
        requests_each=2,
        on_progress=lambda *args: seen.append(args),
    )
    assert seen == [(n, i + 1, 2 * n) for n in (1, 3) for i in range(2 * n)]
    return found


def test_every_request_is_counted_once(result: bench.Result) -> None:
    assert [(row.concurrency, row.num_requests) for row in result.rows] == [(1, 2), (3, 6)]
    for row in result.rows:
        times = (row.first_token, row.between_tokens, row.request)
        assert all(p is not None and 0 < p.p50 <= p.p90 <= p.p99 for p in times)
        assert row.first_token.p50 < row.request.p50
        # The last request ends no earlier than the slowest takes.
        assert row.num_requests * 5 / row.output_tokens_per_s >= row.request.p99 / 1e3


def test_bytes_of_a_step_are_weights_and_cache(llm: LLM) -> None:
    model = llm.model
    assert isinstance(model, CachedModel)
    tensors = [*model.module.parameters(), *model.module.buffers()]
    weights = {id(tensor): tensor.nbytes for tensor in tensors}
    layers = len(model.caches)
    _, _, heads, _, dim = next(iter(model.caches.values())).shape
    kv = 2 * layers * heads * dim * 4
    assert bench.step_bytes(model, 3, 10) == model.weights.bytes + 3 * 10 * kv
    # All weights are read but tables of which only the tokens' rows are.
    assert 0.5 * sum(weights.values()) < model.weights.bytes <= sum(weights.values())


@pytest.mark.parametrize(
    ("keys", "limit"), [((20, 5, [1]), "max_seq_len=24"), ((4, 4, [4]), "max_batch_size=3")]
)
def test_what_the_model_was_not_built_for_is_refused(
    llm: LLM, keys: tuple[int, int, list[int]], limit: str
) -> None:
    input_len, output_len, numbers = keys
    with pytest.raises(ConfigError, match=limit):
        bench.bench(llm, input_len=input_len, output_len=output_len, concurrencies=numbers)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_picture(result: bench.Result, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"steps.{ending}"
    bench.draw(result, file)
    assert file.stat().st_size > 5000


def test_a_picture_on_a_full_disk_leaves_the_old_one(result: bench.Result, tmp_path: Path) -> None:
    file = tmp_path / "steps.svg"
    file.write_text("old")
    with disk_full_after(100), pytest.raises(OSError, match="File too large") as caught:
        bench.draw(result, file)
    assert str(file) in str(caught.value.filename)
    assert contents(tmp_path) == {"steps.svg": b"old"}


def test_one_new_token_has_no_step(llm: LLM) -> None:
    """What was not measured is null in JSON and a dash in the table."""
    found = bench.bench(llm, input_len=4, output_len=1, concurrencies=[1])
    assert (found.rows[0].step_ms, found.rows[0].between_tokens) == (None, None)
    json.dumps(asdict(found), allow_nan=False)
    table, _ = bench.as_tables(found)
    assert isinstance(table, Table)
    assert list(table.columns[3].cells) == ["-"]


LINES = [{"prompt_len": 5, "output_len": 3}, {"prompt_len": 9, "output_len": 1}] * 2
TALK = {"conversations": [{"from": "human", "value": "a b c d e f"}, {"from": "gpt", "value": "g h i j k l"}]}


def written(folder: Path, *entries: object, as_list: bool = False) -> Path:
    file = folder / "requests"
    file.write_text(json.dumps(entries) if as_list else "\n".join(map(json.dumps, entries)))
    return file


def test_dataset_of_lengths(llm: LLM, tmp_path: Path) -> None:
    entries = dataset.read(written(tmp_path, *LINES), 3)
    assert dataset.longest(entries) == 10
    made = dataset.requests(entries, None, 7, 1000.0, seed=3)
    assert [(len(each.prompt), each.output_len) for each in made] == [(5, 3), (9, 1), (5, 3)]
    assert (
        made
        == dataset.requests(entries, None, 7, 1000.0, seed=3)
        != dataset.requests(entries, None, 7, 1000.0, 4)
    )
    assert 0 == made[0].arrival < made[1].arrival < made[2].arrival
    found = bench.bench_dataset(llm, made, concurrencies=[1, 2], request_rate=1000.0)
    assert [(row.concurrency, row.num_requests) for row in found.rows] == [(1, 3), (2, 3)]
    assert (found.input_len, found.output_len, found.request_rate) == (6, 2, 1000.0)
    (row, _), (start, _) = found.rows, (row.first_token for row in found.rows)
    assert 0 < start.p50 <= start.p99 <= row.request.p99
    with pytest.raises(ConfigError, match="max_batch_size=3"):
        bench.bench_dataset(llm, made, concurrencies=[4])


def test_a_text_may_hold_separators_of_lines(tmp_path: Path) -> None:
    """JSON wants an escape for newlines alone; line and paragraph separators stand as they are."""
    talk = {"conversations": [{"value": "a\u2028b\x85c"}, {"value": "d\u2029e"}]}
    (file := tmp_path / "talks").write_text(json.dumps(talk, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (entry,) = dataset.read(file, 10)
    assert isinstance(entry, dataset.Conversation)
    assert entry.conversations[0].value == "a\u2028b\x85c"


def test_arrivals_are_a_poisson_process() -> None:
    entries = [dataset.Lengths(prompt_len=1, output_len=1)] * 4000
    times = [each.arrival for each in dataset.requests(entries, None, 2, 10.0, 0)]
    gaps = torch.tensor(times).diff()
    assert float(gaps.mean()) == pytest.approx(0.1, rel=0.05)
    assert float(gaps.std()) == pytest.approx(0.1, rel=0.05)


def test_dataset_of_conversations(llm: LLM, tmp_path: Path) -> None:
    """One turn, or too few or too many tokens, are left out."""
    turns = TALK["conversations"]
    long = {"conversations": [{"value": "word " * 2000}, turns[1]]}
    short = {"conversations": [{"value": "a"}, turns[1]]}
    file = written(tmp_path, {"conversations": turns[:1]}, TALK, long, short, as_list=True)
    entries = dataset.read(file, 1000)
    assert (len(entries), dataset.longest(entries)) == (3, 2048)
    assert llm.tokenizer is not None
    (request,) = dataset.requests(entries, llm.tokenizer, llm.model.vocab_size, float("inf"), 0)
    assert request.prompt == llm.tokenizer.encode(turns[0]["value"])
    assert request.output_len == len(llm.tokenizer.encode(turns[1]["value"]))
    with pytest.raises(ConfigError, match="no tokenizer"):
        dataset.requests(entries, None, 7, float("inf"), 0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no request"),
        ("{", "must be JSON"),
        ('{"prompt_len": 0, "output_len": 1}', "request 1 must have prompt_len"),
        ('[{"prompt_len": 1, "output_len": 1}, 3]', "request 2 must have prompt_len"),
    ],
)
def test_a_dataset_that_is_none_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    (file := tmp_path / "requests").write_text(text)
    with pytest.raises(ConfigError, match=f"{file}: .*{problem}"):
        dataset.read(file, 10)


def test_command_with_a_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = written(tmp_path, *LINES)
    with pytest.raises(SystemExit) as end:
        main(["bench", "--dataset", str(file), "--request-rate", "200", "--concurrency", "2", "--json", "-q"])
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    assert (found["request_rate"], found["rows"][0]["num_requests"]) == (200.0, 4)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--input-len", "4", "--output-len", "3", "--concurrency", "1,2", "--json", "-q"])
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    assert [row["concurrency"] for row in found["rows"]] == [1, 2]
    assert torch.__version__.startswith(found["versions"]["torch"].partition("+")[0])


def test_command_refuses_a_bad_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--concurrency", "1,x"])
    assert end.value.code == 2
    assert "--concurrency" in capsys.readouterr().err


def test_drafts_are_shown_beside_plain_decoding() -> None:
    """The same requests with drafts and without, what a step gave, and how often each draft was taken."""
    keys = SpeculativeConfig(drafter="ngram", num_tokens=2)
    llm = build.build_model(AutoDeployConfig(max_batch_size=2, max_seq_len=64, speculative_config=keys))
    result = bench.bench(llm, input_len=12, output_len=40, concurrencies=[1, 2])
    for row in result.rows:
        assert row.plain_tokens_per_s is not None
        assert row.tokens_a_step == pytest.approx(1 + sum(row.acceptance), abs=1e-3)
        assert len(row.acceptance) == 2
        assert row.acceptance[0] >= row.acceptance[1]
    metrics = llm.engine.metrics
    assert 0 < metrics.num_verify_steps < metrics.num_steps / 2
    lines = [line for line in bench.as_tables(result) if isinstance(line, str)]
    assert [line.split(" at once")[0] for line in lines if "taken by position" in line] == ["1", "2"]
