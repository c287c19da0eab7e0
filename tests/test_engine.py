"""The public API on a tiny model with a tokenizer: generating, stopping, chatting, refusing, reporting."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import Tiny, make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import flashinfer_cli as fc
from flashinfer_cli.apps.evaluate import evaluate
from flashinfer_cli.apps.inspect import inspect_model
from flashinfer_cli.apps.planning import plan_only
from flashinfer_cli.apps.profile import profile
from flashinfer_cli.config import RunConfig, SamplingParams
from flashinfer_cli.errors import (
    BudgetError,
    ContextError,
    CorruptCheckpointError,
    DeviceError,
    TokenizerError,
    UsageError,
)

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def add_tokenizer(folder: Path) -> None:
    """Letters and digits as one token each, 128 in all: small enough for the tiny models' vocabulary."""
    characters = [chr(c) for c in range(32, 127)]
    vocab = {c: i + 3 for i, c in enumerate(characters)} | {"<s>": 0, "<unk>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, _ = make("llama", 0, tmp_path_factory.mktemp("engine") / "model")
    add_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> fc.Engine:
    with fc.load(folder, context=60) as engine:
        yield engine


def ids_of(engine: fc.Engine, prompt: str | list[int], params: SamplingParams = GREEDY) -> list[int]:
    return [event.token_id for event in engine.generate(prompt, params)]


def test_greedy_is_the_argmax_of_logits(engine: fc.Engine) -> None:
    prompt = engine.tokenizer.encode("Once")
    made = ids_of(engine, prompt)
    logits = engine.logits(prompt + made)
    assert made == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_text_and_ids_agree_and_the_last_event_says_why(engine: fc.Engine) -> None:
    events = list(engine.generate("Once", GREEDY))
    assert "".join(e.text for e in events) == engine.tokenizer.decode([e.token_id for e in events])
    assert [e.finish_reason for e in events] == [None] * 11 + ["length"]
    assert [e.index for e in events] == list(range(12))


def test_every_cache_and_budget_gives_the_same_tokens(folder: Path, engine: fc.Engine) -> None:
    expected = ids_of(engine, "The quick brown fox")
    for options in (
        {"stream": "always"},
        {"prefill_chunk": 3},
        {"io_threads": 1},
        {"direct_io": "never"},
        {"threads": 1},
    ):
        with fc.load(folder, context=60, **options) as other:
            assert ids_of(other, "The quick brown fox") == expected, options


def test_stop_string_is_not_shown(engine: fc.Engine) -> None:
    whole = "".join(e.text for e in engine.generate("Once", GREEDY))
    stop = whole[4:7]
    events = list(engine.generate("Once", SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop=(stop,))))
    assert "".join(e.text for e in events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"


def test_stop_id_ends_without_text(engine: fc.Engine) -> None:
    first = ids_of(engine, "Once")[0]
    (event,) = engine.generate("Once", SamplingParams(max_tokens=9, temperature=0, stop_token_ids=(first,)))
    assert (event.token_id, event.text, event.finish_reason) == (first, "", "stop")


def test_seed_fixes_the_text(engine: fc.Engine) -> None:
    def sample(seed: int) -> list[int]:
        return ids_of(engine, "Once", SamplingParams(max_tokens=12, temperature=1.5, seed=seed, ignore_eos=True))

    assert sample(1) == sample(1) != sample(2)


def test_context_bounds(engine: fc.Engine) -> None:
    with pytest.raises(ContextError, match="longer than the context"):
        list(engine.generate([5] * 61, GREEDY))
    events = list(engine.generate([5] * 55, GREEDY))
    assert len(events) == 6 and events[-1].finish_reason == "length"


def test_the_context_is_what_the_prompt_needs(folder: Path, tiny: Tiny) -> None:
    for options, context in (({}, 17), ({"context": 30}, 30)):
        with fc.load(folder, need=lambda tokenizer: len(tokenizer.encode("Once")) + 13, **options) as engine:
            assert engine.plan.context == context
    bare, _ = tiny("llama", 0)
    with pytest.raises(TokenizerError):  # before any weight is loaded
        fc.load(bare, need=lambda tokenizer: 1)


@pytest.mark.parametrize("prompt", [[], [5, 128], [-1]])
def test_bad_ids_are_refused(engine: fc.Engine, prompt: list[int]) -> None:
    with pytest.raises(UsageError):
        list(engine.generate(prompt, GREEDY))


def test_chat_reads_each_turn_once(engine: fc.Engine) -> None:
    chat = engine.chat(system="Be")
    list(chat.send("Hi", SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)))
    before = engine.report().prefill.tokens
    list(chat.send("Go", SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)))
    again = engine.report().prefill.tokens - before
    turn = engine.tokenizer.encode_chat(chat.messages[:-1])
    assert 0 < again < len(turn)
    alone = ids_of(engine, turn, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert engine.tokenizer.decode(alone) == chat.messages[-1]["content"]
    chat.reset()
    assert [m["role"] for m in chat.messages] == ["system"]


def test_without_a_tokenizer_ids_still_work(tiny: Tiny) -> None:
    folder, _ = tiny("llama", 0)
    with fc.load(folder, context=20) as bare:
        assert bare.logits([1, 2, 3]).shape == (3, 128)
        assert len(ids_of(bare, [1, 2], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))) == 3
        with pytest.raises(TokenizerError):
            list(bare.generate("text", GREEDY))


def test_nan_weights_are_named(folder: Path, tmp_path: Path) -> None:
    for role in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        broken = tmp_path / role
        broken.mkdir()
        for file in folder.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        weights = load_file(broken / "model.safetensors")
        weights[role] = weights[role].copy()
        weights[role].flat[7] = np.nan
        save_file(weights, broken / "model.safetensors")
        with pytest.raises(CorruptCheckpointError, match=role), fc.load(broken, context=20) as engine:
            engine.logits([1, 2, 3])


def test_budget_below_the_least_names_it(folder: Path) -> None:
    with pytest.raises(BudgetError, match="at least") as refused:
        fc.load(folder, memory="1MiB")
    assert refused.value.least > 1 << 20 and refused.value.exit_code == 2
    with pytest.raises(BudgetError):
        plan_only(str(folder), RunConfig(memory="1MiB"))
    assert plan_only(str(folder), RunConfig()).everything_fits


def test_what_plan_names_is_what_a_run_needs() -> None:
    """Each in a process of its own, whose size counts."""
    both = (
        "import flashinfer_cli.apps.planning as p, flashinfer_cli.config as c; "
        "p.plan_only('zoo:stories-moe', c.RunConfig(memory='1MiB', context=64))",
        "import flashinfer_cli as fc; fc.load('zoo:stories-moe', memory='1MiB', context=64)",
    )
    least = []
    for code in both:
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        least.append(int(re.findall(r"needs at least (\d+) MiB", ran.stderr)[-1]))
    assert abs(least[0] - least[1]) <= 12


def test_devices_and_options_are_checked(folder: Path) -> None:
    with pytest.raises(DeviceError, match="cpu"):
        fc.load(folder, device="cpuu")
    with pytest.raises(UsageError, match="memoryy"):
        fc.load(folder, memoryy="1GiB")
    for memory in ("lots", "0%", "-1G", "101%"):
        with pytest.raises(UsageError):
            fc.load(folder, memory=memory)


def test_report_adds_up(folder: Path) -> None:
    with fc.load(folder, context=60, stream="always", memory="8GiB") as engine:
        report = profile(engine, "Once upon", SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    assert report.decode.tokens == 4 and report.prefill.tokens == 9 and len(report.steps) == 4
    assert report.decode.hits == 0 and report.decode.misses > 0
    assert sum(row["bytes"] for row in report.io if row["phase"] == "decode") == report.decode.bytes_read
    # Reading ahead crosses from prefill into decode, so only the sum of both is exact.
    assert report.prefill.bytes_read + report.decode.bytes_read >= 5 * report.streamed_bytes
    assert report.peak > 0 and report.budget == 8 << 30
    assert report.drive is not None and report.drive["bytes_per_second"] > 0
    assert sum(report.request_sizes.values()) == sum(row["requests"] for row in report.io)
    json.dumps(report.to_dict())
    assert "exact" in report.summary()


def test_evaluate_by_hand(folder: Path, engine: fc.Engine) -> None:
    text = "Once upon a time there was a fox."
    found = evaluate(str(folder), text, RunConfig(context=60, stream="always"), against="dense")
    ids = torch.tensor(engine.tokenizer.encode(text))
    loss = torch.nn.functional.cross_entropy(engine.logits(ids.tolist())[:-1], ids[1:]).item()
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["mean_kl"] == pytest.approx(0, abs=1e-9) and found["top1_agreement"] == 1
    windowed = evaluate(str(folder), text, RunConfig(context=10))
    assert windowed["tokens"] == len(ids) - 1 and windowed["loss"] != pytest.approx(loss, abs=1e-3)


def test_inspect_counts_every_weight(folder: Path) -> None:
    found = inspect_model(str(folder))
    weights = load_file(folder / "model.safetensors")
    assert found["parameters"] == sum(w.size for w in weights.values())
    assert sum(found["parts"].values()) == sum(w.nbytes for w in weights.values())
    assert found["chat_template"] is True and found["model_type"] == "llama"


@pytest.mark.parametrize(("family", "kept"), [("llama", 1), ("mixtral", 0)])
def test_a_prompt_keeps_its_memory_but_with_experts(
    tiny: Tiny, family: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every expert has another number of tokens: what is kept of one fits no other, and adds up past a budget."""
    entered = []

    @contextmanager
    def counting() -> Iterator[None]:
        entered.append(1)
        yield

    monkeypatch.setattr("flashinfer_cli.decoding.generate.reusing_pages", counting)
    with fc.load(tiny(family, 0)[0], context=32) as engine:
        engine.session().prefill([3, 5, 7, 9])
    assert len(entered) == kept
