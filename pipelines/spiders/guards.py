"""What keeps a crawl on the public web: addresses checked where they are connected to.

The resolver hands out public addresses only, and the connection is made to what it handed out, so
neither a redirect nor a name that changes its address (DNS rebinding) reaches a private network.
Behind a proxy that the environment names, the proxy resolves names: then only addresses written
out in a URL are checked.
"""

import ipaddress
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

from scrapy import Request
from scrapy.crawler import Crawler
from scrapy.downloadermiddlewares.robotstxt import RobotsTxtMiddleware
from scrapy.exceptions import IgnoreRequest
from scrapy.http import Response
from scrapy.utils.httpobj import urlparse_cached
from twisted.internet.interfaces import IHostnameResolver, IResolutionReceiver
from zope.interface import implementer  # type: ignore[import-untyped]

TRUSTED = "STARLOOM_TRUSTED"  # setting: list of [host, port] whose address is not checked
PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")

refused_hosts: dict[str, str] = {}  # host: its address; since the last request of the crawl


class Refused(IgnoreRequest):  # type: ignore[misc]
    """The request leads where a crawl must not go."""


class RobotsUnreachable(IgnoreRequest):  # type: ignore[misc]
    """robots.txt could not be read, so nothing may be asked yet (RFC 9309, 2.3.1.4)."""


def is_public(address: str) -> bool:
    """Say whether an IP address is on the public internet, looking into IPv6 embeddings of IPv4.

    >>> is_public("93.184.215.14"), is_public("169.254.169.254"), is_public("::ffff:10.0.0.1")
    (True, False, False)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def origin_of(url: str) -> tuple[str, int]:
    """Return host and port of a URL; ValueError for one that is not http(s) with a host."""
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is no http or https address")
    return parts.hostname.lower(), parts.port or PORTS[parts.scheme]


class OriginGuard:
    """Downloader middleware: http and https only, no user names, no private addresses."""

    def __init__(self, trusted: Sequence[Sequence[Any]]) -> None:
        """Let the trusted (host, port) pairs have any address."""
        self._trusted = {(host, port) for host, port in trusted}

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Build from the crawl's settings."""
        return cls(crawler.settings.getlist(TRUSTED))

    def process_request(self, request: Request) -> None:
        """Raise Refused for a request that must not be made."""
        parts = urlparse_cached(request)
        try:
            host, port = origin_of(request.url)
        except ValueError as error:
            raise Refused(f"leads to {parts.scheme}:, only http and https are followed") from error
        if parts.username is not None or parts.password is not None:
            raise Refused("leads to an address with a user name in it")
        before = request.meta.get("redirect_urls") or [request.url]
        if before[-1].startswith("https:") and parts.scheme == "http":
            raise Refused(f"is redirected from https to plain http on {host}")
        if (host, port) not in self._trusted and _is_literal(host) and not is_public(host):
            raise Refused(f"leads to {host}, a private address")


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


@implementer(IHostnameResolver)
class GuardedResolver:
    """Resolver of the reactor that hands out public addresses only, but for trusted hosts."""

    def __init__(self, reactor: Any, trusted: Sequence[Sequence[Any]]) -> None:
        """Wrap the reactor's own resolver."""
        self._reactor = reactor
        self._inner = reactor.nameResolver
        self._trusted = {(host, port) for host, port in trusted}

    @classmethod
    def from_crawler(cls, crawler: Any, reactor: Any) -> Self:
        """Build from the crawl's settings."""
        return cls(reactor, crawler.settings.getlist(TRUSTED))

    def install_on_reactor(self) -> None:
        """Make the reactor use this resolver."""
        self._reactor.installNameResolver(self)

    def resolveHostName(  # noqa: N802 - Twisted's interface
        self,
        resolutionReceiver: IResolutionReceiver,  # noqa: N803
        hostName: str,  # noqa: N803
        portNumber: int = 0,  # noqa: N803
        addressTypes: Any = None,  # noqa: N803
        transportSemantics: str = "TCP",  # noqa: N803
    ) -> Any:
        """Resolve a name; private addresses are left out and noted in `refused_hosts`."""
        receiver = resolutionReceiver
        if (hostName.lower(), portNumber) not in self._trusted:
            receiver = _PublicOnly(resolutionReceiver, hostName)
        return self._inner.resolveHostName(
            receiver, hostName, portNumber, addressTypes, transportSemantics
        )


@implementer(IResolutionReceiver)
class _PublicOnly:
    def __init__(self, receiver: Any, host: str) -> None:
        self._receiver = receiver
        self._host = host

    def resolutionBegan(self, resolution: Any) -> None:  # noqa: N802
        self._receiver.resolutionBegan(resolution)

    def addressResolved(self, address: Any) -> None:  # noqa: N802
        if is_public(address.host):
            self._receiver.addressResolved(address)
        else:
            refused_hosts[self._host] = address.host

    def resolutionComplete(self) -> None:  # noqa: N802
        self._receiver.resolutionComplete()


class Robots(RobotsTxtMiddleware):  # type: ignore[misc]
    """Scrapy's robots.txt, read by RFC 9309: 4xx allows all, anything unreachable nothing yet."""

    async def _parse_robots(self, response: Response, netloc: str, request: Request) -> None:
        if 400 <= response.status < 500:
            response = response.replace(body=b"")
        elif response.status != 200:
            raise RobotsUnreachable(f"HTTP status {response.status}")
        await super()._parse_robots(response, netloc, request)

    def _robots_error(self, exc: Exception, netloc: str) -> None:
        waiting = self._parsers[netloc]
        self._parsers[netloc] = _Unreachable(str(exc) or type(exc).__name__)
        waiting.callback(self._parsers[netloc])

    def process_request_2(self, rp: Any, request: Request) -> None:
        """Raise IgnoreRequest for a forbidden page, RobotsUnreachable where nobody can tell."""
        if isinstance(rp, _Unreachable):
            self._parsers.pop(urlparse_cached(request).netloc, None)  # the next request asks again
            raise RobotsUnreachable(f"robots.txt cannot be read ({rp.cause})")
        super().process_request_2(rp, request)


class _Unreachable:
    def __init__(self, cause: str) -> None:
        self.cause = cause
