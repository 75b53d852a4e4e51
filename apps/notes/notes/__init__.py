"""Notes: a web application for notes in Markdown, kept in SQLite.

`create_app` wires the parts: `store` (SQLite), `render` (Markdown to safe HTML), `pages` (HTML),
`api` (JSON), `security` (key, CSRF, headers) and `access` (log).
"""

import os
from collections.abc import Mapping
from pathlib import Path

from flask import Flask, current_app, jsonify
from werkzeug.middleware.proxy_fix import ProxyFix

from . import access, api, pages, security
from .store import Store, StoreError

# Bytes of one request: a note of the largest size, form-encoded, and slack.
MAX_REQUEST = 512 * 1024


def create_app(environ: Mapping[str, str] = os.environ) -> Flask:
    """Opens (and migrates) the database and returns the application."""
    app = Flask(__name__)
    data = Path(environ.get("NOTES_DATA") or "/var/lib/notes")
    app.extensions["store"] = Store(data)
    app.config.update(
        SECRET_KEY=security.secret_key(environ, data),
        MAX_CONTENT_LENGTH=MAX_REQUEST,
        MAX_FORM_MEMORY_SIZE=MAX_REQUEST,
        SESSION_COOKIE_NAME="notes",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=environ.get("NOTES_SECURE") == "1",
    )
    proxies = int(environ.get("NOTES_PROXIES") or 0)
    if proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=proxies, x_proto=proxies, x_host=proxies)
    app.register_blueprint(pages.blueprint)
    app.register_blueprint(api.blueprint)
    security.install(app)
    access.install(app)

    @app.get("/healthz")
    def healthz():
        try:
            return jsonify(status="ok", notes=current_app.extensions["store"].check())
        except StoreError as error:
            return jsonify(status="failed", reason=str(error)), 503

    return app
