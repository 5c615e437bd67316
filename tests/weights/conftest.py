from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cellprior.weights._registry import Entry, FileEntry, entries


@dataclass
class Answer:
    """What the server says: a body, its status, how long it claims to be, and what happens meanwhile."""

    body: bytes = b""
    status: int = 200
    claimed: int | None = None
    before: Callable[[], object] | None = None
    midway: Callable[[], object] | None = None
    headers: dict[str, str] | None = None  # in place of an honest Content-Length


@dataclass
class Server:
    """A web server on this machine. `answers`: path -> answers in turn, the last one for ever."""

    base: str
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    answer = Answer

    def serve(self, path: str, *answers: Answer | bytes) -> str:
        """Set the answers for a path and return its address."""
        self.answers[path] = [Answer(item) if isinstance(item, bytes) else item for item in answers]
        return f"{self.base}{path}"

    def file(self, name: str, content: bytes) -> FileEntry:
        """Serve a file and return its registry entry, hash included."""
        return FileEntry(name, self.serve(f"/{name}", content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            log.asked.append(self.path)
            turns = log.answers.get(self.path, [Answer(status=404)])
            answer = turns.pop(0) if len(turns) > 1 else turns[0]
            if answer.before:
                answer.before()
            self.send_response(answer.status)
            claimed = len(answer.body) if answer.claimed is None else answer.claimed
            headers = {"Content-Length": str(claimed)} if answer.headers is None else answer.headers
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            half = len(answer.body) // 2
            self.wfile.write(answer.body[:half])
            if answer.midway:
                self.wfile.flush()
                answer.midway()
            self.wfile.write(answer.body[half:])

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    log = Server(f"http://127.0.0.1:{httpd.server_address[1]}")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield log
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow each other at once."""
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Entry]:
    """Add an entry to the registry for the length of a test."""

    def add(*files: FileEntry, name: str = "tiny", **changes: str) -> Entry:
        facts = {
            "type": "model",
            "licence": "CC0",
            "citation": "A. Author 2020",
            "genes": "three genes",
            "page": "https://example.org/login-here",
            "support": "ready",
        }
        entry = Entry(name=name, files=files, size=3, **{**facts, **changes})
        monkeypatch.setitem(entries(), name, entry)
        return entry

    return add


@pytest.fixture
def mirror_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that CELLPRIOR_MIRROR names."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("CELLPRIOR_MIRROR", str(folder))
    return folder
