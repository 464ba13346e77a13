"""What the tests of the front door share: raw HTTP/1.1 and HTTP/2 bytes, keys, certificates. Standard library only."""

import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
import unittest

# What no error may tell: a path, an address in memory or on the net, a place in the source, a stack.
LEAKS = re.compile(
    r"0x[0-9a-f]{5,}|/(?:home|root|usr|var|tmp|opt|etc|proc|build|work)/|\.(?:cc|h|cpp|py):\d+|ipv[46]:|\d+\.\d+\.\d+\.\d+"
    r"|std::|absl::|nlohmann|parse_error\.\d+|type_error\.\d+|grpc|Traceback|\bat line\b.*\.cc",
    re.IGNORECASE,
)


def check_error(case, status, body):
    """An error's body has OpenAI's shape and leaks nothing; returns its `error`."""
    error = json.loads(body)["error"]
    case.assertEqual(set(error) - {"message", "type", "param", "code"}, set(), body)
    case.assertIsInstance(error["code"], str)
    case.assertTrue(error["message"])
    case.assertIsNone(LEAKS.search(error["message"]), f"{status}: {error['message']}")
    return error


def connect(address, receive_buffer=0, timeout=30):
    host, port = address.rsplit(":", 1)
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(timeout)
    sock.connect((host, int(port)))
    return sock


def reset(sock):
    """Closes with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)


def read_reply(sock, rest=b""):
    """(Reply, bytes after it); Reply is None where the peer closed first."""
    data = rest
    while b"\r\n\r\n" not in data:
        part = sock.recv(65536)
        if not part:
            return None, data
        data += part
    head, _, data = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    status = int(lines[0].split()[1])
    size = int(headers.get("content-length", 0))
    while len(data) < size:
        part = sock.recv(65536)
        if not part:
            break
        data += part
    return Reply(status, headers, data[:size].decode("utf-8", "replace")), data[size:]


def ask(address, request):
    """Sends bytes on a connection of its own; the first Reply, None where there is none."""
    with connect(address) as sock:
        try:
            sock.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused while it was still being sent
        return read_reply(sock)[0]


def post_bytes(path, body, headers=()):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


# gRPC by hand: enough of HTTP/2 for one call a connection.

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, HEADERS, DATA, RST_STREAM, GOAWAY = 4, 1, 0, 3, 7


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name, value):
    """A header field without indexing and without Huffman coding."""
    out = b"\x00"
    for text in (name.encode(), value.encode()):
        assert len(text) < 127
        out += bytes([len(text)]) + text
    return out


def call_headers(path, extra=()):
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *extra]
    return b"".join(literal(name, value) for name, value in fields)


def grpc_message(payload):
    return struct.pack(">BI", 0, len(payload)) + payload


def field(number, payload):
    """A length-delimited protobuf field."""
    key, size, out = number << 3 | 2, len(payload), b""
    for value in (key, size):
        while value > 127:
            out += bytes([value & 127 | 128])
            value >>= 7
        out += bytes([value])
    return out + payload


GENERATE = "/tidepool.v1.Inference/Generate"


def grpc_call(address, payload, extra=(), wrap=lambda sock: sock, path=GENERATE):
    """The grpc-status of one call (None: the connection or stream was ended without one), and all its bytes."""
    with wrap(connect(address)) as sock:
        sock.sendall(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 4, 1, call_headers(path, extra)))
        body = grpc_message(payload)
        window = 65535  # the peer's default
        for at in range(0, min(len(body), window), 16384):
            last = at + 16384 >= len(body)
            sock.sendall(frame(DATA, 1 if last else 0, 1, body[at : min(at + 16384, window)]))
        data = b""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = re.search(rb"grpc-status[\x01\x02](\d+)", data)
            if found:
                return int(found.group(1)), data
            try:
                part = sock.recv(65536)
            except ConnectionResetError:
                break
            if not part:
                break
            data += part
        return None, data


# Keys and certificates.


def digest(key):
    return hashlib.sha256(key.encode()).hexdigest()


def replace_file(path, text):
    """All at once, as deployments do it."""
    with open(path + ".new", "w") as file:
        file.write(text)
    os.replace(path + ".new", path)


def make_certificates(folder, name="localhost"):
    """ca.pem, cert.pem and key.pem of a server called `name`, client.pem and client.key; all signed by the CA."""
    if shutil.which("openssl") is None:
        raise unittest.SkipTest("openssl is not installed")

    def run(*args):
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    if not os.path.exists(os.path.join(folder, "ca.pem")):
        run("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test ca")
    for stem, cn in (("new", name), ("client", "client")):
        with open(os.path.join(folder, "ext"), "w") as file:
            file.write("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        run("req", *curve, "-keyout", f"{stem}.key", "-out", f"{stem}.csr", "-subj", f"/CN={cn}")
        run("x509", "-req", "-in", f"{stem}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "ext", "-out", f"{stem}.pem")
    os.replace(os.path.join(folder, "new.key"), os.path.join(folder, "key.pem"))
    os.replace(os.path.join(folder, "new.pem"), os.path.join(folder, "cert.pem"))
