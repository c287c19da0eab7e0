"""The command line on an engine of fixed words: what goes where, exit codes, prompts, and leaving early."""

from __future__ import annotations

import io
import json
import os
import sys

import fake_engine
import pytest

from flashinfer_cli.cli import main as cli
from flashinfer_cli.cli import options, prompts
from flashinfer_cli.config import RunConfig, SamplingParams

ANSWER = "The sky is blue."


class Stdin(io.TextIOWrapper):
    """Piped text, or a terminal where nobody types."""

    def __init__(self, text: str | None) -> None:
        super().__init__(io.BytesIO((text or "").encode()), encoding="utf-8")
        self.terminal = text is None

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def genai(monkeypatch, capsys):
    """Run a command: genai("generate", ..., stdin=None is a terminal) -> (exit code, stdout, stderr)."""
    for name, module in fake_engine.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fake_engine.FakeEngine, "seen", [])
    monkeypatch.delenv("GENAI_RUN_DEBUG", raising=False)

    def run(*argv: str, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Stdin(stdin))
        code = cli.run(list(argv))
        return (code, *capsys.readouterr())

    return run


def seen(what: str):
    return [value for name, value in fake_engine.FakeEngine.seen if name == what]


def test_only_the_answer_is_on_stdout(genai):
    code, out, err = genai("generate", "-m", "x", "-p", "why?")
    assert (code, out) == (0, ANSWER)
    plan, warning, summary = err.splitlines()
    assert plan.startswith("1000 MiB budget")
    assert warning == "warning: The drive is busy."
    assert "decode 1.89 tok/s" in summary and summary.endswith("exact")
    assert seen("closed") == ["x"]


def test_quiet_leaves_the_answer_alone(genai):
    assert genai("generate", "-m", "x", "-p", "why?", "--quiet") == (0, ANSWER, "")


def test_stats_are_a_table_on_stderr(genai):
    code, out, err = genai("generate", "-m", "x", "-p", "why?", "--stats", "--quiet")
    assert (code, out) == (0, ANSWER)
    for words in (
        "Memory",
        "peak of the process",
        "950 MiB",
        "Time",
        "waiting for I/O",
        "first (cold)",
        "The drive, measured",
    ):
        assert words in err


def test_json_is_one_object(genai):
    code, out, _ = genai("generate", "-m", "x", "-p", "why?", "--json")
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert (found["text"], found["token_ids"], found["finish_reason"]) == (ANSWER, [100, 101, 102, 103, 104], "stop")
    assert found["report"]["peak"] == 950 << 20


@pytest.mark.parametrize("command", [("plan", "-m", "x"), ("inspect", "x"), ("evaluate", "-m", "x", "-p", "some text")])
def test_findings_as_table_and_as_json(genai, command):
    code, out, _ = genai(*command)
    assert code == 0 and ("MiB" in out or "perplexity" in out)
    code, out, _ = genai(*command, "--json")
    assert code == 0 and isinstance(json.loads(out), dict)


def test_json_has_no_nan(genai):
    _, out, _ = genai("evaluate", "-m", "x", "-p", "some text", "--against", "dense", "--json")
    assert json.loads(out)["mean_kl"] is None


def test_profile_writes_its_files(genai, tmp_path):
    code, out, _ = genai("profile", "-m", "x", "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"))
    assert code == 0 and out.startswith("Run")
    assert json.loads((tmp_path / "r.json").read_text())["budget"] == 1000 << 20
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]


def test_profile_json_on_stdout_moves_the_table(genai):
    _, out, err = genai("profile", "-m", "x", "--json", "-")
    assert json.loads(out)["exactness"] == "exact"
    assert "Memory" in err


def test_profile_refuses_an_unwritable_place_before_loading(genai, tmp_path):
    code, _, err = genai("profile", "-m", "x", "--html", str(tmp_path / "none" / "r.html"))
    assert code == 2 and "There is no folder" in err and not seen("load")


def test_bundle(genai, tmp_path):
    assert genai("bundle", "x", str(tmp_path / "out"))[:2] == (0, f"{tmp_path / 'out'}\n")
    code, out, _ = genai("bundle", "x", str(tmp_path / "out"), "--dry-run")
    assert code == 0 and "trunk.safetensors" in out and "free space" in out
    assert genai("bundle", "x")[0] == 2
    code, _, err = genai("bundle", str(tmp_path), "--verify")
    assert code == 1 and err.startswith("error:")


def test_defaults_are_those_of_config(genai):
    genai("generate", "-m", "x", "-p", "why?")
    assert seen("sampling") == [SamplingParams()]
    assert RunConfig(**seen("load")[0]) == RunConfig()


def test_flags_reach_the_engine(genai):
    run = "--memory 2GiB --device cpu --stream always --context 100 --threads 3 --kernels reference --revision v1"
    sampling = (
        "-n 7 --temp 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --repeat-penalty 1.1 --seed 3 --stop a --stop b --ignore-eos"
    )
    code, _, err = genai("generate", "-m", "x", "-p", "why?", *run.split(), *sampling.split())
    assert code == 0, err
    assert RunConfig(**seen("load")[0]) == RunConfig(
        memory="2GiB", device="cpu", stream="always", context=100, threads=3, kernels="reference", revision="v1"
    )
    assert seen("sampling") == [
        SamplingParams(
            max_tokens=7, temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, repeat_penalty=1.1, seed=3, stop=("a", "b"),
            ignore_eos=True,
        )
    ]  # fmt: skip


def test_a_window_goes_with_its_policy_alone(genai):
    assert genai("generate", "-m", "x", "-p", "why?", "--window", "3")[0] == 0
    assert RunConfig(**seen("load")[0]).settled().neuron_policy == "window"
    code, out, err = genai("generate", "-m", "x", "-p", "why?", "--window", "3", "--neuron-policy", "recent")
    assert (code, out) == (2, "") and "--neuron-policy is recent" in err and "hint" in err and len(seen("load")) == 1


def test_chat_template_is_used_unless_raw_or_absent(genai):
    genai("generate", "-m", "x", "-p", "why?", "--system", "be kind")
    assert seen("chat") == [[{"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"}]]
    assert seen("generate") == [[1, 2, 3]]
    genai("generate", "-m", "x", "-p", "why?", "--raw")
    genai("generate", "-m", "base", "-p", "why?")
    assert seen("generate")[1:] == ["why?", "why?"]


def test_every_field_of_the_options_is_a_field_of_the_config():
    assert set(options.RunOptions.__dataclass_fields__) <= set(RunConfig.__dataclass_fields__)
    assert set(options.SamplingOptions.__dataclass_fields__) <= set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(
    ("argv", "stdin", "prompt"),
    [
        (["-p", "a"], None, "a"),
        (["-p", "a"], "", "a"),
        (["-p", "a"], "b\n", "a\n\nb"),
        ([], "b\n\n", "b\n"),
        (["-f", "-"], "ü\r\n", "ü"),
        (["-p", "a", "-f", "FILE"], None, "a\n\nfrom a file"),
        (["-f", "FILE"], "ignored", "from a file"),
        (["-p", ""], None, ""),
    ],
)
def test_where_the_prompt_comes_from(genai, tmp_path, argv, stdin, prompt):
    (tmp_path / "FILE").write_text("from a file\n")
    argv = [str(tmp_path / "FILE") if each == "FILE" else each for each in argv]
    assert genai("generate", "-m", "echo", "--raw", *argv, stdin=stdin)[:2] == (0, prompt)


def test_no_prompt_and_unreadable_prompts(genai, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for argv, words in (
        ([], "There is no prompt."),
        (["-f", str(tmp_path / "none")], "There is no file"),
        (["-f", str(tmp_path)], "cannot be read"),
        (["-f", str(tmp_path / "latin")], "not UTF-8"),
        (["-p", "\udcff"], "not UTF-8"),
    ):
        code, out, err = genai("generate", "-m", "x", *argv)
        assert (code, out) == (2, "") and words in err, argv
        assert not seen("load"), "refused before loading"


def test_a_silent_pipe_is_named(monkeypatch):
    reading, writing = os.pipe()
    monkeypatch.setattr(prompts, "PATIENCE", 0.05)
    said: list[str] = []

    def notify(text: str) -> None:
        said.append(text)
        os.write(writing, b"late")
        os.close(writing)

    with os.fdopen(reading) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert prompts.gather("a", None, notify) == "a\n\nlate"
    assert len(said) == 1 and "stdin" in said[0]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["generate", "-m", "missing", "-p", "a"], 1, "There is nothing at missing."),
        (["generate", "-m", "toobig", "-p", "a"], 2, "300 MiB is the least"),
        (["plan", "-m", "toobig"], 2, "300 MiB is the least"),
        (["generate", "-m", "notokenizer", "-p", "a"], 1, "no tokenizer"),
        (["generate", "-m", "memory", "-p", "a"], 1, "no more memory"),
        (["generate", "-m", "crash", "-p", "a"], 1, "ZeroDivisionError: division by zero"),
        (["generate", "-m", "x", "-p", "a", "--raw", "--system", "s"], 2, "exclude each other"),
        (["generate", "-m", "base", "-p", "a", "--system", "s"], 2, "needs a chat template"),
        (["chat"], 2, "--model"),
        (["generate", "-m", "x", "-p", "a", "--top-p", "7"], 2, "--top-p is 7"),
        (
            ["generate", "-m", "x", "-p", "a", "--stream", "often"],
            2,
            "Invalid value for '--stream': 'often' is not one of",
        ),
        (["generate", "-m", "x", "-p", "a", "--context", "0"], 2, "--context is 0"),
        (["generate", "-m", "x", "-p", "a", "-n", "many"], 2, "--max-tokens"),
        (["generate", "-m", "x", "-p", "a", "--bogus"], 2, "--bogus"),
        (["generat"], 2, "generat"),
        (["chat", "-m", "base"], 1, "no chat template"),
    ],
)
def test_failures_are_a_sentence_and_a_hint(genai, argv, code, words):
    got, out, err = genai(*argv)
    assert got == code and words in err
    at = err.index("error: ")
    assert err[at:].count("\n") == 1 + ("hint: " in err), "a sentence each, and nothing behind"
    assert "Traceback" not in err and out in ("", "The sky")


def test_debug_shows_the_traceback(genai, monkeypatch):
    assert "GENAI_RUN_DEBUG=1" in genai("generate", "-m", "crash", "-p", "a")[2]
    monkeypatch.setenv("GENAI_RUN_DEBUG", "1")
    _, _, err = genai("generate", "-m", "crash", "-p", "a")
    assert "Traceback" in err and "ZeroDivisionError" in err


def test_interrupt_ends_with_the_figures(genai):
    code, out, err = genai("generate", "-m", "interrupt", "-p", "a")
    assert (code, out) == (130, "The sky")
    assert err.splitlines()[-1].endswith("exact")
    assert seen("closed") == ["interrupt"]
    code, out, _ = genai("generate", "-m", "interrupt", "-p", "a", "--json")
    assert code == 130 and json.loads(out)["finish_reason"] == "interrupted"


def test_version_and_bare_command(genai):
    assert genai("--version")[1].startswith("genai-run ")
    code, out, _ = genai()
    assert code == 0 and "generate" in out and "evaluate" in out


def test_each_piped_line_is_a_turn(genai):
    code, out, err = genai(
        "chat", "-m", "x", "--system", "s", stdin="hello\n\n/system be kind\nagain\nmore\n/exit\nnever\n"
    )
    assert (code, out) == (0, "1:s:hello\n1:be kind:again\n2:be kind:more\n")
    assert err.splitlines()[-1].endswith("exact")


def test_chat_commands_speak_on_stderr(genai):
    code, out, err = genai("chat", "-m", "x", stdin="hi\n/reset\nhi\n/help\n/stat\n/stats\n/system\nlong\nhi\n")
    assert (code, out) == (0, "1::hi\n1::hi\n2::hi\n")
    for words in (
        "/system ",
        "Did you mean /stats?",
        "peak of the process",
        "no system message",
        "error: The conversation",
    ):
        assert words in err
