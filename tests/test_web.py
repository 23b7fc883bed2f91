"""sampling/web.py and the limits of vision.open_picture: pictures from strangers, and what is refused of them."""

import gc
import io
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

import vision
from sampling import web


def png(size=(4, 3), colour="red"):
    """The bytes of a small picture."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def site():
    """A server at 127.0.0.1 -> (its URL, {path: (status, headers, body or a function that writes to the handler)},
    [the (path, headers) it was asked for])."""
    pages, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append((self.path, dict(self.headers)))
            status, headers, body = pages[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                body(self) if callable(body) else self.wfile.write(body)
            except OSError:
                pass  # the other side has hung up

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", pages, asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def reachable(monkeypatch):
    """As if 127.0.0.1 were out in the world; everything else stays what it is."""
    real = web.is_public
    monkeypatch.setattr(web, "is_public", lambda address: address == "127.0.0.1" or real(address))


def refusal(url):
    """The sentence with which a URL is refused."""
    with pytest.raises(ValueError) as refused:
        web.fetch(url)
    assert str(refused.value).startswith(f"picture {url} ") and "\n" not in str(refused.value)
    return str(refused.value)


# ---------------------------------------------------------------------------------------------------------- what comes


def test_a_picture_comes(site, reachable):
    url, pages, asked = site
    pages["/a%20b.png?size=1&x=%C3%A4"] = 200, {"Content-Type": "image/png"}, png()
    picture = web.fetch(f"{url}/a b.png?size=1&x=\u00e4#part")
    assert picture.size == (4, 3) and picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 0, 0)
    assert asked[-1][1]["Host"] == url.removeprefix("http://")


def test_a_picture_asked_about_twice_is_fetched_once(site, reachable):
    url, pages, asked = site
    pages["/once"] = 200, {}, png()
    asked.clear()
    assert web.fetch(f"{url}/once").size == web.fetch(f"{url}/once").size == (4, 3) and len(asked) == 1


def test_redirects_are_followed_a_few_times_only(site, reachable):
    url, pages, _ = site
    pages["/0"] = 200, {}, png()
    for k in range(1, web.REDIRECTS + 2):
        pages[f"/{k}"] = 302, {"Location": f"/{k - 1}" if k % 2 else f"{url}/{k - 1}"}, b""
    assert web.fetch(f"{url}/{web.REDIRECTS}").size == (4, 3)
    assert f"more than {web.REDIRECTS} times" in refusal(f"{url}/{web.REDIRECTS + 1}")


@pytest.mark.filterwarnings("error")  # ResourceWarning: a socket left open
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_no_socket_is_left_open(site, reachable):
    url, pages, _ = site
    pages |= {"/here": (200, {}, png()), "/there": (302, {"Location": "/here"}, b""), "/gone": (410, {}, b"")}
    assert web.fetch(f"{url}/there").size == (4, 3) and "410" in refusal(f"{url}/gone")
    gc.collect()


def test_what_is_no_picture(site, reachable):
    url, pages, _ = site
    pages["/page"] = 200, {"Content-Type": "image/png"}, b"<html>no picture</html>"
    pages["/none"] = 404, {}, png()
    pages["/empty"] = 200, {}, b""
    pages["/program.eps"] = 200, {}, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    assert "cannot be read" in refusal(f"{url}/page") and "cannot be read" in refusal(f"{url}/empty")
    assert "cannot identify" in refusal(f"{url}/program.eps")
    assert "the server says 404" in refusal(f"{url}/none")


@pytest.mark.parametrize("size", ["said", "kept secret"])
def test_too_large(site, reachable, monkeypatch, size):
    url, pages, _ = site
    monkeypatch.setattr(web, "MAX_BYTES", 1_000_000)
    exact = png() + bytes(1_000_000 - len(png()))
    for path, body in (("/just", exact), ("/more", exact + b"x")):
        pages[path] = 200, {"Content-Length": len(body)} if size == "said" else {}, body
    assert web.fetch(f"{url}/just").size == (4, 3)
    assert "larger than 1 MB" in refusal(f"{url}/more")


def test_a_promised_size_is_believed_without_waiting_for_it(site, reachable):
    url, pages, _ = site
    pages["/huge"] = 200, {"Content-Length": 10**12}, lambda handler: time.sleep(3)
    began = time.monotonic()
    assert "larger than 20 MB" in refusal(f"{url}/huge") and time.monotonic() - began < 2


def drip(handler):
    """A byte now and then, for ten seconds."""
    for _ in range(100):
        time.sleep(0.1)
        handler.wfile.write(b"x")


@pytest.mark.parametrize("how", [drip, lambda handler: time.sleep(5)])
def test_too_slow(site, reachable, monkeypatch, how):
    url, pages, _ = site
    monkeypatch.setattr(web, "SECONDS", 0.5)
    pages["/slow"] = 200, {"Content-Length": 1000}, how
    began = time.monotonic()
    assert "did not come within 0.5 seconds" in refusal(f"{url}/slow") and time.monotonic() - began < 2


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_too_slow_before_the_first_line_is_complete(reachable, monkeypatch, scheme):
    """Each byte is in time, the whole is not; with https these are bytes of the handshake."""
    monkeypatch.setattr(web, "SECONDS", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        record = b"\x16\x03\x03\x40\x00" if scheme == "https" else b"HTTP/1.1 200 "
        for byte in record + bytes(100):
            time.sleep(0.1)
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    began = time.monotonic()
    assert "within 0.5 seconds" in refusal(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/")
    assert time.monotonic() - began < 2
    listener.close()


def test_https_to_a_server_without(reachable, site):
    url, *_ = site
    assert "SSL" in refusal(url.replace("http:", "https:") + "/a.png")  # which speaks no TLS


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl, which makes the certificate, is not here")
def test_https_and_its_certificate(reachable, monkeypatch, tmp_path):
    """A certificate that nobody vouches for is refused; once it is trusted, the picture comes."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=here",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
                   check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(certificate, key)
    server.socket = ours.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"https://127.0.0.1:{server.server_port}/a.png"
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(url)
    trusting = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    assert web.fetch(url).size == (4, 3)
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------------------------------------------------ where it leads

PRIVATE = ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1",
           "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "[::1]", "[::]", "[fe80::1]", "[fd00::1]",
           "[ff02::1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
           "[::127.0.0.1]"]


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused(host, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    assert "no public address" in refusal(f"http://{host}/a.png")


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "151.101.1.140", "2606:4700:4700::1111", "2a00:1450::1"])
def test_public_addresses_are_not(address):
    assert web.is_public(address)


def names(monkeypatch, *addresses):
    """Let DNS say that each name has the next of these lists of addresses, the last one from then on."""
    left = list(addresses)

    def lookup(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
                for address in (left.pop(0) if len(left) > 1 else left[0])]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    names(monkeypatch, ["8.8.8.8", "10.1.2.3"])
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    assert "innocent.example is 10.1.2.3, which is no public address" in refusal("https://innocent.example/a.png")


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch):
    """A second answer of the DNS (rebinding) is never asked for."""
    names(monkeypatch, ["8.8.8.8", "9.9.9.9"], ["127.0.0.1"])
    tried = []

    def connect(place, timeout):
        tried.append(place)
        assert 0 < timeout <= web.SECONDS
        raise ConnectionRefusedError("no")

    monkeypatch.setattr(socket, "create_connection", connect)
    assert "cannot be fetched: no" in refusal("http://rebinding.example:8080/a.png")
    assert tried == [("8.8.8.8", 8080), ("9.9.9.9", 8080)]


@pytest.mark.parametrize("target, said", [
    ("http://169.254.169.254/latest", "169.254.169.254, which is no public address"),
    ("http://[::1]/", "no public address"),
    ("file:///etc/passwd", "no http(s) address"), ("ftp://127.0.0.1/", "no http(s) address"),
    ("http://[bad", "Invalid IPv6"), ("http://127.0.0.1:99999/", "range")])
def test_a_redirect_is_checked_like_any_url(site, reachable, target, said, monkeypatch):
    url, pages, _ = site
    pages["/away"] = 302, {"Location": target}, b""
    opened, connect = [], socket.create_connection

    def once(*args, **options):
        opened.append(args)
        assert len(opened) == 1
        return connect(*args, **options)

    monkeypatch.setattr(socket, "create_connection", once)
    assert said in refusal(f"{url}/away")


@pytest.mark.parametrize("url", ["http://", "https:///a.png", "http://[::1", "http://a b/", "http://x:y/",
                                 "http://" + "a" * 70 + ".example/", "http://127.0.0.1:1/a.png"])
def test_urls_that_lead_nowhere(url, reachable):
    assert "cannot be fetched: " in refusal(url)


def test_urls_and_paths():
    assert web.is_url("http://x/y") and web.is_url("HTTPS://x") and not web.is_url("a/http://b.png")
    assert not web.is_url("httpx.png")


# ------------------------------------------------------------------------------------------------- how large they get


def announced(width, height):
    """A PNG that announces a size and then holds next to nothing."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.fixture
def limits():
    """The pixel limit is the process's; put back what it was."""
    before = Image.MAX_IMAGE_PIXELS
    yield vision.limit_pixels
    Image.MAX_IMAGE_PIXELS = before


def test_a_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(announced(100_000, 100_000))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="bomb.png has more than 178,956,970 pixels .* --max_pixels"):
        vision.open_picture(tmp_path / "bomb.png")


def test_max_pixels_is_exact_and_silent(tmp_path, limits, recwarn):
    (tmp_path / "a.png").write_bytes(png((11, 9)))
    limits(99)
    assert vision.open_picture(tmp_path / "a.png").size == (11, 9)
    assert Image.DecompressionBombWarning not in [warning.category for warning in recwarn]
    limits(98)
    with pytest.raises(ValueError, match="a.png has more than 98 pixels and was not decoded"):
        vision.open_picture(tmp_path / "a.png")
    limits(10**9)
    with pytest.raises(ValueError, match="cannot be read"):  # allowed, but cut
        vision.open_picture(io.BytesIO(announced(30_000, 30_000)[:60]), name="cut.png")


def test_a_picture_inside_a_small_one_counts_too(tmp_path, limits):
    """An icon's directory says 16 x 16; the PNG in it says otherwise."""
    body = announced(5000, 5000)
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(body), 22) + body
    (tmp_path / "small.ico").write_bytes(icon)
    limits(1_000_000)
    with pytest.raises(ValueError, match="small.ico has more than 1,000,000 pixels"):
        vision.open_picture(tmp_path / "small.ico")


@pytest.mark.parametrize("aspect, grown", [("pad", "100000 x 100000, 30 GB"), ("square", "33600000 x 336, 34 GB")])
def test_a_line_does_not_grow_into_a_bomb(aspect, grown):
    """100,000 pixels, before they are padded to a square or until their short side has its length."""
    processor = vision.ImageProcessor(336)
    with pytest.raises(ValueError, match=f"picture of 100000 x 1 pixels would become one of {grown}; cut off"):
        processor(Image.new("RGB", (100_000, 1)), aspect)
    assert processor(Image.new("RGB", (1000, 1)), aspect).shape == (1, 3, 336, 336)
