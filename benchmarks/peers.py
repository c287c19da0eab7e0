"""python -m benchmarks.peers: this tool and what a user would take instead, side by side, under one memory cap.

Every system decodes the same random tokens with the same weights, alone, in a fresh memory cgroup of a share of the
weights' size, its files cold; memory-mapped peers run at Linux's own readahead (128 KB) and at this machine's, and the
better one counts (we read past the page cache, where readahead has no say). The bound is the larger of two times: bytes
that cannot stay under the cap over the drive's rate, and the weights that a token needs over the memory's rate; of a
mixture of experts, where what must be read hangs on what is asked for, bytes that were read. The drive's rate is taken
before and after each run, as others use it too.

    python -m benchmarks.peers --folder DIR [--models qwen-1.5b llama-3g] [--caps 0.5 0.25] [--systems ours llama.cpp]
                               [--kind BF16|Q8_0|Q4_0] [--peer-python PYTHON] [--repeat N] [--bundle CALIBRATED]
                               [--options JSON]

DIR keeps the checkpoints: synthetic ones are written there when first asked for, a real one is a Hugging Face folder
DIR/NAME. With --bundle the peers run the model as it is and we its calibrated bundle, which reads the neurons that
predictors name (LLM in a Flash): `--models arcee-relu-3g --kind F16 --bundle DIR/calibrated`. --peer-python is an
interpreter that has llama-cpp-python (or transformers and accelerate).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open

from . import cgroup, machine, synthetic
from .gguf_files import write

DEFAULT_READAHEAD = 128  # KB: Linux's own
QUANTIZED = {"Q8_0": "int8", "Q4_0": "int4"}  # the bundle that faces a GGUF of that kind
MOST = 0.96  # of the cap: what our budget may take, the rest being page cache and the kernel's own


def weight_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files)


def touched_share(source: Path) -> float:
    """Which share of a checkpoint's weights one token needs: all of them, but of experts as many as it chooses."""
    config = json.loads((source / "config.json").read_text())
    total = experts = 0
    for file in source.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                size = math.prod(tensors.get_slice(name).get_shape())
                total += size
                experts += size if ".experts." in name else 0
    if not experts:
        return 1.0
    chosen = config["num_experts_per_tok"] / (config.get("num_local_experts") or config["num_experts"])
    return 1 - experts / total * (1 - chosen)


def checkpoint(name: str, folder: Path) -> Path:
    """The folder of a model: DIR/NAME as it stands, or a synthetic one made there."""
    if (folder / name / "config.json").exists():
        return folder / name
    if name not in synthetic.MODELS:
        raise SystemExit(f"{folder / name} is not there, and no synthetic model is called {name}.")
    return synthetic.make(name, folder)


def our_file(source: Path, kind: str) -> Path:
    """What we run: the folder itself, or its bundle at the precision that faces `kind`."""
    if kind not in QUANTIZED:
        return source
    import flashinfer_cli as fc

    out = source.with_name(f"{source.name}-{QUANTIZED[kind]}")
    return (
        out if out.exists() else Path(fc.bundle(source, out, quantize=QUANTIZED[kind], quantize_trunk=QUANTIZED[kind]))
    )


def run(
    system: str,
    python: str,
    model: Path,
    cap: int | None,
    tokens: int,
    prompt: int,
    kb: int | None,
    most: float,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One run of one system; without a cap it has all the memory there is. `options` are for ours alone."""
    command = [python, "-m", "benchmarks.run_one", system, str(model), "--tokens", str(tokens), "--prompt", str(prompt)]
    limit = cap or 1 << 40
    if system == "ours" and cap is not None:
        command += ["--memory", str(int(most * cap))]
    if system == "llama.cpp" and cap is not None:
        options = {"repack": False}
    elif system != "ours":
        options = None
    if options:
        command += ["--options", json.dumps(options)]
    if system == "accelerate" and cap is not None:
        command += ["--memory", str(int(0.5 * cap))]  # it does not count its activations, nor what it reads in
    with cgroup.readahead(model, kb) as found:
        env = {"PYTHONPATH": str(Path(__file__).parents[1])}
        return cgroup.run_capped(command, limit, [model], env=env) | {"readahead_kb": found}


def trace_bound(bundle: Path, asked: dict[str, float], drive: float) -> dict[str, float]:
    """What the trace needs, at the drive's rates: neurons at that of requests of their size, slices at `drive`."""
    file = max(bundle.glob("neurons-*.safetensors"), key=lambda path: path.stat().st_size)
    scattered = machine.scattered_rate(file, round(asked["neuron_bytes"] / asked["neuron_requests"]))
    seconds = asked["neuron_bytes"] / scattered + asked["slice_bytes"] / drive
    return {"scattered_bytes_s": scattered, "trace_bound_tok_s": 1 / seconds}


def compare(
    name: str,
    folder: Path,
    caps: list[float],
    systems: list[str],
    kind: str,
    python: str,
    tokens: int,
    prompt: int,
    repeat: int,
    bundle: Path | None = None,
    most: float = MOST,
    options: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """All runs of one model, printed as they come."""
    source = checkpoint(name, folder)
    files = {"ours": bundle or our_file(source, kind), "accelerate": source}
    if "llama.cpp" in systems:
        files["llama.cpp"] = write(source, source.with_name(f"{name}-{kind}.gguf"), Kind[kind])
    threads = len(os.sched_getaffinity(0))
    memory, rows, touched = machine.memory_bandwidth(threads), [], touched_share(source)
    sample = next(iter(sorted(source.glob("*.safetensors"))))
    for share in caps:
        size = weight_bytes(files.get("llama.cpp", source))
        cap = None if share >= 1 else int(share * size)
        must = 0 if cap is None else size - cap
        print(
            f"\n{name} {kind}: {size / 1e9:.2f} GB, {'no cap' if cap is None else f'cap {cap / 1e9:.2f} GB'}; memory "
            f"{memory / 1e9:.1f} GB/s",
            flush=True,
        )
        drive = machine.drive_rate(sample)
        for system in systems * repeat:
            for kb in (None, DEFAULT_READAHEAD) if system == "llama.cpp" and cap is not None else (None,):
                row = {"model": name, "kind": kind, "cap": cap, "share": share, "system": system}
                try:
                    got = run(
                        system,
                        sys.executable if system == "ours" else python,
                        files[system],
                        cap,
                        tokens,
                        prompt,
                        kb,
                        most,
                        options,
                    )
                except cgroup.CappedError as error:
                    rows.append(row | {"error": str(error)})
                    print(f"  {system:10} {error}", flush=True)
                    continue
                before, drive = drive, machine.drive_rate(sample)
                rate = (before + drive) / 2
                asked = got.get("per_token", {})
                if asked.get("neuron_requests"):
                    row |= trace_bound(files[system], asked, rate)
                own = 1 / max(got["bytes_per_token"] / rate, touched * size / memory)
                bound = 1 / max(must / rate, size / memory) if touched == 1 else own
                rows.append(row | got | {"drive_bytes_s": rate, "bound_tok_s": bound})
                print(
                    f"  {system:10} readahead {got['readahead_kb']:>5} KB  {got['tok_s']:6.2f} tok/s  "
                    f"{got['bytes_per_token'] / 1e6:8.0f} MB a token  peak {got['peak_charge'] / 1e9:.2f} GB  "
                    f"drive {rate / 1e9:.2f} GB/s: bound {bound:.2f} tok/s, {got['tok_s'] / bound:4.0%} of it, "
                    f"{got['tok_s'] / own:4.0%} of what its own reads allow  prompt {got['prefill_tok_s']:.1f} tok/s",
                    flush=True,
                )
                if "trace_bound_tok_s" in row:
                    print(
                        f"  {'':10} {asked['neuron_requests']:.0f} reads of neurons a token, "
                        f"{asked['neuron_bytes'] / 1e6:.1f} MB, at {row['scattered_bytes_s'] / 1e6:.0f} MB/s for their "
                        f"size, and {asked['slice_bytes'] / 1e6:.1f} MB of slices: at most "
                        f"{row['trace_bound_tok_s']:.2f} tok/s, this is {got['tok_s'] / row['trace_bound_tok_s']:.0%}; "
                        f"waiting {got['wait_share']:.0%}, computing {got['compute_share']:.0%} of the time",
                        flush=True,
                    )
    return rows


def arguments(about: str | None, systems: list[str], *others: str) -> argparse.ArgumentParser:
    """What every comparison takes; `systems` run if none are named, `others` if they are."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["llama-3g"])
    parser.add_argument("--systems", nargs="+", default=systems, choices=[*systems, *others])
    parser.add_argument("--peer-python", default=sys.executable)
    return parser


def main() -> None:
    parser = arguments(__doc__, ["ours", "llama.cpp"], "accelerate")
    parser.add_argument("--caps", nargs="+", type=float, default=[0.5, 0.25], help="shares of the weights; 1 is no cap")
    parser.add_argument("--kind", default="BF16", choices=["BF16", "F16", "Q8_0", "Q4_0"])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--bundle", type=Path, help="what we run of the one model: a calibrated bundle, sparse")
    parser.add_argument("--budget", type=float, default=MOST, metavar="SHARE", help="our --memory, of the cap")
    parser.add_argument("--options", type=json.loads, metavar="JSON", help='of our runs: {"cache_bias": 0.4}')
    parser.add_argument("--repeat", type=int, default=1, help="runs of each system, in turns")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models:
        rows += compare(
            name,
            given.folder,
            given.caps,
            given.systems,
            given.kind,
            given.peer_python,
            given.tokens,
            given.prompt,
            given.repeat,
            given.bundle,
            given.budget,
            given.options,
        )
    machine.emit("peers", rows)


if __name__ == "__main__":
    main()
