"""The notes in SQLite: schema, migrations, reading, writing, search.

One file, `notes.db`, in WAL mode, so that readers never wait for the writer. A connection is
opened for each operation: that costs some 50 µs and needs no care about threads and forks.
"""

import re
import sqlite3
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

MAX_TITLE = 200
MAX_BODY = 100_000

# Around a match in a snippet; neither is printable, so neither can stand in a note's words.
MARK_START, MARK_END = "\x02", "\x03"

# `PRAGMA user_version` counts how many of these were run. Append; never edit what was released.
MIGRATIONS = [
    """
    CREATE TABLE notes (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        title TEXT NOT NULL,
        body TEXT NOT NULL,
        created TEXT NOT NULL,
        updated TEXT NOT NULL,
        version INTEGER NOT NULL DEFAULT 1
    );
    CREATE INDEX notes_updated ON notes (updated DESC, id DESC);
    """,
    """
    CREATE VIRTUAL TABLE notes_fts USING fts5 (
        title, body, content = 'notes', content_rowid = 'id', tokenize = 'unicode61 remove_diacritics 2'
    );
    INSERT INTO notes_fts (rowid, title, body) SELECT id, title, body FROM notes;
    CREATE TRIGGER notes_insert AFTER INSERT ON notes BEGIN
        INSERT INTO notes_fts (rowid, title, body) VALUES (new.id, new.title, new.body);
    END;
    CREATE TRIGGER notes_delete AFTER DELETE ON notes BEGIN
        INSERT INTO notes_fts (notes_fts, rowid, title, body) VALUES ('delete', old.id, old.title, old.body);
    END;
    CREATE TRIGGER notes_update AFTER UPDATE ON notes BEGIN
        INSERT INTO notes_fts (notes_fts, rowid, title, body) VALUES ('delete', old.id, old.title, old.body);
        INSERT INTO notes_fts (rowid, title, body) VALUES (new.id, new.title, new.body);
    END;
    """,
]


class StoreError(Exception):
    """The database cannot be used; the text says why and what to do."""


class Invalid(ValueError):
    """What was given is not a note; the text says why."""


class Missing(LookupError):
    """There is no such note."""


class Conflict(Exception):
    """The note was changed since it was read; `note` is how it is now."""

    def __init__(self, note: "Note"):
        super().__init__(f"note {note.id} was changed meanwhile (now version {note.version})")
        self.note = note


@dataclass(frozen=True)
class Note:
    id: int
    title: str
    body: str
    created: str  # RFC 3339, UTC
    updated: str
    version: int  # counts the changes, from 1

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """A note in a list: `snippet` is the beginning or, after a search, the place of the match."""

    note: Note
    snippet: str


class Store:
    def __init__(self, folder: Path):
        """Creates or migrates the database in `folder`. Raises StoreError when it cannot be used."""
        self.path = folder / "notes.db"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._open() as db:
                db.execute("PRAGMA journal_mode = WAL")
                self._migrate(db)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"cannot use the database {self.path}: {error}; mount a writable volume there or set NOTES_DATA"
            ) from error

    def create(self, title: str, body: str) -> Note:
        title, body = valid(title, body)
        with self._transaction() as db:
            now = timestamp()
            row = db.execute(
                "INSERT INTO notes (title, body, created, updated) VALUES (?, ?, ?, ?) RETURNING *", (title, body, now, now)
            ).fetchone()
            return Note(**row)

    def get(self, id: int) -> Note:
        with self._open() as db:
            return self._get(db, id)

    def update(self, id: int, title: str, body: str, version: int | None = None) -> Note:
        """With `version` the note is only changed if that is still its version, else Conflict."""
        title, body = valid(title, body)
        with self._transaction() as db:
            old = self._get(db, id)
            if version is not None and version != old.version:
                raise Conflict(old)
            row = db.execute(
                "UPDATE notes SET title = ?, body = ?, updated = ?, version = version + 1 WHERE id = ? RETURNING *",
                (title, body, timestamp(), id),
            ).fetchone()
            return Note(**row)

    def delete(self, id: int) -> None:
        with self._transaction() as db:
            if db.execute("DELETE FROM notes WHERE id = ?", (id,)).rowcount == 0:
                raise Missing(f"there is no note {id}")

    def recent(self, limit: int, offset: int = 0) -> tuple[list[Found], int]:
        """The notes changed last, and how many there are in all."""
        with self._open() as db:
            rows = db.execute("SELECT * FROM notes ORDER BY updated DESC, id DESC LIMIT ? OFFSET ?", (limit, offset)).fetchall()
            total = db.execute("SELECT count(*) FROM notes").fetchone()["count(*)"]
        return [Found(note, " ".join(note.body.split())[:200]) for note in (Note(**row) for row in rows)], total

    def search(self, text: str, limit: int, offset: int = 0) -> tuple[list[Found], int]:
        """The notes with all words of `text` (each may be the beginning of a word), best first."""
        words = re.findall(r"\w+", text)
        if not words:
            return [], 0
        query = " ".join(f'"{word}"*' for word in words)
        with self._open() as db:
            rows = db.execute(
                "SELECT notes.*, snippet(notes_fts, -1, ?, ?, '…', 24) AS snippet FROM notes_fts JOIN notes ON notes.id = notes_fts.rowid"
                " WHERE notes_fts MATCH ? ORDER BY bm25(notes_fts, 4.0, 1.0), notes.id DESC LIMIT ? OFFSET ?",
                (MARK_START, MARK_END, query, limit, offset),
            ).fetchall()
            total = db.execute("SELECT count(*) FROM notes_fts WHERE notes_fts MATCH ?", (query,)).fetchone()["count(*)"]
        found = []
        for row in rows:
            snippet = row.pop("snippet")
            found.append(Found(Note(**row), " ".join(snippet.split())))
        return found, total

    def check(self) -> int:
        """How many notes there are; StoreError when the database does not answer or is another version's."""
        try:
            with self._open() as db:
                version = db.execute("PRAGMA user_version").fetchone()["user_version"]
                if version != len(MIGRATIONS):
                    raise StoreError(f"the schema is version {version}, not {len(MIGRATIONS)}")
                return db.execute("SELECT count(*) FROM notes").fetchone()["count(*)"]
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error

    @contextmanager
    def _open(self):
        db = sqlite3.connect(self.path, timeout=5, isolation_level=None)
        db.row_factory = lambda cursor, row: {column[0]: value for column, value in zip(cursor.description, row)}
        try:
            db.execute("PRAGMA synchronous = NORMAL")
            yield db
        finally:
            db.close()

    @contextmanager
    def _transaction(self):
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @staticmethod
    def _get(db: sqlite3.Connection, id: int) -> Note:
        row = db.execute("SELECT * FROM notes WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise Missing(f"there is no note {id}")
        return Note(**row)

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Runs what is missing, one transaction each; several workers may do it at once."""
        while True:
            db.execute("BEGIN IMMEDIATE")
            try:
                version = db.execute("PRAGMA user_version").fetchone()["user_version"]
                if version > len(MIGRATIONS):
                    raise StoreError(
                        f"the database {self.path} has schema {version}, this program knows {len(MIGRATIONS)}; run a newer one"
                    )
                if version == len(MIGRATIONS):
                    db.execute("ROLLBACK")
                    return
                for statement in statements(MIGRATIONS[version]):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {version + 1}")
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


def statements(script: str) -> list[str]:
    """The statements of a script (`executescript` would commit the open transaction)."""
    found, text = [], ""
    for line in script.splitlines(keepends=True):
        text += line
        if sqlite3.complete_statement(text):
            found.append(text.strip())
            text = ""
    return found


def valid(title: str, body: str) -> tuple[str, str]:
    """A title on one line and a body with Unix line ends; Invalid when they will not do."""
    if not isinstance(title, str) or not isinstance(body, str):
        raise Invalid("title and body must be text")
    title = " ".join(title.split())
    body = body.replace("\r\n", "\n").rstrip()
    if not title:
        raise Invalid("a note needs a title")
    if len(title) > MAX_TITLE:
        raise Invalid(f"the title is {len(title)} characters long; {MAX_TITLE} fit")
    if len(body) > MAX_BODY:
        raise Invalid(f"the text is {len(body)} characters long; {MAX_BODY} fit")
    if any(c in title + body for c in ("\x00", MARK_START, MARK_END)):
        raise Invalid("a note cannot hold control characters")
    try:
        (title + body).encode()
    except UnicodeEncodeError:
        raise Invalid("the text is not valid Unicode") from None
    return title, body


def timestamp() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
