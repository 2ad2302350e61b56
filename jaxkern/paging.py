"""Which pages of a cache belong to which request: `PageAllocator`, on the host, between the steps of a server."""

import heapq
import operator
from collections.abc import Sequence

import numpy as np

from jaxkern._check import require_integer


class OutOfPages(RuntimeError):
    """A cache has fewer free pages than a request needs. Nothing has changed: free others and ask again."""


class PageAllocator:
    """Hands out the pages of a cache to requests, and takes them back.

    >>> allocator = PageAllocator(pages=1000, page_size=64)
    >>> request = allocator.reserve(prompt_length + max_new_tokens)
    >>> block_table = allocator.block_table([request], width=32)  # for kv_cache.append and mla_decode
    >>> allocator.free(request)

    A request is a number that never comes again. Requests may share the full pages of a prefix (`fork`), which come
    back with the last of them; a page that is still to be filled is always one request's own, so none writes what
    another reads. The lowest free pages are handed out first, so the same calls give the same pages. The cache itself
    is the caller's: one allocator for each device's part of it.

    available: how many pages are free.
    """

    def __init__(self, pages: int, page_size: int):
        for name, size in (("pages", pages), ("page_size", page_size)):
            if require_integer("PageAllocator", name, size) < 1:
                raise ValueError(f"PageAllocator: {name} must be positive, got {size}")
        self.pages, self.page_size = operator.index(pages), operator.index(page_size)
        self._free = list(range(self.pages))  # a heap
        self._references = [0] * self.pages
        self._requests: dict[int, list[int]] = {}
        self._next = 0

    @property
    def available(self) -> int:
        return len(self._free)

    def reserve(self, tokens: int) -> int:
        """A new request with pages for `tokens` tokens.

        Errors: OutOfPages; ValueError for a negative number.
        """
        return self._add(self._take("reserve", self._pages_for("reserve", tokens)))

    def extend(self, request: int, tokens: int):
        """Gives the request pages for `tokens` tokens in all, if it has fewer.

        Errors: OutOfPages; ValueError for a request that there is not.
        """
        pages = self._pages_of("extend", request)
        pages += self._take("extend", self._pages_for("extend", tokens) - len(pages))

    def fork(self, request: int, shared: int, tokens: int) -> tuple[int, tuple[int, int] | None]:
        """A new request with pages for `tokens` tokens that begins with the first `shared` ones of another.

        -> the request, and a page to copy. The full pages of the shared tokens, which must be written already, are
        shared. A page that they fill in part is not, as both requests will write the rest of it: its place in the new
        request is a page of its own, and the caller copies (from, to) before either writes, in every layer:

        >>> cache = cache.at[to].set(cache[from_])

        None where there is nothing to copy.
        Errors: OutOfPages; ValueError for a request that there is not, or for more shared tokens than it has pages for
            or than `tokens`.
        """
        pages = self._pages_of("fork", request)
        shared = require_integer("PageAllocator.fork", "shared", shared)
        room = min(len(pages) * self.page_size, tokens)
        if not 0 <= shared <= room:
            raise ValueError(f"PageAllocator.fork: shared must be in 0..{room}, got {shared}")
        full, partial = divmod(shared, self.page_size)
        own = self._take("fork", self._pages_for("fork", tokens) - full)
        for page in pages[:full]:
            self._references[page] += 1
        return self._add(pages[:full] + own), (pages[full], own[0]) if partial else None

    def free(self, request: int):
        """Ends the request; pages that no other one shares are available again.

        Errors: ValueError for a request that there is not, as one that was freed before.
        """
        for page in self._pages_of("free", request):
            self._references[page] -= 1
            if self._references[page] == 0:
                heapq.heappush(self._free, page)
        del self._requests[request]

    def pages_of(self, request: int) -> tuple[int, ...]:
        """The request's pages in order: token t is in pages_of(request)[t // page_size].

        Errors: ValueError for a request that there is not.
        """
        return tuple(self._pages_of("pages_of", request))

    def block_table(self, requests: Sequence[int], width: int) -> np.ndarray:
        """The pages of some requests, int32 [len(requests), width]; -1, which is no page, past the end of each.

        Errors: ValueError for a request that there is not, or that has more than `width` pages.
        """
        table = np.full((len(requests), width), -1, np.int32)
        for row, request in zip(table, requests, strict=True):
            pages = self._pages_of("block_table", request)
            if len(pages) > width:
                raise ValueError(
                    f"PageAllocator.block_table: width must be at least {len(pages)}, the pages of request {request}, "
                    f"got {width}"
                )
            row[: len(pages)] = pages
        return table

    def _pages_of(self, method: str, request: int) -> list[int]:
        if request not in self._requests:
            raise ValueError(f"PageAllocator.{method}: there is no request {request}: it was freed, or never reserved")
        return self._requests[request]

    def _pages_for(self, method: str, tokens: int) -> int:
        if require_integer(f"PageAllocator.{method}", "tokens", tokens) < 0:
            raise ValueError(f"PageAllocator.{method}: tokens must not be negative, got {tokens}")
        return -(-tokens // self.page_size)

    def _take(self, method: str, count: int) -> list[int]:
        """`count` free pages, or none at all."""
        if count > len(self._free):
            raise OutOfPages(
                f"PageAllocator.{method}: {count} pages are needed, {len(self._free)} of {self.pages} are free"
            )
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def _add(self, pages: list[int]) -> int:
        request, self._next = self._next, self._next + 1
        self._requests[request] = pages
        return request
