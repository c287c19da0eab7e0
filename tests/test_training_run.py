"""Training as people meet it: killed and resumed to the same losses, bad data, and folders that the runtime reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flashinfer_cli as fc
from flashinfer_cli.apps.train import train
from flashinfer_cli.cli import main
from flashinfer_cli.cli.train import several
from flashinfer_cli.errors import UsageError
from flashinfer_cli.training import data
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.loop import Training, read_corpus
from flashinfer_cli.training.model import Decoder
from flashinfer_cli.training.recipes import RECIPES, Recipe

ROOT = Path(__file__).parents[1]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VARIANTS: dict[str, tuple[str, dict]] = {
    "relu": ("stories-relu", {}),
    "moe": ("stories-moe", {"num_experts": 4, "moe_intermediate_size": 16}),
    "mod": ("stories-mod", {"mod_capacity": 0.25}),
    "staged": ("stories-mod", {"mod_capacity": 0.25, "num_experts": 3, "moe_intermediate_size": 16}),
    "integrated": (
        "stories-mod",
        {"mod_capacity": 0.0, "num_experts": 3, "num_noop_experts": 2, "moe_intermediate_size": 16},
    ),
}


def small(variant: str, steps: int = 12) -> Recipe:
    name, changes = VARIANTS[variant]
    recipe = RECIPES[name]
    return replace(
        recipe, shape=replace(recipe.shape, **SMALL, **changes), batch=2, sequence=32, tokens=64 * steps, warmup=3
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    names = ("Tom", "Lily", "Ben", "Mia")
    stories = [
        f"One day {names[i % 4]} saw a {colour} {thing} number {i} and was happy. The {thing} was {colour}."
        for i in range(40)
        for colour, thing in (("red", "ball"), ("blue", "bird"))
    ]
    path.write_text(f"\n{data.END}\n".join(stories))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """The same sums in the same order, whatever ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses(recipe: Recipe, text: Path, out: Path, stops: list[int]) -> str:
    """The log of a run that is stopped after each number of steps and begun again."""
    corpus = read_corpus(recipe, [text], None)
    for stop in [*stops, recipe.steps]:
        training = Training(recipe, corpus, out)
        assert training.step <= stop
        training.run(lambda *_: None, stop=lambda t=training, s=stop: t.step >= s, save_every=5)
    return (out / "loss.jsonl").read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_repeats_the_losses_exactly(tmp_path, text, variant):
    recipe = small(variant)
    whole = losses(recipe, text, tmp_path / "a", [])
    parts = losses(recipe, text, tmp_path / "b", [1, 4, 9])
    assert whole == parts and len(whole.splitlines()) == recipe.steps
    assert len({json.loads(line)["loss"] for line in whole.splitlines()}) > 5


def test_a_lost_step_is_made_again(tmp_path, text):
    """Killed between two savings: the log is cut back to what was saved."""
    recipe = small("relu")
    whole = losses(recipe, text, tmp_path / "a", [])
    corpus = read_corpus(recipe, [text], None)
    training = Training(recipe, corpus, tmp_path / "b")

    class Killed(BaseException):
        pass

    def report(done: int, total: int, figures: dict[str, float]) -> None:
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        training.run(report, save_every=5)
    again = Training(recipe, corpus, tmp_path / "b")
    assert again.step == 5
    again.run(lambda *_: None, save_every=5)
    assert (tmp_path / "b" / "loss.jsonl").read_text() == whole


def command(text: Path, out: Path) -> list[str]:
    argv = ["train", "stories-draft", "--data", str(text), "--out", str(out), "--threads", "1", "--batch", "1"]
    return [*argv, "--sequence", "32", "--tokens", "480", "--save-every", "4"]


def test_sigkill_and_the_same_command_again(tmp_path, text, capsys, monkeypatch):
    assert main.run(command(text, tmp_path / "a")) == 0
    program, env = [sys.executable, "-m", "flashinfer_cli"], {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*program, *command(text, tmp_path / "b")], env=env, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "b" / ".training" / "state.pt").exists() and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b" / "model.safetensors").exists()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["genai-run", *command(text, tmp_path / "b")])  # as the card tells it
    assert main.run(sys.argv[1:]) == 0
    assert "going on from step" in capsys.readouterr().err
    for name in ("loss.jsonl", "model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not (tmp_path / "b" / ".training").exists()
    card = json.loads((tmp_path / "b" / "card.json").read_text())
    assert card["command"].startswith("genai-run train stories-draft --data") and len(card["samples"]) == 3
    assert "bits per byte" in (tmp_path / "b" / "README.md").read_text()
    assert (tmp_path / "b" / "loss.svg").read_text().startswith("<svg")


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Cannot read"),
        (b"", "holds no text"),
        (b"  \n<|endoftext|>\n ", "holds no text"),
        (b"abc\0def", "is binary"),
        (b"caf\xe9 " * 100, "not UTF-8"),
        (b"a" * ((16 << 20) + 1), "a line of more than 16 MiB"),
        (b"one story only", "both learned and held out"),
        (b"a<|endoftext|>b<|endoftext|>c", "too few"),
    ],
)
def test_bad_data_is_one_sentence(tmp_path, capsys, content, words):
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out"
    assert main.run(["train", "stories-draft", "--data", str(path), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and not out.exists()


def test_other_settings_do_not_go_on_in_a_folder(tmp_path, text):
    recipe = small("relu")
    corpus = read_corpus(recipe, [text], None)
    Training(recipe, corpus, tmp_path / "o").run(lambda *_: None, stop=lambda: True, save_every=1)
    training = Training(recipe, corpus, tmp_path / "o")
    training.run(lambda *_: None, stop=lambda: training.step >= 1, save_every=1)
    with pytest.raises(UsageError, match="another recipe"):
        Training(replace(recipe, seed=9), corpus, tmp_path / "o")


def test_a_finished_folder_is_left_alone(tmp_path, text, capsys):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "model.safetensors").write_bytes(b"mine")
    assert main.run(["train", "stories-draft", "--data", str(text), "--out", str(tmp_path / "o")]) == 2
    assert "finished model" in capsys.readouterr().err
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == b"mine"


def test_several_files_behind_one_flag():
    got = several(["train", "r", "--data", "a", "b", "--out", "o", "--data", "c"])
    assert got == ["train", "r", "--data", "a", "--data", "b", "--out", "o", "--data", "c"]


# ------------------------------------------------------------------ what is saved


def trained(variant: str, text: Path, out: Path, decoding: str = "router") -> Decoder:
    """A few steps, so that gates and routers are not as they began, rounded as saved."""
    recipe = small(variant, 8)
    recipe = replace(recipe, shape=replace(recipe.shape, mod_decoding=decoding), learning_rate=0.02)
    corpus = read_corpus(recipe, [text], None)
    training = Training(recipe, corpus, out)
    training.run(lambda *_: None)
    model = training.model.eval()
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    write_folder(model, corpus.tokenizer, out)
    return model


@pytest.mark.parametrize(
    ("variant", "decoding"),
    [*((variant, "router") for variant in VARIANTS), ("mod", "predictor"), ("staged", "predictor")],
)
def test_the_runtime_computes_what_was_trained(tmp_path, text, variant, decoding):
    model = trained(variant, text, tmp_path / "m", decoding)
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids, causal=True)[0][0]
    for options in ({}, {"stream": "always"}):
        with fc.load(tmp_path / "m", kv_cache_type="f32", **options) as engine:
            assert (engine.logits(ids[0].tolist()) - want).abs().max() < 1e-4


@pytest.mark.parametrize("variant", ["relu", "moe"])
def test_transformers_computes_the_same(tmp_path, text, variant):
    transformers = pytest.importorskip("transformers")
    model = trained(variant, text, tmp_path / "m")
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)[0]).abs().max() < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    with fc.load(tmp_path / "m") as engine:
        told = "One day Tom saw a red ball."
        assert engine.tokenizer.encode(told) == tokenizer(told)["input_ids"]
        assert engine.tokenizer.encode(told)[0] == 0


def test_the_l1_silences_neurons(tmp_path, text):
    """The same steps with and without: more zeros with it."""
    corpus = read_corpus(small("relu"), [text], None)
    ends = {}
    for goal in (0.0, 0.97):
        recipe = replace(small("relu", 150), sparsity=goal, learning_rate=0.01)
        training = Training(recipe, corpus, tmp_path / str(goal))
        training.run(lambda *_: None)
        ends[goal] = sum(row["sparsity"] for row in training.history()[-10:]) / 10
    assert ends[0.97] > ends[0.0] + 0.05


def test_train_gives_the_card_it_writes(tmp_path, text):
    said: list[str] = []
    recipe = replace(small("mod", 4))
    card = train(recipe, [text], tmp_path / "o", command="c", threads=1, note="mine", say=said.append)
    assert card is not None and card["depth"]["router"]["skipped"] and "documents" in said[0]
    assert json.loads((tmp_path / "o" / "card.json").read_text())["note"] == "mine"
    page = (tmp_path / "o" / "README.md").read_text()
    assert "Deciding who computes a block" in page and "**Once upon a time**" in page
