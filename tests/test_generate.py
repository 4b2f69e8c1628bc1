"""The command with real models: the package's own, and what it must refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ad_flashinfer_pass import AutoDeployConfig, build, cli
from ad_flashinfer_pass.runtime.llm import LLM

ROOT = Path(__file__).parents[1]


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


def state_space_model(directory: Path) -> None:
    transformers.MambaConfig().save_pretrained(directory)


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "code", "cause", "way_out"),
    [
        (missing_tensor, 1, "'model.norm.weight' of shape [16] is missing", "another config.json"),
        (misshapen_tensor, 1, "must have shape [16], found [15]", "another config.json"),
        (encoder, 1, "'bert' is an encoder", "supported are"),
        (state_space_model, 1, "'mamba' has no attention heads", "supported are"),
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
