# SPDX-License-Identifier: Apache-2.0
"""Requests with images on their way through a TensorRT-LLM worker: all of one arrives at the engine as it was sent.

The unmodified ``dynamo.trtllm`` fetches and decodes the image itself. The engine is the stand-in, which sees none: it refuses the
request, and says what it was given.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer

from tests.conftest import ROOT
from tests.dynamo.running import EtcdServer, RunningWorker, eventually, running_frontend
from tests.dynamo.test_standin_trtllm import ask

pytestmark = pytest.mark.dynamo
# as models that see have it: a text for each image, where the image is
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{{ part['text'] if part['type'] == 'text' else '<image>' }}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
<|im_start|>assistant
"""
Start = Callable[..., RunningWorker]


class ImageServer:
    """Serves images of one colour each at ``/COLOUR.png``, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.send_header("Content-Type", "image/png")
                self.end_headers()
                self.wfile.write(png(self.path.strip("/").partition(".")[0]))

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        """Return the address of an image."""
        return f"http://127.0.0.1:{self.server.server_port}/{path}"


def picture(colour: str) -> Image.Image:
    """Return an image."""
    return Image.new("RGB", (3, 2), colour)


def png(colour: str) -> bytes:
    """Return the same as a file."""
    content = io.BytesIO()
    picture(colour).save(content, "PNG")
    return content.getvalue()


def described(colour: str) -> str:
    """Return an image in the stand-in's words."""
    return f"RGB 3x2 sha256:{hashlib.sha256(picture(colour).tobytes()).hexdigest()}"


@pytest.fixture
def images() -> Iterator[ImageServer]:
    """A server of images on loopback."""
    server = ImageServer()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    """The model's folder with a chat template that knows images."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_dir.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text()) | {"chat_template": TEMPLATE}
    config.unlink()
    config.write_text(json.dumps(content))
    return folder


@pytest.fixture
def start(tmp_path: Path, etcd: EtcdServer, model: Path) -> Iterator[Start]:
    """Start a worker; what is left of it is killed."""
    paths = [os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)]
    usual = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    usual["DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"] = "0.2"
    flags = ("--engine", "trtllm", "--allow-no-gpu", "--max-seq-len", "512", "--max-batch-size", "2")
    workers: list[RunningWorker] = []

    def begin(*more: str, **environment: str) -> RunningWorker:
        workers.append(RunningWorker(tmp_path, etcd, model, 3, *flags, *more, **{**usual, **environment}))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def post(port: int, content: list[dict[str, Any]]) -> tuple[int, str]:
    """Send the example's request with this content; return the HTTP status and the body."""
    body = {"model": "model", "messages": [{"role": "user", "content": content}], "stream": False, "max_tokens": 160}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def await_model(port: int) -> None:
    """Wait until the model is served: the frontend lists it a moment before its chat finds it."""
    eventually(lambda: post(port, [text("Hello")])[0] != 404, "the model is served")


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def given(worker: RunningWorker, number: int) -> dict[str, Any]:
    """Return what the engine was given with one of the requests that it has refused, the first being 0."""
    found = eventually(
        lambda: re.findall(r"it was given (\{[^}]*\})", worker.text())[number:], "the refusal is in the log", 10
    )
    content: dict[str, Any] = json.loads(found[0])
    return content


def prompt(model: Path, tokens: list[int]) -> str:
    """Return a prompt's text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return str(tokenizer.decode(tokens, skip_special_tokens=False))


def test_images_and_texts_arrive_as_they_were_sent(
    start: Start, etcd: EtcdServer, images: ImageServer, model: Path, tmp_path: Path
) -> None:
    worker = start(MODALITY="multimodal", DYN_MM_ALLOW_INTERNAL="1", DYN_LOG="warn")
    worker.ready()
    with running_frontend(tmp_path, etcd) as frontend:
        await_model(frontend.port)

        # Dynamo's example; the frontend keeps the engine's reason to itself
        status, body = post(frontend.port, [text("Describe the image"), image(images.url("red.png"))])
        assert status == 500, body
        assert images.asked == ["/red.png"]
        seen = given(worker, 0)
        assert seen["image"] == [described("red")]
        assert "user\nDescribe the image<image><|im_end|>" in prompt(model, seen["prompt_token_ids"])

        parts = [image(images.url("blue.png?of=2")), text(" or "), image(images.url("lime.png")), text("?")]
        status, body = post(frontend.port, parts)
        assert status == 500, body
        assert sorted(images.asked[1:]) == ["/blue.png?of=2", "/lime.png"]
        seen = given(worker, 1)
        assert seen["image"] == [described("blue"), described("lime")]
        assert "user\n<image> or <image>?<|im_end|>" in prompt(model, seen["prompt_token_ids"])

        choice = ask(frontend.port, "model", "What is the capital of France?")
        assert "The capital of France is Paris." in choice["message"]["content"]
        os.kill(worker.rank_zero(), signal.SIGTERM)
        assert worker.wait() == 0, worker.text()


def test_addresses_inside_the_cluster_must_be_allowed(
    start: Start, etcd: EtcdServer, images: ImageServer, tmp_path: Path
) -> None:
    start("--modality", "multimodal").ready()
    with running_frontend(tmp_path, etcd) as frontend:
        await_model(frontend.port)
        status, body = post(frontend.port, [text("Describe the image"), image(images.url("red.png"))])
        assert (status, images.asked) == (400, []), body
        assert "DYN_MM_ALLOW_INTERNAL=1" in body
