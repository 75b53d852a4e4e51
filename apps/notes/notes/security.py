"""The key that signs cookies, protection against forged requests, and response headers."""

import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from flask import Flask, abort, request, session

POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' https: data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def secret_key(environ: Mapping[str, str], data: Path) -> str:
    """From the file NOTES_SECRET_FILE, from NOTES_SECRET, or made once and kept beside the database."""
    if file := environ.get("NOTES_SECRET_FILE"):
        return Path(file).read_text().strip()
    if key := environ.get("NOTES_SECRET"):
        return key
    path = data / "secret.key"
    try:
        # All workers start at once: the first link wins, and a reader never sees half a key.
        fresh = data / f"secret.key.{os.getpid()}"
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.link(fresh, path)
    except FileExistsError:
        pass
    finally:
        fresh.unlink(missing_ok=True)
    return path.read_text()


def csrf_token() -> str:
    """The token of this visitor's session, made at first use."""
    if "csrf" not in session:
        session["csrf"] = secrets.token_urlsafe(24)
    return session["csrf"]


def install(app: Flask) -> None:
    app.jinja_env.globals["csrf_token"] = csrf_token

    @app.before_request
    def refuse_forged_requests():
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return
        if request.path.startswith("/api/"):
            # A page of another site can send neither JSON nor PUT and DELETE without our consent (CORS),
            # and browsers say where a request comes from.
            if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
                abort(403, "requests of other sites are refused")
            return
        given = request.form.get("csrf", "")
        if not hmac.compare_digest(given.encode(), session.get("csrf", "").encode()) or not given:
            abort(403, "the form is too old or was not ours; go back, reload the page and send it again")

    @app.after_request
    def add_headers(response):
        response.headers.setdefault("Content-Security-Policy", POLICY)
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Referrer-Policy", "same-origin")
        if request.endpoint != "static":
            response.headers.setdefault("Cache-Control", "no-store")
        return response
