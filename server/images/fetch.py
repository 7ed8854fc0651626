"""Fetching over http(s), only from domains that an operator allowed, and never into a private network.

Each request goes to an address that was resolved once and checked; the name stays in `Host` and in TLS, where the
certificate must be the name's. Redirects are followed a few times, each checked like the first URL. Proxies of the
environment are not used: they would resolve names by themselves. What comes is counted while it streams.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address

import httpx

from winnow.server import __version__
from winnow.server.images.addresses import Address, is_public
from winnow.server.images.bad import BadImage
from winnow.server.images.uri import too_many_bytes
from winnow.server.settings import Settings

PORTS = {"http": 80, "https": 443}
MAX_URL_CHARS = 8192
HEADERS = {"User-Agent": f"winnow/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

logging.getLogger("httpcore").setLevel(logging.WARNING)  # it logs URLs, which are text of callers


async def resolve(host: str, port: int) -> list[Address]:
    """Addresses of a name, best first. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(at[0]) for *_, at in found))


class Fetcher:
    """Fetches images. One for a server; `close` it in the end."""

    def __init__(
        self, settings: Settings, resolve: Resolve = resolve, is_allowed: Callable[[Address], bool] = is_public
    ):
        """
        Args
            resolve, is_allowed: what names mean, and which addresses are fetched from
        """
        self.domains = frozenset(settings.allowed_image_domains)
        self.timeout_s = settings.image_fetch_timeout_s
        self.max_bytes = settings.max_image_bytes
        self.max_redirects = settings.max_image_redirects
        self._resolve = resolve
        self._is_allowed = is_allowed
        self._slots = asyncio.Semaphore(settings.max_image_fetches)
        self._transport: httpx.AsyncHTTPTransport | None = None

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.aclose()

    async def fetch(self, text: str) -> bytes:
        """
        Raises
            BadImage
        """
        url = self._checked(text)
        async with self._slots:
            try:
                async with asyncio.timeout(self.timeout_s):
                    return await self._follow(url)
            except TimeoutError as late:
                message = f"did not arrive within {self.timeout_s:g} s"
                raise BadImage(message, "failed_to_download_image") from late

    def _checked(self, text: str) -> httpx.URL:
        """The URL, of an allowed domain."""
        if not self.domains:
            raise BadImage("this server fetches no images; send them as data: URIs", "invalid_image_url")
        try:
            if len(text) > MAX_URL_CHARS:
                raise httpx.InvalidURL("too long")
            url = httpx.URL(text)
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise BadImage("is not a valid URL", "invalid_image_url") from error
        if url.scheme not in PORTS or not url.host:
            raise BadImage("must be a data:, http: or https: URL", "invalid_image_url")
        if url.userinfo:
            raise BadImage("must not hold a user name or password", "invalid_image_url")
        if domain(url) not in self.domains:
            raise BadImage("is not on a domain that this server may fetch images from", "invalid_image_url")
        return url

    async def _follow(self, url: httpx.URL) -> bytes:
        for _ in range(self.max_redirects + 1):
            found = await self._get(url)
            if isinstance(found, bytes):
                return found
            if url.scheme == "https" and found.scheme == "http":
                raise BadImage("is redirected from https to http", "failed_to_download_image")
            url = found
        raise BadImage(f"is redirected more than {self.max_redirects} times", "failed_to_download_image")

    async def _get(self, url: httpx.URL) -> bytes | httpx.URL:
        """The body, or where it is said to be."""
        refused: Exception | None = None
        for address in await self._addresses(url):
            try:
                return await self._get_from(address, url)
            except httpx.ConnectError as error:
                refused = error
            except httpx.HTTPError as error:
                raise BadImage("could not be fetched", "failed_to_download_image") from error
        raise BadImage("could not be fetched: no connection", "failed_to_download_image") from refused

    async def _addresses(self, url: httpx.URL) -> Sequence[Address]:
        host = url.raw_host.decode()
        try:
            found = await self._resolve(host, url.port or PORTS[url.scheme])
        except (OSError, ValueError) as error:
            raise BadImage("could not be fetched: no such host", "failed_to_download_image") from error
        # One private address among public ones is reason enough: somebody plays with the name.
        if not found or not all(self._is_allowed(address) for address in found):
            raise BadImage("is at an address that this server does not fetch from", "invalid_image_url")
        return found

    async def _get_from(self, address: Address, url: httpx.URL) -> bytes | httpx.URL:
        request = httpx.Request(
            "GET",
            url.copy_with(host=str(address), fragment=None),
            headers=HEADERS | {"Host": url.netloc.decode()},
            extensions={"sni_hostname": url.raw_host.decode(), "timeout": httpx.Timeout(self.timeout_s).as_dict()},
        )
        answer = await self._connected().handle_async_request(request)
        try:
            if answer.has_redirect_location:
                return self._checked(str(url.join(answer.headers["location"])))
            if answer.status_code != httpx.codes.OK:
                message = f"could not be fetched: the answer has status {answer.status_code}"
                raise BadImage(message, "failed_to_download_image")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise BadImage("comes compressed, which was not asked for", "failed_to_download_image")
            return await self._body(answer)
        except httpx.InvalidURL as error:
            raise BadImage("is redirected to what is no URL", "failed_to_download_image") from error
        finally:
            await answer.aclose()

    async def _body(self, answer: httpx.Response) -> bytes:
        declared = answer.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.max_bytes:
            raise too_many_bytes(self.max_bytes)
        data = bytearray()
        async for chunk in answer.aiter_raw():
            data += chunk
            if len(data) > self.max_bytes:
                raise too_many_bytes(self.max_bytes)
        return bytes(data)

    def _connected(self) -> httpx.AsyncHTTPTransport:
        """What is beneath a client: it knows no proxies and no cookies. No connection is used twice: pooled ones go by
        address, and a certificate is for a name."""
        if self._transport is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self._transport = httpx.AsyncHTTPTransport(trust_env=False, limits=limits)
        return self._transport


def domain(url: httpx.URL) -> str:
    """As `allowed_image_domains` has it: the host, and its port if that is not the scheme's own."""
    host = url.raw_host.decode().lower()
    return host if url.port is None else f"{host}:{url.port}"
