"""What Python and the compiled code agree on: the words through which a job is handed over. Imports no compiler.

The pool is an array of int64 words, given by byte offsets; those that threads contend for stand on cache lines (64 bytes) of
their own. `cpu.enter` says what each word of a job means.
"""

from __future__ import annotations

from ..checkpoint.base import FORMATS, PLAIN

# Kinds of jobs, formats and activations, by number. Plain formats come first.
LINEAR, DEQUANTIZE, FFN = range(3)
BLOCKS = tuple(fmt for fmt, (elements, _) in FORMATS.items() if elements > 1)
CODES = {fmt: code for code, fmt in enumerate((*PLAIN, *BLOCKS))}
ACTS = {"relu": 0, "relu2": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "gelu_quick": 5}
GATED = 8  # added to an activation

SEQUENCE = 0  # grows by one with every job
GATE = 64  # OPEN while a job runs, plus the number of workers inside
NEXT = 128  # the next chunk to hand out
SLEEPERS = 192  # marks of workers that went to sleep
STOP = 256  # not zero: workers return
PIPE_IN, PIPE_OUT, THREADS = 320, 328, 336
JOB = 384
JOB_WORDS = 16
POOL_BYTES = JOB + 8 * JOB_WORDS
OPEN = 1 << 40

ROW_LIMIT = 16  # most tokens of a LINEAR or FFN job
CHUNK_BYTES = 64 << 10  # of weights handed out together; small enough that nobody waits long for the last one
MOST_CHUNKS = 32  # of an FFN, since each has sums of its own,
CHUNK_COLUMNS = 128 << 10  # and the sums of all of them have about so many columns at most
