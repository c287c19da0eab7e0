"""One system, one model, one process: decode given tokens and print what it cost, as JSON. `benchmarks.peers` calls it.

python -m benchmarks.run_one SYSTEM MODEL [--tokens N] [--prompt N] [--memory BYTES] [--options JSON]

Tokens are random and the same for every system, since greedy text of random weights may loop, and a loop needs fewer
weights than speech. The first decoded token is left out of the rate: it still warms caches. Bytes read are those the
kernel counts for the process, page faults included.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def bytes_read() -> int:
    """Bytes this process has caused to be read from a disk."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def timed(
    prefill: Callable[[list[int]], None], step: Callable[[int], None], prompt: int, tokens: int
) -> dict[str, Any]:
    """Run the tokens through; rates of what follows the first decoded token."""
    draw = random.Random(7)
    ids = [draw.randrange(3, 30000) for _ in range(prompt + tokens)]
    begin, read = time.perf_counter(), bytes_read()
    prefill(ids[:prompt])
    first, prefill_read = time.perf_counter() - begin, bytes_read() - read
    step(ids[prompt])
    begin, read = time.perf_counter(), bytes_read()
    for token in ids[prompt + 1 :]:
        step(token)
    seconds, read = time.perf_counter() - begin, bytes_read() - read
    return {
        "prefill_s": first,
        "prefill_tok_s": prompt / first,
        "prefill_bytes": prefill_read,
        "tok_s": (tokens - 1) / seconds,
        "bytes_per_token": read / (tokens - 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def ours(model: str, prompt: int, tokens: int, memory: int | None, threads: int, **options: Any) -> dict[str, Any]:
    import flashinfer_cli as fc

    with fc.load(model, memory=memory, context=prompt + tokens, threads=threads, **options) as engine:
        session = engine.session()
        left = tokens

        def step(token: int) -> None:
            nonlocal left
            left -= 1
            session.step(token, more=left > 0)

        found = timed(lambda ids: (session.prefill(ids, more=True), None)[1], step, prompt, tokens)
        report = engine.report()
        asked = [row for row in report.experts if row["phase"] == "decode"]
        hits = sum(row["hits"] for row in asked) if asked else report.decode.hits
        misses = sum(row["misses"] for row in asked) if asked else report.decode.misses
        decoded = [io for io in report.io if io["phase"] == "decode"]
        per_token = {
            f"{kind}_{what}": sum(io[what] for io in decoded if io["kind"] == kind) / tokens
            for kind in ("slice", "neuron")
            for what in ("bytes", "useful", "requests")
        }
        return found | {
            "exactness": report.exactness,
            "per_token": per_token,
            "wait_share": report.decode.wait_seconds / report.decode.seconds,
            "hit_ratio": hits / max(1, hits + misses),  # of experts where there are such, else of slices and neurons
            "budget": report.budget,
            "chunk": engine.plan.chunk,
            "peak_bytes": report.peak,
            "read_GB_s": report.decode.read_bytes_per_second / 1e9,
            "hidden": report.decode.overlap,
            "compute_share": report.decode.compute_seconds / report.decode.seconds,
        }


def llama_cpp(
    model: str, prompt: int, tokens: int, memory: int | None, threads: int, repack: bool = True
) -> dict[str, Any]:
    """Without `repack` blocks are computed on as they stand in the file; else llama.cpp copies them, and is killed
    where they do not fit."""
    import ctypes

    import llama_cpp.llama_cpp as library
    from llama_cpp import Llama

    if not repack:
        defaults = library.llama_model_default_params

        def plain() -> Any:
            params = defaults()
            params.use_extra_bufts = ctypes.c_bool(False)
            return params

        library.llama_model_default_params = plain

    llama = Llama(
        model, n_ctx=prompt + tokens + 8, n_threads=threads, n_threads_batch=threads, use_mmap=True, verbose=False
    )
    return timed(llama.eval, lambda token: llama.eval([token]), prompt, tokens)


def accelerate(model: str, prompt: int, tokens: int, memory: int | None, threads: int) -> dict[str, Any]:
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=Path(model).parent) as folder, torch.inference_mode():
        limit = None if memory is None else {"cpu": memory}
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", device_map="auto", max_memory=limit, offload_folder=folder
        )
        cache: Any = None

        def run(ids: list[int]) -> None:
            nonlocal cache
            cache = loaded(torch.tensor([ids]), past_key_values=cache, use_cache=True).past_key_values

        return timed(run, lambda token: run([token]), prompt, tokens)


SYSTEMS = {"ours": ours, "llama.cpp": llama_cpp, "accelerate": accelerate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=list(SYSTEMS))
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", type=json.loads, default={}, help='of the run, as JSON: {"cache_bias": 0.4}')
    given = parser.parse_args()
    call = SYSTEMS[given.system]
    found = call(given.model, given.prompt, given.tokens, given.memory, given.threads, **given.options)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
