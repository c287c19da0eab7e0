"""Every option, declared once: dataclasses of typer options, and `spread`, which lets a command take them whole.

Defaults are those of config.py; None means that the model or the machine decides.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import typer

from ..config import DEFAULT_CONTEXT, RunConfig, SamplingParams
from ..zoo import DEFAULT as ZOO_DEFAULT
from ..zoo import PREFIX

MODEL, PROMPT, SAMPLING, MEMORY, OUTPUT = "Model", "Prompt", "Sampling", "Memory & device", "Output"
_OFFERS = SamplingParams().resolved()  # what holds when neither a flag nor the model says anything

A_MODEL = "A Hugging Face folder, a .gguf file, a bundle, zoo:NAME, or org/name on the hub."

Model = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        rich_help_panel=MODEL,
        help=A_MODEL,
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        rich_help_panel=MODEL,
        help=A_MODEL,
        show_default=f"{PREFIX}{ZOO_DEFAULT}",
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=A_MODEL),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", rich_help_panel=MODEL, help="Branch, tag or commit of an org/name."),
]
File = Annotated[
    str | None,
    typer.Option("-f", "--file", metavar="FILE", rich_help_panel=PROMPT, help="Read the text from FILE; - is stdin."),
]
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Write the result as one JSON object on stdout.")
]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", rich_help_panel=OUTPUT, help="No progress, plan or figures; errors only.")
]
Stats = Annotated[
    bool, typer.Option("--stats", rich_help_panel=OUTPUT, help="End with the full table of figures, on stderr.")
]
System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", rich_help_panel=PROMPT, help="System message for the chat template."),
]


@dataclass(frozen=True)
class RunOptions:
    """The part of RunConfig that people set."""

    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            rich_help_panel=MEMORY,
            help="Bound on the memory of the whole process: 4GiB, 1500M, 60%, or auto (most of what is free).",
            show_default="auto",
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="NAME", rich_help_panel=MEMORY, help="Where to compute: auto, cpu, cuda, cuda:N, mps."
        ),
    ] = RunConfig.device
    stream: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(
            "--stream",
            rich_help_panel=MEMORY,
            help="auto keeps resident what fits; always streams all that can; never refuses what does not fit.",
        ),
    ] = RunConfig.stream
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="TOKENS",
            rich_help_panel=MEMORY,
            help="Tokens that prompt and answer may take.",
            show_default=f"the model's own, at most {DEFAULT_CONTEXT}",
        ),
    ] = RunConfig.context
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            metavar="N",
            rich_help_panel=MEMORY,
            help="Threads that compute.",
            show_default="the cores this process may use",
        ),
    ] = RunConfig.threads
    io_threads: Annotated[
        int | None,
        typer.Option(
            "--io-threads",
            min=1,
            max=256,
            metavar="N",
            rich_help_panel=MEMORY,
            help="Reads under way at once.",
            show_default="what serves the drive best, measured once",
        ),
    ] = RunConfig.io_threads
    remeasure: Annotated[
        bool,
        typer.Option("--remeasure", rich_help_panel=MEMORY, help="Measure the drive again, and keep what is found."),
    ] = RunConfig.remeasure
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            metavar="MODEL",
            rich_help_panel=MEMORY,
            help="What guesses ahead: a small model with the same tokenizer, ngram (the text itself) or self (what of "
            "the model is in memory). Changes the speed only.",
        ),
    ] = RunConfig.draft
    speculate: Annotated[
        str,
        typer.Option(
            "--speculate",
            metavar="N",
            rich_help_panel=MEMORY,
            help="Tokens to draft at once: 1 to 16, auto by what drafting and checking cost, off.",
        ),
    ] = RunConfig.speculate
    draft_tree: Annotated[
        int,
        typer.Option(
            "--draft-tree",
            min=0,
            max=16,
            metavar="N",
            rich_help_panel=MEMORY,
            help="Check the draft's second guess too, at so many places at the front of a run.",
        ),
    ] = RunConfig.draft_tree
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            rich_help_panel=MEMORY,
            help="Compute every neuron, also where calibration says which few matter.",
        ),
    ] = RunConfig.exact
    neuron_policy: Annotated[
        Literal["recent", "window", "frequent"],
        typer.Option("--neuron-policy", rich_help_panel=MEMORY, help="Which neurons of a calibrated bundle stay."),
    ] = RunConfig.neuron_policy
    window: Annotated[
        int,
        typer.Option(
            "--window", min=1, metavar="TOKENS", rich_help_panel=MEMORY, help="Tokens that the policy window spans."
        ),
    ] = RunConfig.window
    prefetch_neurons: Annotated[
        bool,
        typer.Option(
            "--prefetch-neurons",
            rich_help_panel=MEMORY,
            help="Read ahead which neurons the next layer will need, as guessed from this layer's input.",
        ),
    ] = RunConfig.prefetch_neurons
    expert_policy: Annotated[
        Literal["auto", "foresight", "lfu", "stale", "lru", "lru-layer", "pinned", "none"],
        typer.Option(
            "--expert-policy",
            rich_help_panel=MEMORY,
            help="Which experts stay: those foreseen to be used (calibrated bundles), the most used of late, the least "
            "stale, the latest used (of all, or of each layer), those of the first layers, or none.",
        ),
    ] = RunConfig.expert_policy
    prefetch_experts: Annotated[
        str,
        typer.Option(
            "--prefetch-experts",
            metavar="N",
            rich_help_panel=MEMORY,
            help="Experts a layer to read ahead on a guess: auto (off where it loses), off, or how many.",
        ),
    ] = str(RunConfig.prefetch_experts)
    lookahead: Annotated[
        int | None,
        typer.Option(
            "--lookahead",
            min=1,
            max=2,
            metavar="N",
            rich_help_panel=MEMORY,
            help="Layers ahead to guess experts: 2 where memory takes many of them, else 1.",
        ),
    ] = RunConfig.lookahead
    cache_bias: Annotated[
        float,
        typer.Option(
            "--cache-bias",
            min=0,
            metavar="L",
            rich_help_panel=MEMORY,
            help="Prefer experts that are in memory by so much of the router's range: fewer reads, other words.",
        ),
    ] = RunConfig.cache_bias
    cache_gap: Annotated[
        float,
        typer.Option(
            "--cache-gap",
            min=0,
            max=1,
            metavar="G",
            rich_help_panel=MEMORY,
            help="Let experts that are in memory stand in for others, as long as that takes at most G of a token's "
            "weights: fewer reads, other words. 0.2 cost a model of ours 0.9 to 1.4% in perplexity.",
        ),
    ] = RunConfig.cache_gap
    keep_top: Annotated[
        int | None,
        typer.Option(
            "--keep-top",
            min=0,
            metavar="J",
            rich_help_panel=MEMORY,
            help="With --cache-bias or --cache-gap: the best J experts are chosen in any case.",
            show_default="1 where experts are few, else 2",
        ),
    ] = RunConfig.keep_top
    degrade: Annotated[
        float,
        typer.Option(
            "--degrade",
            min=0,
            max=1,
            metavar="SHARE",
            rich_help_panel=MEMORY,
            help="Experts that are not in memory and have less than SHARE of a token's weights are served from the "
            "small copies of a bundle made with --small-experts: fewer bytes, other words.",
        ),
    ] = RunConfig.degrade
    kernels: Annotated[
        Literal["auto", "compiled", "reference"],
        typer.Option(
            "--kernels",
            rich_help_panel=MEMORY,
            help="auto takes the fastest for the device; compiled also for a small model that ran without so far; "
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
        int | None,
        typer.Option(
            "-n",
            "--max-tokens",
            metavar="N",
            rich_help_panel=SAMPLING,
            help="Most tokens to generate.",
            show_default=str(_OFFERS.max_tokens),
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temp",
            "--temperature",
            metavar="T",
            rich_help_panel=SAMPLING,
            help="0 is greedy.",
            show_default="the model's, else 0",
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", metavar="K", rich_help_panel=SAMPLING, help="Sample from the K likeliest; 0 is off."),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="P",
            rich_help_panel=SAMPLING,
            help="Sample from the likeliest that together reach P; 1 is off.",
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            metavar="P",
            rich_help_panel=SAMPLING,
            help="Drop tokens less likely than P times the likeliest; 0 is off.",
        ),
    ] = None
    repeat_penalty: Annotated[
        float | None,
        typer.Option(
            "--repeat-penalty",
            metavar="R",
            rich_help_panel=SAMPLING,
            help="Make recent tokens less likely; 1 is off.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            rich_help_panel=SAMPLING,
            help="Same seed, same answer.",
            show_default="a new one",
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", metavar="TEXT", rich_help_panel=SAMPLING, help="End before TEXT appears; may be repeated."
        ),
    ] = None
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", rich_help_panel=SAMPLING, help="Go on past the model's end-of-text tokens."),
    ] = SamplingParams.ignore_eos

    def params(self) -> SamplingParams:
        return SamplingParams(**{**dataclasses.asdict(self), "stop": tuple(self.stop or ())})


@dataclass(frozen=True)
class PromptOptions:
    """Where the prompt comes from and how it is wrapped."""

    prompt: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--prompt",
            metavar="TEXT",
            rich_help_panel=PROMPT,
            help="The prompt. Text piped to stdin follows it after a blank line, or stands alone.",
        ),
    ] = None
    file: File = None
    system: System = None
    raw: Annotated[
        bool,
        typer.Option("--raw", rich_help_panel=PROMPT, help="Continue the text as it is, without the chat template."),
    ] = False


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it: parameters that are dataclasses of options replaced by their fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            groups[name] = hint
            inner = get_type_hints(hint, include_extras=True)
            flat += [_keyword(field.name, inner[field.name], field.default) for field in dataclasses.fields(hint)]
        else:
            flat.append(_keyword(name, hint, parameter.default))

    @functools.wraps(command)
    def taken(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        command(**values)

    paragraphs = (command.__doc__ or "").split("\n\n")
    taken.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)  # the terminal wraps anew
    del taken.__wrapped__  # else typer would look past the new signature
    taken.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    taken.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return taken


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    empty = default is dataclasses.MISSING or default is inspect.Parameter.empty
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if empty else default,
        annotation=annotation,
    )
