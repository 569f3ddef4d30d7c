"""The served page asked by a stranger: no file is read, no upload ends it, nothing is told."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import pytest
from studio.test_studio_safe import UPLOADS

JOBS = "job-upload"  # the button that takes them
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file=/proc/self/environ",
        "/file=/etc/passwd",
        "/static/../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/proxy=http://127.0.0.1:1/",
    ],
)
def test_no_path_outside_is_served(served, path):
    import http.client
    from urllib.parse import urlsplit

    studio, address = served
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    assert b"root:" not in body and b"PATH=" not in body and b"[project]" not in body
    assert answer.status in (400, 403, 404, 405), answer.status


class Stranger:
    """Asks the server as a page would, without one."""

    def __init__(self, address):
        import httpx

        self.http = httpx.Client(base_url=f"{address}gradio_api/", timeout=60)
        config = httpx.get(f"{address}config", timeout=60).json()
        jobs = next(
            each["id"] for each in config["components"] if each["props"].get("elem_id") == JOBS
        )
        self.event = next(
            each["id"] for each in config["dependencies"] if [jobs, "upload"] in each["targets"]
        )

    def send(self, name, raw):
        return self.http.post("upload", files={"files": (name, raw)})

    def open(self, path):
        """What the server answers to a job that lies there; None where it takes no question."""
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, ""]
        asked = {"fn_index": self.event, "data": data, "session_hash": "evil"}
        joined = self.http.post("queue/join", json=asked)
        if joined.status_code != 200:
            return None
        with self.http.stream("GET", "queue/data?session_hash=evil") as stream:
            return "".join(stream.iter_lines())


def test_the_network_cannot_name_files_or_send_large_ones(served):
    studio, address = served
    stranger = Stranger(address)
    assert stranger.send("job.yaml", b"x" * 9_000_000).status_code == 413
    for path in ("/etc/passwd", str(Path(__file__)), str(studio.folder), "../../etc/passwd"):
        told = stranger.open(path)
        if told is not None:
            assert "root:" not in told and "import " not in told
            assert '"success":false' in told.replace(" ", "")


def test_every_hostile_job_over_the_network_is_a_sentence_and_the_server_lives(served):
    """The uploads of test_studio_safe.py, through the server's own door and under evil names."""
    studio, address = served
    stranger = Stranger(address)
    names = ("job.yaml", "../../../etc/job.yaml", "a;rm -rf.yaml", "job.yaml\0.pkl", ".yaml")
    assert len(UPLOADS) >= 25
    for number, (name, (raw, words)) in enumerate(UPLOADS.items()):
        sent = stranger.send(names[number % len(names)], raw)
        if sent.status_code != 200:  # the door itself refuses it
            assert sent.status_code in (400, 413, 422), name
            continue
        told = stranger.open(sent.json()[0])
        assert "ac-alert" in told and json_text(words) in told, name
        assert "Traceback" not in told and str(studio.folder) not in told, name
    assert stranger.http.get(f"{address}config").status_code == 200
    assert studio.runner._thread.is_alive() and studio.runner._now is None


def json_text(words):
    """As it stands inside a string of JSON and HTML."""
    return json.dumps(escape(words))[1:-1]
