"""Addresses of directories on a server: what is supported, and what each scheme needs."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from cmkd_scale.errors import UsageError

SCHEMES = ("s3", "gs", "https", "http", "hf")

_PACKAGES = {
    **{"s3": ("s3fs",), "gs": ("gcsfs",), "https": ("aiohttp",), "http": ("aiohttp",)},
    "hf": ("huggingface_hub", "aiohttp"),
}
_WEB_CREDENTIALS = "USER:PASSWORD@ in the address, or ~/.netrc"
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket "
    "FSSPEC_S3_ANON=true",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS; for a public bucket FSSPEC_GS_TOKEN=anon",
    **{"https": _WEB_CREDENTIALS, "http": _WEB_CREDENTIALS, "hf": "HF_TOKEN"},
}
"""Where each scheme's credentials come from."""
HUB = re.compile(
    r"hf://(?:(?P<type>dataset|space)s/)?(?P<repo>(?!(?:dataset|space|bucket)s/)[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
"""A path in a repository of the Hugging Face Hub."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Address:
    """A directory on a server; what can be a secret is not in ``shown``."""

    scheme: str
    base: str
    """With user and password, without query."""
    query: str
    """With its question mark, or nothing."""
    shown: str
    """For messages."""

    def file(self, name: str) -> str:
        """What to ask the server for."""
        return f"{self.base}/{name}{self.query}"

    def child(self, name: str) -> Address:
        """The address of a sub-directory."""
        return replace(self, base=f"{self.base}/{name}", shown=f"{self.shown}/{name}")


def is_remote(address: str) -> bool:
    """Whether an address means a server rather than a local directory."""
    return "://" in address


def is_bare(name: str) -> bool:
    """Whether this is a file name as a manifest may have it: no path, no hidden file."""
    return _NAME.fullmatch(name) is not None


def parse_address(url: str) -> Address:
    """Take the address of a directory apart.

    Raises:
        UsageError: it is not of a supported kind, or a package is missing.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "::" in url.partition("://")[2]:
        raise UsageError(
            "Shards are read from a local directory or from "
            f"{', '.join(f'{name}://' for name in SCHEMES)}; not from addresses of another kind."
        )
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit(f"{scheme}://")
    host = parts.netloc.rpartition("@")[2]
    address = f"{scheme}://{host}{parts.path}".rstrip("/")
    if not host or (scheme == "hf" and not HUB.fullmatch(url.rstrip("/"))):
        form = "hf://datasets/OWNER/NAME[@REVISION]/PATH" if scheme == "hf" else "s3://BUCKET/PATH"
        raise UsageError(f"{address} is not a complete address, such as {form}.")
    secrets = parts.query or parts.fragment or "@" in parts.netloc
    if parts.fragment or (secrets and scheme not in ("https", "http")):
        raise UsageError(
            f"{address}: an address of {scheme}:// has no user, query (?) or fragment (#); "
            f"credentials come from {CREDENTIALS[scheme]}."
        )
    for package in _PACKAGES[scheme]:
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{address}: {scheme}:// needs the package {package}: "
                "pip install 'cmkd_scale[remote]'"
            )
    base = f"{scheme}://{parts.netloc}{parts.path}".rstrip("/")
    return Address(scheme, base, f"?{parts.query}" if parts.query else "", address)
