"""The memory of a draft that is of no use, lent to the weights that stream because of it, until it is wanted again."""

from __future__ import annotations

from ..cache.slices import Slice
from ..models.decoder import Decoder
from ..plan import spread


class Lending:
    """A draft model's weights out, slices of the target in their place, and back. No bit of a result depends on it."""

    def __init__(self, target: Decoder, draft: Decoder) -> None:
        self.target, self.draft = target, draft
        self.out: tuple[Slice, ...] = ()  # the draft's, while they are away
        self.taken: tuple[Slice, ...] = ()  # the target's, in their place

    @property
    def lent(self) -> bool:
        return bool(self.out)

    @property
    def share(self) -> float:
        """Of what a pass streams: what would stay if the draft's memory were lent."""
        streamed = sum(s.span.nbytes for s in self.target.streamed)
        return min(1.0, self.draft.rt.feed.pinned_bytes / streamed) if streamed else 0.0

    @property
    def wait(self) -> float:
        """Seconds that a pass of decoding waited for reading, on average."""
        count = self.target.rt.recorder.phases["decode"]
        return count.wait_seconds / count.passes if count.passes else 0.0

    def lend(self) -> None:
        """Drop the draft's weights, and read as many bytes of the target's, spread evenly over a pass."""
        streamed, feed = self.target.streamed, self.draft.rt.feed
        chosen = spread([s.span.nbytes for s in streamed], feed.pinned_bytes)
        self.out = tuple(feed.stays)
        feed.unpin(self.out)
        self.taken = tuple(s for s, stays in zip(streamed, chosen, strict=True) if stays)
        self.target.keep(self.taken)

    def take_back(self) -> None:
        """The other way round."""
        self.target.let_go(self.taken)
        self.draft.rt.feed.pin(self.out)
        self.out = self.taken = ()
