"""Second guesses beside a run of drafts: each position to the bit as if it stood alone, greedy text the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import Tiny

import flashinfer_cli as fc
from flashinfer_cli.config import RunConfig, SamplingParams
from flashinfer_cli.decoding.speculative import Speculator
from flashinfer_cli.errors import UsageError
from flashinfer_cli.training import data
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.model import Decoder
from flashinfer_cli.training.shape import Shape

LINE, SECONDS = [7, 11, 13, 17, 19], [23, 29]  # 23 in the place of 11, 29 in that of 13


# Rotations that depend on the length, windows, learned positions, latents, sinks.
CASES = [("llama", 6), ("gemma2", 1), ("opt", 1), ("deepseek_v2", 1), ("gpt_oss", 0)]


@pytest.mark.parametrize(("family", "index"), CASES, ids=lambda value: str(value))
def test_every_family(family: str, index: int, tiny: Tiny) -> None:
    folder, _ = tiny(family, index)
    prompt = torch.randint(3, 100, (21,), generator=torch.Generator().manual_seed(3)).tolist()
    with fc.load(folder, context=48, stream="always") as engine:
        session = engine.session()
        session.prefill(prompt)

        def alone(ids: list[int], at=session) -> torch.Tensor:
            at.trim(len(prompt))
            return torch.stack([at.step(token) for token in ids])

        want = torch.cat([alone(LINE), alone([7, 23])[-1:], alone([7, 11, 29])[-1:]])
        held = [kept[:, :24].clone() for kept in (*session.kv.keys, *session.kv.values)]
        after = alone([7, 11, 29, 31])[-1]
        session.trim(len(prompt))
        assert torch.equal(session.verify([*LINE, *SECONDS], beside=2), want)
        session.take_beside(len(prompt) + 6, len(prompt) + 2)
        assert session.ids == [*prompt, 7, 11, 29] and session.kv.length == 24
        now = (*session.kv.keys, *session.kv.values)
        assert all(torch.equal(a, b[:, :24]) for a, b in zip(held, now, strict=True))
        assert torch.equal(session.step(31), after)


class Told:
    """A draft that knows the text, and says it as its first guess or, every third time, as its second."""

    catching_up, repeatable, belief, step = 0.0, True, 0.7, 0.1

    def __init__(self, text: list[int], width: int) -> None:
        self.text, self.width, self.seconds, self.turn = text, width, [], 0

    def propose(self, ids, count, sampler, generator):
        coming = self.text[len(ids) : len(ids) + count]
        wrong = [self.says_wrong(place) for place in range(len(coming))]
        seconds = [t if w else t + 1 for t, w in zip(coming, wrong, strict=True)]
        self.seconds = [(second, torch.eye(128)[second]) for second in seconds[: self.width]]
        return [t + 1 if w else t for t, w in zip(coming, wrong, strict=True)], None

    def says_wrong(self, place: int) -> bool:
        self.turn += 1
        return self.turn % 3 == 0

    def close(self) -> None:
        return


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "mixtral", "deepseek_v2"])
def test_greedy_text_is_the_same(family: str, tiny: Tiny) -> None:
    folder, _ = tiny(family, 0)
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    with fc.load(folder, context=40, stream="always") as engine:
        want = [event.token_id for event in engine.generate([5, 6, 7], params)]
        passes = {}
        for width in (0, 2):
            engine.speculator = Speculator(Told([5, 6, 7, *want], width), "told", fixed=4, width=width)
            assert [event.token_id for event in engine.generate([5, 6, 7], params)] == want
            passes[width] = engine.speculator.passes
            assert (engine.speculator.rescued > 2) == (width > 0)
        assert passes[2] < passes[0]
        engine.speculator.draft = Told([5, 6, 7, *want], 16)  # to the end of the context, where nothing else fits
        assert [event.token_id for event in engine.generate([5, 6, 7], replace(params, max_tokens=99))][:30] == want


def test_what_cannot_be_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder, _ = tiny("llama", 0)
    with pytest.raises(UsageError, match="second guesses"):
        fc.load(folder, draft="ngram", draft_tree=2)
    shape = Shape(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                  mod_capacity=0.25)  # fmt: skip
    write_folder(Decoder(shape).eval(), data.train_tokenizer(["a cat sat on a mat"], 300), tmp_path)
    with pytest.raises(UsageError, match="Mixture-of-Depths"):
        fc.load(tmp_path, draft="self", draft_tree=1)
    with pytest.raises(UsageError, match="needs a draft"):
        RunConfig(draft_tree=2)
    with pytest.raises(UsageError, match="draft-tree is 17"):
        RunConfig(draft_tree=17)
