"""Every option that more than one command takes, declared once: single ones, and dataclasses of them (`spread`).

Defaults are those of config.py; None means that the model or the machine decides.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import typer

from ..config import DEFAULT_CONTEXT, NEURON_WINDOW, RunConfig, SamplingParams
from ..zoo import DEFAULT as ZOO_DEFAULT
from ..zoo import PREFIX

MODEL, PROMPT, SAMPLING, MEMORY, OUTPUT = "Model", "Prompt", "Sampling", "Memory & device", "Output"
_OFFERS = SamplingParams().resolved()  # what holds when neither a flag nor the model says anything


def option(panel: str | None, names: str, help: str, **more: Any) -> Any:
    """A typer option from its line of usage, as in "-n --max-tokens N", in a panel of --help."""
    flags = [name for name in names.split() if name.startswith("-")]
    metavar = names.removeprefix(" ".join(flags)).strip() or None
    return typer.Option(*flags, metavar=metavar, rich_help_panel=panel, help=help, **more)


_model, _prompt, _sampling, _memory, _output = (
    partial(option, panel) for panel in (MODEL, PROMPT, SAMPLING, MEMORY, OUTPUT)
)

A_MODEL = "A Hugging Face folder, a .gguf file, a bundle, zoo:NAME, or org/name on the hub."

Model = Annotated[str, _model("-m --model MODEL", A_MODEL)]
OptionalModel = Annotated[str | None, _model("-m --model MODEL", A_MODEL, show_default=f"{PREFIX}{ZOO_DEFAULT}")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=A_MODEL)]
Revision = Annotated[str | None, _model("--revision REV", "Branch, tag or commit of an org/name.")]
File = Annotated[str | None, _prompt("-f --file FILE", "Read the text from FILE; - is stdin.")]
Json = Annotated[bool, _output("--json", "Write the result as one JSON object on stdout.")]
Quiet = Annotated[bool, _output("-q --quiet", "No progress, plan or figures; errors only.")]
Stats = Annotated[bool, _output("--stats", "End with the full table of figures, on stderr.")]
System = Annotated[str | None, _prompt("--system TEXT", "System message for the chat template.")]


@dataclass(frozen=True)
class RunOptions:
    """The part of RunConfig that people set."""

    memory: Annotated[
        str | None,
        _memory(
            "--memory SIZE",
            "Bound on the memory of the whole process: 4GiB, 1500M, 60%, or auto (most of what is free).",
            show_default="auto",
        ),
    ] = None
    device: Annotated[str, _memory("--device NAME", "Where to compute: auto, cpu, cuda, cuda:N, mps.")] = (
        RunConfig.device
    )
    stream: Annotated[
        Literal["auto", "always", "never"],
        _memory(
            "--stream", "auto keeps resident what fits; always streams all that can; never refuses what does not fit."
        ),
    ] = RunConfig.stream
    context: Annotated[
        int | None,
        _memory(
            "--context TOKENS",
            "Tokens that prompt and answer may take.",
            show_default=f"the model's own, at most {DEFAULT_CONTEXT}",
        ),
    ] = RunConfig.context
    kv_cache_type: Annotated[
        Literal["auto", "f32", "f16", "q8_0"],
        _memory(
            "--kv-cache-type",
            "How keys and values are kept: float32, float16 at half the memory, or blocks of int8 at 27% of it; auto "
            "is f16, or f32 where the weights are float32.",
        ),
    ] = RunConfig.kv_cache_type
    threads: Annotated[
        int | None,
        _memory("--threads N", "Threads that compute.", min=1, show_default="the cores this process may use"),
    ] = RunConfig.threads
    io_threads: Annotated[
        int | None,
        _memory(
            "--io-threads N",
            "Reads under way at once.",
            min=1,
            max=256,
            show_default="what serves the drive best, measured once",
        ),
    ] = RunConfig.io_threads
    remeasure: Annotated[bool, _memory("--remeasure", "Measure the drive again, and keep what is found.")] = (
        RunConfig.remeasure
    )
    draft: Annotated[
        str | None,
        _memory(
            "--draft MODEL",
            "What guesses ahead: a small model with the same tokenizer, ngram (the text itself) or self (what of "
            "the model is in memory). Changes the speed only.",
        ),
    ] = RunConfig.draft
    speculate: Annotated[
        str, _memory("--speculate N", "Tokens to draft at once: 1 to 16, auto by what drafting and checking cost, off.")
    ] = RunConfig.speculate
    draft_tree: Annotated[
        int,
        _memory(
            "--draft-tree N",
            "Check the draft's second guess too, at so many places at the front of a run.",
            min=0,
            max=16,
        ),
    ] = RunConfig.draft_tree
    exact: Annotated[
        bool, _memory("--exact", "Compute every neuron, also where calibration says which few matter.")
    ] = RunConfig.exact
    neuron_policy: Annotated[
        Literal["auto", "foresight", "recent", "window", "frequent"],
        _memory(
            "--neuron-policy",
            "Which neurons of a calibrated bundle stay: those that its predictors come nearest to naming (foresight, "
            "which auto is unless --window is given), those named last, all that the last tokens named (window), or "
            "those named most often.",
        ),
    ] = RunConfig.neuron_policy
    window: Annotated[
        int | None,
        _memory(
            "--window TOKENS",
            "Keep the neurons that so many last tokens named: sets --neuron-policy window, and goes with no other.",
            min=1,
            show_default=f"{NEURON_WINDOW} with --neuron-policy window",
        ),
    ] = RunConfig.window
    prefetch_neurons: Annotated[
        bool,
        _memory(
            "--prefetch-neurons/--no-prefetch-neurons",
            "Read the neurons that a layer will most surely need while its attention computes.",
            show_default="on",
        ),
    ] = RunConfig.prefetch_neurons
    expert_policy: Annotated[
        Literal["auto", "adaptive", "foresight", "lfu", "stale", "lru", "lru-layer", "pinned", "none"],
        _memory(
            "--expert-policy",
            "Which experts stay: those foreseen to be used, the most used of late (lfu), those by whichever of these "
            "two finds more (adaptive, which auto is unless routing is lossy), the least stale, the latest used (of "
            "all, or of each layer), those of the first layers, or none.",
        ),
    ] = RunConfig.expert_policy
    prefetch_experts: Annotated[
        str,
        _memory(
            "--prefetch-experts N",
            "Experts a layer to read ahead on a guess: auto (off where it loses), off, or how many.",
        ),
    ] = str(RunConfig.prefetch_experts)
    lookahead: Annotated[
        int | None,
        _memory(
            "--lookahead N", "Layers ahead to guess experts: 2 where memory takes many of them, else 1.", min=1, max=2
        ),
    ] = RunConfig.lookahead
    cache_bias: Annotated[
        float,
        _memory(
            "--cache-bias L",
            "Prefer experts that are in memory by so much of the router's range: fewer reads, other words.",
            min=0,
        ),
    ] = RunConfig.cache_bias
    cache_gap: Annotated[
        float,
        _memory(
            "--cache-gap G",
            "Let experts that are in memory stand in for others, as long as that takes at most G of a token's "
            "weights: fewer reads, other words. What cost a model of ours 0.9% in perplexity was 0.17 where half of "
            "the experts stay, and 0.15 where a quarter does.",
            min=0,
            max=1,
        ),
    ] = RunConfig.cache_gap
    keep_top: Annotated[
        int | None,
        _memory(
            "--keep-top J",
            "With --cache-bias or --cache-gap: the best J experts are chosen in any case.",
            min=0,
            show_default="1 where experts are few, else 2",
        ),
    ] = RunConfig.keep_top
    degrade: Annotated[
        float,
        _memory(
            "--degrade SHARE",
            "Experts that are not in memory and have less than SHARE of a token's weights are served from the "
            "small copies of a bundle made with --small-experts: fewer bytes, other words.",
            min=0,
            max=1,
        ),
    ] = RunConfig.degrade
    kernels: Annotated[
        Literal["auto", "compiled", "reference"],
        _memory(
            "--kernels",
            "auto takes the fastest for the device; compiled also for a small model that ran without so far; "
            "reference the plain torch ones.",
        ),
    ] = RunConfig.kernels
    revision: Revision = RunConfig.revision

    def config(self) -> RunConfig:
        return RunConfig(**self.given())

    def given(self) -> dict[str, Any]:
        """As keywords of `load`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class SamplingOptions:
    """The part of SamplingParams that people set; what is None is up to the model's generation_config."""

    max_tokens: Annotated[
        int | None, _sampling("-n --max-tokens N", "Most tokens to generate.", show_default=str(_OFFERS.max_tokens))
    ] = None
    temperature: Annotated[
        float | None, _sampling("--temp --temperature T", "0 is greedy.", show_default="the model's, else 0")
    ] = None
    top_k: Annotated[int | None, _sampling("--top-k K", "Sample from the K likeliest; 0 is off.")] = None
    top_p: Annotated[
        float | None, _sampling("--top-p P", "Sample from the likeliest that together reach P; 1 is off.")
    ] = None
    min_p: Annotated[
        float | None, _sampling("--min-p P", "Drop tokens less likely than P times the likeliest; 0 is off.")
    ] = None
    repeat_penalty: Annotated[
        float | None, _sampling("--repeat-penalty R", "Make recent tokens less likely; 1 is off.")
    ] = None
    seed: Annotated[int | None, _sampling("--seed N", "Same seed, same answer.", show_default="a new one")] = None
    stop: Annotated[list[str] | None, _sampling("--stop TEXT", "End before TEXT appears; may be repeated.")] = None
    ignore_eos: Annotated[bool, _sampling("--ignore-eos", "Go on past the model's end-of-text tokens.")] = (
        SamplingParams.ignore_eos
    )

    def params(self) -> SamplingParams:
        return SamplingParams(**{**dataclasses.asdict(self), "stop": tuple(self.stop or ())})


@dataclass(frozen=True)
class PromptOptions:
    """Where the prompt comes from and how it is wrapped."""

    prompt: Annotated[
        str | None,
        _prompt("-p --prompt TEXT", "The prompt. Text piped to stdin follows it after a blank line, or stands alone."),
    ] = None
    file: File = None
    system: System = None
    raw: Annotated[bool, _prompt("--raw", "Continue the text as it is, without the chat template.")] = False
