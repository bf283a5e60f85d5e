"""An HTTP server on the loopback that speaks OpenAI's protocol, as well or as badly as a test wants."""

import json
import math
import threading
import time
from contextlib import contextmanager
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
    return {"message": {"role": "assistant", "content": pairs[0][0]},
            "logprobs": {"content": [{"token": pairs[0][0], "logprob": pairs[0][1], "top_logprobs": tokens}]}}


def prefers_m(p):
    return top_logprobs(("m", math.log(p)), ("M", math.log(1 - p)))


def says(text):
    return {"message": {"role": "assistant", "content": text}}


def completion(choice):
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "usage": None,
            "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None} | choice]}


class Server:
    """respond: (the request's JSON, how often this one was asked before) -> a choice, or (status, body, headers),
    or a number of seconds to keep the client waiting. models: the names that it lists, or what it says instead."""

    def __init__(self, respond, models):
        self.respond, self.requests, self.headers, self.paths, self.together = respond, [], [], [], 0
        self.lock, self.now = threading.Lock(), 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.handle(self)

            def do_GET(self):
                listed = {"object": "list", "data": [{"id": str(name), "object": "model"} for name in models]}
                reply(self, 200, json.dumps(models if isinstance(models, dict) else listed), {})

            def log_message(self, *_):
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128  # of its own 5 more than a few clients at a time are reset

        self.http = Listener(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def handle(self, handler):
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            before = self.requests.count(request)
            self.requests.append(request)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self.now += 1
            self.together = max(self.together, self.now)
        made = self.respond(request, before)
        if isinstance(made, float):
            time.sleep(made)
            made = prefers_m(0.5)
        status, body, headers = made if isinstance(made, tuple) else (200, json.dumps(completion(made)), {})
        with self.lock:
            self.now -= 1
        reply(handler, status, body, headers)


def reply(handler, status, body, headers):
    try:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body.encode())))
        handler.end_headers()
        handler.wfile.write(body.encode())
    except OSError:  # the client has given up
        pass


@contextmanager
def serving(respond, models=()):
    server = Server(respond, models)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()
