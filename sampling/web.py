"""Pictures from the web, for --allow_urls: whoever writes a question must not reach what only this machine can reach.

A URL may name this very machine, a router or a cloud's metadata service (server-side request forgery, CWE-918), in
many disguises: 127.1, a public name whose DNS entry says 10.0.0.1, a redirect, a name that says something else when it
is looked up a second time. So every address that a name has must be public, the connection goes to the very address
that was checked, and a redirect is a new URL. What comes is small, quick and a picture, or nothing.
"""

import io
import os
import socket
import ssl
import time
from contextlib import closing, contextmanager, suppress
from functools import lru_cache, partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import ip_address
from threading import Timer
from urllib.parse import quote, urljoin, urlsplit

from vision import open_picture

MAX_BYTES, SECONDS, REDIRECTS = 20_000_000, 20.0, 3  # of one picture, its redirects included
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # without EPS, for which Pillow starts Ghostscript
CONNECTIONS = {"http": HTTPConnection, "https": HTTPSConnection}


def is_url(name):
    """Whether a picture's name is a URL rather than a path."""
    return str(name).lower().startswith(("http://", "https://"))


def source(name, allow_urls=False, folder=""):
    """A picture's name -> its path or, for a URL, a function that fetches it; what a Request takes as image."""
    if not is_url(name):
        return os.path.join(folder, name)
    if not allow_urls:
        raise ValueError(f"picture {name} is a URL; add --allow_urls to have it fetched")
    return partial(fetch, name)


def fetch(url):
    """Download a picture. -> PIL picture in RGB. ValueError, one sentence: what stood in the way."""
    return open_picture(io.BytesIO(body_of(url)), name=url, formats=FORMATS)


@lru_cache(maxsize=8)  # several questions about a picture often follow one another
def body_of(url):
    """The bytes behind a URL. ValueError: there are none, or they are too many or too slow."""
    deadline = time.monotonic() + SECONDS
    try:
        return download(url, deadline)
    except (ValueError, OSError, HTTPException) as error:
        late = isinstance(error, TimeoutError) or time.monotonic() >= deadline
        reason = f"it did not come within {SECONDS:g} seconds" if late else str(error) or type(error).__name__
        raise ValueError(f"picture {url} cannot be fetched: {reason}") from None


def download(url, deadline):
    """The same, with OSError or HTTPException, too, and until a time.monotonic() of `deadline`."""
    for _ in range(1 + REDIRECTS):
        parts = urlsplit(url)
        if parts.scheme not in CONNECTIONS or not parts.hostname:
            raise ValueError(f"{url} is no http(s) address")
        port = parts.port or CONNECTIONS[parts.scheme].default_port
        connection = CONNECTIONS[parts.scheme](parts.hostname, port)
        connection.sock = connect(parts.hostname, port, deadline)
        with closing(connection), hung_up_at(deadline, connection.sock):
            if parts.scheme == "https":
                connection.sock = ssl.create_default_context().wrap_socket(
                    connection.sock, server_hostname=parts.hostname)
            target = quote(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", safe="!$%&'()*+,/:;=?@[]~")
            connection.request("GET", target, headers={"User-Agent": "pumice", "Accept": "image/*"})
            with connection.getresponse() as response:  # which may have taken the socket over
                if response.status not in (301, 302, 303, 307, 308):
                    return read(response, deadline)
                url = urljoin(url, response.getheader("Location", ""))
    raise ValueError(f"it leads from one address to the next, more than {REDIRECTS} times")


def connect(host, port, deadline):
    """A socket to the first address of a host that answers. ValueError unless all its addresses are public."""
    addresses = [place[0] for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in addresses:
        if not is_public(address):
            raise ValueError(f"{host} is {address}, which is no public address")
    for address in addresses:
        with suppress(OSError if address != addresses[-1] else ()):
            return socket.create_connection((address, port), timeout=max(0.01, deadline - time.monotonic()))


def is_public(address):
    """Whether an IP address, as text, belongs to the internet at large; one that wraps another (6to4, NAT64) does not
    count, since the wrapped one may not."""
    address = ip_address(address)
    wraps = address.version == 6 and address.sixtofour is not None
    return address.is_global and not (address.is_multicast or address.is_reserved or wraps)


@contextmanager
def hung_up_at(deadline, sock):
    """Within the block, cut a connection off at the deadline: a timeout alone never ends one that drips."""
    with sock.dup() as line:  # the same connection, also once `sock` has been wrapped by ssl
        timer = Timer(deadline - time.monotonic(), line.shutdown, [socket.SHUT_RDWR])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def read(response, deadline):
    """The body of an answer, if there is one of a size that a picture may have."""
    if response.status != 200:
        raise ValueError(f"the server says {response.status} {response.reason}")
    body = response.read(MAX_BYTES + 1) if int(response.getheader("Content-Length", 0)) <= MAX_BYTES else None
    if body is None or len(body) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES / 1e6:.0f} MB")
    if time.monotonic() >= deadline:
        raise TimeoutError
    return body
