"""The one training loop: seeded, resumable to the bit, and finished by writing a folder that the runtime reads."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ..errors import StorageError, UsageError
from . import data
from .model import Decoder
from .objective import SparsityControl, held_out_nats, total_loss
from .recipes import Recipe

STATE = ".training"  # the folder inside OUT of a run that is not finished
SAVE_EVERY = 100  # steps
LOOK_EVERY = 250  # steps between two looks at the held-out text
LOOK_WINDOWS = 24  # sequences of such a look

Report = Callable[[int, int, dict[str, float]], None]  # steps done, of how many, figures of the last


@dataclass(frozen=True)
class Corpus:
    """What there is to learn from and to judge by."""

    tokenizer: Tokenizer
    train: data.Batches
    held_out: list[torch.Tensor]  # windows
    held_out_bytes: int  # of text
    documents: int
    tokens: int
    held_out_documents: list[str]
    train_documents: list[str]


def read_corpus(recipe: Recipe, texts: Sequence[Path], tokenizer: Tokenizer | None) -> Corpus:
    """Read, split, tokenize. Without a tokenizer one is trained, the same one from the same text."""
    train, held = data.split(data.read_documents(texts))
    tokenizer = tokenizer or data.train_tokenizer(train, recipe.shape.vocab_size)
    if tokenizer.get_vocab_size() > recipe.shape.vocab_size:
        raise UsageError(
            f"The tokenizer has {tokenizer.get_vocab_size():,} entries, the recipe's embedding "
            f"{recipe.shape.vocab_size:,}."
        )
    stream, rest = data.encode(tokenizer, train), data.encode(tokenizer, held)
    return Corpus(
        tokenizer,
        data.Batches(stream, recipe.sequence, recipe.batch, recipe.seed),
        list(data.windows_of(rest, recipe.sequence, recipe.batch)),
        sum(len(d.encode()) for d in held),
        len(train),
        len(stream),
        held,
        train,
    )


class Training:
    """A run: the model, its optimizer, the step it is at, and the folder it lives in."""

    def __init__(self, recipe: Recipe, corpus: Corpus, out: Path, start: Decoder | None = None) -> None:
        """`start` is a model to go on with rather than new weights."""
        self.recipe, self.corpus, self.out = recipe, corpus, out
        self.state_file, self.log_file = out / STATE / "state.pt", out / "loss.jsonl"
        torch.manual_seed(recipe.seed)
        self.model = Decoder(recipe.shape) if start is None else start
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            fused=True,
        )
        self.control = SparsityControl(recipe.sparsity) if recipe.sparsity else None
        self.step = 0
        self.seconds = 0.0  # of training, over all its runs
        identity = json.dumps(asdict(recipe), sort_keys=True).encode() + corpus.train.stream.tobytes()
        if start is not None:
            identity += b"".join(p.detach().numpy().tobytes() for p in start.parameters())
        self.identity = hashlib.sha256(identity).hexdigest()
        self._resume()

    # ---- what survives a kill
    def _resume(self) -> None:
        if not self.state_file.exists():
            self.log_file.unlink(missing_ok=True)
            return
        state = torch.load(self.state_file, weights_only=True)
        if state["identity"] != self.identity:
            raise UsageError(
                f"{self.out} holds an unfinished run of another recipe, seed or text.",
                "Repeat its command to go on with it, or give another --out.",
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        if self.control is not None:
            self.control = SparsityControl(**state["control"])
        kept = self.log_file.read_text().splitlines(keepends=True)[: self.step]
        self.log_file.write_text("".join(kept))

    def save(self) -> None:
        """Write the state beside and rename: a kill leaves the old one or the new one."""
        state = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "control": None if self.control is None else asdict(self.control),
        }
        temporary = self.state_file.with_suffix(".tmp")
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.state_file)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"Cannot save the training's state to {self.state_file}: {error}.") from None

    # ---- steps
    def _learning_rate(self) -> float:
        recipe = self.recipe
        if self.step < recipe.warmup:
            return recipe.learning_rate * (self.step + 1) / recipe.warmup
        progress = (self.step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def advance(self) -> dict[str, float]:
        """One step of the optimizer. Everything random in it is seeded by the step's number."""
        recipe, rate = self.recipe, self._learning_rate()
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        weight = self.control.weight if self.control is not None and self.control.start >= 0 else 0.0
        loss, figures = self._loss(weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.control is not None:
            self.control.steer(figures["sparsity"], self.step / recipe.steps)
            figures["l1"] = weight
        if not math.isfinite(figures["loss"]):
            raise UsageError(f"The loss is not finite at step {self.step}.", "Lower --learning-rate.")
        if self.step % LOOK_EVERY == 0 or self.step == recipe.steps:
            figures["held_out"] = self._look()
        return figures | {"learning_rate": rate}

    def _loss(self, l1: float) -> tuple[torch.Tensor, dict[str, float]]:
        loss, figures, _ = total_loss(self.model, self.corpus.train(self.step), self.recipe, l1)
        return loss, figures

    def _look(self) -> float:
        windows, seen = [], 0
        for window in self.corpus.held_out:
            windows.append(window)
            seen += window.shape[0]
            if seen >= LOOK_WINDOWS:
                break
        return held_out_nats(self.model, windows)[0] / sum(w[:, 1:].numel() for w in windows)

    def run(self, report: Report, *, stop: Callable[[], bool] = lambda: False, save_every: int = SAVE_EVERY) -> bool:
        """Train to the recipe's last step, or until `stop()`; tells whether the last step is done. Saves either way."""
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        report(self.step, self.recipe.steps, {})
        with self.log_file.open("a") as log:
            while self.step < self.recipe.steps and not stop():
                started = time.monotonic()
                figures = self.advance()
                self.seconds += time.monotonic() - started
                log.write(json.dumps({"step": self.step, **figures}) + "\n")
                if self.step % save_every == 0 or self.step == self.recipe.steps:
                    log.flush()
                    self.save()
                report(self.step, self.recipe.steps, figures)
        if self.step % save_every and self.step < self.recipe.steps:
            self.save()
        return self.step == self.recipe.steps

    def history(self) -> list[dict[str, Any]]:
        """The log: one row a step."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def discard_state(self) -> None:
        """The folder is finished: nothing is left to go on with."""
        shutil.rmtree(self.state_file.parent, ignore_errors=True)
