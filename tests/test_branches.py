"""Branches of a gradient step: equal in result, and nothing that one writes or gives back is another's.

Without a GPU streams are pretended: every operator is told to the stream that it would be launched on, and what waits
for what is kept in vector clocks. Two operators that touch the same memory, one of them writing, must be in order; and
memory goes back to the stream that it came from, so what comes next on that one must be behind all uses on others.
"""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from test_graphs import CASES, assert_same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastflow import branches
from fastflow.branches import branch, settled
from fastflow.graphs import GraphedUpdate

OFF_POLICY = [name for name in CASES if name.startswith(("floq", "fql", "value_flows"))]
ON_POLICY = [name for name in CASES if name.startswith(("fpo", "dppo", "ppo"))]


class Stream:
    """A stream that nothing runs on."""

    def __init__(self, board=None):
        self.board = board or Stream.of
        self.board.streams.append(self)
        self.clock, self.free = {}, []

    def tick(self):
        for memory in self.free:
            memory.may_be_taken_again()
        self.free.clear()
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def wait_stream(self, other):
        for stream, time in other.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)


class Memory:
    """A piece of memory from its first use to its last."""

    def __init__(self, board, owner):
        self.board, self.owner, self.alive = board, owner, set()
        self.reads, self.writes = {}, {}  # by stream, the last of each

    def use(self, stream, time, write, what):
        others = [self.writes, self.reads] if write else [self.writes]
        for uses in others:
            for other, (at, before) in uses.items():
                if stream.clock.get(other, 0) < at:
                    self.board.wrong.append(f"{what} does not wait for {before}")
        (self.writes if write else self.reads)[stream] = time, what

    def may_be_taken_again(self):
        for uses in (self.writes, self.reads):
            for other, (at, what) in uses.items():
                if self.owner.clock.get(other, 0) < at:
                    self.board.wrong.append(f"given back before the end of {what}")


class Streams(TorchDispatchMode):
    """Tells operators to the present stream. `wrong` holds what is out of order."""

    def __init__(self):
        super().__init__()
        self.streams, self.wrong, self.memories = [], [], {}
        Stream.of = self
        self.now = self.main = Stream(self)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def memory(self, x, new):
        key = x.untyped_storage().data_ptr()
        found = self.memories.get(key)
        if found is None or not found.alive:
            found = self.memories[key] = Memory(self, self.now if new else self.main)
        handle = id(x)
        if handle not in found.alive:
            found.alive.add(handle)
            weakref.finalize(x, self._dies, found, handle)
        return found

    def _dies(self, memory, handle):
        memory.alive.discard(handle)
        if not memory.alive:
            memory.owner.free.append(memory)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "profiler":
            return out
        time, what = self.now.tick(), f"{func} on stream {self.streams.index(self.now)}"
        given = {id(x) for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        written = set()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= {id(x) for x in tree_iter(value) if isinstance(x, torch.Tensor)}
        storages = set()
        for x in tree_iter((args, kwargs)):
            if isinstance(x, torch.Tensor) and x.numel():
                storages.add(x.untyped_storage().data_ptr())
                self.memory(x, False).use(self.now, time, id(x) in written, what)
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and x.numel() and id(x) not in given:
                new = x.untyped_storage().data_ptr() not in storages
                self.memory(x, new).use(self.now, time, new, what)
        return out


@pytest.fixture
def streams(monkeypatch):
    """Pretends that a step under `Streams` is being captured."""
    board = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(board))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: board.now)
    monkeypatch.setattr(torch.cuda, "stream", board.on)
    monkeypatch.setattr(branches, "_capturing", lambda: True)
    return board


@pytest.mark.parametrize("case", [*OFF_POLICY, *ON_POLICY])
def test_branches_do_not_touch_each_other(case, streams):
    make, batch = CASES[case]
    plain, agent = make(), make()
    for i in range(3):
        given = batch(agent, i)
        expected = plain.update(given)
        with streams, branches.allowed():
            found = agent.update(given)
        assert_same(expected, found)
        assert_same(plain.state_dict(), agent.state_dict())
    assert not streams.wrong, streams.wrong[:3]
    used = [stream for stream in streams.streams if stream.clock]
    # Of each update the actors, one of them apart; floq's distilled critic as well. Of each minibatch the values.
    apart = 3 if case.startswith("floq") else 2
    assert len(used) == 1 + 3 * apart if case in OFF_POLICY else len(used) > 3
    # Nothing is left behind.
    assert all(streams.main.clock[stream] == stream.clock[stream] for stream in used)


@pytest.mark.parametrize("case", ["floq", "fql", "fpo"])
def test_graphs_have_them_unless_they_are_told_not_to(case, streams):
    make, batch = CASES[case]

    def capture(function, generator, warmup):
        with streams:
            result = function()
        return lambda: None, result

    agent = make()
    GraphedUpdate(agent, batch(agent, 0), capture=capture, branched=False)
    assert len(streams.streams) == 1
    GraphedUpdate(agent, batch(agent, 0), capture=capture)
    assert len(streams.streams) > 1 and not streams.wrong


def test_without_a_capture_there_are_none():
    assert not branches.active()
    with branches.allowed():
        assert not branches.active()
    loss = torch.ones((), requires_grad=True) * 2
    assert settled(loss) is loss
    assert branch("part", lambda x, y: x + y, 1, y=2).join() == 3


# That these streams see what is wrong -------------------------------------------------------------------------------


def test_a_write_without_a_join_is_seen(streams):
    x = torch.zeros(3)
    with streams, branches.allowed():
        part = branch("part", x.add_, 1)
        y = x + 1
        part.join()
    assert any("does not wait for aten.add_" in line for line in streams.wrong), streams.wrong
    del y


def test_a_result_without_a_join_is_seen(streams):
    x = torch.zeros(3)
    with streams, branches.allowed():
        part = branch("part", torch.exp, x)
        y = part._result + 1
    assert any("does not wait for aten.exp" in line for line in streams.wrong)
    del y


def test_memory_given_back_too_early_is_seen(streams):
    with streams, branches.allowed():
        x = torch.zeros(3) + 1
        part = branch("part", torch.exp, x)
        del x
        y = torch.zeros(3) + 1
        part.join()
    assert any("given back before the end of aten.exp" in line for line in streams.wrong)
    streams.wrong.clear()
    with streams, branches.allowed():
        x = torch.zeros(3) + 1
        part = branch("part", torch.exp, x)
        part.join()
        del x
        y = torch.zeros(3) + 1
    assert not streams.wrong
    del y
