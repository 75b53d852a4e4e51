"""Tests of the notes application: the store, the pages, the API, and the real server under gunicorn."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SOURCE))

from notes import create_app, render  # noqa: E402
from notes.store import MIGRATIONS, Conflict, Invalid, Missing, Store, StoreError, statements  # noqa: E402


class Folder(unittest.TestCase):
    """Each test has a data folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.data = Path(folder.name) / "data"


class StoreTest(Folder):
    def setUp(self):
        super().setUp()
        self.store = Store(self.data)

    def titles(self, found):
        return [entry.note.title for entry in found[0]], found[1]

    def test_a_note_from_first_to_last(self):
        note = self.store.create("  Bread \n flour ", "500 g\r\nsalt\n\n")
        self.assertEqual((note.id, note.title, note.body, note.version), (1, "Bread flour", "500 g\nsalt", 1))
        changed = self.store.update(1, "Bread", "600 g", version=1)
        self.assertEqual((changed.title, changed.body, changed.version, changed.created), ("Bread", "600 g", 2, note.created))
        self.assertEqual(self.store.get(1), changed)
        self.store.delete(1)
        for again in (lambda: self.store.get(1), lambda: self.store.delete(1), lambda: self.store.update(1, "a", "")):
            with self.assertRaises(Missing):
                again()
        self.assertEqual(self.store.create("Next", "").id, 2, "an id is never used again")

    def test_a_change_on_an_old_version_is_a_conflict(self):
        self.store.create("One", "")
        self.store.update(1, "Two", "", version=1)
        with self.assertRaises(Conflict) as caught:
            self.store.update(1, "Three", "", version=1)
        self.assertEqual((caught.exception.note.title, self.store.get(1).title), ("Two", "Two"))

    def test_what_is_no_note_is_refused(self):
        cases = [
            ("", "x", "a note needs a title"),
            (" \n\t", "x", "a note needs a title"),
            ("x" * 201, "", "the title is 201 characters long; 200 fit"),
            ("x", "y" * 100_001, "the text is 100001 characters long; 100000 fit"),
            ("x", "a\x00b", "a note cannot hold control characters"),
            ("x", "a\x02b", "a note cannot hold control characters"),
            ("x", "\ud800", "the text is not valid Unicode"),
            (7, "x", "title and body must be text"),
        ]
        for title, body, message in cases:
            with self.subTest(message=message), self.assertRaises(Invalid) as caught:
                self.store.create(title, body)
            self.assertEqual(str(caught.exception), message)
        self.assertEqual(self.store.check(), 0)

    def test_search_follows_changes_and_takes_any_text(self):
        self.store.create("Shopping", "flour, yeast and Käse")
        self.store.create("Yeast", "grows")
        self.store.create("Other", "nothing")
        cases = [
            ("yeast", ["Yeast", "Shopping"]),  # the title counts more
            ("yea", ["Yeast", "Shopping"]),
            ("flour yeast", ["Shopping"]),
            ("kase", ["Shopping"]),
            ('"', []),
            ("NOT", ["Other"]),  # the beginning of `nothing`, not an operator
            ("yeast AND flour OR *", []),
            ("title:grows", []),
        ]
        for text, titles in cases:
            with self.subTest(text=text):
                self.assertEqual(self.titles(self.store.search(text, 10)), (titles, len(titles)))
        self.store.update(2, "Mould", "grows")
        self.store.delete(1)
        self.assertEqual(self.titles(self.store.search("yeast", 10)), ([], 0))
        self.assertEqual(self.titles(self.store.search("mould", 10)), (["Mould"], 1))

    def test_lists_come_in_pages_newest_first(self):
        for count in range(5):
            self.store.create(f"n{count}", "")
        self.store.update(1, "n0 again", "")
        self.assertEqual(self.titles(self.store.recent(2)), (["n0 again", "n4"], 5))
        self.assertEqual(self.titles(self.store.recent(2, 4)), (["n1"], 5))

    def test_an_old_database_is_migrated(self):
        old = self.data / "old"
        old.mkdir()
        with contextlib.closing(sqlite3.connect(old / "notes.db")) as db:
            for statement in statements(MIGRATIONS[0]):
                db.execute(statement)
            db.execute("INSERT INTO notes (title, body, created, updated) VALUES ('Kept', 'words', 't', 't')")
            db.execute("PRAGMA user_version = 1")
            db.commit()
        store = Store(old)
        self.assertEqual(self.titles(store.search("words", 5)), (["Kept"], 1))
        self.assertEqual(store.check(), 1)

    def test_a_newer_database_is_refused(self):
        with contextlib.closing(sqlite3.connect(self.store.path)) as db:
            db.execute("PRAGMA user_version = 99")
        with self.assertRaisesRegex(StoreError, "has schema 99, this program knows 2"):
            Store(self.data)
        with self.assertRaisesRegex(StoreError, "the schema is version 99, not 2"):
            self.store.check()

    def test_many_workers_may_start_and_write_at_once(self):
        fresh, failures = self.data / "fresh", []

        def work(worker):
            try:
                store = Store(fresh)
                for count in range(10):
                    store.create(f"{worker}-{count}", "x")
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])
        self.assertEqual(Store(fresh).check(), 60)
        with contextlib.closing(sqlite3.connect(fresh / "notes.db")) as db:
            self.assertEqual(db.execute("PRAGMA journal_mode").fetchone(), ("wal",))

    def test_a_folder_that_cannot_be_used_is_named(self):
        blocked = self.data / "file"
        blocked.write_text("")
        with self.assertRaisesRegex(StoreError, "cannot use the database .*file/notes.db: .*mount a writable volume"):
            Store(blocked)


class RenderTest(unittest.TestCase):
    def test_markdown_is_safe(self):
        cases = [
            ("# A\n\n*b* ~~c~~ `d`", "<h1>A</h1>\n<p><em>b</em> <s>c</s> <code>d</code></p>\n"),
            ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>\n"),
            ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>\n"),
            ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>\n"),
            ("[x](https://a.example/ \"t\")", '<p><a href="https://a.example/" title="t" rel="noopener noreferrer">x</a></p>\n'),
            ("![x](data:text/html;base64,AAAA)", "<p>![x](data:text/html;base64,AAAA)</p>\n"),
        ]
        for text, html in cases:
            with self.subTest(text=text):
                self.assertEqual(str(render.markdown(text)), html)

    def test_tables(self):
        self.assertIn("<td>1</td>", render.markdown("|a|\n|-|\n|1|"))

    def test_snippets_are_escaped_and_marked(self):
        self.assertEqual(str(render.snippet("<b> \x02hit\x03")), "&lt;b&gt; <mark>hit</mark>")


class Web(Folder):
    def setUp(self):
        super().setUp()
        self.app = create_app({"NOTES_DATA": str(self.data)})
        self.client = self.app.test_client()
        self.log = io.StringIO()
        redirect = contextlib.redirect_stdout(self.log)
        redirect.__enter__()
        self.addCleanup(redirect.__exit__, None, None, None)

    def token(self):
        page = self.client.get("/new").text
        return re.search(r'name="csrf" value="([^"]+)"', page)[1]

    def post(self, path, **form):
        return self.client.post(path, data={"csrf": self.token(), **form})


class PagesTest(Web):
    def test_a_note_from_first_to_last(self):
        self.assertIn("Nothing here yet", self.client.get("/").text)
        created = self.post("/new", title="Bread & <b>", body="**flour**")
        self.assertEqual((created.status_code, created.location), (303, "/notes/1"))
        page = self.client.get("/notes/1").text
        self.assertIn("<h1>Bread &amp; &lt;b&gt;</h1>", page)
        self.assertIn("<strong>flour</strong>", page)
        self.assertIn("Saved.", page)
        self.assertIn("<mark>flour</mark>", self.client.get("/?q=flour").text)
        edited = self.post("/notes/1/edit", title="Bread", body="**rye**", version="1")
        self.assertEqual((edited.status_code, edited.location), (303, "/notes/1"))
        self.assertIn("version 2", self.client.get("/notes/1").text)
        self.assertEqual(self.post("/notes/1/delete").location, "/")
        self.assertEqual(self.client.get("/notes/1").status_code, 404)

    def test_forged_forms_are_refused(self):
        self.post("/new", title="Kept", body="")
        for path in ("/new", "/notes/1/edit", "/notes/1/delete"):
            for form in ({}, {"csrf": ""}, {"csrf": "wrong"}, {"csrf": "ü"}):
                with self.subTest(path=path, form=form):
                    answer = self.client.post(path, data={"title": "x", **form})
                    self.assertEqual(answer.status_code, 403)
        stranger = self.app.test_client()
        self.assertEqual(stranger.post("/new", data={"title": "x", "csrf": self.token()}).status_code, 403)
        self.assertEqual(stranger.post("/new", data={"title": "x", "csrf": ""}).status_code, 403)
        self.assertEqual(self.client.get("/api/notes").json["total"], 1)

    def test_a_conflict_keeps_both_texts(self):
        self.post("/new", title="One", body="")
        self.post("/notes/1/edit", title="Theirs", body="their words", version="1")
        answer = self.post("/notes/1/edit", title="Mine", body="my words", version="1")
        self.assertEqual(answer.status_code, 409)
        self.assertIn("my words", answer.text)
        self.assertIn("their words", answer.text)
        self.assertEqual(self.post("/notes/1/edit", title="Mine", body="my words", version="2").status_code, 303)

    def test_a_refused_note_stays_in_the_form(self):
        answer = self.post("/new", title=" ", body="long <text>")
        self.assertEqual(answer.status_code, 400)
        self.assertIn("a note needs a title", answer.text)
        self.assertIn("long &lt;text&gt;", answer.text)

    def test_pages_of_the_list(self):
        for count in range(31):
            self.app.extensions["store"].create(f"number-{count}", "")
        first, second = self.client.get("/").text, self.client.get("/?page=2").text
        self.assertIn("number-30<", first)
        self.assertNotIn("number-0<", first)
        self.assertIn("number-0<", second)
        self.assertEqual(self.client.get("/?page=-3").status_code, 200)

    def test_headers(self):
        answer = self.client.get("/")
        self.assertIn("default-src 'none'", answer.headers["Content-Security-Policy"])
        self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
        cookie = self.client.get("/new").headers["Set-Cookie"]
        self.assertIn("HttpOnly", cookie)
        self.assertIn("SameSite=Lax", cookie)
        with self.client.get("/static/notes.css") as style:
            self.assertEqual(style.mimetype, "text/css")

    def test_errors_are_pages(self):
        self.assertEqual(self.client.get("/nowhere").status_code, 404)
        self.assertIn("All notes", self.client.get("/nowhere").text)
        self.assertEqual(self.client.get("/notes/1/delete").status_code, 405)

    def test_the_access_log_is_json(self):
        self.client.get("/notes/7?q=private", headers={"User-Agent": "test \"quoted\"", "X-Request-Id": "abc"})
        entry = json.loads(self.log.getvalue())
        self.assertEqual(
            {key: entry[key] for key in ("id", "method", "path", "status", "agent", "remote")},
            {"id": "abc", "method": "GET", "path": "/notes/7", "status": 404, "agent": 'test "quoted"', "remote": "127.0.0.1"},
        )
        self.assertNotIn("private", self.log.getvalue())

    def test_the_key_is_kept_and_can_be_given(self):
        again = create_app({"NOTES_DATA": str(self.data)})
        self.assertEqual(self.app.config["SECRET_KEY"], again.config["SECRET_KEY"])
        self.assertEqual((self.data / "secret.key").stat().st_mode & 0o777, 0o600)
        self.assertEqual(sorted(path.name for path in self.data.glob("secret*")), ["secret.key"])
        file = self.data / "given"
        file.write_text("from a file\n")
        cases = [({"NOTES_SECRET": "direct"}, "direct"), ({"NOTES_SECRET_FILE": str(file), "NOTES_SECRET": "x"}, "from a file")]
        for environ, key in cases:
            self.assertEqual(create_app({"NOTES_DATA": str(self.data), **environ}).config["SECRET_KEY"], key)


class ApiTest(Web):
    def test_a_note_from_first_to_last(self):
        created = self.client.post("/api/notes", json={"title": "Bread", "body": "flour"})
        self.assertEqual((created.status_code, created.headers["Location"]), (201, "/api/notes/1"))
        self.assertEqual({k: created.json[k] for k in ("id", "title", "body", "version")}, {"id": 1, "title": "Bread", "body": "flour", "version": 1})
        self.assertEqual(self.client.get("/api/notes/1").json, created.json)
        self.assertEqual(self.client.get("/api/notes?q=flo").json, {"notes": [created.json], "total": 1})
        changed = self.client.put("/api/notes/1", json={"body": "rye", "version": 1})
        self.assertEqual((changed.json["title"], changed.json["body"], changed.json["version"]), ("Bread", "rye", 2))
        conflict = self.client.put("/api/notes/1", json={"body": "oats", "version": 1})
        self.assertEqual((conflict.status_code, conflict.json["note"]), (409, changed.json))
        self.assertEqual(self.client.delete("/api/notes/1").status_code, 204)
        self.assertEqual(self.client.get("/api/notes").json, {"notes": [], "total": 0})

    def test_refusals(self):
        big = json.dumps({"title": "x", "body": "y" * 600_000})
        cases = [
            ("post", "/api/notes", {"json": {"title": ""}}, 400, "a note needs a title"),
            ("post", "/api/notes", {"json": ["x"]}, 400, "the request must be a JSON object"),
            ("post", "/api/notes", {"json": {"title": "x", "colour": 1}}, 400, "unknown key `colour`"),
            ("post", "/api/notes", {"json": {"title": "x", "version": True}}, 400, "`version` must be a number"),
            ("post", "/api/notes", {"data": "{", "content_type": "application/json"}, 400, ""),
            ("post", "/api/notes", {"data": {"title": "x"}}, 415, ""),
            ("post", "/api/notes", {"data": big, "content_type": "application/json"}, 413, ""),
            ("post", "/api/notes", {"json": {"title": "x"}, "headers": {"Sec-Fetch-Site": "cross-site"}}, 403, "other sites"),
            ("get", "/api/notes?limit=9999", {}, 400, "`limit` must be a number from 0 to 200"),
            ("get", "/api/notes?offset=-1", {}, 400, "`offset` must be a number"),
            ("get", "/api/notes/5", {}, 404, "there is no note 5"),
            ("put", "/api/notes/5", {"json": {}}, 404, "there is no note 5"),
            ("delete", "/api/notes/5", {}, 404, "there is no note 5"),
            ("patch", "/api/notes", {}, 405, ""),
        ]
        for method, path, request, status, message in cases:
            with self.subTest(method=method, path=path, status=status):
                answer = getattr(self.client, method)(path, **request)
                self.assertEqual(answer.status_code, status)
                if answer.is_json:
                    self.assertIn(message, answer.json["error"])
                else:
                    self.assertEqual(message if status != 403 else "", "")
        self.assertEqual(self.client.get("/api/notes").json["total"], 0)

    def test_health_follows_the_database(self):
        self.client.post("/api/notes", json={"title": "x"})
        self.assertEqual(self.client.get("/healthz").json, {"status": "ok", "notes": 1})
        (self.data / "notes.db").write_bytes(b"this is not a database" * 100)
        for name in ("notes.db-wal", "notes.db-shm"):
            (self.data / name).unlink(missing_ok=True)
        answer = self.client.get("/healthz")
        self.assertEqual((answer.status_code, answer.json["status"]), (503, "failed"))


class ServerTest(Folder):
    """The application as it runs in the image: gunicorn with two workers."""

    def setUp(self):
        super().setUp()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = open(self.data.parent / "log", "w+")
        self.addCleanup(self.log.close)
        environ = {**os.environ, "PORT": str(self.port), "WEB_CONCURRENCY": "2", "NOTES_DATA": str(self.data)}
        command = [sys.executable, "-m", "gunicorn"]
        self.server = subprocess.Popen(command, cwd=SOURCE, env=environ, stdout=self.log, stderr=subprocess.STDOUT)
        self.addCleanup(self.stop)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.fetch("/healthz")
                return
            except OSError as error:
                if time.monotonic() > deadline or self.server.poll() is not None:
                    self.fail(f"the server did not start: {error}\n{self.output()}")
                time.sleep(0.05)

    def stop(self):
        if self.server.poll() is None:
            self.server.kill()
            self.server.wait()

    def output(self):
        self.log.flush()
        return Path(self.log.name).read_text()

    def fetch(self, path, data=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return json.load(answer)

    def test_it_serves_logs_and_stops(self):
        for count in range(20):
            self.fetch("/api/notes", json.dumps({"title": f"n{count}"}).encode())
        self.assertEqual(self.fetch("/healthz"), {"status": "ok", "notes": 20})
        self.server.send_signal(signal.SIGTERM)
        self.assertEqual(self.server.wait(timeout=25), 0, self.output())
        posts = [entry for entry in map(json.loads, re.findall(r"^\{.*\}$", self.output(), re.M)) if entry["method"] == "POST"]
        self.assertEqual([entry["status"] for entry in posts], [201] * 20)
        self.assertEqual(Store(self.data).check(), 20)


if __name__ == "__main__":
    unittest.main()
