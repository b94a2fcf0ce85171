"""Scrapy's settings for every crawl; each default that is not polite or not safe is overridden."""

from importlib import metadata
from typing import Any

from pipelines.spiders.guards import TRUSTED, origin_of

DELAY_SECONDS = 0.1
TIMEOUT_SECONDS = 60.0
MAX_BYTES = 20 * 2**20
MAX_REDIRECTS = 5
WEB = "scrapy.core.downloader.handlers.http11.HTTP11DownloadHandler"
STOCK = "scrapy.downloadermiddlewares"


def user_agent(contact: str | None = None) -> str:
    """Return name/version, and whom to write to about this crawl or else the project's page."""
    urls = metadata.metadata("starloom").get_all("Project-URL") or []
    page = contact or next((url.partition(",")[2].strip() for url in urls), None)
    return f"starloom/{metadata.version('starloom')}" + (f" (+{page})" if page else "")


def scrapy_settings(request: dict[str, Any]) -> dict[str, Any]:
    """Return the settings for a request of `run_spider`."""
    return {
        "BOT_NAME": "starloom",
        "USER_AGENT": user_agent(request.get("contact")),
        "ROBOTSTXT_OBEY": True,
        "ROBOTSTXT_USER_AGENT": "starloom",
        "CONCURRENT_REQUESTS": 1,
        "CONCURRENT_REQUESTS_PER_DOMAIN": 1,
        "DOWNLOAD_DELAY": float(request.get("delay", DELAY_SECONDS)),
        "DOWNLOAD_DELAY_JITTER": 0.0,
        "DOWNLOAD_TIMEOUT": float(request.get("timeout", TIMEOUT_SECONDS)),
        "DOWNLOAD_MAXSIZE": int(request.get("max_bytes", MAX_BYTES)),
        "DOWNLOAD_FAIL_ON_DATALOSS": True,
        "DOWNLOAD_VERIFY_CERTIFICATES": True,
        "DOWNLOAD_HANDLERS": {
            **dict.fromkeys(("data", "file", "ftp", "s3")),
            "http": WEB,
            "https": WEB,
        },
        "DEFAULT_REQUEST_HEADERS": {"Accept": "*/*", "Accept-Encoding": "gzip"},
        # Scrapy's decompression accepts a cut-off gzip body; the crawl decodes strictly itself.
        "COMPRESSION_ENABLED": False,
        # Retries belong to the conversation: it knows Retry-After, backoff and its own clock.
        "RETRY_ENABLED": False,
        "HTTPERROR_ALLOW_ALL": True,
        "REDIRECT_MAX_TIMES": MAX_REDIRECTS,
        "METAREFRESH_ENABLED": False,
        "REFERRER_POLICY": "no-referrer",  # an address may hold a key
        "COOKIES_ENABLED": False,
        "HTTPCACHE_ENABLED": False,
        "TELNETCONSOLE_ENABLED": False,
        "REMOTE_CONTROL_ENABLED": False,  # a port that runs code
        "LOG_LEVEL": "WARNING",
        "STATS_DUMP": False,
        "TWISTED_DNS_RESOLVER": "pipelines.spiders.guards.GuardedResolver",
        TRUSTED: [list(origin_of(url)) for url in request.get("trusted", ())],
        "DOWNLOADER_MIDDLEWARES": {
            "pipelines.spiders.guards.OriginGuard": 40,
            f"{STOCK}.offsite.OffsiteMiddleware": None,
            f"{STOCK}.robotstxt.RobotsTxtMiddleware": None,
            "pipelines.spiders.guards.Robots": 100,
        },
    }
