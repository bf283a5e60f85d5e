"""An HTTP server on the loopback that speaks OpenAI's protocol, as well or as badly as a test wants."""

import contextlib
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from extras import endpoint

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def on_the_loopback(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the client refuses the loopback as well
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)


def top_logprobs(*pairs):
    """The answer of a judge whose likeliest first tokens are these (token, log-prob)."""
    tokens = [{"token": token, "logprob": logp, "bytes": None} for token, logp in pairs]
    return says("m") | {"logprobs": {"content": [{"token": "m", "logprob": -1.0, "top_logprobs": tokens}]}}


def prefers_m(p):
    """p(m) = p where the letters are followed through all the ways to write them, as text or as tokenizers do."""
    return top_logprobs(*((token, math.log(share)) for token, share in (
        ("m", 0.75 * p), (" M", 0.5 * (1 - p)), ("Ġm", 0.25 * p), ("▁M", 0.5 * (1 - p)))), ("Both", -9.0))


def says(text):
    return {"message": {"role": "assistant", "content": text}}


class Server(ThreadingHTTPServer):
    """respond: (the request's JSON, how often this one was asked before) -> a choice, or (status, body, headers), or
    seconds to keep the client waiting.

    models: the names that it lists, or what it says instead.
    """
    request_queue_size = 128  # of its own 5 more than a few clients at a time are reset
    daemon_threads = True

    def __init__(self, respond, models):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        listed = {"object": "list", "data": [{"id": str(name), "object": "model"} for name in models]}
        self.models = models if isinstance(models, dict) else listed
        self.respond, self.requests, self.headers, self.paths, self.lock = respond, [], [], [], threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, json.dumps(self.server.models))

    def do_POST(self):
        server, request = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            before = server.requests.count(request)
            server.requests.append(request)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
        made = server.respond(request, before)
        if isinstance(made, float):
            time.sleep(made)
            made = prefers_m(0.5)
        if isinstance(made, dict):
            made = 200, json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [
                {"index": 0, "finish_reason": "stop", "logprobs": None} | made]})
        self.reply(*made)

    def reply(self, status, body, headers={}):
        with contextlib.suppress(OSError):  # the client may have given up
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body.encode()))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(respond, models=()):
    with Server(respond, models) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
