"""What calibration adds to a bundle of a mixture of experts: maps from one layer's hidden state to routing to come.

    ahead.safetensors   S.L.weight [E, d] and S.L.bias [E], float16: from the input of layer S's FFN (-1: the embedding,
                        normed as the first FFN's input is) to the logits of layer L's router; where S is L, to the
                        uses of each expert of L by the tokens that follow, discounted by how far off they are

Only maps that guess better than the router itself, applied as 2312.17238 does, are there. The header's metadata has the
SHA-256 of the manifest that they were made for, and what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..bundles.sparsity import manifest_digest
from ..errors import BundleError

AHEAD_FILE = "ahead.safetensors"
Pair = tuple[int, int]  # layer of the hidden state, layer that is guessed
Maps = Mapping[Pair, tuple[torch.Tensor, torch.Tensor]]  # weight [E, d], bias [E]


@dataclass(frozen=True)
class Recall:
    """Of one pair of layers, on held-out tokens: the share of the chosen experts among as many guesses. A layer with
    itself stands for the next token's choice, which its own router guesses to be that of now."""

    source: int
    layer: int
    router: float  # the layer's own router on the hidden state
    probe: float  # the trained map
    chance: float

    @property
    def better(self) -> bool:
        return self.probe > self.router


def write_ahead(bundle: Path, maps: Maps, found: list[Recall], tokens: int) -> None:
    """Write what was learned, in one step. The bundle's other files stay as they are."""
    tensors = {}
    for (source, layer), (weight, bias) in maps.items():
        tensors[f"{source}.{layer}.weight"] = weight.half().contiguous()
        tensors[f"{source}.{layer}.bias"] = bias.half().contiguous()
    about = {"manifest": manifest_digest(bundle), "tokens": str(tokens),
             "recall": json.dumps([asdict(each) for each in found])}  # fmt: skip
    save_file(tensors, bundle / f"{AHEAD_FILE}.tmp", about)
    (bundle / f"{AHEAD_FILE}.tmp").replace(bundle / AHEAD_FILE)


def read_ahead(bundle: Path) -> dict[Pair, tuple[torch.Tensor, torch.Tensor]]:
    """The maps as float32; none where the bundle was never calibrated. Raises BundleError for a damaged file, or one of
    another bundle."""
    file, again = bundle / AHEAD_FILE, "Calibrate the bundle again: genai-run calibrate BUNDLE."
    if not file.is_file():
        return {}
    found: dict[Pair, tuple[torch.Tensor, torch.Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            if (tensors.metadata() or {}).get("manifest") != manifest_digest(bundle):
                raise BundleError(f"{file} was made for another bundle.", again)
            for name in tensors.keys():  # noqa: SIM118
                source, layer, kind = name.rsplit(".", 2)
                if kind == "weight":
                    bias = tensors.get_tensor(f"{source}.{layer}.bias")
                    found[int(source), int(layer)] = tensors.get_tensor(name).float(), bias.float()
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read: {error}.", again) from None
    return found
