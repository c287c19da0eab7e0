"""The compiled kernels' own threads: called at once, put to sleep and woken, changed in number, forked."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
import torch
from stored_weights import close, weights

from flashinfer_cli.kernels import Kernels, select
from flashinfer_cli.kernels.jobs import BRIEF, LONG


def test_calls_from_many_threads_at_once(numba: Kernels) -> None:
    stored, _ = weights("Q8_0", 257, 512)
    x = torch.randn(8, 512)
    want = torch.empty(8, 257)
    numba.linear(x, stored, "Q8_0", want, 0)
    wrong: list[int] = []

    def work(tokens: int) -> None:
        out = torch.empty(tokens, 257)
        for turn in range(100):
            out.zero_()
            numba.linear(x[:tokens], stored, "Q8_0", out, 0)
            if not torch.equal(out, want[:tokens]):
                wrong.append(turn)

    threads = [threading.Thread(target=work, args=(tokens,)) for tokens in (1, 3, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_workers_sleep_wake_and_change_in_number() -> None:
    chosen, _ = select("cpu", threads=1)
    stored, values = weights("F32", 600, 256)
    x, out = torch.ones(1, 256), torch.empty(1, 600)
    for threads in (4, 2, 3, 1, 2):
        chosen.set_threads(threads)  # type: ignore[attr-defined]
        for _ in range(3):
            time.sleep(0.005)  # long enough for every worker to sleep
            out.zero_()
            chosen.linear(x, stored, "F32", out, 0)
            close(out, values.sum(1, dtype=np.float64)[None], np.abs(values).sum(1)[None])
    spent = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - spent < 0.05  # idle workers cost nothing
    chosen.close()  # type: ignore[attr-defined]
    chosen.linear(x, stored, "F32", out, 0)  # closed: the caller computes alone
    close(out, values.sum(1, dtype=np.float64)[None], np.abs(values).sum(1)[None])


def test_workers_wait_as_long_as_they_are_told_also_when_there_are_others() -> None:
    chosen, _ = select("cpu", "compiled", threads=2)
    pool = chosen._pool  # type: ignore[attr-defined]
    assert pool._shared.patience == BRIEF
    chosen.keep_cores(True)
    chosen.set_threads(3)  # type: ignore[attr-defined]
    assert pool._shared.patience == LONG
    chosen.keep_cores(False)
    assert pool._shared.patience == BRIEF
    chosen.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_with_threads_of_its_own(numba: Kernels) -> None:
    stored, _ = weights("F32", 600, 256)
    x, out = torch.ones(1, 256), torch.empty(1, 600)
    numba.linear(x, stored, "F32", out, 0)
    want = out.clone()
    child = os.fork()
    if child == 0:
        out.zero_()
        for _ in range(20):
            numba.linear(x, stored, "F32", out, 0)
        os._exit(0 if torch.equal(out, want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
