"""A vLLM server that refuses, hangs, breaks off or wants a key; tests/tools/ has those with a real one."""

from __future__ import annotations

import http.server
import json
import math
import socket
import threading
from contextlib import contextmanager

import pytest
import torch

from splaser_plugin import LaserConfig, laser
from splaser_plugin.errors import ModelError, ScoreError
from splaser_plugin.generation import requests, vllm_server
from splaser_plugin.generation.requests import KEYS, ask
from splaser_plugin.generation.vllm_server import Server, restore
from tests.builders import QUICK

SERVED = {
    "/v1/models": (200, {"data": [{"id": "mine", "root": "./none"}]}),
    "/server_info?config_format=json": (
        200,
        {"vllm_config": {"model_config": {"quantization": None, "dtype": "torch.float32", "max_model_len": 64}}},
    ),
}
"""What a vLLM server says of itself."""


def test_an_address_without_a_server_is_told(tiny_folder, pairs):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        config = LaserConfig(**QUICK, engine="vllm", engine_url=url)
        with pytest.raises(ModelError, match=rf"^engine_url {url}: no vLLM server answers there \(.*\)\. Start one"):
            laser(tiny_folder, pairs, config=config)


HANGS = object()
"""An answer that never comes."""


@contextmanager
def serving(answers, key="", seen=None):
    """The address of an HTTP server of these answers: path to status and JSON, text as it is, or HANGS.

    key: which it wants under /v1, as vLLM does. seen: a list that gets the authorization of each request.
    """
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            given = self.headers["Authorization"]
            if seen is not None:
                seen.append(given)
            status, body = answers.get(self.path, (404, {}))
            if key and self.path.startswith("/v1") and given != f"Bearer {key}":
                status, body = 401, {"error": "Unauthorized"}
            if body is HANGS:
                over.wait()
                return
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body)
            self.end_headers()
            self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

        do_POST = do_GET  # noqa: N815 - the standard library's name

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            over.set()
            server.shutdown()


@pytest.fixture(autouse=True)
def without_key(monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def impatient(monkeypatch):
    for module in (requests, vllm_server):
        monkeypatch.setattr(module, "WORK_S", 0.2)
    monkeypatch.setattr(requests, "QUICK_S", 0.2)


@pytest.mark.parametrize("name", KEYS)
def test_a_server_gets_the_key_that_it_wants(name, tiny_model, monkeypatch):
    with serving(SERVED, key="a-secret") as url:
        with pytest.raises(ModelError, match=rf"^engine_url {url}: /v1/models answers 401: Unauthorized\. Set VLLM_API_"
                           r"KEY to the key that it was started with, or use engine transformers\.$"):  # fmt: skip
            Server(url, tiny_model, longest=32)
        monkeypatch.setenv(name, "a-secret\n")
        Server(url, tiny_model, longest=32)
        monkeypatch.setenv("VLLM_API_KEY", "another")
        with pytest.raises(ModelError, match=r"/v1/models answers 401"):
            Server(url, tiny_model, longest=32)


def test_a_key_is_sent_to_no_other_server_and_never_told(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    seen = []
    with serving({"/": (200, {})}, seen=seen) as other, serving({"/": (302, other + "/")}, seen=seen) as url:
        ask(url + "/")
    assert seen == ["Bearer a-secret", None]
    with (
        serving({"/": (400, {"error": {"message": "got a-secret"}})}) as url,
        pytest.raises(requests.RefusedError, match=r"^400: got \[the key\]$"),
    ):
        ask(url + "/")
    for key in ("a-\nsecret", "a-s\N{LATIN SMALL LETTER E WITH ACUTE}cret"):
        monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(ModelError, match=r"^VLLM_API_KEY has characters that no key of a server has\. Set it to "):
            ask(url + "/")


@pytest.mark.parametrize("path", ["/v1/models", "/collective_rpc", vllm_server.RESET, "/v1/completions"])
def test_a_server_that_hangs_is_told(path, tiny_model, impatient):
    answers = {**SERVED, "/collective_rpc": (200, {}), vllm_server.RESET: (200, {"success": True}), path: (200, HANGS)}
    with serving(answers) as url, pytest.raises(
        ModelError,
        match=rf"^engine_url {url}: {path} has answered nothing for 0\.2 s, as if the server hung\. Start it anew, and "
        r"run this again: with the same output it goes on where it stopped\.$",
    ):  # fmt: skip
        server = Server(url, tiny_model, longest=32)
        server.load([("weight", torch.zeros(2))])
        server.answers([[1]], [4], [2])


def test_a_server_that_hangs_at_the_end_is_not_waited_for(capsys, impatient):
    with serving({"/v1/models": (200, HANGS)}) as url:
        restore(url, "my-model")
    assert f"{url}: the vLLM server may still have" in capsys.readouterr().err


def part(index, tokens, likelihoods):
    """Of an answer, as vLLM streams it."""
    choice = {"index": index, "token_ids": tokens, "logprobs": {"token_logprobs": likelihoods}}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def test_answers_come_in_parts(tiny_model):
    said = part(1, [7], [-0.5]) + part(0, [5, 6], [-1.0, None]) + part(1, [2], [-0.25]) + "data: [DONE]\n\n"
    with serving({**SERVED, "/v1/completions": (200, said)}) as url:
        (first, (second, likelihoods)) = Server(url, tiny_model, longest=32).answers([[1], [3]], [4, 4], [2])
    assert first[0] == [5, 6]
    assert math.isnan(first[1][1])
    assert (second, likelihoods) == ([7, 2], [-0.5, -0.25])


@pytest.mark.parametrize(
    ("end", "error", "said"),
    [
        ("", ModelError, r"no vLLM server answers there \(its answer broke off\)\. Start one: "),
        (
            'data: {"error": {"message": "it died", "code": 500}}\n\n',
            ModelError,
            "/v1/completions answers 500: it died",
        ),
        ('data: {"error": {"message": "Out of range float values"}}\n\n', ScoreError, "the model's logits are nan"),
    ],
)
def test_an_answer_that_breaks_off_is_told(end, error, said, tiny_model):
    with serving({**SERVED, "/v1/completions": (200, part(0, [5], [-1.0]) + end)}) as url:
        server = Server(url, tiny_model, longest=32)
        with pytest.raises(error, match=said):
            server.answers([[1]], [4], [2])


@pytest.mark.parametrize("body", [{"object": "list", "data": None}, {"data": []}, {}, [], "models"])
def test_another_server_than_vllms_is_told(body, tiny_model):
    with serving({"/v1/models": (200, body)}) as url, pytest.raises(ModelError, match=r"no vLLM server .*\. Start one"):
        Server(url, tiny_model, longest=32)


def test_an_address_with_a_wrong_port_is_told(tiny_model):
    with pytest.raises(ModelError, match=r"no vLLM server answers there \(nonnumeric port: 'port'\)\. Start one"):
        Server("http://localhost:port", tiny_model, longest=32)


def test_a_server_that_does_not_get_its_own_weights_back_is_told(capsys):
    load, reset = "/collective_rpc", vllm_server.RESET
    for answers, is_told in (
        ({**SERVED, load: (200, {}), reset: (200, {"success": True})}, False),
        ({**SERVED, load: (500, {}), reset: (200, {"success": True})}, True),
    ):
        with serving(answers) as url:
            restore(url, "my-model")
        assert (f"{url}: the vLLM server may still have" in capsys.readouterr().err) is is_told
    restore(url, "my-model")
    assert not capsys.readouterr().err, "it is gone"


def test_weights_that_a_server_does_not_take_are_told_with_one_advice(tiny_model):
    with serving({**SERVED, "/collective_rpc": (500, {"error": {"message": "no such folder"}})}) as url:
        server = Server(url, tiny_model, longest=32)
        with pytest.raises(
            ModelError,
            match=rf"^engine_url {url}: /collective_rpc answers 500: no such folder\. It has to see .* to serve this "
            r"model; or use engine transformers\.$",
        ):
            server.load([("weight", torch.zeros(2))])


def test_a_server_at_work_is_asked_again_to_throw_prompts_away(capsys, monkeypatch):
    monkeypatch.setattr(vllm_server, "RESET_WAIT_S", 0)
    with serving({**SERVED, "/collective_rpc": (200, {}), vllm_server.RESET: (200, {"success": False})}) as url:
        restore(url, "my-model")
    assert "may still have" in capsys.readouterr().err
