"""Plans and findings as tables of text. Draws nothing: console.py does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..config import RopeConfig, format_size
from ..report import label

if TYPE_CHECKING:
    from ..plan import MemoryPlan


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; columns stand right, except those that `left` numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    left: tuple[int, ...] = (0,)


def facts(title: str, pairs: Mapping[str, str]) -> Table:
    """Names and values, without a header."""
    return Table(title, ("", ""), list(pairs.items()), left=(0, 1))


def rate(bytes_per_second: float | None) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s" if bytes_per_second else "–"


def seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "–"


# ------------------------------------------------------------------ the plan


def plan_tables(plan: MemoryPlan) -> list[Table]:
    used = sum(part.planned for part in plan.parts)
    rows = [(part.part, format_size(part.planned), share(part.planned, plan.budget), part.note) for part in plan.parts]
    rows.append(("left over", format_size(plan.budget - used), share(plan.budget - used, plan.budget), ""))
    rows.append(("budget", format_size(plan.budget), "", f"the least that works is {format_size(plan.least)}"))
    streams = f"{format_size(plan.streamed_bytes)} stream from the drive" if plan.streamed_bytes else "nothing streams"
    weights = f"Weights: {format_size(plan.resident_bytes)} stay in memory, {streams}."
    return [
        Table("Memory plan", ("part", "planned", "of budget", ""), rows, notes=(weights,), left=(0, 3)),
    ]


def plan_dict(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as plain values, ready for JSON."""
    names = ("budget", "least", "context", "chunk", "resident_bytes", "streamed_bytes")
    parts = [{"part": part.part, "planned": part.planned, "note": part.note} for part in plan.parts]
    return {**{name: getattr(plan, name) for name in names}, "parts": parts}


# ------------------------------------------------------------------ a checkpoint

# What of the config people look for, in this order; the rest is in --json.
SHOWN = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "hidden_act", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "sliding_window", "tie_word_embeddings", "dtype",
)  # fmt: skip


def inspect_tables(found: Mapping[str, Any]) -> list[Table]:
    """What apps.inspect found."""
    config, weights = found["config"], found["weight_bytes"]
    model = {
        "path": str(found["path"]),
        "kind": f"{found['kind']}, {label(found['exactness'], found.get('quality'))}",
        "model_type": str(found["model_type"]),
        "parameters": f"{found['parameters']:,}",
        "weights": format_size(weights),
    }
    if found.get("sparsity_problem"):
        model["calibration"] = str(found["sparsity_problem"])
    architecture = {name: plain(config[name]) for name in SHOWN if name in config}
    rope, usual = config.get("rope"), asdict(RopeConfig())
    if rope:
        settings = {key: value for key, value in rope.items() if value != usual.get(key) or key == "rope_type"}
        architecture["rope"] = ", ".join(f"{key} {plain(value)}" for key, value in settings.items())
    if config.get("moe"):
        architecture["moe"] = ", ".join(f"{key} {plain(value)}" for key, value in config["moe"].items() if value)
    text = {
        "tokenizer": str(found["tokenizer"] or f"none: {found.get('tokenizer_problem', '')}"),
        "chat template": plain(found["chat_template"]),
        "end-of-text ids": plain(found.get("eos_token_ids", [])),
    }
    memory = {
        "can stream": format_size(found["streams_bytes"]),
        "always stays": format_size(found["always_resident_bytes"]),
        "keys and values": f"{format_size(found['kv_bytes_per_token'])} a token of context",
    }
    tables = [facts(str(found["name"]), model), facts("Architecture", architecture)]
    if found.get("sparsity"):
        tables.append(_sparsity(found["sparsity"]))
    sizes = [
        Table(
            title, ("", "size", "share"), [(name, format_size(n), share(n, weights)) for name, n in found[key].items()]
        )
        for title, key in (("Weights by part", "parts"), ("Weights by format", "formats"))
    ]
    return [*tables, *sizes, facts("Text", text), facts("Memory", memory)]


def _sparsity(found: Mapping[str, Any]) -> Table:
    """Of a calibrated bundle what its predictors do, over its layers."""
    ranks, recalls = ([f"{value:{form}}" for value in found[key]] for key, form in (("rank", ",d"), ("recall", ".1%")))
    pairs = {
        "runs": f"sparse, and {found['with_exact']} with --exact",
        "calibrated on": f"{found['tokens']:,} tokens",
        "predictors": f"{found['layers']:,} layers, {_range(ranks, 'rank ')}, {format_size(found['predictor_bytes'])}",
        "recall": f"{_range(recalls)} of the neurons that fire, by layer",
        "predicted": f"{found['predicted']:.1%} of the neurons for a token, where {found['density']:.1%} fire",
    }
    return facts("Neurons on demand", pairs)


def _range(ends: Sequence[str], before: str = "") -> str:
    return before + " to ".join(dict.fromkeys(ends))


def plain(value: Any) -> str:
    """A setting as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(each) for each in value) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------ an evaluation


def evaluation_table(found: Mapping[str, Any]) -> Table:
    """What apps.evaluate found."""
    rows = {
        "tokens scored": f"{found['tokens']:,} in windows of {found['context']}",
        "perplexity": f"{found['perplexity']:.4f}",
        "bits a byte": f"{found['bits_per_byte']:.4f}",
    }
    if "mean_kl" in found:
        rows["mean KL from dense"] = f"{found['mean_kl']:.3g} nats"
        rows["same first choice"] = f"{found['top1_agreement']:.2%}"
    if "expert_hits" in found:
        hits, misses = found["expert_hits"], found["expert_misses"]
        rows["experts"] = f"{share(hits, hits + misses)} hits, {misses:,} misses, token by token"
    rows["exactness"] = label(found["exactness"], found.get("quality"))
    rows["peak memory"] = f"{format_size(found['peak'])} of {format_size(found['budget'])}"
    return facts("", rows)
