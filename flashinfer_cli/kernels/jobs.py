"""What Python and the compiled code agree on: the words through which a job is handed over. Imports no compiler.

The pool is an array of int64 words, given by byte offsets; those that threads contend for stand on cache lines (64
bytes) of their own. `cpu.enter` says what each word of a job means.
"""

from __future__ import annotations

from ..checkpoint.base import FORMATS, PLAIN

# Kinds of jobs, formats and activations, by number. Plain formats come first, then the blocks that bundles are made
# of: for those two kinds there are products that take weights straight from memory.
(
    LINEAR, DEQUANTIZE, FFN, ADD_UP, FFN_LISTED, LINEAR_LISTED, NORM, ROTATE, ATTEND, ABOVE_ZERO, SUREST, SETTLE,
    LAY_OUT, COPY, PROGRAM, GUESS, SPARSE,
) = range(17)  # fmt: skip
BLOCKS = tuple(fmt for fmt, (elements, _) in FORMATS.items() if elements > 1)
DIRECT_BLOCKS = ("Q8_0", "Q8_G128", "Q4_0", "Q4_1", "Q4_G64")
CODES = {fmt: code for code, fmt in enumerate((*PLAIN, *DIRECT_BLOCKS, *(f for f in BLOCKS if f not in DIRECT_BLOCKS)))}


def is_direct(fmt: str) -> bool:
    """Do products of a few tokens take this format's weights as they stand in memory."""
    return fmt in PLAIN or fmt in DIRECT_BLOCKS


ACTS = {"relu": 0, "relu2": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "gelu_quick": 5}
GATED = 8  # added to an activation

SEQUENCE = 0  # grows by one with every job
GATE = 64  # OPEN while a job runs, plus the number of workers inside
NEXT = 128  # the next chunk to hand out
SLEEPERS = 192  # marks of workers that went to sleep
STOP = 256  # not zero: workers return
PIPE_IN, PIPE_OUT, THREADS = 320, 328, 336
MISSED = 344  # bytes of jobs since somebody went to sleep
LATER = 360  # flights whose guess is laid out and not handed over, or 0
PATIENCE = 352  # turns that a worker waits for the next job before it sleeps
JOB = 384
JOB_WORDS = 18
POOL_BYTES = JOB + 8 * JOB_WORDS
OPEN = 1 << 40

# Bytes of weights handed out together: small enough that nobody waits long for the last ones, and in large jobs
# (1 / CHUNKS_A_THREAD of a thread's share) large enough for memory's prefetchers.
CHUNK_BYTES, LARGEST_CHUNK_BYTES, CHUNKS_A_THREAD = 64 << 10, 256 << 10, 32
GROUP_BYTES = 128 << 10  # of float32 rows worked on together: half of a small second-level cache
DIRECT_TOKENS = 3  # up to which rows go straight from memory into the products
DIRECT_NEURONS = 4  # of records in blocks that are then worked on together
MANY_TOKENS = 24  # from which on a product goes through its columns in blocks
# Columns, tokens and rows at once. Activations take 768 KiB, most of a second-level cache; few rows go through them
# again and again, and long columns seldom have their partial sums put away. All the activations of one pass, if they
# are not to come from memory again for every few rows, have to stay in the third-level cache.
BLOCK_COLS, BLOCK_TOKENS, BLOCK_ROWS, PASS_BYTES = 2048, 96, 16, 7 << 20
# Turns of waiting, some 30 ns each: the gap between products of a small model, where reading wants the cores too, or
# one in which torch works, where nothing is read.
BRIEF, LONG = 3000, 60_000
SUMS = 16  # partial sums a dot product has
PADDING = 64  # bytes between such rows of an FFN: rows of 2^n bytes would all want the same few lines of a cache
FFN_CHUNK_BYTES = 288 << 10  # of neurons' records handed out together, but
FFN_CHUNK_ROWS = 32  # not more of them than this,
FFN_CHUNKS = 16  # and not in more chunks than this, since each has sums of its own
SUMS_BYTES = 8 << 20  # of such sums at once: with more tokens, some at a time

# The sheet of a demand of neurons (`demands.settle`), by byte offsets. Of the layer, which never move: arrays by id
# (held bool, last and ranks int64, slot int64), the stack of free slots and the address of its height, slots' places.
S_COUNT, S_HELD, S_LAST, S_RANKS, S_SLOT, S_FREE, S_LEFT, S_PLACES = range(0, 64, 8)
# Of all layers: int64 [3 count] to work in, and [count] zeros; where records are computed on in passing, an address for
# each of `stages`; a block's neurons; blocks that are read at once.
S_WORK, S_MARKS, S_PASSING, S_STAGES, S_BLOCK, S_BLOCKS_READ, S_WIDTH = range(64, 120, 8)
# Of one demand: the policy's room, its time, the time of what goes whether or not there is need; ids asked for, ids
# guessed and where rows of theirs begin.
S_CAPACITY, S_TIME, S_OLDEST, S_IDS, S_ASKED, S_GUESSED_IDS, S_GUESSED, S_GUESSED_ROWS = range(120, 184, 8)
# What comes of it: the address of each id's record (int64) and its state (a byte), what to read, the counts of ids that
# the policy did not hold, of reads, and of guesses that were right.
S_ADDRESSES, S_STATES, S_READ_IDS, S_READ_AT, S_MISSES, S_READS, S_RIGHT = range(184, 240, 8)
# Of a policy that foresees: uses of each neuron, float64, or 0 for one that does not; what turns them into steps of
# worth, float64; and of the demand, float32 scores of all neurons, or 0.
S_USES, S_SCALE, S_SCORES = range(240, 264, 8)
# Of a demand that is settled, read and computed with one job (`sparse`): what a token adds to the tally, float64, and
# the tally of each neuron, float64, or 0; the address of how many are named; the reads' flights; the layer's records on
# the drive; and what comes of it, the blocks that are computed.
S_ADDS, S_TALLY, S_FOUND, S_FLIGHTS, S_FD, S_BASE, S_GAP, S_DONE = range(264, 328, 8)
SHEET_WORDS = 41
SCORE_STEPS, MOST_WORTH = 8, 63  # what a score of one is worth, and from where on all are alike
WORTH_BITS = 40  # of a rank, below what a neuron is worth: when it was demanded last
STATE_ABSENT, STATE_NEW, STATE_GUESSED = 1, 2, 4  # had no slot; has got one, which it is yet to reach; was guessed
STATE_ARRIVING = 7  # all of these: to be copied to a slot of its own

# Reads that compiled code hands to Linux (`reads`), by byte offsets. The context and its depth; reads under way; what
# io_getevents fills; the numbers of two system calls; requests so far by the bits of their bytes, int64 [64]; since
# when there is a read under way.
F_CONTEXT, F_DEPTH, F_UNDER_WAY, F_EVENTS, F_SUBMIT, F_GETEVENTS, F_BY_BITS, F_SINCE = range(0, 64, 8)
# Counts: nanoseconds with a read under way, and spent waiting; requests, bytes, bytes asked for; records guessed, and
# of them those that were needed.
F_BUSY, F_WAITED, F_REQUESTS, F_BYTES, F_USEFUL, F_GUESSED, F_RIGHT = range(64, 120, 8)
# The clock's two words. Where bytes between records go, and the most pieces of memory of a read. The batches. Of the
# guess under way: the sheet of its layer or 0, ids, their number, the addresses of their rows, and the first of these.
F_CLOCK, F_WASTE, F_MOST, F_BATCHES = 120, 136, 144, 152
F_GUESS_OF, F_GUESS_IDS, F_GUESS_COUNT, F_GUESS_ROWS, F_GUESS_AT = range(160, 200, 8)
# For a block of neurons: ids and addresses of what is to be read, of what is copied from and to, biases float32 [2].
F_IDS, F_AT, F_FROM, F_TO, F_BIASES = range(200, 240, 8)
FLIGHT_WORDS = 30
# A batch of reads: not ended; begun; of so many, in so many pieces; failed; of so many records. Arrays for it: requests
# and behind them their addresses, offsets, sizes, first pieces, pieces.
B_LEFT, B_BEGUN, B_READS, B_PIECES, B_FAILED, B_RECORDS = range(0, 48, 8)
B_REQUESTS, B_OFFSETS, B_SIZES, B_FIRST, B_VIEWS = range(48, 88, 8)
BATCH_WORDS = 11
EVENT_BYTES = 32
PREADV = 7  # the kernel's number for a read into several pieces of memory
