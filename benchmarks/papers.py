"""Figures of the papers, ours beside theirs: `python -m benchmarks.papers NAME [OPTIONS]`, and `--list` for the names.

Each name is a module of this folder with a `main(arguments)`. It prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import importlib
import sys

# name: (module, what it shows, where it was published)
FIGURES: dict[str, tuple[str, str, str]] = {
    "flash-ladder": (
        "flash_ladder",
        "bytes and time a token as the parts come in",
        "2312.11514",
    ),
    "flash-window": ("flash_window", "new neurons a token against the window that keeps them", "2312.11514"),
    "flash-friends": ("flash_friends", "each neuron beside a copy of its closest friend, and a hot set", "2312.11514"),
    "flash-resident": ("flash_resident", "computing every resident neuron beside the active ones alone", "2312.11514"),
    "experts": ("experts", "what an expert cache and guesses ahead find and earn", "2312.17238"),
    "speculative": ("speculative", "what drafts bring where weights stream", "2211.17192"),
    "moe-losses": ("moe_losses", "what the importance and load losses do to balance and perplexity", "1701.06538"),
    "moe-experts": ("moe_experts", "perplexity against the number of experts at equal compute", "1701.06538"),
    "mod": ("mod", "Mixture-of-Depths beside dense models of equal compute, and what it skips", "2404.02258"),
    "gqa": ("gqa", "mean, first and random conversion of heads, before and after uptraining", "2305.13245"),
    "mqa": ("mqa", "KV bytes and time a token against key/value heads and context", "1911.02150"),
    "tune": ("tune", "instruction tuning with the router, the experts or nothing frozen", "2305.14705"),
    "follow": ("follow", "how often a small instruct model does what it is asked", "2305.14705"),
}


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--list"]:
        width = max(map(len, FIGURES))
        print("\n".join(f"{name:{width}}  {shows} ({paper})" for name, (_, shows, paper) in FIGURES.items()))
        return 0
    if not arguments or arguments[0] not in FIGURES:
        print(f"usage: python -m benchmarks.papers {{{','.join(FIGURES)}}} [OPTIONS] | --list", file=sys.stderr)
        return 2
    importlib.import_module(f"benchmarks.{FIGURES[arguments[0]][0]}").main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
