"""The batcher against devices that are slow, that fail, and whose callers go away."""

import asyncio
import threading
import time
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve import batcher as batcher_module
from tinyserve.batcher import Batcher
from tinyserve.errors import BusyError

POISON = 255


def pictures(*numbers):
    """Pictures of one pixel that say which they are."""
    return np.array(numbers, np.uint8)[:, None]


class Device:
    """Doubles every number, one batch at a time, and remembers the batches."""

    def __init__(self, gate=None):
        self.batches = []
        self.gate = gate
        self.busy = threading.Lock()
        self.began = threading.Event()

    def run(self, images):
        assert self.busy.acquire(blocking=False), "two batches at a time"
        try:
            self.began.set()
            if self.gate is not None:
                assert self.gate.wait(timeout=30)
            self.batches.append(images[:, 0].tolist())
            if POISON in images:
                raise ValueError("poison")
            return images.astype(np.float32) * 2
        finally:
            self.busy.release()


async def ask(batcher, *numbers):
    with batcher.place(len(numbers)) as submit:
        answer = await submit(pictures(*numbers))
    return answer[:, 0].tolist()


@contextmanager
def held(device, batcher):
    """The device has picture 0 and keeps it until the end of the block."""
    device.gate = threading.Event()
    task = asyncio.ensure_future(ask(batcher, 0))
    yield task
    device.gate.set()


async def busy_with_it(device):
    await asyncio.to_thread(device.began.wait, 30)


def test_a_lone_request_is_computed_alone():
    async def main():
        device = Device()
        batcher = Batcher(device.run)
        assert await ask(batcher, 3) == [6]
        assert await ask(batcher, 4, 5) == [8, 10]
        await batcher.drain()
        assert device.batches == [[3], [4, 5]]

    asyncio.run(main())


def test_what_arrives_while_the_device_is_busy_is_one_batch():
    async def main():
        device = Device()
        batcher = Batcher(device.run, max_batch_size=8)
        with held(device, batcher) as first:
            await busy_with_it(device)
            others = [asyncio.ensure_future(ask(batcher, n)) for n in range(1, 7)]
            await asyncio.sleep(0)
        assert await first == [0]
        assert await asyncio.gather(*others) == [[2 * n] for n in range(1, 7)]
        await batcher.drain()
        assert device.batches == [[0], [1, 2, 3, 4, 5, 6]]

    asyncio.run(main())


def test_batches_are_no_larger_than_allowed():
    async def main():
        device = Device()
        batcher = Batcher(device.run, max_batch_size=4)
        with held(device, batcher):
            await busy_with_it(device)
            others = [
                asyncio.ensure_future(ask(batcher, *numbers))
                for numbers in ([1, 2, 3], [4, 5], [6], [7])
            ]
            await asyncio.sleep(0)
        await asyncio.gather(*others)
        await batcher.drain()
        assert device.batches == [[0], [1, 2, 3], [4, 5, 6, 7]]

    asyncio.run(main())


def test_a_large_request_is_split_and_put_together_again():
    async def main():
        device = Device()
        batcher = Batcher(device.run, max_batch_size=4)
        assert await ask(batcher, *range(11)) == [2 * n for n in range(11)]
        await batcher.drain()
        assert sorted(map(len, device.batches)) == [3, 4, 4]

    asyncio.run(main())


def test_with_a_delay_an_idle_device_waits_for_company_but_not_when_full():
    async def main():
        device = Device()
        batcher = Batcher(device.run, max_batch_size=2, max_delay=3600)
        assert await asyncio.gather(ask(batcher, 1), ask(batcher, 2)) == [[2], [4]]
        await batcher.drain()
        assert device.batches == [[1, 2]]

    asyncio.run(main())


def test_a_delay_ends():
    async def main():
        device = Device()
        batcher = Batcher(device.run, max_delay=0.02)
        assert await ask(batcher, 1) == [2]
        await batcher.drain()

    asyncio.run(main())


def test_a_full_queue_refuses_and_says_when_to_come_back():
    async def main():
        device = Device()
        batcher = Batcher(device.run, max_queue=3)
        with held(device, batcher) as first:
            await busy_with_it(device)
            second = asyncio.ensure_future(ask(batcher, 1, 2))
            await asyncio.sleep(0)
            with pytest.raises(BusyError, match="3 of 3") as refused:
                await ask(batcher, 3)
            assert refused.value.retry_after >= 1
        assert await asyncio.gather(first, second) == [[0], [2, 4]]
        assert batcher.waiting == 0
        assert await ask(batcher, 1, 2, 3) == [2, 4, 6]
        await batcher.drain()

    asyncio.run(main())


def test_the_time_to_come_back_follows_the_queue_and_the_speed():
    def slow(images):
        time.sleep(0.2)
        return images.astype(np.float32)

    async def main():
        batcher = Batcher(slow, max_queue=100)
        await ask(batcher, 0)  # five images a second, at most
        with batcher.place(100):
            with pytest.raises(BusyError) as refused:
                await ask(batcher, 1)
            assert 20 <= refused.value.retry_after <= 60
        await batcher.drain()

    asyncio.run(main())


def test_who_is_refused_is_not_told_to_come_back_with_all_the_others(monkeypatch):
    def slow(images):
        time.sleep(0.1)
        return images.astype(np.float32)

    async def main():
        batcher = Batcher(slow, max_queue=100)
        await ask(batcher, *range(20))  # two hundred images a second, at most
        told = []
        # All in one moment: of those who come later, fewer are expected before them.
        now = time.monotonic()
        monkeypatch.setattr(batcher_module, "time", SimpleNamespace(monotonic=lambda: now))
        with batcher.place(100):
            for _ in range(1000):
                with pytest.raises(BusyError) as refused:
                    await ask(batcher, 1)
                told.append(refused.value.retry_after)
        assert told == sorted(told)
        assert told[-1] >= told[0] + 3  # 800 images more are expected
        assert told[-1] <= 60
        assert Counter(told).most_common(1)[0][1] < 500
        monkeypatch.undo()
        await batcher.drain()

    asyncio.run(main())


def test_who_leaves_is_not_computed():
    async def main():
        device = Device()
        batcher = Batcher(device.run, max_batch_size=2)
        with held(device, batcher):
            await busy_with_it(device)
            tasks = [asyncio.ensure_future(ask(batcher, *n)) for n in ([1], [2, 3, 4], [5])]
            await asyncio.sleep(0)
            tasks[0].cancel()
            tasks[1].cancel()
            await asyncio.wait(tasks[:2])
            assert batcher.waiting == 2
        assert await tasks[2] == [10]
        await batcher.drain()
        assert device.batches == [[0], [5]]

    asyncio.run(main())


def test_who_leaves_while_the_batch_before_is_computed_is_not_computed():
    async def main():
        device = Device()
        batcher = Batcher(device.run, max_batch_size=3)
        with held(device, batcher):
            await busy_with_it(device)
            waiting, leaving = (asyncio.ensure_future(ask(batcher, *n)) for n in ([1, 2], [3, 4]))
            await asyncio.sleep(0)
            device.began.clear()
            first, device.gate = device.gate, threading.Event()
            first.set()
            await busy_with_it(device)  # with 1 and 2, beside which 3 and 4 had no room
            leaving.cancel()
            await asyncio.wait([leaving])
        assert await waiting == [2, 4]
        await batcher.drain()
        assert device.batches == [[0], [1, 2]]

    asyncio.run(main())


def test_who_fails_fails_alone():
    async def main():
        device = Device()
        batcher = Batcher(device.run)
        with held(device, batcher):
            await busy_with_it(device)
            tasks = [asyncio.ensure_future(ask(batcher, *n)) for n in ([1], [2, POISON], [3])]
            await asyncio.sleep(0)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.drain()
        assert answers[0] == [2]
        assert isinstance(answers[1], ValueError)
        assert answers[2] == [6]

    asyncio.run(main())


def test_who_fails_in_part_is_not_computed_on():
    failed, batches = threading.Event(), []

    def run(images):
        batches.append(images[:, 0].tolist())
        if POISON in images:
            raise ValueError("poison")
        assert failed.wait(timeout=30)
        return images.astype(np.float32)

    async def main():
        batcher = Batcher(run, max_batch_size=1)
        with pytest.raises(ValueError, match="poison"):
            await ask(batcher, POISON, 2, 3, 4)
        failed.set()
        await batcher.drain()
        assert batches in ([[POISON]], [[POISON], [2]])  # the thread may have gone on to that

    asyncio.run(main())


def test_drain_waits_for_every_place_and_ends_the_thread():
    async def main():
        threads = set(threading.enumerate())
        batcher = Batcher(Device().run)
        with batcher.place(1) as submit:
            draining = asyncio.ensure_future(batcher.drain())
            for _ in range(5):
                await asyncio.sleep(0)
            assert not draining.done()
            assert (await submit(pictures(7)))[0, 0] == 14  # it came before the end
        await draining
        left = set(threading.enumerate()) - threads
        assert not any(thread.name == "batcher" for thread in left)

    asyncio.run(main())


def test_batches_are_watched():
    async def main():
        seen = []
        batcher = Batcher(Device().run, watch=lambda *numbers: seen.append(numbers))
        await ask(batcher, 1, 2)
        await batcher.drain()
        ((count, waited, seconds),) = seen
        assert count == 2
        assert waited >= 0 and seconds >= 0

    asyncio.run(main())


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, POISON), min_size=1, max_size=9),
        st.integers(0, 3),  # turns of the event loop before it is sent
        st.none() | st.integers(0, 6),  # turns after which it is cancelled
    ),
    max_size=25,
)


@given(
    requests=REQUESTS,
    max_batch_size=st.integers(1, 8),
    max_queue=st.integers(9, 40),
    max_delay=st.sampled_from([0.0, 0.001]),
)
@settings(max_examples=150, deadline=None)
def test_everybody_gets_their_own_answer_once(requests, max_batch_size, max_queue, max_delay):
    device = Device()

    async def client(batcher, numbers, before):
        for _ in range(before):
            await asyncio.sleep(0)
        return await ask(batcher, *numbers)

    async def cancel(task, after):
        for _ in range(after):
            await asyncio.sleep(0)
        task.cancel()

    async def main():
        batcher = Batcher(
            device.run, max_batch_size=max_batch_size, max_queue=max_queue, max_delay=max_delay
        )
        clients = [asyncio.ensure_future(client(batcher, n, before)) for n, before, _ in requests]
        leaving = [
            cancel(task, after)
            for task, (_, _, after) in zip(clients, requests, strict=True)
            if after is not None
        ]
        await asyncio.gather(*leaving)
        answers = await asyncio.gather(*clients, return_exceptions=True)
        await batcher.drain()
        assert batcher.waiting == 0
        return answers

    answers = asyncio.run(main())
    for (numbers, _, cancelled), answer in zip(requests, answers, strict=True):
        if isinstance(answer, asyncio.CancelledError):
            assert cancelled is not None
        elif isinstance(answer, ValueError):
            assert POISON in numbers
        elif not isinstance(answer, BusyError):
            assert answer == [2 * number for number in numbers]
    assert all(len(batch) <= max_batch_size for batch in device.batches)
    if not any(POISON in numbers for numbers, _, _ in requests):  # nothing had to be tried again
        assert sum(map(len, device.batches)) <= sum(len(numbers) for numbers, _, _ in requests)
