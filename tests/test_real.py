"""Real trained models against transformers on the same weights, and real budgets. Needs GENAI_RUN_MODELS, a folder of
models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flashinfer_cli as fc

pytestmark = pytest.mark.real
FOLDER = Path(os.environ.get("GENAI_RUN_MODELS", "/nonexistent"))
MODELS = sorted(FOLDER.glob("*.gguf")) + sorted(FOLDER.glob("*-hf"))
PROMPTS = [
    "The capital of France is",
    "def quicksort(items):\n",
    "Once upon a time there was a little fox who",
    "Q: What is 17 + 25?\nA:",
    "Les enfants jouaient dans le jardin, et 猫 slept: 🐈",
]
TOKENS = 64


def reference(path: Path) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.skipif(not MODELS, reason="GENAI_RUN_MODELS names no folder with models")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_greedy_tokens_equal_transformers(path: Path) -> None:
    with fc.load(path) as engine:
        prompts = [engine.tokenizer.encode(p) for p in PROMPTS]
        greedy = fc.SamplingParams(max_tokens=TOKENS, temperature=0, repeat_penalty=1.0, ignore_eos=True)
        ours = [[event.token_id for event in engine.generate(ids, greedy)] for ids in prompts]
    hf = reference(path)
    for ids, mine in zip(prompts, ours, strict=True):
        with torch.no_grad():
            logits = hf(torch.tensor([ids + mine])).logits[0, len(ids) - 1 : -1].float()
        top = logits.topk(2, dim=-1)
        theirs = top.indices[:, 0].tolist()
        gap = (top.values[:, 0] - top.values[:, 1]).tolist()
        different = [(i, a, b, gap[i]) for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
        assert not different, different


@pytest.mark.skipif(not MODELS, reason="GENAI_RUN_MODELS names no folder with models")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_least_budget_gives_the_same_tokens_within_the_budget(path: Path) -> None:
    """At the least budget, and halfway to everything: the same text as resident, and never more memory than said."""

    def run(*flags: str) -> tuple[int, dict[str, Any], str]:
        command = [sys.executable, "-m", "flashinfer_cli", "generate", "-m", str(path), "--raw", "-p", PROMPTS[2]]
        done = subprocess.run(
            [*command, "-n", "8", "--temp", "0", "--json", "--context", "64", *flags],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, json.loads(done.stdout) if done.returncode == 0 else {}, done.stderr

    code, resident, errors = run("--stream", "never")
    assert code == 0, errors
    code, _, errors = run("--memory", "1MiB")
    assert code == 2
    least = int(errors.split("(")[1].split("MiB")[0]) + 24
    middle = (least + resident["report"]["peak"] // 2**20) // 2
    for budget in (least, middle):
        code, found, errors = run("--memory", f"{budget}MiB")
        assert code == 0, errors
        assert found["token_ids"] == resident["token_ids"]
        assert found["report"]["peak"] <= found["report"]["budget"]
