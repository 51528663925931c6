"""Starting, failing to start, and ending: one sentence, the right exit code, soon."""

import contextlib
import json
import signal
import socket
import threading

import pytest

from streamworker.cli import main
from streamworker.cli.options import ServerFlags, WorkerFlags
from streamworker.settings import Settings
from tests.conftest import eventually_blocking


@contextlib.contextmanager
def listener(answer):
    """A TCP server that is no Redis: it answers with ``answer``, or not at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connections.append(connection)
                    if answer:
                        connection.recv(1000)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        for connection in connections:
            connection.close()
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def fails(program, code, *words, **env):
    done = program(*words, **env)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stdout == ""
    return done.sentence


COMMANDS = [["worker", "jobs:app"], ["pending"], ["enqueue", "k", "--queue", "q"]]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
class TestRedis:
    def test_nobody_there(self, bare, words):
        sentence = fails(bare, 69, *words, REDIS_URL="redis://user:secret@127.0.0.1:1/0")
        assert "does not answer" in sentence
        assert "secret" not in sentence

    def test_http(self, bare, words):
        with listener(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as url:
            assert "is not Redis" in fails(bare, 69, *words, REDIS_URL=url)

    def test_silence(self, bare, words):
        bare.constants["streamworker.broker.redis.client.COMMAND_TIMEOUT"] = 0.3
        with listener(b"") as url:
            assert "does not answer" in fails(bare, 69, *words, REDIS_URL=url)

    def test_wrong_password(self, bare, words, own_server):
        with own_server.client() as client:
            client.config_set("requirepass", "right")
        sentence = fails(bare, 78, *words, REDIS_URL=own_server.url.replace("//", "//:wrong@"))
        assert "refused the login" in sentence
        assert "wrong" not in sentence
        assert "refused the login" in fails(bare, 78, *words, REDIS_URL=own_server.url)

    def test_no_url(self, bare, words):
        assert "REDIS_URL" in fails(bare, 78, *words)

    def test_misspelt(self, bare, words):
        sentence = fails(bare, 78, *words, REDIS_URL="redis://127.0.0.1:1", STREAMWORKER_LAESE="5")
        assert "STREAMWORKER_LEASE" in sentence


@pytest.mark.all
def test_silence_is_waited_for_some_seconds(bare):
    with listener(b"") as url:
        assert "does not answer" in fails(bare, 69, "pending", REDIS_URL=url)


APPS = {
    None: "There is no app to run",
    "nosuch:app": "There is no module 'nosuch'",
    "nosuch.sub:app": "There is no module 'nosuch'",
    "jobs": "module:attribute",
    "jobs:nope": "did you mean jobs:app?",
    "jobs:not_an_app": "is a int",
    "jobs:App": "must be a streamworker.App",
    "broken:app": "ZeroDivisionError: division by zero",
    "needs:app": "No module named 'missing_library'",
    "quits:app": "SystemExit: 3",
    "syntax:app": "SyntaxError",
}


@pytest.mark.parametrize("app", APPS)
def test_no_such_app(sw, project, app):
    (project / "broken.py").write_text("def f():\n    return 1 / 0\nf()\n")
    (project / "needs.py").write_text("import missing_library\n")
    (project / "quits.py").write_text("import sys\nsys.exit(3)\n")
    (project / "syntax.py").write_text("def (:\n")
    sentence = fails(sw, 78, "worker", *([app] if app else []))
    assert APPS[app] in sentence
    if app == "syntax:app":
        assert "syntax.py line 1" in sentence
    if app == "broken:app":
        assert "broken.py line 2" in sentence
        shown = sw("worker", app, STREAMWORKER_LOG_LEVEL="debug")
        assert shown.returncode == 78
        assert "Traceback" in shown.stderr
        assert "return 1 / 0" in shown.stderr


def test_usage(sw):
    for words in (["nosuch"], ["pending", "--nosuch"], ["queues", "--limit", "x"], ["pending", "list", "a", "b"],
                  ["queues", "--limit", "0"], ["worker", "jobs:app", "--processes", "0"]):  # fmt: skip
        done = sw(*words)
        assert done.returncode == 2, words
        assert done.sentence


def test_flags_go_before_the_environment(sw, raw, bare):
    url = bare.env.pop("REDIS_URL")
    ok = sw.ok("queues", "--redis-url", url, "--namespace", "ns:", STREAMWORKER_REDIS_URL="redis://127.0.0.1:1")
    assert ok.sentence == "no queues"
    # The app of the worker enqueues with the same settings, wherever they came from.
    sw.ok("enqueue", "note.write", '{"text": "x"}', "--app", "jobs:app", "--redis-url", url, "--namespace", "ns:")
    done = sw.ok("worker", "jobs:app", "--redis-url", url, "--namespace", "ns:", "--burst", "--log-format", "json")
    assert json.loads(done.stderr.splitlines()[-1])["done"] == 1
    assert "concurrency" in fails(sw, 78, "worker", "jobs:app", "--redis-url", url, "--concurrency", "many")


def test_settings_of_the_app_itself(bare, redis_url, project):
    """What the app says in Python holds where nobody says otherwise."""
    (project / "coded.py").write_text(
        f"from streamworker import App, Settings\nfrom jobs import app as jobs\n"
        f"app = App(settings=Settings(redis_url={redis_url!r}, concurrency=7, log_level='warning'))\napp.include(jobs)\n"
    )
    bare.ok("worker", "coded:app", "--burst")
    assert "redis://127.0.0.1:1" in fails(bare, 69, "worker", "coded:app", "--burst", REDIS_URL="redis://127.0.0.1:1")


def test_every_setting_is_a_flag():
    names = {line.name.removeprefix("STREAMWORKER_").lower() for line in Settings().describe()} - {"app"}
    assert set(WorkerFlags.__dataclass_fields__) == names
    assert set(ServerFlags.__dataclass_fields__) < names


def test_a_worker_drains_and_ends(sw, raw, tmp_path):
    sw.ok("enqueue", "hold", json.dumps({"gate": str(tmp_path / "gate")}), "--app", "jobs:app", "--count", 2)
    worker = sw.worker(STREAMWORKER_LAES_UNKNOWN="1")
    eventually_blocking(lambda: raw.xpending("stream:{holds}", "workers")["pending"] == 2)
    assert "setting_without_effect" in worker.text
    worker.signal(signal.SIGTERM)
    eventually_blocking(lambda: worker.saw("worker_stopping"))
    (tmp_path / "gate").touch()
    assert worker.wait() == 0
    assert raw.xlen("stream:{holds}") == 0
    assert raw.xinfo_consumers("stream:{holds}", "workers") == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_hurries(sw, raw, tmp_path, number, code):
    sw.ok("enqueue", "hold", json.dumps({"gate": str(tmp_path / "gate")}), "--app", "jobs:app")
    worker = sw.worker()
    eventually_blocking(lambda: raw.xpending("stream:{holds}", "workers")["pending"] == 1)
    worker.signal(number)
    eventually_blocking(lambda: worker.saw("worker_stopping"))
    worker.signal(number)
    assert worker.wait(10) == code
    assert raw.xlen("stream:{holds}") == 1
    assert raw.xpending("stream:{holds}", "workers")["pending"] == 0


def test_a_stuck_thread_does_not_keep_the_process(sw, raw):
    sw.ok("enqueue", "stick", "--app", "jobs:app")
    worker = sw.start("worker", "jobs:app", "--grace", "0.5", "--queues", "sticks")
    assert worker.wait(20) == 70
    assert "would not end when it was told to" in worker.text
    assert raw.xlen("stream:{sticks}:dead") == 1


def test_burst(sw, raw):
    sw.ok("enqueue", "note.write", '{"text": "x"}', "--app", "jobs:app", "--count", 300)
    done = sw.ok("worker", "--app", "jobs:app", "--burst")
    assert json.loads(done.stderr.splitlines()[-1])["done"] == 300
    assert raw.xlen("stream:{notes}") == 0


def test_main_in_this_process(capsys, monkeypatch):
    """It returns the exit code instead of ending the process, and says unexpected errors too in one sentence."""
    assert main(["--help"]) == 0
    assert "Look and act" in capsys.readouterr().out
    assert main(["nosuch"]) == 2
    monkeypatch.setattr("streamworker.cli.command_tree", lambda: 1 / 0)
    assert main([]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
