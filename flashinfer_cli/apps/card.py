"""What a trained model is and does: measured on held-out text, written as a card beside it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import SamplingParams
from ..training import data
from ..training.loop import Training
from ..training.model import Aux, Decoder
from ..training.ngram import NGram
from ..training.objective import held_out_nats

PROMPTS = ("Once upon a time", "One day, a little girl named Lily", "The dog was very sad because")
SAMPLE_TOKENS = 120


def measure(training: Training) -> dict[str, Any]:
    """Losses in bits per byte of the held-out text, and what the structure of the model does there.

    The model is judged as it is saved, in bfloat16, and as it decodes: causally.
    """
    model, corpus = training.model, training.corpus
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    windows = corpus.held_out

    def bits(nats: float) -> float:
        return nats / math.log(2) / corpus.held_out_bytes

    nats, aux = held_out_nats(model, windows)
    stream = data.encode(corpus.tokenizer, corpus.held_out_documents)
    ngram = NGram(corpus.train.stream, model.shape.vocab_size).nats(stream)
    found: dict[str, Any] = {"bits_per_byte": bits(nats), "bits_per_byte_4gram": bits(ngram)}
    if aux.active and len(aux.active[0]):
        active = torch.stack(aux.active).mean(0)
        found["sparsity"] = [1 - float(a) for a in active]
    if aux.chosen and len(aux.chosen[0]):
        found["experts"] = _experts(model, aux)
    if model.shape.mod_capacity:
        found["depth"] = _depth(model, windows, bits)
    return found


def _experts(model: Decoder, aux: Aux) -> dict[str, Any]:
    """How evenly experts are used: shares of all choices by layer."""
    chosen = torch.stack(aux.chosen).sum(0)
    shares = chosen / chosen.sum(-1, keepdim=True)
    return {
        "use": [[round(float(s), 4) for s in layer] for layer in shares],
        "max_over_mean": [float(layer.max() / layer.mean()) for layer in shares],
        "coefficient_of_variation": [float(layer.std(correction=0) / layer.mean()) for layer in shares],
    }


def _depth(model: Decoder, windows: list[torch.Tensor], bits: Any) -> dict[str, Any]:
    """Both causal ways of deciding, beside the top-k that no decoder can make."""
    found: dict[str, Any] = {"decoding": model.shape.mod_decoding}
    shape = model.shape
    blocks = [block for block in model.layers if hasattr(block, "mod_router")]
    for way in ("router", "predictor"):
        for block in blocks:
            block.shape = replace(shape, mod_decoding=way)  # type: ignore[assignment]
        nats, aux = held_out_nats(model, windows)
        skipped = 1 - torch.stack(aux.computed).mean(0)
        found[way] = {"bits_per_byte": bits(nats), "skipped": [float(s) for s in skipped]}
    for block in blocks:
        block.shape = shape  # type: ignore[assignment]
    nats, agreements = 0.0, []
    model.eval()
    with torch.no_grad():
        for batch in windows:
            logits, aux = model(batch[:, :-1])
            nats += float(torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))  # fmt: skip
            agreements.append((torch.stack(aux.router_agreement), torch.stack(aux.predictor_agreement)))
    found["top_k"] = {"bits_per_byte": bits(nats), "skipped": 1 - shape.mod_capacity}
    for index, way in enumerate(("router", "predictor")):
        found[way]["agreement"] = float(torch.stack([a[index] for a in agreements]).mean())
    return found


def samples(model: Path) -> list[dict[str, str]]:
    """Stories from the folder, through the runtime."""
    from ..loading import load

    params = SamplingParams(max_tokens=SAMPLE_TOKENS, seed=1)
    with load(model) as engine:
        return [
            {"prompt": prompt, "text": "".join(event.text for event in engine.generate(prompt, params))}
            for prompt in PROMPTS
        ]


def describe(training: Training, texts: Sequence[Path], command: str, note: str | None) -> dict[str, Any]:
    """Where the model comes from."""
    recipe, corpus = training.recipe, training.corpus
    history = training.history()
    return {
        "name": recipe.name,
        "about": recipe.about,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "data": [{"file": t.name, "sha256": hashlib.sha256(t.read_bytes()).hexdigest()} for t in texts],
        "documents": {"trained": corpus.documents, "held_out": len(corpus.held_out_documents)},
        "tokens_of_text": corpus.tokens,
        "note": note,
        "recipe": asdict(recipe),
        "command": command,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "hours": training.seconds / 3600,
        "torch": torch.__version__,
        "final_training_loss": float(np.mean([row["loss"] for row in history[-100:]])),
    }


def write_card(card: dict[str, Any], out: Path) -> None:
    """card.json for programs, README.md for people."""
    (out / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "README.md").write_text(markdown(card), encoding="utf-8")


def markdown(card: dict[str, Any]) -> str:
    """The card as a page."""
    files = ", ".join(f"`{file['file']}`" for file in card["data"])
    shape = {k: v for k, v in card["recipe"]["shape"].items() if v}
    recipe = {k: v for k, v in card["recipe"].items() if k not in ("shape", "name", "about") and v}
    lines = [
        f"# {card['name']}",
        "",
        f"A small language model of simple English stories: {card['about']}. {card['parameters']:,} parameters in "
        "bfloat16. It tells little stories and knows nothing else.",
        "",
        f"- **Held-out loss**: {card['bits_per_byte']:.3f} bits per byte, decided as at decoding; an interpolated "
        f"Kneser-Ney 4-gram of the same tokens has {card['bits_per_byte_4gram']:.3f}.",
        f"- **Data**: {files}; {card['documents']['trained']:,} documents to train on, "
        f"{card['documents']['held_out']} held out (one in 32, by hash). {card['note'] or ''}".rstrip(),
        f"- **Training**: {card['steps']:,} steps, {card['hours']:.2f} hours, seed {card['seed']}, torch "
        f"{card['torch']}, bf16 autocast on the CPU.",
        f"- **Command**: `{card['command']}`",
        f"- **Shape**: {', '.join(f'{k} {v}' for k, v in shape.items())}",
        f"- **Recipe**: {', '.join(f'{k} {v}' for k, v in recipe.items())}",
    ]
    if "sparsity" in card:
        by_layer = ", ".join(f"{s:.1%}" for s in card["sparsity"])
        mean = sum(card["sparsity"]) / len(card["sparsity"])
        lines.append(f"- **Natural sparsity** of the FFN by layer: {by_layer}; {mean:.1%} on average.")
    if "experts" in card:
        most = ", ".join(f"{m:.2f}" for m in card["experts"]["max_over_mean"])
        lines.append(f"- **Expert use**, the busiest over the mean, by layer: {most}.")
    if "depth" in card:
        depth = card["depth"]
        lines.append("- **Deciding who computes a block** (this folder decodes with the " + depth["decoding"] + "):")
        for way in ("router", "predictor"):
            skipped = ", ".join(f"{s:.1%}" for s in depth[way]["skipped"])
            lines.append(
                f"  - {way}: {depth[way]['bits_per_byte']:.3f} bits per byte, skipped by block {skipped}, agrees with "
                f"the top-k for {depth[way]['agreement']:.1%} of tokens"
            )
        lines.append(
            f"  - top-k of the whole sequence, not causal: {depth['top_k']['bits_per_byte']:.3f} bits per byte"
        )
    lines += ["", "## Samples", "", "Temperature and top-p of generation_config.json, seed 1, the prompt in bold.", ""]
    for sample in card["samples"]:
        text = sample["text"].strip("\n").replace("\n", "\n> ")
        space = " " if sample["text"][:1].isspace() else ""
        lines += [f"> **{sample['prompt']}**{space}{text.lstrip()}", ""]
    return "\n".join(lines).rstrip() + "\n"
