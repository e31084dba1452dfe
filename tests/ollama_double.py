"""A strict double of an Ollama server: the documented part of its HTTP interface, on a port of its own.

It keeps what it receives, compares digests, and refuses whatever the documentation does not allow. What is to go wrong is
said beforehand, by route: `double.next("POST /api/create", lines({"error": "no"}))`.
"""

import contextlib
import hashlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import go_templates

NO_TEMPLATE = "{{ .Prompt }}"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
NAME = re.compile(rf"(?:[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}}/)?{WORD}(?::{WORD})?")
# Field -> type, by route; of the fields with a *, one cannot do without.
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "/api/create": {
        "*model": str,
        "*files": dict,
        "template": str,
        "system": str,
        "parameters": dict,
        "license": (str, list),
        "stream": bool,
    },
    "/api/show": {"*model": str, "verbose": bool},
    "/api/copy": {"*source": str, "*destination": str},
    "/api/delete": {"*model": str},
    "/api/generate": {
        "*model": str,
        "*prompt": str,
        "raw": bool,
        "stream": bool,
        "options": dict,
        "keep_alive": (int, str),
    },
    "/api/chat": {
        "*model": str,
        "*messages": list,
        "stream": bool,
        "options": dict,
        "keep_alive": (int, str),
        "_debug_render_only": bool,
    },
}
METHOD_OF = {
    "/api/version": "GET",
    "/api/tags": "GET",
    "/api/delete": "DELETE",
    **{f"/api/{name}": "POST" for name in ("create", "show", "copy", "generate", "chat")},
}
OPTIONS: dict[str, type | tuple[type, ...]] = {
    "temperature": (int, float),
    "repeat_penalty": (int, float),
    "seed": int,
    "num_predict": int,
    "num_ctx": int,
    "top_k": int,
    "top_p": (int, float),
    "stop": list,
}


@dataclass
class Model:
    """What the double made of a create request."""

    digest: str
    template: str = ""
    system: str = ""
    license: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass
class Asked:
    """A question to a model: a conversation, or a text to be continued."""

    name: str
    model: Model
    gguf: bytes
    messages: Sequence[Mapping[str, str]]
    prompt: str
    raw: bool
    options: Mapping[str, Any]
    template: str
    """The model's own, or what the server took for it."""


Answerer = Callable[[Asked], str]


@dataclass
class Seen:
    """A request, as it came."""

    route: str
    headers: Mapping[str, str]
    fields: Mapping[str, Any]


class Refused(Exception):  # noqa: N818 - an answer, not a fault of the double
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


Fault = Callable[["_Handler"], None]


def cut(*, after_bytes: int = 0) -> Fault:
    """Hang up after reading so many bytes of the body, without an answer."""

    def fault(handler: "_Handler") -> None:
        handler.rfile.read(after_bytes)
        handler.hang_up()

    return fault


def status(code: int, message: str = "", *, after_bytes: int = 0, **headers: str) -> Fault:
    """Answer an error, if need be before the body was read."""

    def fault(handler: "_Handler") -> None:
        handler.rfile.read(after_bytes)
        body = json.dumps({"error": message}).encode() if message else b""
        handler.reply(code, body, **headers)
        handler.hang_up()

    return fault


def body(content: bytes, *, claims: int | None = None) -> Fault:
    """Answer with 200 and these bytes; ``claims`` is a false length."""

    def fault(handler: "_Handler") -> None:
        handler.read_body()
        handler.reply(200, content, claims=claims)
        handler.hang_up()

    return fault


def lines(*objects: object) -> Fault:
    """Answer with 200 and these objects, one a line."""
    return body(b"".join(json.dumps(one).encode() + b"\n" for one in objects))


def slow(seconds: float) -> Fault:
    """Answer nothing for so long, then hang up."""

    def fault(handler: "_Handler") -> None:
        handler.double.woken.wait(seconds)
        handler.hang_up()

    return fault


def drip(content: bytes, *, every_s: float) -> Fault:
    """Answer one byte at a time."""

    def fault(handler: "_Handler") -> None:
        handler.read_body()
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for byte in content:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                if handler.double.woken.wait(every_s):
                    break
        handler.hang_up()

    return fault


def stored_unanswered(handler: "_Handler") -> None:
    """Keep the file, and hang up instead of saying so."""
    handler.store_blob(handler.path.removeprefix("/api/blobs/"))
    handler.hang_up()


def losing(*names: str) -> Fault:
    """Make the model, but lose these parts of it."""

    def fault(handler: "_Handler") -> None:
        fields = handler.read_fields("/api/create")
        handler.create({key: value for key, value in fields.items() if key not in names})

    return fault


class _Server(ThreadingHTTPServer):
    """Counts the connections that are open."""

    daemon_threads = True

    def __init__(self, double: "OllamaDouble", address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.double = double
        self.open = 0
        self.changed = threading.Condition()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._count(1)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._count(-1)

    def _count(self, change: int) -> None:
        with self.changed:
            self.open += change
            self.changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""


class Cut(str):
    """An answer that ended only since no more tokens were asked for."""

    __slots__ = ()


class OllamaDouble:
    """The server; use it as a context manager."""

    def __init__(
        self,
        answer: Answerer = lambda asked: "fine",
        address: tuple[str, int] = ("127.0.0.1", 0),
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        self._server = _Server(self, address)
        self._scheme = "https" if tls else "http"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.first_answer = answer
        self.woken = threading.Event()
        self._forget()

    def reset(self) -> None:
        """End what is under way, and forget everything."""
        self.woken.set()
        # Connections are taken in turn: once this one is answered, all before it are counted.
        with socket.create_connection(self._server.server_address[:2]) as last:
            last.sendall(b"GET /end HTTP/1.0\r\n\r\n")
            last.recv(1)
        with self._server.changed:
            assert self._server.changed.wait_for(lambda: self._server.open == 0, timeout=5)
        self.woken = threading.Event()
        self._forget()

    def _forget(self) -> None:
        self.answer = self.first_answer
        self.version = "0.31.1"
        # What it takes for the template of a model that was given none.
        self.detected = NO_TEMPLATE
        self.renders_only = True
        self.token = ""
        self.blobs: dict[str, bytes] = {}
        self.models: dict[str, Model] = {}
        self.seen: list[Seen] = []
        self._faults: dict[str, list[Fault]] = {}

    def next(self, route: str, *faults: Fault) -> None:
        """Let the next requests of a route, e.g. `POST /api/blobs`, go wrong, each in its way."""
        self._faults.setdefault(route, []).extend(faults)

    def take_fault(self, route: str) -> Fault | None:
        waiting = self._faults.get(route)
        return waiting.pop(0) if waiting else None

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}"

    @property
    def routes(self) -> list[str]:
        return [one.route for one in self.seen]

    def prune(self) -> None:
        """Remove the files that no model needs."""
        needed = {model.digest for model in self.models.values()}
        self.blobs = {digest: data for digest, data in self.blobs.items() if digest in needed}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.woken.set()
        self._server.shutdown()
        self._server.server_close()


def full_name(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    @property
    def double(self) -> OllamaDouble:
        assert isinstance(self.server, _Server)
        return self.server.double

    def log_message(self, format: str, *args: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.serve
        raise AttributeError(name)

    def serve(self) -> None:
        path = "/api/blobs" if self.path.startswith("/api/blobs/") else self.path
        self.fields: dict[str, Any] = {}
        route = f"{self.command} {path}"
        seen = Seen(route, dict(self.headers), self.fields)
        self.double.seen.append(seen)
        fault = self.double.take_fault(route)
        try:
            if fault is not None:
                fault(self)
                return
            self._authorize()
            self._dispatch(path)
        except Refused as refused:
            self.reply(refused.status, json.dumps({"error": str(refused)}).encode())
            self.hang_up()
        except OSError:
            self.hang_up()

    def _authorize(self) -> None:
        if self.double.token and self.headers["Authorization"] != f"Bearer {self.double.token}":
            raise Refused(401, "unauthorized")

    def _dispatch(self, path: str) -> None:
        if path == "/api/blobs":
            self._blob(self.path.removeprefix("/api/blobs/"))
            return
        method = METHOD_OF.get(path)
        if method is None:
            raise Refused(404, "404 page not found")
        if method != self.command:
            raise Refused(405, "405 method not allowed")
        if method == "GET":
            self.reply_json({"version": self.double.version} if path == "/api/version" else self._tags())
            return
        fields = self.read_fields(path)
        getattr(self, path.removeprefix("/api/"))(fields)

    def _blob(self, digest: str) -> None:
        if self.command not in ("HEAD", "POST"):
            raise Refused(405, "405 method not allowed")
        if not DIGEST.fullmatch(digest):
            raise Refused(400, "invalid digest format")
        if self.command == "HEAD":
            self.reply(200 if digest in self.double.blobs else 404, b"")
        elif digest in self.double.blobs:
            self.reply(200, b"")
            self.hang_up()
        else:
            self.store_blob(digest)
            self.reply(201, b"")

    def store_blob(self, digest: str) -> None:
        data = self.read_body()
        found = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if found != digest:
            raise Refused(400, f'digest mismatch, expected "{digest}", got "{found}"')
        self.double.blobs[digest] = data

    def read_body(self) -> bytes:
        """Read the body, which must have its length said, and be that long."""
        said = self.headers["Content-Length"]
        if self.command == "GET" and said is None:
            return b""
        if said is None or not said.isdigit():
            raise Refused(411, "missing content length")
        data = self.rfile.read(int(said))
        if len(data) != int(said):
            raise ConnectionError("the body is shorter than its length")
        return data

    def read_fields(self, path: str) -> dict[str, Any]:
        known = FIELDS[path]
        if self.headers["Content-Type"] != "application/json":
            raise Refused(400, "content type is not application/json")
        try:
            fields = json.loads(self.read_body(), object_pairs_hook=_without_doubles, parse_constant=_no_constant)
        except ValueError as error:
            raise Refused(400, f"invalid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise Refused(400, "not a JSON object")
        _check_types(fields, known)
        for key in ("model", "source", "destination"):
            if key in fields and not NAME.fullmatch(fields[key]):
                raise Refused(400, "invalid model name")
        self.fields.update(fields)
        return fields

    def create(self, fields: Mapping[str, Any]) -> None:
        files = fields["files"]
        for name, digest in files.items():
            if name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name:
                raise Refused(400, f"file path must be relative: {name}")
            if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
                raise Refused(400, f"invalid digest for {name}")
            if digest not in self.double.blobs:
                raise Refused(400, f"blob not found for {name}")
        if len(files) != 1:
            raise Refused(400, "no files provided to convert" if not files else "invalid split GGUF")
        _check_types(fields.get("parameters", {}), {"stop": list, **OPTIONS})
        (digest,) = files.values()
        told: list[dict[str, str]] = [{"status": "parsing GGUF"}]
        template = fields.get("template", "")
        if self.double.blobs[digest][:4] != b"GGUF":
            told.append({"error": "supplied file was not in GGUF format"})
        elif wrong := _wrong_template(template):
            told.append({"error": f"template error: {wrong}"})
        else:
            self.double.models[full_name(fields["model"])] = Model(
                digest,
                template,
                fields.get("system", ""),
                fields.get("license", ""),
                fields.get("parameters", {}),
            )
            told += [{"status": "writing manifest"}, {"status": "success"}]
        self.reply(200, b"".join(json.dumps(one).encode() + b"\n" for one in told), kind="application/x-ndjson")

    def _model(self, name: str) -> Model:
        model = self.double.models.get(full_name(name))
        if model is None:
            raise Refused(404, f"model '{name}' not found")
        return model

    def show(self, fields: Mapping[str, Any]) -> None:
        model = self._model(fields["model"])
        stops = model.parameters.get("stop", [])
        self.reply_json(
            {
                "modelfile": f"FROM /blobs/{model.digest.replace(':', '-')}",
                "parameters": "\n".join(f"{'stop':<30} {_quoted(stop)}" for stop in stops),
                "template": model.template or self.double.detected,
                "system": model.system,
                "license": model.license,
                "details": {"format": "gguf", "family": "llama"},
                "model_info": {"general.architecture": "llama"},
                "capabilities": ["completion"],
            }
        )

    def _tags(self) -> dict[str, object]:
        return {
            "models": [
                {"name": name, "model": name, "digest": model.digest.removeprefix("sha256:")}
                for name, model in self.double.models.items()
            ]
        }

    def copy(self, fields: Mapping[str, Any]) -> None:
        self.double.models[full_name(fields["destination"])] = self._model(fields["source"])
        self.reply(200, b"")

    def delete(self, fields: Mapping[str, Any]) -> None:
        self._model(fields["model"])
        del self.double.models[full_name(fields["model"])]
        self.double.prune()
        self.reply(200, b"")

    def generate(self, fields: Mapping[str, Any]) -> None:
        said, stopped = self._answer(fields, prompt=fields["prompt"], raw=fields.get("raw", False))
        self._say(fields, {"response": said}, {"response": ""}, stopped)

    def chat(self, fields: Mapping[str, Any]) -> None:
        for message in fields["messages"]:
            if not isinstance(message, dict) or set(message) != {"role", "content"}:
                raise Refused(400, "invalid message")
            if message["role"] not in ("system", "user", "assistant", "tool"):
                raise Refused(400, f"invalid role: {message['role']}")
        if fields.get("_debug_render_only") and self.double.renders_only:
            model = self._model(fields["model"])
            text = rendered(model.template or self.double.detected, model, fields["messages"])
            common = {"model": fields["model"], "created_at": "2026-01-01T00:00:00Z"}
            self.reply_json({**common, "_debug_info": {"rendered_template": text}})
            return
        said, stopped = self._answer(fields, messages=fields["messages"])
        none = {"role": "assistant", "content": ""}
        self._say(fields, {"message": {**none, "content": said}}, {"message": none}, stopped)

    def _answer(
        self,
        fields: Mapping[str, Any],
        *,
        messages: Sequence[Mapping[str, str]] = (),
        prompt: str = "",
        raw: bool = False,
    ) -> tuple[str, bool]:
        model = self._model(fields["model"])
        options = fields.get("options", {})
        _check_types(options, OPTIONS)
        template = model.template or self.double.detected
        blob = self.double.blobs[model.digest]
        asked = Asked(fields["model"], model, blob, messages, prompt, raw, options, template)
        said = self.double.answer(asked)
        stops = [said.find(stop) for stop in model.parameters.get("stop", []) if stop in said]
        return said[: min(stops)] if stops else said, bool(stops) or not isinstance(said, Cut)

    def _say(
        self, fields: Mapping[str, Any], said: Mapping[str, Any], nothing: Mapping[str, Any], stopped: bool
    ) -> None:
        common = {"model": fields["model"], "created_at": "2026-01-01T00:00:00Z"}
        done = {"done": True, "done_reason": "stop" if stopped else "length", "eval_count": 1}
        if fields.get("stream", True):
            told = [{**common, **said, "done": False}, {**common, **nothing, **done}]
            self.reply(200, b"".join(json.dumps(one).encode() + b"\n" for one in told), kind="application/x-ndjson")
        else:
            self.reply_json({**common, **said, **done})

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode())

    def reply(
        self, code: int, content: bytes, *, kind: str = "application/json", claims: int | None = None, **headers: str
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if claims is None else claims))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True


def rendered(template: str, model: Model, messages: Sequence[Mapping[str, str]]) -> str:
    """Render a conversation, with the model's system prompt if it has none of its own."""
    own = not messages or messages[0]["role"] != "system"
    lead = [{"role": "system", "content": model.system}] if model.system and own else []
    return go_templates.render(template, [*lead, *messages])


def _wrong_template(template: str) -> str:
    try:
        fields = go_templates.fields_of(go_templates.parse(template))
    except go_templates.TemplateError as error:
        return str(error)
    known = {".Messages", ".Prompt", "$.Messages"}
    return "" if not template or fields & known else "template must have .Messages or .Prompt"


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_types(fields: Mapping[str, Any], known: Mapping[str, type | tuple[type, ...]]) -> None:
    types = {name.removeprefix("*"): kind for name, kind in known.items()}
    for name, value in fields.items():
        kind = types.get(name)
        if kind is None:
            raise Refused(400, f"unknown field: {name}")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise Refused(400, f"wrong type of field: {name}")
    for name in known:
        if name.startswith("*") and name[1:] not in fields:
            raise Refused(400, f"missing field: {name[1:]}")


def _quoted(text: str) -> str:
    """Quote as Go's strconv does, as far as tests need it."""
    named = {"\a": r"\a", "\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t", "\v": r"\v"}
    shown = ""
    for char in text:
        if char in '"\\':
            shown += "\\" + char
        elif char in named:
            shown += named[char]
        elif char.isprintable():
            shown += char
        else:
            code = ord(char)
            shown += f"\\x{code:02x}" if code < 128 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return f'"{shown}"'


@contextlib.contextmanager
def llama_answerer(folder: Path) -> Iterator[Answerer]:
    """Answer with llama.cpp, from the very file that was received; loaded at the first question, once per file."""
    loaded: dict[str, Any] = {}

    def answer(asked: Asked) -> str:
        if asked.model.digest not in loaded:
            from backprop.edges.llama_cpp import bindings

            path = folder / f"{asked.model.digest.removeprefix('sha256:')}.gguf"
            path.write_bytes(asked.gguf)
            loaded[asked.model.digest] = bindings().Llama(str(path), n_ctx=1024, verbose=False, seed=0)
        model = loaded[asked.model.digest]
        settings = {
            "temperature": float(asked.options.get("temperature", 0.8)),
            "repeat_penalty": float(asked.options.get("repeat_penalty", 1.1)),  # Ollama's own default
            "max_tokens": asked.options.get("num_predict", 64),
            "stop": asked.model.parameters.get("stop", []),
        }
        prompt = rendered(asked.template, asked.model, asked.messages) if asked.messages else asked.prompt
        (choice,) = model.create_completion(prompt, **settings)["choices"]
        return (Cut if choice["finish_reason"] == "length" else str)(choice["text"])

    try:
        yield answer
    finally:
        for model in loaded.values():
            model.close()
