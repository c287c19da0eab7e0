"""What calibration adds to a bundle: a predictor a layer, and what was measured. Files beside the manifest's.

    predictors.safetensors   layers.N.a.FORMAT and layers.N.b.FORMAT, rows in blocks of 8 or 4 bits, and layers.N.bias
                             [d_ff] in float32: see `models.predictors`
    order.safetensors        N int32 [d_ff], an order in which neurons of layer N that fire together stand together
    sparsity.json            by layer rank, recall, precision, density; for the model its quality; written last

sparsity.json holds the SHA-256 of the manifest it was made for, so that a bundle made anew does not run with the
predictors of another.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BundleError
from .format import MANIFEST_FILE

PREDICTORS_FILE, ORDER_FILE, SPARSITY_FILE = "predictors.safetensors", "order.safetensors", "sparsity.json"
_AGAIN = "Calibrate the bundle again: genai-run calibrate BUNDLE."


@dataclass(frozen=True)
class LayerSparsity:
    """Of one layer, on tokens held out of the predictor's training. Shares of its neurons, but for rank and bytes."""

    layer: int
    rank: int
    bytes: int  # of the predictor
    density: float  # neurons that fire for a token
    predicted: float  # neurons predicted to
    recall: float  # of those that fire, how many are predicted
    precision: float  # of those predicted, how many fire
    new: dict[str, float] = field(default_factory=dict)  # window of k tokens -> predicted and not in it

    def working_set(self, window: int) -> float:
        """Neurons that some of so many consecutive tokens are predicted to need."""
        known = sorted((int(k), share) for k, share in self.new.items())
        total = self.predicted
        for k in range(1, window):  # each further token adds what those before it did not have
            at_most = [share for tokens, share in known if tokens <= k]
            total += at_most[-1] if at_most else self.predicted
        return min(1.0, total)


@dataclass(frozen=True)
class Sparsity:
    """The whole of it. `quality` has perplexity, dense_perplexity and top1_agreement on held-out text, or nothing;
    `missed`, by the share of the FFN's bytes that is in memory, the share of neurons that a token reads then."""

    manifest: str
    tokens: int
    layers: tuple[LayerSparsity, ...]
    quality: dict[str, float]
    missed: dict[str, float] = field(default_factory=dict)

    @property
    def recall(self) -> float:
        """The mean of all layers."""
        return sum(layer.recall for layer in self.layers) / len(self.layers)

    @property
    def perplexity_increase(self) -> float:
        return self.quality["perplexity"] / self.quality["dense_perplexity"] - 1

    @property
    def measured(self) -> dict[str, float] | None:
        """`quality` with perplexity_increase, as reports tell it; None where it was not measured."""
        if not {"perplexity", "dense_perplexity", "top1_agreement"} <= self.quality.keys():
            return None
        increase = self.perplexity_increase
        return {**self.quality, "perplexity_increase": increase} if math.isfinite(increase) else None


def manifest_digest(bundle: Path) -> str:
    return hashlib.sha256((bundle / MANIFEST_FILE).read_bytes()).hexdigest()


def predictor_tensor(names: Iterable[str], layer: int, part: str) -> str:
    """The name of part "a" or "b" of a layer among the tensors of PREDICTORS_FILE. Raises KeyError for none."""
    for name in names:
        if f"{name}.".startswith(f"layers.{layer}.{part}."):
            return name
    raise KeyError(f"layers.{layer}.{part}")


def read_sparsity(bundle: Path) -> Sparsity | None:
    """What was calibrated; None where nothing was. Raises BundleError when it is damaged or of another bundle."""
    file = bundle / SPARSITY_FILE
    if not file.exists():
        return None
    try:
        body: dict[str, Any] = json.loads(file.read_bytes())
        layers = tuple(LayerSparsity(**layer) for layer in body["layers"])
        quality, missed = (
            {str(name): float(value) for name, value in body.get(what, {}).items()} for what in ("quality", "missed")
        )
        found = Sparsity(str(body["manifest"]), int(body["tokens"]), layers, quality, missed)
        _ = found.measured
    except (OSError, ArithmeticError, AttributeError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{file} is damaged: {error!r}.", _AGAIN) from None
    if found.manifest != manifest_digest(bundle):
        raise BundleError(f"{bundle} has changed since it was calibrated.", _AGAIN)
    if not (bundle / PREDICTORS_FILE).is_file():
        raise BundleError(f"{bundle} has lost its {PREDICTORS_FILE}.", _AGAIN)
    return found


def sparsity_json(found: Sparsity) -> bytes:
    return (json.dumps(asdict(found), indent=1) + "\n").encode()
