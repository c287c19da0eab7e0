"""Arithmetic on weights that stay in their stored format: `reference` in plain torch, `native` compiled for this CPU.

Both have the signatures of `Kernels`; `select` picks one. Importing this package imports neither torch nor numba.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from ..device import Device
    from .listed import Listed

__all__ = ["Kernels", "select", "warm_up"]


class Kernels(Protocol):
    """Products of float32 activations with stored weights. All tensors of a call are on one device and contiguous.

    Stored weights are uint8 tensors, one row of the matrix a row, in a format of `checkpoint.base.FORMATS`; they may
    start at any address that is a multiple of the format's element size (2, for blocks).
    """

    name: str
    own_threads: bool  # they do not compute on torch's

    def keep_cores(self, keep: bool) -> None:
        """Whether threads of its own may stay awake between products: no reading, and nothing of torch's, wants their
        cores."""
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor, fmt: str, out: torch.Tensor, start: int) -> None:
        """out[:, start : start + rows] = x @ weight.T for x [T, cols], weight uint8 [rows, row bytes], out float32
        [T, N]."""
        ...

    def linear_listed(self, x: torch.Tensor, weights: Sequence[torch.Tensor], fmt: str, out: torch.Tensor) -> None:
        """out[i] = weights[i] @ x[i], or @ x[0] where x has one row: matrices of one shape that may stand anywhere,
        with the bits of `linear`. x [n or 1, cols], weights n of uint8 [rows, row bytes], out float32 [n, rows]."""
        ...

    def ffn_records(
        self,
        x: torch.Tensor,
        records: torch.Tensor | Listed,
        fmt: str,
        gated: bool,
        act: str,
        bias: tuple[torch.Tensor | None, torch.Tensor | None] | None,
        out: torch.Tensor,
    ) -> None:
        """out += (act(x @ gate.T + gate bias) * (x @ up.T + up bias)) @ down; without a gate act(x @ up.T + up bias)
        @ down.

        records uint8 [n, width], a neuron a row: gate row (if gated), up row, down column, each d elements of `fmt`,
        then padding; or a list of where such rows stand, with the same bits as if they stood side by side. x and out
        float32 [T, d]; biases (gate, up) float32 [n]; `act` a name of `activations`.
        """
        ...

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor) -> None:
        """out = x / sqrt(mean of x^2 over a row + eps) * weight: x and out float32 [..., d], weight [d]."""
        ...

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, out: torch.Tensor
    ) -> None:
        """out = (x - mean) / sqrt(variance over a row + eps) * weight + bias: shapes as in `norm`."""
        ...

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """out[h] = softmax(scale q[h] . keys) values, of one token: q and out float32 [heads, hd], keys and values
        [kv_heads, S, hd] as a cache keeps them (`kept`), of which the last `window` positions count. Positions stand
        side by side, heads of keys and values as far apart as in a cache."""
        ...

    def dequantize(self, weight: torch.Tensor, fmt: str, cols: int) -> torch.Tensor:
        """uint8 [rows, row bytes] as float32 [rows, cols]."""
        ...


def select(
    device: str,
    mode: Literal["auto", "compiled", "reference"] = "auto",
    threads: int | None = None,
    notify: Callable[[str], None] | None = None,
) -> tuple[Kernels, str | None]:
    """The kernels for a device, and a warning for the user when they are not the ones that should have been.

    mode "reference", or a device other than the CPU: plain torch. Otherwise the compiled ones, on `threads` threads
    (None: the cores this process may use), compiled now if this machine has not compiled them before (`notify` is
    told so, once).
    """
    from .reference import ReferenceKernels

    if mode == "reference" or device.split(":")[0] != "cpu":
        return ReferenceKernels(), None
    try:
        from .warm import compiled

        compiled(notify)
        from .native import NumbaKernels

        return NumbaKernels(threads), None
    except ImportError as error:
        reason = f"numba cannot be imported ({error})"
    except Exception as error:  # whatever a compiler can raise: slower is better than not at all, if it is said
        reason = f"{type(error).__name__}: {error}"
    return (
        ReferenceKernels(),
        f"The compiled CPU kernels are not usable: {reason}. Running on plain torch, many times slower.",
    )


def warm_up(kernels: Kernels, device: Device) -> None:
    """Touch what libraries allocate on first use, so that a plan made then sees it."""
    import torch

    a = torch.ones(64, 256, device=device.name)
    (a @ a.T).softmax(-1)
    weight = torch.zeros(64, 1024, dtype=torch.uint8, device=device.name)
    for tokens in (1, 64):
        kernels.linear(a[:tokens].contiguous(), weight, "F32", a.new_empty(tokens, 64), 0)
    device.synchronize()
