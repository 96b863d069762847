"""One connection, read by read: its bytes come from the test, and nothing from a socket."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from starlette.requests import Request
from uvicorn.server import ServerState

from tinyserve.server import Limits
from tinyserve.server.body import GONE, _while_connected
from tinyserve.server.connection import protocol
from tinyserve.server.metrics import Metrics

LIMITS = Limits(head_bytes=1000, head_seconds=0.2, answer_seconds=0.2, idle_seconds=60)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Transport(asyncio.Transport):
    """What a connection does with its socket."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.unread = 0
        self.reading, self.closing, self.aborted = True, False, False

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.unread

    @property
    def answers(self) -> int:
        return self.written.count(b"HTTP/1.1 ")


class App:
    """Answers after the whole body, or at once, when it may."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.may.set()
        self.reads_body = True
        self.bodies: list[bytes] = []
        self.gone: asyncio.Future[None] | None = None
        self.calls = 0

    async def __call__(self, scope, receive, send) -> None:
        self.calls += 1
        self.gone = scope[GONE]
        body = b""
        while self.reads_body:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await self.may.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"x"})


def converse(test: Callable[..., Awaitable[None]]) -> None:
    """Run ``test`` with an application, the connection to it, and what that does."""

    async def run() -> None:
        app, transport = App(), Transport()
        config = uvicorn.Config(app, http=protocol(LIMITS, Metrics()), log_config=None)
        config.load()
        connection = config.http_protocol_class(config, ServerState(), {})
        connection.connection_made(transport)
        await test(app, connection, transport)

    asyncio.run(run())


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def post(length: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length


@pytest.mark.parametrize("length", [100, 200_000])
def test_whether_a_client_is_there_is_read_on_after_its_body(length):
    async def test(app, connection, transport):
        app.may.clear()
        connection.data_received(post(length) + bytes(10))
        await turns()  # it waits for the rest, which comes at once
        connection.data_received(bytes(length - 10))
        await turns()
        assert transport.reading
        connection.connection_lost(None)
        assert app.gone.done()

    converse(test)


def test_a_client_that_goes_when_its_answer_comes_cancels_nothing_that_follows():
    async def run() -> str:
        loop = asyncio.get_running_loop()
        gone, answer = loop.create_future(), loop.create_future()

        async def work() -> str:
            with _while_connected(Request({"type": "http", GONE: gone})):
                await answer
            await asyncio.sleep(0)
            return "done"

        task = asyncio.create_task(work())
        await turns()
        answer.set_result(None)
        gone.set_result(None)
        return await task

    assert asyncio.run(run()) == "done"


def test_what_is_no_body_is_bounded():
    chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def head(_app, connection, transport):
        connection.data_received(GET[:-2] + b"a: " + bytes(b"x" * 900))
        assert not transport.aborted
        connection.data_received(bytes(b"x" * 100))
        assert transport.aborted

    async def trailers(_app, connection, transport):
        connection.data_received(chunked + b"1\r\nx\r\n")
        for _ in range(30):
            connection.data_received(b"1\r\nx\r\n" * 10)  # a body of small chunks
        connection.data_received(b"0\r\n")
        assert not transport.aborted
        for _ in range(300):
            connection.data_received(b"a: b\r\n")
        assert transport.aborted

    converse(head)
    converse(trailers)


def test_requests_may_follow_each_other_before_their_answers():
    async def test(_app, connection, transport):
        connection.data_received((post(300) + bytes(300)) * 6 + GET[:9])
        connection.data_received(GET[9:])
        await turns()
        assert (transport.answers, transport.closing) == (7, False)

    converse(test)


def with_an_offer(request: bytes) -> bytes:
    """As Java's clients send it, which can do HTTP/2, too."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAA\r\n"
    return request.replace(b"\r\n\r\n", b"\r\n" + offer + b"\r\n", 1)


@pytest.mark.parametrize("at", [0, 30, -150, -75])
def test_an_offer_to_speak_http2_is_ignored_and_the_body_is_the_requests_own(at):
    async def test(app, connection, transport):
        # A body like a request, which is none.
        request = with_an_offer(post(len(GET))) + GET
        connection.data_received((request + with_an_offer(GET)) * 3 + request[:at])
        connection.data_received(request[at:] + GET)
        await turns()
        assert (transport.answers, app.calls, transport.closing) == (8, 8, False)
        assert app.bodies == [GET, b"", GET, b"", GET, b"", GET, b""]
        assert connection._data == b""

    converse(test)


@pytest.mark.parametrize("request_", [GET, with_an_offer(GET)], ids=["plain", "with an offer"])
def test_requests_that_pile_up_close_the_connection(request_):
    async def test(app, connection, transport):
        app.may.clear()
        connection.data_received(request_ * 5000)
        assert transport.closing
        assert len(connection.pipeline) < 100

    converse(test)


def test_an_answer_that_nobody_fetches_closes_the_connection_and_one_that_is_late_does_not():
    async def test(_app, connection, transport):
        transport.unread = 5
        for _ in range(4):
            connection.data_received(GET)
            await asyncio.sleep(LIMITS.answer_seconds / 2)
            assert not transport.aborted  # each answer has its own time
        await asyncio.sleep(LIMITS.answer_seconds)
        assert transport.aborted

    converse(test)


@pytest.mark.parametrize("waits", [False, True], ids=["its body", "its answer"])
def test_a_request_that_came_before_the_last_answer_has_its_own_time(waits):
    """Though no head comes: of its body there is more, or behind it a head has begun."""

    async def test(app, connection, transport):
        app.may.clear()
        connection.data_received(GET)
        await turns()
        connection.data_received(GET + GET[:9] if waits else post(100) + bytes(10))
        app.may.set()
        await asyncio.sleep(0)  # the first one answers, and no other
        app.may.clear()
        await asyncio.sleep(2 * LIMITS.head_seconds)
        assert (transport.answers, transport.closing) == (1, False)
        app.may.set()
        connection.data_received(GET[9:] if waits else bytes(90))
        await turns()
        assert (transport.answers, transport.closing) == (3 if waits else 2, False)

    converse(test)


def test_a_body_after_its_answer_is_no_idle_time_and_does_not_end_the_connection():
    async def test(app, connection, transport):
        app.reads_body = False
        connection.data_received(post(100))
        await turns()
        assert transport.answers == 1
        connection.data_received(bytes(100))
        await asyncio.sleep(2 * LIMITS.head_seconds)
        connection.data_received(GET)
        await turns()
        assert (transport.answers, transport.closing) == (2, False)
        # And a body that does not come whole is not waited for.
        connection.data_received(post(100) + bytes(10))
        await asyncio.sleep(2 * LIMITS.head_seconds)
        assert transport.aborted

    converse(test)
