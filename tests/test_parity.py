"""Every family against transformers: float32 logits within 1e-4, resident, streamed, from a bundle, and step by
step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny, tiny_config_dicts

import flashinfer_cli as fc
from flashinfer_cli.engine import Engine

CASES = [(family, index) for family, dicts in tiny_config_dicts().items() for index in range(len(dicts))]
LENGTH = 40
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def model(request: pytest.FixtureRequest, tiny: Tiny) -> tuple[Path, Any]:
    return tiny(*request.param)


@pytest.fixture(scope="module")
def expected(model: tuple[Path, Any]) -> tuple[list[int], torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, model[1].config.vocab_size, (LENGTH,), generator=generator)
    with torch.no_grad():
        return ids.tolist(), model[1](ids[None], use_cache=False).logits[0].float()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    worst = (ours - theirs).abs().max().item()
    assert worst <= TOLERANCE, worst


@pytest.fixture(scope="module")
def resident(model: tuple[Path, Any], expected: tuple[list[int], torch.Tensor]) -> torch.Tensor:
    with fc.load(model[0], stream="never", context=LENGTH) as engine:
        assert engine.plan.everything_fits
        assert engine.report().exactness == "exact"
        return engine.logits(expected[0])


def test_resident(resident: torch.Tensor, expected: tuple[list[int], torch.Tensor]) -> None:
    assert expected[1].std() > 1e-2  # a model that says the same of everything would prove nothing
    close(resident, expected[1])


def test_streamed_is_bit_equal_to_resident(
    model: tuple[Path, Any], resident: torch.Tensor, expected: tuple[list[int], torch.Tensor]
) -> None:
    with fc.load(model[0], stream="always", context=LENGTH) as engine:
        assert torch.equal(engine.logits(expected[0]), resident)
        report = engine.report()
        assert report.prefill.bytes_read >= report.streamed_bytes > 0


def test_prefill_equals_single_steps(model: tuple[Path, Any], expected: tuple[list[int], torch.Tensor]) -> None:
    ids, _ = expected
    rope = getattr(model[1].config, "rope_parameters", None) or {}
    # Rotations that depend on the length change while stepping, in transformers too: stay where they do not.
    short = 6 if rope.get("rope_type") in ("dynamic", "longrope") else 12
    with fc.load(model[0]) as engine:
        whole = engine.logits(ids[:short])
        close(stepwise(engine, ids[:short]), whole)
        close(torch.cat(list(engine.session().all_logits(ids[:short], 5))), whole)


def stepwise(engine: Engine, ids: list[int]) -> torch.Tensor:
    session = engine.session()
    rows = [session.prefill(ids[:1], more=True)]
    rows += [session.step(token, more=i + 2 < len(ids)) for i, token in enumerate(ids[1:])]
    return torch.stack(rows)


def test_bundle(model: tuple[Path, Any], expected: tuple[list[int], torch.Tensor], tmp_path: Path) -> None:
    ids, logits = expected
    fc.bundle(model[0], tmp_path / "bundle")
    found = []
    for stream in ("never", "always"):
        with fc.load(tmp_path / "bundle", stream=stream, context=LENGTH) as engine:
            found.append(engine.logits(ids))
            assert engine.report().exactness == "exact"
    close(found[0], logits)
    assert torch.equal(*found)


def test_trim_rewinds(model: tuple[Path, Any], expected: tuple[list[int], torch.Tensor]) -> None:
    ids, _ = expected
    ids = ids[:6]
    with fc.load(model[0]) as engine:
        session = engine.session()
        first = session.prefill(ids, more=True)
        session.step(5), session.step(9)
        session.trim(len(ids) - 1)
        close(session.prefill(ids[-1:])[None], first[None])
