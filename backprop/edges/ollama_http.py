"""How to speak to an Ollama server: its address, one request at a time, and what went wrong in plain words.

No redirect is followed and no proxy is used: the token goes to the named server and to no other.
"""

import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

from backprop.console import without_escapes
from backprop.errors import OllamaError, UsageError

# https://github.com/ollama/ollama/blob/main/envconfig/config.go: with a scheme, the scheme's own port is meant.
DEFAULT_PORT = 11434
PORT_OF = {"http": 80, "https": 443}
CONNECT_S = 10.0
"""Seconds to reach a server."""
ANSWER_S = 30.0
"""Seconds for an answer that costs the server nothing."""
WORK_S = 1800.0
"""Seconds for an answer that the server works for: it copies gigabytes, or loads a model."""
# What the longest real answer, the description of a model, stays far below.
ANSWER_MOST_BYTES = 16 * 2**20
SAID_MOST = 300
CHUNK_BYTES = 2**20
ADDRESS_HINT = "give `--ollama-url http://HOST:11434`, or set OLLAMA_HOST"
START_HINT = "start it with `ollama serve`, or give its address with `--ollama-url`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where an Ollama server listens."""

    https: bool
    host: str
    """A name or an IP address, without brackets."""
    port: int
    prefix: str = ""
    """Path in front of `/api`, for a server behind another; without a slash at its end."""
    token: str | None = field(default=None, repr=False)
    token_withheld: bool = False
    """Whether there is a token that is not sent, because anyone on the way could read it."""

    @property
    def url(self) -> str:
        """Its address, as a person would type it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.https else 'http'}://{host}:{self.port}{self.prefix}"


def find_server(url: str | None = None) -> Server:
    """Find the server's address: ``url``, or `OLLAMA_HOST`, or Ollama's default; and its token, `OLLAMA_API_KEY`.

    Args:
        url: `host`, `host:port`, `:port`, an IPv6 address, or a URL. 0.0.0.0 means this machine, as for Ollama itself.

    Raises:
        UsageError: If it is no address, or holds a password; or if the token cannot stand in a header.
    """
    text = (url or os.environ.get("OLLAMA_HOST", "")).strip().strip("\"'").strip()
    scheme, separator, rest = text.partition("://")
    scheme, rest = (scheme.lower(), rest) if separator else ("http", text)
    if "@" in rest:
        raise UsageError("the address of Ollama holds a user or password", hint="set OLLAMA_API_KEY instead")
    authority, _, path = rest.partition("/")
    prefix = path.rstrip("/")
    if scheme not in PORT_OF or not re.fullmatch(r"[A-Za-z0-9._~/-]*", prefix):
        raise _no_address(text)
    host, port = _host_and_port(authority, text)
    https = scheme == "https"
    token = _token()
    safe = https or _is_this_machine(host)
    return Server(
        https=https,
        host=host,
        port=port or (PORT_OF[scheme] if separator else DEFAULT_PORT),
        prefix=f"/{prefix}" if prefix else "",
        token=token if safe else None,
        token_withheld=token is not None and not safe,
    )


def _host_and_port(authority: str, text: str) -> tuple[str, int | None]:
    """Split an authority into host and port (1 to 65535; None where it names none)."""
    found = re.fullmatch(r"(\[[^\[\]]+\]|[A-Za-z0-9_][A-Za-z0-9._-]*)?(?::([0-9]{1,5}))?", authority)
    host, digits = (found[1] or "", found[2]) if found else (f"[{authority}]", None)
    if host.startswith("["):
        host = host[1:-1]
        try:
            host = "::1" if ipaddress.IPv6Address(host).is_unspecified else host
        except ValueError as error:
            raise _no_address(text) from error
    port = int(digits) if digits else None
    if port is not None and not 1 <= port <= 65535:
        raise _no_address(text)
    return "127.0.0.1" if host in ("", "0.0.0.0") else host, port  # noqa: S104 - nothing is bound # nosec B104


def _no_address(text: str) -> UsageError:
    return UsageError(f"`{one_line(text)}` is no address of an Ollama server", hint=ADDRESS_HINT)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _token() -> str | None:
    token = os.environ.get("OLLAMA_API_KEY", "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", token):
        raise UsageError("OLLAMA_API_KEY holds characters that no token has", hint="set it again, without line breaks")
    return token or None


def fetch(
    server: Server, method: str, path: str, fields: Mapping[str, object] | None = None, *, slow: bool = False
) -> Mapping[str, Any]:
    """Send ``fields`` as JSON and return the JSON object of the answer; empty where the answer is.

    Args:
        slow: Whether the server works for the answer.

    Raises:
        OllamaError: If the server cannot be reached, refuses, or answers anything else.
    """
    body = None if fields is None else json.dumps(fields).encode()
    with _exchange(server, method, path, body=body, size_bytes=len(body or b""), slow=slow) as response:
        text = b"".join(_chunks(server, response, slow=slow))
    return _object(server, text) if text else {}


def fetch_lines(server: Server, path: str, fields: Mapping[str, object]) -> list[Mapping[str, Any]]:
    """Send ``fields`` as JSON and return the JSON objects of the answer, one a line, when it is complete.

    Raises:
        OllamaError: As `fetch`; also if a line tells of an error, at once.
    """
    body = json.dumps(fields).encode()
    found: list[Mapping[str, Any]] = []
    with _exchange(server, "POST", path, body=body, size_bytes=len(body), slow=True) as response:
        rest = b""
        for chunk in _chunks(server, response, slow=True):
            *lines, rest = (rest + chunk).split(b"\n")
            found += [_object(server, line) for line in lines if line.strip()]
        if rest.strip():
            found.append(_object(server, rest))
    return found


def finds(server: Server, method: str, path: str, fields: Mapping[str, object] | None = None) -> bool:
    """Send a request, and say whether the server has what it is about.

    Raises:
        OllamaError: As `fetch`, except that the server may lack it.
    """
    body = None if fields is None else json.dumps(fields).encode()
    with _exchange(server, method, path, body=body, size_bytes=len(body or b""), may_lack=True) as response:
        return response.status != http.client.NOT_FOUND


def send(server: Server, path: str, chunks: Iterable[bytes], *, size_bytes: int) -> None:
    """Send a stream of exactly ``size_bytes``.

    Raises:
        OllamaError: As `fetch`; `is_broken` tells whether only the connection is to blame.
    """
    with _exchange(server, "POST", path, body=chunks, size_bytes=size_bytes, slow=True):
        pass


def is_broken(error: OllamaError) -> bool:
    """Say whether a connection broke that was good before, or that a server may accept again in a moment."""
    return isinstance(error.__cause__, ConnectionError | http.client.IncompleteRead)


@contextmanager
def _exchange(
    server: Server,
    method: str,
    path: str,
    *,
    body: bytes | Iterable[bytes] | None,
    size_bytes: int,
    slow: bool = False,
    may_lack: bool = False,
) -> Generator[http.client.HTTPResponse]:
    """Send one request on a connection of its own, and give the answer while the block reads it."""
    headers = {"User-Agent": "backprop", "Accept": "application/json", "Connection": "close"}
    if body is not None:
        kind = "application/json" if isinstance(body, bytes) else "application/octet-stream"
        headers |= {"Content-Type": kind, "Content-Length": str(size_bytes)}
    if server.token is not None:
        headers["Authorization"] = f"Bearer {server.token}"
    connection = _connection(server)
    try:
        with _told(server, path, slow=slow):
            _connect(connection, server)
            connection.sock.settimeout(WORK_S if slow else ANSWER_S)
            response = _answer(connection, method, server.prefix + path, body, headers)
            if not (response.status in (200, 201) or (may_lack and response.status == http.client.NOT_FOUND)):
                raise _refusal(server, path, response)
            yield response
    finally:
        connection.close()


def _connection(server: Server) -> http.client.HTTPConnection:
    if server.https:
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(server.host, server.port, timeout=CONNECT_S, context=context)
    return http.client.HTTPConnection(server.host, server.port, timeout=CONNECT_S)


def _connect(connection: http.client.HTTPConnection, server: Server) -> None:
    try:
        connection.connect()
    except TimeoutError as error:
        raise OllamaError(f"`{server.url}` cannot be reached within {CONNECT_S:g} s", hint=START_HINT) from error


def _answer(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | Iterable[bytes] | None,
    headers: Mapping[str, str],
) -> http.client.HTTPResponse:
    try:
        connection.request(method, path, body=body, headers=headers)
    except ConnectionError as broken:
        # A server that refuses a file answers and hangs up before it has read all of it.
        try:
            response = connection.getresponse()
        except (OSError, http.client.HTTPException):
            raise broken from None
        if response.status < http.client.BAD_REQUEST:
            raise
        return response
    return connection.getresponse()


def _chunks(server: Server, response: http.client.HTTPResponse, *, slow: bool) -> Iterator[bytes]:
    """Read an answer to its end, within a size and a time."""
    ends_at = time.monotonic() + (WORK_S if slow else ANSWER_S)
    size_bytes = 0
    while chunk := response.read1(CHUNK_BYTES):
        size_bytes += len(chunk)
        if size_bytes > ANSWER_MOST_BYTES:
            raise OllamaError(
                f"`{server.url}` answers with more than {ANSWER_MOST_BYTES / 2**20:.0f} MiB", hint=ADDRESS_HINT
            )
        if time.monotonic() > ends_at:
            raise TimeoutError
        yield chunk
    # `read1` takes an answer that is cut short for a whole one.
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)


def _object(server: Server, text: bytes) -> Mapping[str, Any]:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = said(server, text.decode(errors="replace"))
        raise OllamaError(f"`{server.url}` does not answer as Ollama does: {shown}", hint=ADDRESS_HINT) from error
    if not isinstance(value, dict):
        shown = said(server, text.decode(errors="replace"))
        raise OllamaError(f"`{server.url}` does not answer as Ollama does: {shown}", hint=ADDRESS_HINT)
    answer = cast(dict[str, Any], value)
    if answer.get("error"):
        raise _failure(server, said(server, str(answer["error"])))
    return answer


def _refusal(server: Server, path: str, response: http.client.HTTPResponse) -> OllamaError:
    """Say why a server did not do what it was asked to."""
    status, reason = response.status, said(server, response.reason)
    if 300 <= status < 400:
        target = said(server, response.headers.get("Location", ""))
        return OllamaError(f"`{server.url}` sends us on to `{target}`", hint="give that address with `--ollama-url`")
    read: list[bytes] = []
    # What is missing of a refusal matters less than that it is one.
    with suppress(OSError, http.client.HTTPException):
        for chunk in _chunks(server, response, slow=False):
            read.append(chunk)
    text = b"".join(read).decode(errors="replace")
    try:
        text = str(json.loads(text)["error"])
    except (ValueError, RecursionError, KeyError, TypeError):
        text = f"{status} {reason}: {text}"
    why = said(server, text).removesuffix(":")
    if status in (401, 403):
        hint = "set OLLAMA_API_KEY to a token that this server takes"
        if server.token_withheld:
            hint = "OLLAMA_API_KEY is sent only over https, or to this machine: give `--ollama-url https://…`"
        return OllamaError(f"`{server.url}` refuses: {why}", hint=hint)
    if status == http.client.NOT_FOUND and path == "/api/version":
        return OllamaError(f"no Ollama answers at `{server.url}`: {why}", hint=ADDRESS_HINT)
    if status == http.client.INSUFFICIENT_STORAGE:
        return _disk_full(server, why)
    return _failure(server, why)


def _failure(server: Server, why: str) -> OllamaError:
    if re.search(r"no space left|disk (is )?full|not enough space|quota exceeded", why, re.IGNORECASE):
        return _disk_full(server, why)
    return OllamaError(f"Ollama at `{server.url}` failed: {why}", hint="look into its log, or `ollama --version`")


def _disk_full(server: Server, why: str) -> OllamaError:
    return OllamaError(
        f"the disk of Ollama at `{server.url}` is full: {why}", hint="make room there, e.g. with `ollama rm`"
    )


@contextmanager
def _told(server: Server, path: str, *, slow: bool) -> Generator[None]:
    """Say in plain words what goes wrong on the way to the server and back."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        why = said(server, error.verify_message)
        raise OllamaError(
            f"the certificate of `{server.url}` is not trusted: {why}", hint="set SSL_CERT_FILE to its authority"
        ) from error
    except ssl.SSLError as error:
        raise OllamaError(
            f"`{server.url}` does not speak TLS: {said(server, str(error))}", hint="try `--ollama-url http://…`"
        ) from error
    except (socket.gaierror, UnicodeError) as error:
        raise OllamaError(f"no machine is called `{server.host}`", hint=ADDRESS_HINT) from error
    except ConnectionRefusedError as error:
        raise OllamaError(f"nothing listens at `{server.url}`", hint=START_HINT) from error
    except TimeoutError as error:
        limit_s = WORK_S if slow else ANSWER_S
        raise OllamaError(
            f"`{server.url}` did not answer {path} within {limit_s:g} s", hint="look into its log, or restart it"
        ) from error
    except (ConnectionError, http.client.IncompleteRead) as error:
        raise OllamaError(f"the connection to `{server.url}` broke during {path}", hint=START_HINT) from error
    except http.client.HTTPException as error:
        raise OllamaError(
            f"`{server.url}` does not speak HTTP: {said(server, repr(error))}", hint=ADDRESS_HINT
        ) from error
    except OSError as error:
        raise OllamaError(f"`{server.url}` cannot be reached: {error.strerror or error}", hint=START_HINT) from error


def said(server: Server, text: str) -> str:
    """Show what a server said on one line: short, without the token and without what drives a terminal."""
    if server.token is not None:
        text = text.replace(server.token, "***")
    return one_line(text)


def one_line(text: str) -> str:
    """Show a text of unknown origin on one line, with its control characters as escapes, and not endlessly."""
    line = " ".join(without_escapes(text[: 4 * SAID_MOST]).split())
    return line if len(line) <= SAID_MOST else f"{line[:SAID_MOST]}…"
