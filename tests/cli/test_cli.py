import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

import pytest
import typer

from ad_flashinfer_pass import __version__, build, cli
from ad_flashinfer_pass.errors import CapacityError, ConfigError, LoadError, TransformError
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from tests.fake_llm import FakeBuild, FakeLLM
from tests.signals import hear_signals

ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, object]]:
        """The lines of --json."""
        return [json.loads(line) for line in self.out.split("\n") if line]


class Command:
    """The command in this process, with a fake model."""

    def __init__(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, build: FakeBuild
    ) -> None:
        self.build = build
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *args: str | Path, stdin: str = "", terminal: bool = False) -> Outcome:
        """Run it to its end; ``terminal``: whether stdout is one."""
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, *self._capsys.readouterr())

    def error(self, code: int, *args: str | Path) -> str:
        """The error line: the last on stderr, the only one of its kind, with nothing on stdout."""
        found = self(*args)
        assert (found.code, found.out) == (code, "")
        *progress, line = found.err.splitlines()
        assert not [other for other in progress if "rror" in other or "Traceback" in other]
        assert line.startswith("error: ")
        return line


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    fake = FakeBuild()
    monkeypatch.setattr(build, "build_model", fake)
    return Command(capsys, monkeypatch, fake)


def test_continues_one_prompt(command: Command) -> None:
    """One prompt: stdout is its continuation and nothing else."""
    found = command("generate", "once")
    assert (found.code, found.out) == (0, "ONCE\n")


def test_tells_progress_in_lines_on_stderr(command: Command) -> None:
    """Phases, and in the end speed and pages, each on a line of its own."""
    err = command("generate", "once").err
    lines = err.splitlines()
    assert lines[:3] == ["load libraries", "load model", "export model"]
    assert lines[3].startswith("ready on cpu in")
    assert "7 tokens in" in lines[4]
    assert "tokens/s), at most 3 of 9 pages, 1 preemptions" in lines[4]
    assert lines[5] == "2 steps ran without a CUDA graph: prefill"
    assert len(lines) == 6


def test_quiet_says_nothing_but_errors(command: Command) -> None:
    """--quiet leaves stderr to errors; a refused prompt is one."""
    assert command("generate", "once", "-q").err == ""
    assert command("generate", "refuse", "-q").err == "error: prompt 0: it was refused\n"


def test_separates_several_prompts(command: Command) -> None:
    """Several prompts: each continuation stands under its prompt."""
    found = command("generate", "one", "two\nlines " + "long " * 40)
    head, tail = found.out.split("\n\n", 1)
    assert head == "--- 0: one\nONE"
    heading = tail.splitlines()[0]
    assert heading.startswith("--- 1: two lines long")
    assert heading.endswith("...")


def test_streams_one_prompt_on_a_terminal(command: Command) -> None:
    """On a terminal the text is continued where it stands."""
    assert command("generate", "once", terminal=True).out == "onceONCE\n"


def test_stream_refused_is_a_failure(command: Command) -> None:
    """A prompt that is refused on a terminal is an error like elsewhere."""
    found = command("generate", "refuse", "-q", terminal=True)
    assert found.code == 1
    assert found.err == "error: it was refused\n"


def test_json_lines(command: Command) -> None:
    """--json: one object a line, with the prompt as it was given."""
    found = command("generate", "--json", "é", "two")
    assert found.records[0] == {
        "index": 0,
        "prompt": "é",
        "text": "É",
        "token_ids": [3, 4],
        "finish_reason": "stop",
        "error": None,
    }
    assert [record["index"] for record in found.records] == [0, 1]


def test_terminal_of_few_characters(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stdout cannot show is escaped, in JSON so that it can be read back."""
    for options, line in (([], b"\\xc9"), (["--json"], b'"text": "\\u00c9"')):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command("generate", "\xe9", *options).code == 0
        assert line in stdout.buffer.getvalue()


def test_refused_prompt_leaves_the_others(command: Command) -> None:
    """A refused prompt is said on stderr and in its result, fails the run, and stops nothing."""
    found = command("generate", "--json", "one", "refuse", "three", "-q")
    assert found.code == 1
    assert found.err == "error: prompt 1: it was refused\n"
    assert [record["error"] for record in found.records] == [None, "it was\nrefused", None]


def test_text_of_refused_prompt_is_left_out(command: Command) -> None:
    """In text output a refused prompt has no heading."""
    assert command("generate", "refuse", "two").out == "--- 1: two\nTWO\n\n"


def test_without_tokenizer_shows_token_ids(command: Command, tmp_path: Path) -> None:
    """A model without tokenizer continues token ids by token ids."""
    command.build.tokenizer = None
    file = tmp_path / "ids.jsonl"
    file.write_text('{"prompt_token_ids": [1, 2]}\n')
    assert command("generate", "-f", file).out == "3 4\n"
    assert command("generate", "-f", file, terminal=True).out == "3 4\n"
    assert command.build.llm is not None
    assert command.build.llm.inputs == [[1, 2]]
    assert '--prompt-file FILE.jsonl with lines such as {"prompt_token_ids"' in command.error(
        2, "generate", "text"
    )


@pytest.mark.parametrize(
    ("args", "stdin", "prompts"),
    [
        ([], "a\n\n  b\r\n", ["a", "  b"]),
        (["-"], "a\nb\n", ["a", "b"]),
        (["x", "-"], "a", ["x", "a"]),
        (["x"], "not read", ["x"]),
    ],
    ids=["piped", "dash", "dash_among_arguments", "arguments_only"],
)
def test_reads_stdin(command: Command, args: list[str], stdin: str, prompts: list[str]) -> None:
    """A line of stdin is a prompt, if stdin is asked for or nothing else is given."""
    found = command("generate", "--json", *args, stdin=stdin.replace("\r\n", "\n"))
    assert [record["prompt"] for record in found.records] == prompts


def test_reads_text_file(command: Command, tmp_path: Path) -> None:
    """A line that is not blank is a prompt, whatever else splits lines elsewhere."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\n\r\ntwo\u2028half\x0c\n".encode())
    found = command("generate", "--json", "-f", file)
    assert [record["prompt"] for record in found.records] == ["one", "two\u2028half\x0c"]


def test_reads_json_lines_file(command: Command, tmp_path: Path) -> None:
    """Objects of a .jsonl file hold text, token ids or a chat."""
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "hello"}]
    given = [{"prompt": "two\nlines"}, {"prompt_token_ids": [5, 6]}, {"messages": chat}]
    file.write_text("\n".join(map(json.dumps, given)))
    found = command("generate", "--json", "-f", file)
    assert [record["prompt"] for record in found.records] == ["two\nlines", [5, 6], chat]
    assert command.build.llm is not None
    assert command.build.llm.inputs == ["two\nlines", [5, 6], [5]]


def test_chat_puts_text_into_the_template(command: Command) -> None:
    """--chat makes a user's message of each text, after the system message."""
    found = command("generate", "--json", "--chat", "--system", "be brief", "hi")
    assert found.records[0]["prompt"] == "hi"
    assert command.build.llm is not None
    assert command.build.llm.inputs == [[8, 2]]


def test_chat_needs_a_template(command: Command) -> None:
    """A model without chat template says so before anything is generated."""
    assert command.build.tokenizer is not None
    command.build.tokenizer.chat_template = None
    assert "no chat template" in command.error(2, "generate", "--chat", "hi")
    command.build.tokenizer = None
    assert "no chat template" in command.error(2, "generate", "--chat", "hi")


def test_options_win_over_the_config_file(command: Command, tmp_path: Path) -> None:
    """Keys come from the file, under those given as options; nested ones too."""
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: theirs\nmax_batch_size: 3\nmax_seq_len: 99\n"
        "kv_cache_config: {tokens_per_block: 16, dtype: float32}\n"
    )
    assert command("generate", "x", "-c", file, "-m", "ours", "--tokens-per-block", "64").code == 0
    config = command.build.config
    assert config is not None
    assert (config.model, config.max_batch_size, config.max_seq_len) == ("ours", 3, 99)
    assert config.kv_cache_config.tokens_per_block == 64
    assert config.kv_cache_config.dtype == "float32"


def test_every_option_of_the_model_arrives(command: Command) -> None:
    """Each option sets its key of AutoDeployConfig."""
    options = (
        "--model m --random-weights --trust-remote-code --dtype float16 --device cuda:1 "
        "--compile-backend torch-opt --kv-cache-dtype fp8 --kernel-dir / "
        "--max-batch-size 2 --max-seq-len 50 --max-num-tokens 20 --tokens-per-block 8"
    )
    assert command("generate", "x", *options.split()).code == 0
    config = command.build.config
    assert config is not None
    assert config.model_dump(
        include={
            "model",
            "skip_loading_weights",
            "trust_remote_code",
            "dtype",
            "device",
            "compile_backend",
            "kernel_dir",
            "max_batch_size",
            "max_seq_len",
            "max_num_tokens",
        }
    ) == {
        "model": "m",
        "skip_loading_weights": True,
        "trust_remote_code": True,
        "dtype": "float16",
        "device": "cuda:1",
        "compile_backend": "torch-opt",
        "kernel_dir": "/",
        "max_batch_size": 2,
        "max_seq_len": 50,
        "max_num_tokens": 20,
    }
    assert config.kv_cache_config.tokens_per_block == 8
    assert config.kv_cache_config.dtype == "fp8"


def test_every_option_of_sampling_arrives(command: Command) -> None:
    """Each option sets its field of SamplingParams."""
    options = (
        "-n 5 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 "
        "--seed 4 --stop a --stop b --ignore-eos"
    )
    assert command("generate", "x", *options.split()).code == 0
    assert command.build.llm is not None
    assert command.build.llm.sampling == SamplingParams(
        max_new_tokens=5,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=4,
        stop=("a", "b"),
        ignore_eos=True,
    )


def test_sampling_defaults_are_those_of_the_library() -> None:
    """The help shows the defaults of SamplingParams, which hold where the model's file says nothing."""
    options = signature(cli.generate.generate, eval_str=True).parameters
    for name, field in signature(SamplingParams).parameters.items():
        if name in options and name != "stop":
            assert not options[name].default, name
            (info,) = options[name].annotation.__metadata__
            assert (
                name in ("seed", "ignore_eos") or f"Default: the model's, or {field.default:g}." in info.help
            )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate"], "no prompt"),
        (["generate", ""], "prompt 0: the prompt is empty"),
        (["generate", "", " "], "prompt 0: the prompt is empty"),
        (["generate", "a", "-f", "b"], "not both"),
        (["generate", "-f", "/no/such"], "--prompt-file /no/such: No such file"),
        (["generate", "-f", "/"], "--prompt-file /: Is a directory"),
        (["generate", "-c", "/no/such", "a"], "config /no/such: No such file"),
        (["generate", "a", "--max-batch-size", "0"], "max_batch_size: .* got 0"),
        (["generate", "a", "--dtype", "int8"], "dtype: .*'float32'.* got 'int8'"),
        (["generate", "a", "--max-num-tokens", "4"], "max_num_tokens must be at least"),
        (["generate", "a", "--temperature", "-1"], "temperature must be 0"),
        (["generate", "a", "-n", "0"], "max_new_tokens must be at least 1"),
        (["generate", "a", "--stop", ""], "stop must be"),
        (["generate", "a", "--system", "b"], "--system needs --chat"),
        (["generate", "a", "-o", "/no/such/file"], "--output /no/such/file: No such file"),
        (["generate", "a", "-o", "/"], "--output /: is a directory"),
        (["generate", "a\udcff"], "prompt 0: must be UTF-8"),
        (["generate", "a", "--generation-config", "x"], "generation_config: .*'none'.* got 'x'"),
        (["generate", "a", "--top-k", "x"], "'--top-k'.*; see ad-flashinfer-pass generate --help"),
        (["bench", "--plot", "steps.pdf"], "--plot steps.pdf: must end in .png or .svg"),
        (["bench", "--plot", "/no/such/steps.png"], "--plot .*: there is no folder /no/such"),
        (["bench", "--input-len", "0"], "--input-len must be at least 1, got 0"),
        (["serve", "--max-waiting", "0"], "--max-waiting must be positive, got 0"),
        (["serve", "--port", "70000"], "--port 70000: a port must lie in 0..65535"),
        (["serve", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: .* Take another address or port"),
        (["generate", "a", "--no-such"], "No such option: --no-such"),
        (["generat"], "No such command 'generat'"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_wrong_usage(command: Command, args: list[str], message: str) -> None:
    """Exit code 2, the cause on one line, nothing on stdout, and no model is built."""
    assert re.search(message, command.error(2, *args))
    assert command.build.config is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ("{", ":1: not valid JSON"),
        ("[1]", ":1: must be an object"),
        ('{"prompt": "a"}\n{"promt": "b"}', ":2: unknown key 'promt'; did you mean 'prompt'"),
        ('{"prompt": "a", "messages": []}', ":1: must have one of"),
        ("{}", ":1: must have one of"),
        ('{"prompt": 1}', ":1: prompt must be a string"),
        ('{"prompt": " "}', ":1: the prompt is empty"),
        ('{"prompt": "\\ud800"}', ":1: must be UTF-8"),
        ('{"prompt_token_ids": []}', ":1: prompt_token_ids must be a list of integers"),
        ('{"prompt_token_ids": [1.5]}', ":1: prompt_token_ids must be a list of integers"),
        ('{"prompt_token_ids": [true]}', ":1: prompt_token_ids must be a list of integers"),
        ('{"messages": [{"role": "user"}]}', ":1: messages must be"),
        ('{"messages": [{"role": "user", "content": ""}]}', ":1: the prompt is empty"),
    ],
)
def test_wrong_prompt_file(command: Command, tmp_path: Path, content: str, message: str) -> None:
    """A bad line is named by its number, before any model is built."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    line = command.error(2, "generate", "-f", file)
    assert str(file) in line
    assert message in line
    assert command.build.config is None


def test_prompt_file_must_be_text(command: Command, tmp_path: Path) -> None:
    """A binary file is no prompt file."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xff\xfe\x00")
    assert "must be UTF-8 text" in command.error(2, "generate", "-f", file)


def test_chat_of_token_ids_is_refused(command: Command, tmp_path: Path) -> None:
    """Token ids cannot be put into a chat template."""
    file = tmp_path / "ids.jsonl"
    file.write_text('{"prompt_token_ids": [1]}')
    assert "--chat needs text" in command.error(2, "generate", "--chat", "-f", file)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no such model"), 2),
        (LoadError("no such tensor"), 1),
        (TransformError("two\nlines"), 1),
        (CapacityError("no memory"), 1),
        (ZeroDivisionError("a bug"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_model(command: Command, error: Exception, code: int) -> None:
    """Each error is one line, with exit code 2 if the configuration is at fault, else 1."""
    command.build.error = error
    assert " ".join(str(error).split()) in command.error(code, "generate", "x")


def test_debug_shows_the_traceback(command: Command) -> None:
    """--debug shows where an error came from, above its line."""
    command.build.error = ZeroDivisionError("a bug")
    found = command("generate", "x", "--debug")
    assert found.code == 1
    assert "Traceback" in found.err
    assert found.err.splitlines()[-1].startswith("error: ZeroDivisionError: a bug")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out.txt", "--- 0: one\nONE\n\n--- 1: zwö\nZWÖ\n\n"),
        ("out.jsonl", '"prompt": "zwö", "text": "ZWÖ"'),
    ],
)
def test_output_file(command: Command, tmp_path: Path, name: str, content: str) -> None:
    """--output takes the results in place of stdout, and replaces what stood there."""
    file = tmp_path / name
    file.write_text("old")
    found = command("generate", "one", "zwö", "--output", file)
    assert (found.code, found.out) == (0, "")
    assert content in file.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [file]


def test_output_file_has_the_mode_that_it_had(command: Command, tmp_path: Path) -> None:
    """What was private stays private; a new file is as the umask says."""
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("old")
    old.chmod(0o600)
    mask = os.umask(0o027)
    try:
        for file in (old, new):
            assert command("generate", "one", "-o", file).code == 0
    finally:
        os.umask(mask)
    assert [stat.S_IMODE(file.stat().st_mode) for file in (old, new)] == [0o600, 0o640]


def test_output_follows_the_users_link_and_no_other(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link is written through; one that somebody planted under the temporary name is not."""
    target, link, victim = tmp_path / "target.txt", tmp_path / "link.txt", tmp_path / "victim"
    target.write_text("old")
    link.symlink_to(target)
    assert command("generate", "one", "-o", link).code == 0
    assert (link.is_symlink(), target.read_text()) == (True, "ONE\n")

    # Even if the name could be guessed: as it was, and as it would be if the dice were loaded.
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    for name in (f".target.txt.{os.getpid()}.tmp", ".0000000000000000.tmp"):
        (tmp_path / name).symlink_to(victim)
    assert "File exists" in command.error(2, "generate", "two", "-o", link)
    assert target.read_text() == "ONE\n"
    assert not victim.exists()


def test_output_to_a_pipe(command: Command, tmp_path: Path) -> None:
    """A fifo is written directly, as a device is."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert command("generate", "one", "-o", fifo).code == 0
    assert os.read(reader, 100) == b"ONE\n"
    os.close(reader)
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.parametrize("prompts", [["one", "crash"], ["refuse"]], ids=["crash", "all_refused"])
def test_output_file_is_not_touched_by_failure(command: Command, tmp_path: Path, prompts: list[str]) -> None:
    """A run that fails leaves the old file and nothing else."""
    file = tmp_path / "out.jsonl"
    file.write_text("old")
    assert command("generate", *prompts, "-o", file).code == 1
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_full_disk(command: Command) -> None:
    """A full disk is one line that names the file."""
    line = command.error(1, "generate", "one", "-o", "/dev/full")
    assert line == "error: --output /dev/full: No space left on device."


def test_full_disk_leaves_nothing(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk fills up while results are written, neither file nor remains are left."""

    def full(self: object, text: str) -> None:
        raise OSError(28, "No space left on device", "--output out.txt")

    monkeypatch.setattr("ad_flashinfer_pass.files.OutputFile.write", full)
    assert "No space left" in command.error(1, "generate", "one", "-o", tmp_path / "out.txt")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_keeps_what_is_done(command: Command, tmp_path: Path) -> None:
    """Ctrl-C: exit code 130, one line; results that are done are on stdout, or in FILE.partial."""
    found = command("generate", "one", "interrupt", "three")
    assert (found.code, found.out) == (130, "--- 0: one\nONE\n\n")
    assert found.err.splitlines()[-1] == "interrupted: 1 of 3 prompts done"
    file = tmp_path / "out.jsonl"
    found = command("generate", "one", "interrupt", "-o", file)
    partial = tmp_path / "out.jsonl.partial"
    assert found.err.splitlines()[-1] == f"interrupted: 1 of 2 prompts done, kept in {partial}"
    assert json.loads(partial.read_text())["text"] == "ONE"
    assert list(tmp_path.iterdir()) == [partial]


def test_interrupted_before_the_first_result(command: Command, tmp_path: Path) -> None:
    """Ctrl-C with nothing done leaves no file."""
    assert command("generate", "interrupt", "-o", tmp_path / "out.jsonl").code == 130
    assert list(tmp_path.iterdir()) == []
    found = command("generate", "interrupt", terminal=True)
    assert (found.code, found.out) == (130, "interrupt\n")


def test_help_and_version(command: Command) -> None:
    """Without arguments the commands are listed; help of a command has examples."""
    assert command("--version").out == f"ad-flashinfer-pass {__version__}\n"
    assert "generate" in command().out
    text = command("generate", "--help").out
    assert "Examples" in text
    assert all(f"─ {name} ─" in text for name in ("Prompts", "Model", "Sampling", "Limits", "Output"))


def start(*args: str, **settings: object) -> subprocess.Popen[str]:
    """The command with the fake model in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fake_llm", "generate", *args],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        preexec_fn=hear_signals,
        **settings,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_the_process_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C, kill and a closed terminal: finished results, one line, no traceback, nothing hidden left."""
    process = start("one", "sleep", "-q", "-o", str(tmp_path / "out.txt"), stdout=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == "sleeping\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, "")
    partial = tmp_path / "out.txt.partial"
    assert err == f"interrupted: 1 of 2 prompts done, kept in {partial}\n"
    assert list(tmp_path.iterdir()) == [partial]
    assert partial.read_text() == "--- 0: one\nONE\n\n"


def test_nohup_is_respected(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that was ignored when the command began stays so; handlers are put back in the end."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(command.build, "error", None)
        monkeypatch.setattr(FakeLLM, "_result", _hung_up(FakeLLM._result))
        assert command("generate", "one").code == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def _hung_up(method: Any) -> Any:
    def hung_up(*args: Any) -> Any:
        signal.raise_signal(signal.SIGHUP)
        return method(*args)

    return hung_up


def test_reader_that_goes_away_is_no_error() -> None:
    """``| head -1``: quiet, with the exit code that a shell gives for SIGPIPE."""
    process = start("one", "two", "-q", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""


@pytest.mark.parametrize("args", [["--help"], ["lint", "--rules"], ["lint", "--rules", "--json"]])
def test_every_command_ends_so(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those that print tables, by rich or as JSON, end with the same code."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with pytest.raises(SystemExit) as caught:
            cli.main(args)
    assert caught.value.code == 141
    assert "rror" not in capfd.readouterr().err


def test_without_stdout(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``>&-``: Python has no stdout then."""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "one", "-o", str(tmp_path / "out.txt"), "-q"])
    assert not caught.value.code
    assert (tmp_path / "out.txt").read_text() == "ONE\n"


def test_full_disk_on_stdout() -> None:
    """A full disk behind ``>`` is one line, and Python adds nothing to it when it exits."""
    with open("/dev/full", "w") as full:
        process = start("one", "-q", stdout=full)
        assert process.communicate(timeout=30)[1] == "error: stdout: No space left on device.\n"
    assert process.returncode == 1


def test_no_value_is_named_as_its_option() -> None:
    """typer 0.27 takes an option's name from its metavar then: --DEVICE in place of --device."""
    for command in typer.main.get_command(cli.app).commands.values():  # type: ignore[attr-defined]
        for parameter in command.params:
            names = {name[2:].casefold() for name in parameter.opts if name.startswith("--")}
            assert str(parameter.metavar or "").casefold().replace("_", "-") not in names, parameter.opts


def test_an_option_is_the_same_on_every_command() -> None:
    """One name has one type, one metavar, one help text and one short form, whichever command takes it."""
    forms: dict[str, set[tuple[object, ...]]] = {}
    for command in cli.app.registered_commands:
        assert command.callback is not None
        for parameter in signature(command.callback, eval_str=True).parameters.values():
            kind, info = get_args(parameter.annotation)
            if isinstance(info, typer.models.OptionInfo):
                kinds = {*get_args(kind)} - {NoneType} or {kind}
                names = tuple(info.param_decls or [f"--{parameter.name.replace('_', '-')}"])
                form = (*kinds, names, info.metavar, info.help, info.rich_help_panel)
                for name in names:
                    forms.setdefault(name, set()).add(form)
    assert {name: found for name, found in forms.items() if len(found) > 1} == {}
    assert len(forms) > 40


def test_every_command_of_a_graph_takes_what_decides_it() -> None:
    """But for what a command itself decides: where kernels go, the scales of a cache, the machine."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    wanted = {"--model", "--config", "--dtype", "--compile-backend", "--kv-cache-dtype", "--kernel-dir"}
    lacking = {
        name: wanted - {option for parameter in command.params for option in parameter.opts}
        for name, command in commands.items()
    }
    assert lacking.pop("doctor") >= {"--model"}
    assert lacking.pop("migrate") >= {"--model"}
    assert lacking.pop("quantize") >= {"--compile-backend"}
    assert {name: options for name, options in lacking.items() if options} == {
        "calibrate": {"--kv-cache-dtype"},
        "prebuild": {"--kernel-dir"},
    }


def test_tables_in_a_pipe_are_rows_with_tabs(command: Command) -> None:
    """A header and a row for each rule, none of them cut or framed; on a terminal a frame."""
    header, *rows = command("lint", "--rules", "-q").out.splitlines()
    rules = json.loads(command("lint", "--rules", "--json", "-q").out)
    assert header.split("\t") == ["rule", "why", "fix", "example"]
    assert [row.split("\t") for row in rows] == [
        [name, *(" ".join(rule[key].split()) for key in ("why", "fix", "example"))]
        for name, rule in rules.items()
    ]
    assert "─" in command("lint", "--rules", "-q", terminal=True).out
