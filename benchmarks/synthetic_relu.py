"""ReLU checkpoints of real shapes with random weights, built so that neurons behave as in trained models.

Each neuron has its own firing rate, log-normal over neurons (a quarter of them cause four fifths of the activity, some
96% are silent for a token), reached by a bias that is calibrated on random tokens, layer by layer. The spectrum of what
reads and writes the stream falls off, so that a small predictor can tell who fires. Attention looks at the last few
tokens, so that the stream, and with it who fires, changes gradually.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

STREAM = 0.05  # scale of the residual stream: keeps tied logits small
CONSTANT = 0.5  # part of an RMS-normed model's embeddings that all tokens share
CONTEXT = 0.7  # what one attention block adds, relative to the embeddings
MLP = 0.25  # what one FFN adds
NEAR = (0.05, 0.5)  # angular frequencies, radians a token, that attention compares
SHARPNESS = 6.0  # attention logit of a token to itself, above that of a distant one
SAMPLE = (4, 256)  # sequences and tokens that biases are calibrated on
FIRING = (0.025, 0.055)  # share of the neurons that fire, first to last layer

COMMON: dict[str, Any] = {
    "dtype": "float16", "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048,
    "num_hidden_layers": 28, "num_attention_heads": 32, "head_dim": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    # OPT-1.3B's width, a few more layers: 2.9 GB
    "opt-relu-3g": COMMON | {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "word_embed_proj_dim": 2048, "ffn_dim": 8192,
        "max_position_embeddings": 2048, "activation_function": "relu", "do_layer_norm_before": True,
        "enable_bias": True, "layer_norm_elementwise_affine": True, "pad_token_id": 0, "tie_word_embeddings": True,
    },
    # its twin with squared ReLU, in an architecture that llama.cpp knows
    "arcee-relu-3g": COMMON | {
        "model_type": "arcee", "architectures": ["ArceeForCausalLM"], "intermediate_size": 8192,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "hidden_act": "relu2", "mlp_bias": False,
        "attention_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
}  # fmt: skip
Add = Callable[[dict[str, torch.Tensor]], None]


def signs(count: int) -> torch.Tensor:
    return torch.randint(0, 2, (count,)) * 2.0 - 1


def firing_rates(neurons: int, mean: float) -> torch.Tensor:
    """Log-normal, so that the busiest 26% of the neurons do 80% of the firing."""
    rates = torch.exp(1.5 * torch.randn(neurons))
    for _ in range(20):  # the clipping moves the mean
        rates = (rates * mean / rates.mean()).clamp(1e-4, 0.95)
    return rates


def biases(z: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Biases at which neurons of pre-activations z [tokens, neurons] fire at these rates."""
    spread = z.std(0)
    bias = -(z.mean(0) + spread * torch.special.ndtri(1 - rates))
    low, high, middle = -2.0, 2.0, 0.0  # z is not quite normal: shift all until the mean is right
    for _ in range(20):
        middle = (low + high) / 2
        fired = (z + bias + middle * spread > 0).float().mean()
        low, high = (middle, high) if fired < rates.mean() else (low, middle)
    return bias + middle * spread


def rotation(length: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(length)[:, None] * theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.cat([angle, angle], 1)
    return angle.cos(), angle.sin()


@torch.no_grad()
def write(config: dict[str, Any], add: Add) -> None:
    """Give the tensors of a checkpoint, float32, a few at a time in the order of the forward pass, to `add`."""
    opt = config["model_type"] == "opt"
    d, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    hd, ff, vocab = d // heads, config["ffn_dim" if opt else "intermediate_size"], config["vocab_size"]
    batch, length = SAMPLE
    spectrum = (1 + torch.arange(d) / 32) ** -0.5
    basis = torch.linalg.qr(torch.randn(d, d))[0] * (spectrum / spectrum.pow(2).mean().sqrt())

    def along(count: int) -> torch.Tensor:
        """Random vectors of the stream's kind, [count, d]."""
        return torch.randn(count, d) @ basis.T

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (d,)) if opt else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    tokens, embed = torch.randint(3, vocab, SAMPLE), along(vocab)
    shared, near = signs(d), torch.zeros(hd)
    if opt:  # positions are clock hands of many speeds; queries and keys compare them
        hands = torch.linalg.qr(torch.randn(d, hd))[0]
        rate = torch.logspace(math.log10(NEAR[0]), math.log10(NEAR[1]), hd // 2)
        angle = torch.arange(config["max_position_embeddings"] + 2)[:, None] * rate
        position = torch.cat([angle.cos(), angle.sin()], 1) @ hands.T * math.sqrt(d / (hd / 2)) * 0.5
        h = embed[tokens] + position[2 : length + 2]
        add({"model.decoder.embed_tokens.weight": embed * STREAM})
        add({"model.decoder.embed_positions.weight": position * STREAM})
    else:
        embed = embed * math.sqrt(1 - CONSTANT**2) + shared * CONSTANT
        h = embed[tokens]
        add({"model.embed_tokens.weight": embed * STREAM})
        rate = config["rope_theta"] ** (-torch.arange(0, hd, 2) / hd)
        amplitude = ((rate > NEAR[0]) & (rate < NEAR[1])).float()
        near = torch.cat([amplitude, amplitude])
        near = near / near.norm() * math.sqrt(SHARPNESS * math.sqrt(hd))
        cos, sin = rotation(length, hd, config["rope_theta"])
    h = h * STREAM

    def unplaced(w: torch.Tensor) -> torch.Tensor:
        """Readers of the stream that do not see positions, or what all tokens share."""
        return w - (w @ hands) @ hands.T if opt else w - (w @ shared)[:, None] * shared / d

    def split(x: torch.Tensor) -> torch.Tensor:
        x = x.view(batch, length, heads, hd).transpose(1, 2)
        return x

    for i in range(layers):
        y = norm(h)
        if opt:
            gain = math.sqrt(SHARPNESS * math.sqrt(hd)) / (y @ hands).pow(2).sum(-1).mean().sqrt()
            q = (hands.T * gain).repeat(heads, 1)
            queries = split(y @ q.T)
        else:
            q = near.repeat(heads)[:, None] * shared / (y @ shared).mean()
            plain = split(y @ q.T)
            queries = plain * cos + torch.cat([-plain[..., hd // 2 :], plain[..., : hd // 2]], -1) * sin
        v, o = unplaced(along(d)) / d, along(d).T / d
        mixed = F.scaled_dot_product_attention(queries, queries, split(y @ v.T), is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, d)
        o *= STREAM * CONTEXT / (mixed @ o.T).std()
        h = h + mixed @ o.T

        y = norm(h)
        up, down = unplaced(along(ff)) / d, along(ff).T
        z = (y @ up.T).view(-1, ff)
        up, z = up / z.std(), z / z.std()
        bias = biases(z, firing_rates(ff, FIRING[0] + (FIRING[1] - FIRING[0]) * i / max(1, layers - 1)))
        if opt:
            active = (z + bias).relu()
        else:  # no biases there: the shared direction carries them
            up += bias[:, None] * shared / (y @ shared).mean()
            active = (y.view(-1, d) @ up.T).relu().pow(2)
        down *= STREAM * MLP / (active @ down.T).std()
        h = h + (active @ down.T).view(batch, length, d)
        add(_opt_layer(i, q, v, o, up, bias, down) if opt else _arcee_layer(i, q, v, o, up, down))

    # Random signs part the output from the input, whose weights it shares in OPT.
    if opt:
        add({"model.decoder.final_layer_norm.weight": signs(d), "model.decoder.final_layer_norm.bias": torch.zeros(d)})
    else:
        add({"model.norm.weight": signs(d), "lm_head.weight": torch.randn(vocab, d) * 2 / math.sqrt(d)})


def _opt_layer(
    i: int, q: torch.Tensor, v: torch.Tensor, o: torch.Tensor, up: torch.Tensor, bias: torch.Tensor, down: torch.Tensor
) -> dict[str, torch.Tensor]:
    d = len(q)
    found = {"fc1.weight": up, "fc1.bias": bias, "fc2.weight": down, "fc2.bias": torch.zeros(d)}
    for name, w in (("q_proj", q), ("k_proj", q), ("v_proj", v), ("out_proj", o)):
        found |= {f"self_attn.{name}.weight": w.clone(), f"self_attn.{name}.bias": torch.zeros(d)}
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        found |= {f"{name}.weight": torch.ones(d), f"{name}.bias": torch.zeros(d)}
    return {f"model.decoder.layers.{i}.{name}": w for name, w in found.items()}


def _arcee_layer(
    i: int, q: torch.Tensor, v: torch.Tensor, o: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> dict[str, torch.Tensor]:
    found = {
        "self_attn.q_proj": q, "self_attn.k_proj": q.clone(), "self_attn.v_proj": v, "self_attn.o_proj": o,
        "mlp.up_proj": up, "mlp.down_proj": down,
        "input_layernorm": torch.ones(len(q)), "post_attention_layernorm": torch.ones(len(q)),
    }  # fmt: skip
    return {f"model.layers.{i}.{name}.weight": w for name, w in found.items()}
