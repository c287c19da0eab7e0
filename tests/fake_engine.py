"""An engine without a model, for tests of the command line: it answers with fixed words and never imports torch.

`modules()` stand in for those that compute; `python tests/fake_engine.py ARGS` is genai-run on top of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from flashinfer_cli.config import MiB
from flashinfer_cli.errors import BudgetError, CheckpointNotFoundError, ContextError, TokenizerError
from flashinfer_cli.recorder import Recorder
from flashinfer_cli.report import PlanPart, RunReport, readings

WORDS = ["The", " sky", " is", " blue", "."]


@dataclass(frozen=True)
class Event:
    index: int
    token_id: int
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class Plan:
    budget: int = 1000 * MiB
    least: int = 300 * MiB
    context: int = 4096
    chunk: int = 512
    resident_bytes: int = 400 * MiB
    streamed_bytes: int = 2000 * MiB
    parts: tuple[PlanPart, ...] = (
        PlanPart("process", 280 * MiB, note="interpreter, libraries, tokenizer"),
        PlanPart("always resident", 2 * MiB, 2 * MiB),
        PlanPart("pinned weights", 398 * MiB, 398 * MiB, "12 of 80 slices"),
        PlanPart("streaming ring", 128 * MiB, 128 * MiB),
        PlanPart("keys and values", 112 * MiB, 112 * MiB, "4096 tokens"),
        PlanPart("scratch", 32 * MiB, note="512 tokens at once"),
        PlanPart("reserve", 24 * MiB),
    )


class Tokenizer:
    def __init__(self, has_chat_template: bool) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        FakeEngine.seen.append(("chat", messages))
        return [1, 2, 3]


def make_report(layers: int = 8, decode: int = 12, drive: bool = True) -> RunReport:
    """A run as it might have been: a cold first step, a slow layer, two kinds of reads."""
    recorder = Recorder()
    recorder.phases["load"].seconds, recorder.phases["load"].read_seconds = 0.6, 0.5
    for phase, tokens, passes, slow in (("prefill", 40, 1, 8.0), ("decode", decode, decode, 1.0)):
        count = recorder.phases[phase]
        recorder.phase = phase  # type: ignore[assignment]
        for recorder.layer in range(-1, layers + 1):
            wait = 0.02 * slow * (1 + (recorder.layer == 3)) * (0 <= recorder.layer < layers)
            compute = 0.03 * slow
            recorder._add(0, wait * passes)
            recorder._add(1, compute * passes)
        count.tokens, count.passes = tokens, passes
        count.seconds = (count.wait_seconds + count.compute_seconds) * 1.1
        count.read_seconds = count.wait_seconds * 2.5
        for _ in range(passes * layers):
            recorder.io("weights", (4 * MiB,), 4 * MiB)
            recorder.io("rows", (8192,), 1152)
    from flashinfer_cli.report import Step

    for index in range(decode):
        recorder.steps.append(Step(0.9 if index == 0 else 0.4 + 0.01 * (index % 5), 0.2, layers * 4 * MiB))
    model = {
        "name": "tiny", "path": "/models/tiny", "kind": "gguf", "model_type": "llama", "parameters": 1_234_567,
        "weight_bytes": 2400 * MiB, "formats": {"Q8_0": 2300 * MiB, "F32": 100 * MiB},
    }  # fmt: skip
    plan = Plan()
    return RunReport(
        model=model,
        exactness="exact",
        device="cpu",
        kernels="cpu",
        threads=2,
        direct_io="direct",
        budget=plan.budget,
        peak=950 * MiB,
        least=plan.least,
        plan=plan.parts,
        resident_bytes=plan.resident_bytes,
        streamed_bytes=plan.streamed_bytes,
        **{**readings(recorder), "wasted_bytes": 3 * MiB},
        first_token_seconds=4.2,
        drive={"request_bytes": 4 * MiB, "depth": 8, "bytes_per_second": 1.4e9} if drive else None,
        warnings=("The drive is busy.",),
    )


class FakeEngine(AbstractContextManager["FakeEngine"]):
    """Model names choose what happens: see `load`."""

    seen: ClassVar[list[tuple[str, Any]]] = []  # what it was asked, for tests to look at

    def __init__(self, model: str) -> None:
        self.model, self.plan = model, Plan()
        self._tokenizer = None if "notokenizer" in model else Tokenizer("base" not in model)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise TokenizerError("The model has no tokenizer.", "Give one.")
        return self._tokenizer

    def generate(self, prompt: Any, sampling: Any, *, progress: Any = None) -> Iterator[Event]:
        prompt = prompt if isinstance(prompt, str) or prompt == [1, 2, 3] else "".join(map(chr, prompt))
        FakeEngine.seen.append(("generate", prompt))
        FakeEngine.seen.append(("sampling", sampling))
        if progress is not None:
            progress(3, 3)
        words = WORDS
        if "echo" in self.model:
            words = [prompt]
        for index, word in enumerate(words):
            if index == 2 and "interrupt" in self.model:
                raise KeyboardInterrupt
            if index == 2 and "crash" in self.model:
                raise ZeroDivisionError("division by zero")
            if index == 2 and "memory" in self.model:
                raise MemoryError
            yield Event(index, 100 + index, word, "stop" if index == len(words) - 1 else None)
        while "endless" in self.model:
            time.sleep(0.01)
            yield Event(99, 99, "again and\n" if "lines" in self.model else " again")

    def chat(self, system: str | None = None) -> ChatSession:
        if not self.tokenizer.has_chat_template:
            raise TokenizerError("This model has no chat template, so it cannot chat.", "Use generate.")
        return ChatSession(self, system)

    def report(self) -> RunReport:
        return make_report()

    def __exit__(self, *_: object) -> None:
        FakeEngine.seen.append(("closed", self.model))


class ChatSession:
    def __init__(self, engine: FakeEngine, system: str | None = None) -> None:
        self.engine, self.system = engine, system
        self.turns = 0

    def reset(self) -> None:
        self.turns = 0

    def send(self, message: str, sampling: Any, *, progress: Any = None) -> Iterator[Event]:
        if message == "long":
            raise ContextError("The conversation is longer than the context.", "hint")
        self.turns += 1
        yield Event(0, 1, f"{self.turns}:{self.system or ''}:")
        yield Event(1, 2, message, "stop")
        while "endless" in self.engine.model:
            time.sleep(0.01)
            yield Event(2, 3, " again")


def load(model: str, *, need: Any = None, notify: Any = None, progress: Any = None, **options: Any) -> FakeEngine:
    FakeEngine.seen.append(("load", options))
    if "missing" in model:
        raise CheckpointNotFoundError(f"There is nothing at {model}.", "Check the path.")
    if "toobig" in model:
        raise BudgetError("The budget is too small: 300 MiB is the least.", "Give more.", least=300 * MiB)
    if notify is not None:
        notify("1000 MiB budget: 400 MiB of weights stay, 1.95 GiB stream, context 4096")
    for step in range(1, 5):
        if "slow" in model:
            time.sleep(0.2)
        if progress is not None:
            progress(step, 5, "loading")
    return FakeEngine(model)


def plan_only(model: str, run: Any) -> Plan:
    if "toobig" in model:
        raise BudgetError("The budget is too small: 300 MiB is the least.", "Give more.", least=300 * MiB)
    return Plan()


def inspect_model(model: str, revision: str | None = None) -> dict[str, Any]:
    return {
        "name": model, "path": f"/models/{model}", "kind": "gguf", "model_type": "llama", "parameters": 1_234_567,
        "weight_bytes": 2400 * MiB, "formats": {"Q8_0": 2300 * MiB, "F32": 100 * MiB}, "exactness": "exact",
        "config": {"num_hidden_layers": 8, "norm_eps": 1e-6, "rope": {"theta": 10000.0, "rope_type": "default"}},
        "parts": {"ffn": 1800 * MiB, "attention": 600 * MiB}, "streams_bytes": 2398 * MiB,
        "always_resident_bytes": 2 * MiB,
        "kv_bytes_per_token": 4096, "tokenizer": "49152 tokens", "chat_template": True, "eos_token_ids": [1, 2],
    }  # fmt: skip


def evaluate(model: str, text: str, run: Any, *, against: Any, max_tokens: Any, progress: Any) -> dict[str, Any]:
    progress(1, 2, "evaluating")
    found = {"tokens": len(text.split()), "context": 1024, "loss": 2.5, "perplexity": 12.5, "bits_per_byte": 1.1}
    found |= {"exactness": "exact", "peak": 900 * MiB, "budget": 1000 * MiB}
    return found | ({"mean_kl": float("nan"), "top1_agreement": 0.99} if against else {})


def profile(engine: FakeEngine, prompt: Any, sampling: Any, progress: Any, trace: Path | None) -> RunReport:
    for _ in engine.generate(prompt, sampling):
        progress(1, 2, "generating")
    return engine.report()


@dataclass(frozen=True)
class PlannedFile:
    name: str
    nbytes: int


@dataclass(frozen=True)
class BundlePlan:
    files: tuple[PlannedFile, ...] = (PlannedFile("trunk.safetensors", 5 * MiB),)
    total_bytes: int = 5 * MiB
    exactness: str = "exact"
    notes: tuple[str, ...] = ()


def bundle(model: str, out: Path, *, notify: Any = None, progress: Any = None, **options: Any) -> Path:
    FakeEngine.seen.append(("bundle", options))
    progress(1, 2, "trunk.safetensors")
    return Path(out)


def dry_run(model: str, **options: Any) -> BundlePlan:
    return BundlePlan()


def modules() -> dict[str, ModuleType]:
    """The stand-ins, by the name of what they stand for."""
    offers: dict[str, dict[str, Any]] = {
        "loading": {"load": load},
        "apps.bundling": {"bundle": bundle, "dry_run": dry_run},
        "kernels.warm": {"ensure_compiled": lambda notify: None},
        "apps.inspect": {"inspect_model": inspect_model},
        "apps.planning": {"plan_only": plan_only},
        "apps.evaluate": {"evaluate": evaluate},
        "apps.profile": {"profile": profile},
    }
    made = {}
    for name, values in offers.items():
        made[f"flashinfer_cli.{name}"] = module = ModuleType(f"flashinfer_cli.{name}")
        module.__dict__.update(values)
    return made


if __name__ == "__main__":
    import signal

    # A test run in the background has SIGINT ignored, and children inherit that: here it must mean Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules.update(modules())
    from flashinfer_cli.cli.main import main

    main()
