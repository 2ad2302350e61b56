"""The page allocator: against a model of a server that writes every page it is given, and its errors."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from jaxkern import OutOfPages, PageAllocator


class Server(RuleBasedStateMachine):
    """Requests whose every token is another number, in a cache of one number a token.

    Whatever is reserved, forked and freed, a request reads its own tokens: a page that two of them wrote would show.
    """

    requests = Bundle("requests")

    @initialize(pages=st.integers(1, 12), page_size=st.integers(1, 5))
    def start(self, pages, page_size):
        self.allocator = PageAllocator(pages, page_size)
        self.cache = np.full((pages, page_size), -1)
        self.tokens = {}  # of each request, in order
        self.room = {}  # of each request, in tokens
        self.written = 0
        self.freed = []

    def before(self):
        return self.allocator.available, {r: self.allocator.pages_of(r) for r in self.tokens}

    def pages_for(self, tokens):
        return -(-tokens // self.allocator.page_size)

    def write(self, request, count):
        table = self.allocator.block_table([request], 12)[0]
        for _ in range(min(count, self.room[request] - len(self.tokens[request]))):
            page, offset = divmod(len(self.tokens[request]), self.allocator.page_size)
            self.cache[table[page], offset] = self.written
            self.tokens[request].append(self.written)
            self.written += 1

    @rule(target=requests, tokens=st.integers(0, 20), filled=st.integers(0, 20))
    def reserve(self, tokens, filled):
        available, before = self.before()
        try:
            request = self.allocator.reserve(tokens)
        except OutOfPages:
            assert self.pages_for(tokens) > available and self.before() == (available, before)
            return -1
        assert request not in self.tokens and request not in self.freed
        assert self.allocator.available == available - self.pages_for(tokens)
        self.tokens[request], self.room[request] = [], tokens
        self.write(request, filled)
        return request

    @rule(request=requests, tokens=st.integers(0, 30), filled=st.integers(0, 20))
    def extend(self, request, tokens, filled):
        if request not in self.tokens:
            return
        available, before = self.before()
        try:
            self.allocator.extend(request, tokens)
        except OutOfPages:
            assert self.pages_for(tokens) - len(before[request]) > available
            assert self.before() == (available, before)
            return
        assert self.allocator.pages_of(request)[: len(before[request])] == before[request]
        self.room[request] = max(self.room[request], tokens)
        self.write(request, filled)

    @rule(target=requests, parent=requests, data=st.data(), more=st.integers(0, 9), filled=st.integers(0, 20))
    def fork(self, parent, data, more, filled):
        if parent not in self.tokens:
            return -1
        available, before = self.before()
        shared = data.draw(st.integers(0, len(self.tokens[parent])), "shared")
        try:
            request, copy = self.allocator.fork(parent, shared, shared + more)
        except OutOfPages:
            assert self.before() == (available, before)
            return -1
        if copy is not None:
            source, to = copy
            self.cache[to] = self.cache[source]
        self.tokens[request], self.room[request] = self.tokens[parent][:shared], shared + more
        self.write(request, filled)
        return request

    @rule(request=requests, filled=st.integers(1, 20))
    def go_on(self, request, filled):
        if request in self.tokens:
            self.write(request, filled)

    @rule(request=consumes(requests))
    def free(self, request):
        if request not in self.tokens:
            return
        mine = self.allocator.pages_of(request)
        del self.tokens[request], self.room[request]
        others = {page for r in self.tokens for page in self.allocator.pages_of(r)}
        available = self.allocator.available
        self.allocator.free(request)
        assert self.allocator.available == available + len(set(mine) - others)
        self.freed.append(request)
        with pytest.raises(ValueError, match="there is no request"):
            self.allocator.free(request)

    @invariant()
    def pages_add_up(self):
        owned = [self.allocator.pages_of(r) for r in self.tokens]
        distinct = {page for pages in owned for page in pages}
        assert self.allocator.available == self.allocator.pages - len(distinct)
        assert all(len(set(pages)) == len(pages) and set(pages) <= set(range(self.allocator.pages)) for pages in owned)
        for request, pages in zip(self.tokens, owned, strict=True):
            assert len(pages) >= self.pages_for(self.room[request])

    @invariant()
    def every_request_reads_its_own_tokens(self):
        requests = list(self.tokens)
        table = self.allocator.block_table(requests, 12)
        assert table.dtype == np.int32 and table.shape == (len(requests), 12)
        for row, request in zip(table, requests, strict=True):
            pages = self.allocator.pages_of(request)
            assert tuple(row[: len(pages)]) == pages and (row[len(pages) :] == -1).all()
            tokens = self.tokens[request]
            assert self.cache[list(pages)].reshape(-1)[: len(tokens)].tolist() == tokens


TestServer = Server.TestCase
TestServer.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_the_lowest_pages_come_first():
    allocator = PageAllocator(6, 4)
    a, b, c = (allocator.reserve(tokens) for tokens in (5, 4, 8))
    assert [allocator.pages_of(r) for r in (a, b, c)] == [(0, 1), (2,), (3, 4)]
    allocator.free(c)
    allocator.free(a)
    assert allocator.available == 5
    assert allocator.pages_of(allocator.reserve(12)) == (0, 1, 3)
    np.testing.assert_array_equal(allocator.block_table([b], 3), [[2, -1, -1]])


def test_fork_shares_full_pages_only():
    allocator = PageAllocator(8, 4)
    a = allocator.reserve(12)
    at_a_boundary, nothing = allocator.fork(a, 8, 10)
    assert allocator.pages_of(at_a_boundary) == (0, 1, 3) and nothing is None
    in_a_page, copy = allocator.fork(a, 6, 12)
    assert allocator.pages_of(in_a_page) == (0, 4, 5) and copy == (1, 4)
    allocator.free(a)
    assert allocator.available == 3  # page 2 was nobody else's
    allocator.free(at_a_boundary)
    assert allocator.available == 5
    allocator.free(in_a_page)
    assert allocator.available == 8


def test_errors():
    allocator = PageAllocator(4, 16)
    request = allocator.reserve(40)
    with pytest.raises(OutOfPages, match="PageAllocator.reserve: 2 pages are needed, 1 of 4 are free"):
        allocator.reserve(17)
    with pytest.raises(OutOfPages, match="PageAllocator.extend: 2 pages are needed, 1 of 4 are free"):
        allocator.extend(request, 65)
    with pytest.raises(OutOfPages, match="PageAllocator.fork: 2 pages are needed"):
        allocator.fork(request, 20, 40)
    assert allocator.available == 1
    with pytest.raises(ValueError, match=r"PageAllocator.fork: shared must be in 0\.\.48, got 49"):
        allocator.fork(request, 49, 64)
    with pytest.raises(ValueError, match=r"PageAllocator.fork: shared must be in 0\.\.8, got 9"):
        allocator.fork(request, 9, 8)
    with pytest.raises(ValueError, match="block_table: width must be at least 3, the pages of request 0, got 2"):
        allocator.block_table([request], 2)
    with pytest.raises(ValueError, match="PageAllocator.reserve: tokens must not be negative, got -1"):
        allocator.reserve(-1)
    allocator.free(request)
    for call in (
        allocator.free,
        allocator.pages_of,
        lambda r: allocator.extend(r, 1),
        lambda r: allocator.fork(r, 0, 1),
    ):
        with pytest.raises(ValueError, match="there is no request 0: it was freed, or never reserved"):
            call(request)
    with pytest.raises(ValueError, match="PageAllocator: page_size must be positive, got 0"):
        PageAllocator(4, 0)
    with pytest.raises(TypeError, match=r"PageAllocator: pages must be an integer, got 2\.5"):
        PageAllocator(2.5, 4)
    with pytest.raises(TypeError, match=r"PageAllocator\.reserve: tokens must be an integer, got 5\.5"):
        allocator.reserve(5.5)
