"""The command with real models: the package's own, and what it must refuse."""

import json
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ad_flashinfer_pass import AutoDeployConfig, build, cli
from ad_flashinfer_pass.models.source import find_source
from ad_flashinfer_pass.runtime.llm import LLM

ROOT = Path(__file__).parents[2]


def run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", *map(str, args)])
    assert isinstance(caught.value.code, int | None)
    return caught.value.code or 0


@pytest.fixture(scope="module")
def demo() -> LLM:
    return build.build_model(AutoDeployConfig(max_seq_len=64, max_batch_size=2))


@pytest.fixture
def built(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The demo model stands for what build_model makes, so that it is made once."""
    monkeypatch.setattr(build, "build_model", lambda config, on_event: demo)
    return demo


def test_continues_a_text() -> None:
    """The first command that a user tries, in a process of its own."""
    command = [sys.executable, "-m", "ad_flashinfer_pass", "generate", "Once upon a time", "-n", "9"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(", there was")
    assert found.stdout.count("\n") == 1
    assert "9 tokens in" in found.stderr.splitlines()[-1]


@pytest.mark.usefixtures("built")
def test_refuses_single_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt that is too long or holds an unknown id is refused by number; the others go on."""
    file = tmp_path / "prompts.jsonl"
    prompts = [{"prompt": "Once"}, {"prompt": "a b c " * 40}, {"prompt_token_ids": [1024]}]
    file.write_text("\n".join(map(json.dumps, prompts)))
    assert run("-f", file, "--json", "-q", "-n", "3") == 1
    out, err = capsys.readouterr()
    first, *refused = [json.loads(line) for line in out.splitlines()]
    assert len(first["token_ids"]) == 3
    assert [bool(record["error"]) for record in refused] == [True, True]
    too_long, unknown = err.splitlines()
    assert too_long.startswith(f"error: {file}:2: ")
    assert "64" in too_long
    assert unknown.startswith(f"error: {file}:3: ")
    assert "1024" in unknown


def test_chat_is_not_given_a_second_start_token(built: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """A chat is what the tokenizer's template makes of it, token by token."""
    assert run("--chat", "Tell me a story.", "--json", "-q", "-n", "4") == 0
    assert built.tokenizer is not None
    text = built.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me a story."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = built.tokenizer(text, add_special_tokens=False)["input_ids"]
    (expected,) = built.generate([ids], max_new_tokens=4)
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected.token_ids


def test_chat_gives_the_tokens_of_transformers(demo: LLM) -> None:
    """apply_chat_template and generate of transformers, with the weights of the demo model."""
    directory = find_source(AutoDeployConfig(), ExitStack()).directory
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    messages = [{"role": "user", "content": "Tell me a story."}]
    inputs: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    (answer,) = demo.chat(messages, max_new_tokens=8)
    assert answer.token_ids == tokens.tolist()
    assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)


TEMPLATES = {
    "raise_exception": "{{ raise_exception('no questions') }}",
    "1/0": "{{ 1 / 0 }}",
    "undefined": "{{ messages[0].nothing.at_all }}",
    "type": "{{ messages[0].content + 1 }}",
    "syntax": "{% if %}",
    "sandbox": "{{ range(10 ** 9) | list }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_that_its_template_refuses_is_refused_alone(
    built: LLM,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """Whatever the template raises; the chats and texts around it have the tokens that they have alone."""
    assert built.tokenizer is not None
    good = "{{ messages[0].content }}"
    template = f"{{% if '?' in messages[0].content %}}{TEMPLATES[name]}{{% else %}}{good}{{% endif %}}"
    asked = [{"role": "user", "content": "why?"}]
    told = [{"role": "user", "content": "Once"}]
    if name == "syntax":  # which refuses every chat
        template, told = TEMPLATES[name], asked
    monkeypatch.setattr(built.tokenizer, "chat_template", template)
    file = tmp_path / "prompts.jsonl"
    records = [{"prompt": "Once upon"}, {"messages": asked}, {"messages": told}, {"prompt": "A cat"}]
    file.write_text("\n".join(map(json.dumps, records)))
    assert run("-f", file, "--json", "-q", "-n", "2") == 1
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    num_chats = 2 if name == "syntax" else 1
    lines = err.splitlines()
    assert [
        line.startswith(f"error: {file}:{i}: the model's chat template") for i, line in enumerate(lines, 2)
    ] == [True] * num_chats
    assert [record["index"] for record in found] == [0, 1, 2, 3]
    assert [bool(record["error"]) for record in found] == [False, True, name == "syntax", False]
    alone = built.generate(["Once upon", "A cat"], max_new_tokens=2)
    assert [found[0]["token_ids"], found[3]["token_ids"]] == [result.token_ids for result in alone]


@pytest.mark.usefixtures("built")
def test_prompts_that_are_no_prompts_refuse_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty, of wrong types, of half a character: the others go on, among arguments and in a file."""
    assert run("Once", " ", "--json", "-q", "-n", "2") == 1
    out, err = capsys.readouterr()
    assert [len(json.loads(line)["token_ids"]) for line in out.splitlines()] == [2, 0]
    assert err == "error: prompt 1: the prompt is empty; give some text.\n"

    file, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    bad = ['{"prompt": 1}', '{"prompt": "\\ud800"}', '{"prompt_token_ids": [1.5]}', '{"messages": []}']
    file.write_text("\n".join(['{"prompt": "Once"}', *bad]))
    assert run("-f", file, "-o", results, "-q", "-n", "2") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"{file}:{number}" for number in (2, 3, 4, 5)]
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["finish_reason"] for record in records] == ["length"] + ["error"] * 4
    assert records[2]["prompt"] == "\ud800"


@pytest.mark.usefixtures("built")
def test_a_text_cut_by_max_seq_len_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, with the option that raises it; not with --quiet, and not if it has all its tokens."""
    assert run("so " * 60, "--ignore-eos") == 0
    warning = "warning: 1 of 1 texts ended at max_seq_len=64, short of max_new_tokens; raise max_seq_len"
    assert f"{warning} (--max-seq-len) for longer ones.\n" in capsys.readouterr().err
    assert run("Once upon a time", "-n", "2") == 0
    assert "max_seq_len" not in capsys.readouterr().err


def test_generation_config_decides_where_no_option_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file beside the demo's weights, options over it, and --generation-config none."""
    source = find_source(AutoDeployConfig(), ExitStack()).directory
    for path in filter(Path.is_file, source.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 1, "repetition_penalty": 1.5, "max_new_tokens": 12}))

    def tokens(*options: str) -> list[int]:
        assert run("Once upon a time", "-m", tmp_path, "--max-seq-len", "64", "--json", "-q", *options) == 0
        found: list[int] = json.loads(capsys.readouterr().out)["token_ids"]
        return found

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with_file = model.generate(ids)[0, ids.shape[1] :].tolist()
    plain = model.generate(ids, repetition_penalty=1.0)[0, ids.shape[1] :].tolist()
    assert tokens() == with_file != plain
    assert tokens("--generation-config", "none", "-n", "12") == plain
    file.write_text(json.dumps({"eos_token_id": 1, "num_beams": 4, "do_sample": True, "typical_p": 0.4}))
    assert run("Once", "-m", tmp_path, "-q") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {file}: num_beams=4, typical_p=0.4: not supported")
    assert "--generation-config none" in err
    assert err.count("\n") == 1


def missing_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def misshapen_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def encoder(directory: Path) -> None:
    transformers.BertConfig().save_pretrained(directory)


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "code", "cause", "way_out"),
    [
        (missing_tensor, 1, "'model.norm.weight' of shape [16] is missing", "another config.json"),
        (misshapen_tensor, 1, "must have shape [16], found [15]", "another config.json"),
        (encoder, 1, "'bert' is an encoder", "supported are"),
        (no_config, 2, "no config.json", "give the directory"),
    ],
)
def test_refuses_models(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: object,
    code: int,
    cause: str,
    way_out: str,
) -> None:
    """One line with the cause and the way out, and nothing is written."""
    model = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    assert callable(damage)
    damage(model)
    capsys.readouterr()
    assert run("x", "--model", model, "-o", tmp_path / "out.txt", "-q") == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert cause in err
    assert way_out in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_says_what_drafts_were_worth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same text, and in the last line how many drafts were taken, by position."""
    config = tmp_path / "config.yaml"
    config.write_text("speculative_config: {drafter: ngram, num_tokens: 2}\nmax_seq_len: 64\n")
    assert run("Once upon a time", "-n", "40") == 0
    plain = capsys.readouterr().out
    assert run("--config", config, "Once upon a time", "-n", "40") == 0
    out, err = capsys.readouterr()
    assert out == plain
    assert re.search(r"^drafts: \d\.\d\d tokens a sequence in the \d+ of \d+ steps .* \d+%, \d+%$", err, re.M)
