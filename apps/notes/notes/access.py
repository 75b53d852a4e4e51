"""The access log: one JSON object per request on standard output."""

import json
import secrets
import sys
import time
from datetime import datetime, timezone

from flask import Flask, g, request


def install(app: Flask) -> None:
    @app.before_request
    def begin():
        g.began = time.monotonic()
        g.request_id = request.headers.get("X-Request-Id", "")[:64] or secrets.token_hex(8)

    @app.after_request
    def record(response):
        response.headers["X-Request-Id"] = g.get("request_id", "")
        print(json.dumps(entry(response), ensure_ascii=False), file=sys.stdout, flush=True)
        return response


def entry(response) -> dict:
    """What is logged. The query is left out: it holds what people search for."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "id": g.get("request_id", ""),
        "remote": request.remote_addr,
        "method": request.method,
        "path": request.path,
        "status": response.status_code,
        "bytes": response.calculate_content_length(),
        "ms": round((time.monotonic() - g.get("began", time.monotonic())) * 1000, 2),
        "agent": request.headers.get("User-Agent", ""),
    }
