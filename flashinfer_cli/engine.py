"""The engine: a loaded model under a byte budget."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from . import device as devices
from .bundles.format import RecordLayout
from .cache.kv import KVCache
from .cache.slices import Feed
from .checkpoint.base import Checkpoint
from .config import DEFAULT_CONTEXT, NEURON_WINDOW, ModelConfig, RunConfig, SamplingParams
from .decoding.chat import ChatSession
from .decoding.generate import Session, TokenEvent, check_ids, generate
from .decoding.speculative import Speculator
from .errors import BudgetError, TokenizerError, UsageError
from .kernels import select, warm_up
from .kernels.kept import kept_format_of
from .layers.linear import Runtime
from .models.ahead import read_ahead
from .models.build import Builder
from .models.diagnose import check_finite
from .models.layout import ModelLayout, lay_out
from .models.open import OpenModel
from .models.predictors import load_predictors
from .models.sizes import sizes_of
from .plan import MemoryPlan, make_plan
from .recorder import Recorder
from .report import RunReport, expert_cache, readings
from .store.flash import FlashStore
from .store.scatter import layout_by
from .store.tuning import how_to_read
from .tokenizer import Tokenizer

Notify = Callable[[str], None]
Need = Callable[[Tokenizer], int]
Progress = Callable[[int, int, str], None]


def plan_model(
    model: OpenModel, layout: ModelLayout, run: RunConfig, device: devices.Device
) -> tuple[MemoryPlan, RunConfig]:
    """The memory plan of a run, and the run with its context, the type of its cache and the policy of neurons settled.

    Without --context the default shrinks by halves, down to 512 tokens, where the budget asks for it. Raises
    BudgetError.
    """
    longest = model.config.max_position_embeddings or DEFAULT_CONTEXT
    run = replace(run.settled(), kv_cache_type=model.kv_cache_type(run.kv_cache_type))
    wanted = [run.context] if run.context else [min(longest, DEFAULT_CONTEXT >> i) for i in range(4)]
    if run.memory not in (None, "auto"):  # only a tight budget is worth the time
        gc.collect()
    devices.release_free_memory()
    budget, process, peak = devices.budget_bytes(run.memory), devices.resident_bytes(), devices.peak_bytes()
    refused: BudgetError | None = None
    known = model.sparsity if any(layer.sparse for layer in layout.layers) else None
    shares = {} if known is None else {layer.layer: layer.predicted for layer in known.layers}
    for context in wanted:
        settled = replace(run, context=context)
        try:
            return make_plan(
                sizes_of(layout, model.config, settled, shares),
                budget=budget,
                process=process,
                peak_so_far=peak,
                context=context,
                chunk=min(run.prefill_chunk, context),
                stream=run.stream,
                card=device.card_memory(),
            ), settled
        except BudgetError as error:
            refused = error
    assert refused is not None
    raise refused


class Engine:
    """A model, loaded under a plan. Sessions made from it own their keys and values; one runs at a time.

    Close it, or use it as a context manager.
    """

    def __init__(
        self,
        model: OpenModel,
        run: RunConfig,
        *,
        need: Need | None = None,
        notify: Notify | None = None,
        progress: Progress | None = None,
    ) -> None:
        devices.tame_allocator()
        self.model = model
        self.config: ModelConfig = model.config
        self.speculator: Speculator | None = None  # set by `load` where a draft is asked for
        self.device = devices.resolve(run.device)
        self.recorder = Recorder()
        self.warnings: list[str] = []
        threads = run.threads or devices.cores()
        torch.set_num_threads(threads)
        self.threads = threads
        self.kernels, warning = select(self.device.kind, run.kernels, threads)
        if warning:
            self.warnings.append(warning)
            if notify is not None:
                notify(warning)
        try:  # its memory belongs to the process part of the plan
            self._tokenizer: Tokenizer | TokenizerError = model.tokenizer
        except TokenizerError as error:
            self._tokenizer = error
        if need is not None and run.context is None:
            longest = model.config.max_position_embeddings or DEFAULT_CONTEXT
            run = replace(run, context=min(need(self.tokenizer), longest))
        metadata = getattr(model.checkpoint, "metadata", {})
        for key in [key for key in metadata if key.startswith("tokenizer.")]:
            del metadata[key]  # read by now, and large
        warm_up(self.kernels, self.device)
        self.sparsity = None if run.exact else model.sparsity
        known = self.sparsity.layers if self.sparsity is not None else ()
        sparse_layers = [layer.layer for layer in known]
        predictors = load_predictors(model.predictors_file, sparse_layers, self.kernels, self.device)
        bundled_experts = model.config.moe is not None and model.checkpoint.kind == "bundle"
        self.probes = read_ahead(model.checkpoint.path) if bundled_experts else {}
        self.layout = layout = lay_out(model.checkpoint, model.config, model.weights, sparse_layers, run.degrade > 0)
        self.neuron_wants = {layer.layer: layer.working_set(run.window or NEURON_WINDOW) for layer in known}
        records = getattr(model.checkpoint, "records", {})
        self.neuron_records: dict[int, RecordLayout] = {layer: records[layer] for layer in sparse_layers}
        if run.memory not in (None, "auto"):
            devices.let_go_of_code()
            warm_up(self.kernels, self.device)  # what computing needs of it is back when the plan is made
        self.plan, self.run = plan_model(model, layout, run, self.device)
        if notify is not None:
            notify(str(self.plan))
        self._first_token: float | None = None
        self.drive: dict[str, Any] | None = None
        streaming = model.weight_bytes * (not self.plan.everything_fits and run.direct_io != "never")
        self.reading = how_to_read(model.checkpoint.files, streaming, remeasure=run.remeasure, notify=notify)
        self.store = FlashStore(
            self.recorder,
            threads=run.io_threads or self.reading.depth,
            direct=run.direct_io,
            request_bytes=self.reading.request_bytes,
            lay_out=layout_by(self.kernels),
        )
        try:
            feed = Feed(self.store, self.device, self.recorder)
            rt = Runtime(self.kernels, feed, self.recorder, threads=threads, resident=self.plan.everything_fits)
            with self.recorder.during("load", 0):
                if progress is not None:
                    feed.progress = lambda done, total: progress(done, total, "loading")
                builder = Builder(model.checkpoint, model.config, layout, self.plan, rt)
                self.decoder = builder.build(self.run, predictors, self.neuron_wants, self.probes)
                feed.progress = None
                self.experts = builder.experts.cache if builder.experts is not None else None
                self.neurons = builder.neurons.cache if builder.neurons is not None else None
                self.store.tick()
            assert self.run.context is not None
            self._kv = self.new_cache(self.run.context)
        except BaseException:
            self.store.close()
            raise

    # ---- what it is
    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError where the model has none; ids still work."""
        if isinstance(self._tokenizer, TokenizerError):
            raise self._tokenizer
        return self._tokenizer

    @property
    def checkpoint(self) -> Checkpoint:
        return self.model.checkpoint

    # ---- running it
    def new_cache(self, capacity: int) -> KVCache:
        """Keys and values of a sequence of up to `capacity` tokens, kept as the run asks for."""
        return KVCache(self.config, capacity, self.device.name, kept_format_of(self.config, self.run.kv_cache_type))

    def session(self) -> Session:
        """A new, empty sequence. It takes over the engine's keys and values from the session before."""
        self._kv.trim(0)
        check = partial(check_finite, checkpoint=self.checkpoint, kernels=self.kernels)
        return Session(self.decoder, self._kv, self.recorder, chunk=self.plan.chunk, check=check)

    def logits(self, token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """float32 [T, vocab_size]: one forward pass over the whole sequence. The result itself is not in the budget."""
        ids = [int(i) for i in token_ids]
        check_ids(ids, self.config.vocab_size)
        session = self.session()
        try:
            return torch.cat([part.cpu() for part in session.all_logits(ids, self.plan.chunk)])
        finally:
            self.decoder.rt.feed.end()

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[TokenEvent]:
        """Continue a prompt, text as it is (see `chat_prompt`) or token ids; yields an event a token."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        return self.continue_session(self.session(), ids, sampling, progress=progress)

    def continue_session(
        self,
        session: Session,
        ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[TokenEvent]:
        """Continue a session by a prompt's ids; yields an event a token."""
        check_ids(ids, self.config.vocab_size)
        params = (sampling or SamplingParams()).resolved(self.model.generation_config)
        text = None if isinstance(self._tokenizer, TokenizerError) else self._tokenizer.stream()
        if text is None and params.stop:
            raise UsageError("Stop strings need a tokenizer, and this model has none.")

        def first_token(seconds: float) -> None:
            self._first_token = seconds if self._first_token is None else self._first_token

        return generate(
            session, ids, params, text=text, speculator=self.speculator, progress=progress, first_token=first_token
        )

    def chat(self, system: str | None = None) -> ChatSession:
        """A conversation in the model's own chat template; TokenizerError where it has none."""
        return ChatSession(self.tokenizer, self.session(), self.continue_session, system)

    # ---- what it did
    @property
    def exactness(self) -> str:
        """ "sparse" where neurons are skipped or routing prefers what is in the cache, "degraded" where small copies of
        experts serve, else as the weights are, and keys and values where they are in blocks."""
        if self.run.degrade > 0:
            return "degraded"
        biased = self.run.cache_bias + self.run.cache_gap > 0 and self.experts is not None
        if self.sparsity is not None or biased:
            return "sparse"
        return "quantized" if self._kv.format == "Q8_0" else self.model.exactness

    @property
    def quality(self) -> dict[str, float] | None:
        """What calibration measured of runs that are sparse by it alone; None elsewhere."""
        by_it_alone = self.exactness == "sparse" and self.experts is None
        return self.sparsity.measured if by_it_alone and self.sparsity is not None else None

    def report(self) -> RunReport:
        """The account so far."""
        self.store.tick()
        plan = self.plan
        actual = {
            "keys and values": self._kv.nbytes,
            "streaming ring": plan.ring_bytes if self.decoder.rt.feed.ring is not None else 0,
            "pinned weights": self.decoder.rt.feed.pinned_bytes,
        }
        return RunReport(
            model=self.model.describe(),
            exactness=self.exactness,
            quality=self.quality,
            device=self.device.name,
            kernels=self.kernels.name,
            threads=self.threads,
            direct_io=self.store.mode,
            budget=plan.budget,
            peak=devices.peak_bytes(),
            least=plan.least,
            plan=tuple(replace(part, actual=actual.get(part.part)) for part in plan.parts),
            resident_bytes=plan.resident_bytes,
            streamed_bytes=plan.streamed_bytes,
            **readings(self.recorder),
            first_token_seconds=self._first_token,
            expert_cache=None if self.experts is None else expert_cache(self.experts, self.run),
            drive=self.drive,
            speculation=None if self.speculator is None else self.speculator.report(),
            warnings=tuple(self.warnings),
        )

    def close(self) -> None:
        """Stop reading and let go of the memory."""
        self.decoder.rt.feed.end()
        self.store.close()
        if self.speculator is not None:
            self.speculator.draft.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
