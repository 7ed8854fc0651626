"""Fetching images: what is never fetched, and how what is fetched is bounded.

Servers here are on loopback, which only a fetcher made for tests may reach.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest

from winnow.server.images.addresses import Address, is_public
from winnow.server.images.bad import BadImage
from winnow.server.images.fetch import Fetcher, resolve
from winnow.server.settings import SettingsError, load

from .pictures import LOOPBACK
from .test_image_addresses import PRIVATE

pytestmark = pytest.mark.anyio
CERTIFICATE = Path(__file__).with_name("ok.example.pem")
Serve = Callable[[str, dict[str, str], asyncio.StreamWriter], Awaitable[None]]


def fetcher(*domains: str, hosts: dict[str, list[str]] | None = None, is_open: bool = True, **options: Any) -> Fetcher:
    """One to which every name means loopback, unless `hosts` says else; `is_open`: it may go there."""

    async def look_up(host: str, port: int) -> list[Address]:
        if hosts is None:
            return [LOOPBACK]
        if host not in hosts:
            raise OSError("no such host")
        return [ip_address(address) for address in hosts[host]]

    settings = load(allowed_image_domains=domains, **options)
    return Fetcher(settings, look_up, (lambda address: True) if is_open else is_public)


@asynccontextmanager
async def serving(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that answers GETs with `serve(path, headers, writer)`; its port."""

    jobs: list[asyncio.Task[None]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        with suppress(ConnectionError):  # the fetcher had enough
            await serve(head[0].split(" ")[1], headers, writer)
            await writer.drain()

    async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        jobs.append(asyncio.create_task(answer(reader, writer)))
        await asyncio.wait(jobs[-1:])
        writer.close()
        with suppress(OSError):  # a broken connection is closed as well
            await writer.wait_closed()

    before = asyncio.all_tasks()
    server = await asyncio.start_server(on_connect, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield server.sockets[0].getsockname()[1]
    # A connection that was accepted last may not have got to its answer yet.
    while left := asyncio.all_tasks() - before:
        for job in jobs:
            job.cancel()  # what nobody waits for any more
        await asyncio.wait(left)
    ended = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ended), ended
    await asyncio.sleep(0)  # the last connection is closed


def answering(status: str, *headers: str, body: bytes = b"") -> Serve:
    async def serve(path: str, given: dict[str, str], writer: asyncio.StreamWriter) -> None:
        writer.write("\r\n".join((f"HTTP/1.1 {status}", *headers, "Connection: close", "", "")).encode() + body)

    return serve


async def refusal(of: Fetcher, url: str) -> BadImage:
    with pytest.raises(BadImage) as told:
        await of.fetch(url)
    await of.close()
    return told.value


async def test_what_is_served_is_fetched() -> None:
    seen: list[tuple[str, dict[str, str]]] = []

    async def serve(path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        seen.append((path, headers))
        writer.write(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 5\r\n\r\nimage")

    async with serving(serve) as port:
        one = fetcher(f"images.example:{port}")
        assert await one.fetch(f"http://Images.Example:{port}/a%20b.png?x=1#part") == b"image"
        assert await one.fetch(f"HTTP://images.example:{port}") == b"image"
        await one.close()
    (path, headers), (root, again) = seen
    assert (path, root) == ("/a%20b.png?x=1", "/")
    assert headers["host"] == f"images.example:{port}"
    assert headers["accept-encoding"] == "identity"
    assert again == headers
    assert not {"cookie", "authorization", "referer"} & headers.keys()


async def test_nothing_is_fetched_unless_domains_are_allowed() -> None:
    told = await refusal(Fetcher(load()), "https://example.com/a.png")
    assert "fetches no images" in str(told)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.png",
        "/etc/passwd",
        "//ok.example/a.png",
        "file:///etc/passwd",
        "ftp://ok.example/a.png",
        "gopher://ok.example:70/",
        "unix:///run/docker.sock",
        "http://",
        "http:///a.png",
        "http://other.example/a.png",
        "http://sub.ok.example/a.png",
        "http://ok.example./a.png",
        "http://ok.example.evil.example/a.png",
        "http://ok.example:22/a.png",
        "http://ok.example:443/a.png",
        "https://ok.example:80/a.png",
        "http://ok.example@evil.example/a.png",
        "http://user:secret@ok.example/a.png",
        "http://evil.example\\@ok.example/",
        "http://evil.example#@ok.example/",
        "http://127.0.0.1/a.png",
        "http://[::1]/a.png",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://ok.example\r\nHost: evil.example/",
        "http://ok.example /",
        "http://ok.example/" + "a" * 10_000,
        "http://ⓞⓚ.example.evil.example/",
        "http://ok.example:99999/",
        "http://ok.example:port/",
        "javascript:alert(1)",
    ],
)
async def test_urls_that_are_refused(url: str) -> None:
    async def never(host: str, port: int) -> list[Address]:
        raise AssertionError(f"{host} was looked up")

    one = Fetcher(load(allowed_image_domains=("ok.example",)), never)
    assert (await refusal(one, url)).code == "invalid_image_url"


@pytest.mark.parametrize("address", PRIVATE)
async def test_names_of_private_addresses(address: str) -> None:
    """Whatever an allowed name resolves to; one private address among public ones is enough."""
    for addresses in ([address], ["93.184.216.34", address]):
        one = fetcher("ok.example", hosts={"ok.example": addresses}, is_open=False)
        assert (await refusal(one, "http://ok.example/")).code == "invalid_image_url"


async def test_loopback_is_refused_by_default() -> None:
    """With the real resolver: an allowed name or address that is this machine's."""
    async with serving(answering("200 OK", body=b"secret")) as port:
        for host in ("localhost", "127.0.0.1"):
            one = Fetcher(load(allowed_image_domains=(f"{host}:{port}",)))
            told = await refusal(one, f"http://{host}:{port}/")
            assert "does not fetch from" in str(told)
    assert all(not is_public(address) for address in await resolve("localhost", 80))


async def test_a_name_is_looked_up_once() -> None:
    """What is checked is what is connected to, whatever the name means a moment later."""
    asked = 0

    async def rebinding(host: str, port: int) -> list[Address]:
        nonlocal asked
        asked += 1
        return [LOOPBACK if asked == 1 else ip_address("10.0.0.1")]

    async with serving(answering("200 OK", "Content-Length: 2", body=b"ok")) as port:
        settings = load(allowed_image_domains=(f"ok.invalid:{port}",))
        one = Fetcher(settings, rebinding, lambda address: address == LOOPBACK)
        assert await one.fetch(f"http://ok.invalid:{port}/") == b"ok"
        await one.close()
    assert asked == 1


async def test_the_next_address_if_one_does_not_answer() -> None:
    async with serving(answering("200 OK", body=b"ok")) as port:
        one = fetcher(f"ok.example:{port}", hosts={"ok.example": ["::1", "127.0.0.1"]})
        assert await one.fetch(f"http://ok.example:{port}/") == b"ok"
        await one.close()
    gone = fetcher(f"ok.example:{port}")
    assert "no connection" in str(await refusal(gone, f"http://ok.example:{port}/"))
    unknown = fetcher("ok.example", hosts={})
    assert "no such host" in str(await refusal(unknown, "http://ok.example/"))


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with serving(answering("200 OK", body=b"ok")) as port:
        one = fetcher(f"ok.example:{port}")
        assert await one.fetch(f"http://ok.example:{port}/") == b"ok"
        await one.close()


async def test_redirects() -> None:
    async def serve(path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        left = int(path.rsplit("/", 1)[-1])
        answer = f"HTTP/1.1 302 Found\r\nLocation: {left - 1}\r\n\r\n" if left else "HTTP/1.1 200 OK\r\n\r\nimage"
        writer.write(answer.encode())

    async with serving(serve) as port:
        one = fetcher(f"ok.example:{port}", max_image_redirects=3)
        assert await one.fetch(f"http://ok.example:{port}/x/3") == b"image"
        assert "more than 3 times" in str(await refusal(one, f"http://ok.example:{port}/x/4"))


@pytest.mark.parametrize(
    "location",
    [
        "http://evil.example/",
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:{port}/",
        "file:///etc/passwd",
        "http://user@ok.example:{port}/",
        "http://ok.example:1/",
        "http://ok.example:port/",
        "http://[/",
    ],
)
async def test_redirects_are_checked_like_urls(location: str) -> None:
    async def serve(path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 301 Gone\r\nLocation: {location.format(port=port)}\r\n\r\n".encode())

    async with serving(serve) as port:
        told = await refusal(fetcher(f"ok.example:{port}"), f"http://ok.example:{port}/")
    assert told.code in ("invalid_image_url", "failed_to_download_image")


async def test_a_redirect_to_a_private_address() -> None:
    """Each hop's name is looked up and checked, an allowed one too."""
    async with serving(answering("307 Go", "Location: http://inside.example/")) as port:
        hosts = {"ok.example": ["127.0.0.1"], "inside.example": ["10.0.0.1"]}
        one = fetcher(f"ok.example:{port}", "inside.example", hosts=hosts)
        one._is_allowed = lambda address: address == LOOPBACK
        assert "does not fetch from" in str(await refusal(one, f"http://ok.example:{port}/"))


@pytest.mark.parametrize(
    ("serve", "why"),
    [
        (answering("404 Not Found"), "status 404"),
        (answering("500 Oops"), "status 500"),
        (answering("204 No Content"), "status 204"),
        (answering("304 Not Modified"), "status 304"),
        (answering("200 OK", "Content-Encoding: gzip", body=b"x"), "compressed"),
        (answering("200 OK", "Content-Length: 2000", body=b"x"), "more bytes"),
        (answering("200 OK", "Content-Length: " + "9" * 18), "more bytes"),
        (answering("200 OK", body=b"x" * 2000), "more bytes"),
        (answering("200 OK", "Content-Length: 50", body=b"x"), "could not be fetched"),
        (answering("nonsense"), "could not be fetched"),
        (answering("200 OK", "X: " + "y" * 200_000), "could not be fetched"),
    ],
)
async def test_answers_that_are_refused(serve: Serve, why: str) -> None:
    async with serving(serve) as port:
        one = fetcher(f"ok.example:{port}", max_image_bytes=1024)
        assert why in str(await refusal(one, f"http://ok.example:{port}/"))


async def test_a_body_is_cut_at_the_limit() -> None:
    sent = 0

    async def endless(path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(1 << 16))
            sent += 1 << 16
            await writer.drain()

    async with serving(endless) as port:
        one = fetcher(f"ok.example:{port}", max_image_bytes=1 << 20)
        assert "more bytes" in str(await refusal(one, f"http://ok.example:{port}/"))
    assert sent < 32 << 20  # what sockets buffer


@pytest.mark.parametrize("pace", ["silence", "a byte at a time"])
async def test_time_is_limited(pace: str) -> None:
    async def slow(path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        if pace != "silence":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(100):
            if pace != "silence":
                writer.write(b"x")
                await writer.drain()
            await asyncio.sleep(0.02)

    async with serving(slow) as port:
        began = time.monotonic()
        one = fetcher(f"ok.example:{port}", image_fetch_timeout_s=0.2)
        assert "within 0.2 s" in str(await refusal(one, f"http://ok.example:{port}/"))
        assert time.monotonic() - began < 1.5


async def test_only_so_many_at_a_time() -> None:
    running = most = 0

    async def serve(path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nimage")

    async with serving(serve) as port:
        one = fetcher(f"ok.example:{port}", max_image_fetches=2)
        assert await asyncio.gather(*(one.fetch(f"http://ok.example:{port}/") for _ in range(6))) == [b"image"] * 6
        await one.close()
    assert most == 2


async def test_the_certificate_must_be_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS is with the name, though the connection is to an address. The certificate is ok.example's, by itself."""
    monkeypatch.setattr("certifi.where", lambda: str(CERTIFICATE))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(CERTIFICATE)
    async with serving(answering("200 OK", body=b"image"), tls) as port:
        one = fetcher(f"ok.example:{port}", f"other.example:{port}")
        assert await one.fetch(f"https://ok.example:{port}/") == b"image"
        told = await refusal(one, f"https://other.example:{port}/")
    assert told.code == "failed_to_download_image"


async def test_from_https_never_to_http() -> None:
    one = fetcher("ok.example")

    async def get(url: httpx.URL) -> httpx.URL:
        return httpx.URL("http://ok.example/")

    one._get = get  # type: ignore[method-assign, assignment]
    assert "from https to http" in str(await refusal(one, "https://ok.example/"))


def test_domains_are_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_ALLOWED_IMAGE_DOMAINS", "A.example, b.example:8443")
    assert load().allowed_image_domains == ("a.example", "b.example:8443")
    for wrong in ("http://a.example", "a.example/x", "*.example", "a b", "ä.example"):
        with pytest.raises(SettingsError, match="allowed_image_domains"):
            load(allowed_image_domains=wrong)
