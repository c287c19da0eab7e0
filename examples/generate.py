"""The Python API: load under a budget, stream an answer, look at what it cost.

python examples/generate.py MODEL "Why is the sky blue?" 1GiB
"""

from __future__ import annotations

import sys

import flashinfer_cli as fc


def main(model: str, question: str, memory: str) -> None:
    with fc.load(model, memory=memory, context=512) as engine:
        chat = engine.chat(system="You answer in one sentence.")
        for event in chat.send(question, fc.SamplingParams(max_tokens=64, temperature=0)):
            print(event.text, end="", flush=True)
        print("\n" + engine.report().summary(), file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
