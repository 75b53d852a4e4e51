"""The JSON API below /api/notes."""

from flask import Blueprint, Response, current_app, jsonify, request, url_for
from werkzeug.exceptions import HTTPException

from .store import Conflict, Invalid, Missing

blueprint = Blueprint("api", __name__, url_prefix="/api/notes")

MAX_LIMIT = 200


def store():
    return current_app.extensions["store"]


def number(name: str, default: int, top: int) -> int:
    text = request.args.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text) <= top):
        raise Invalid(f"`{name}` must be a number from 0 to {top}")
    return int(text)


def body() -> dict:
    """The request's object, with the keys of a note and no others."""
    data = request.get_json()
    if not isinstance(data, dict):
        raise Invalid("the request must be a JSON object")
    if unknown := sorted(set(data) - {"title", "body", "version"}):
        raise Invalid(f"unknown key `{unknown[0]}`; a note has `title`, `body` and `version`")
    version = data.get("version")
    if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
        raise Invalid("`version` must be a number")
    return data


@blueprint.get("")
def list_notes():
    limit, offset = number("limit", 50, MAX_LIMIT), number("offset", 0, 1_000_000_000)
    query = request.args.get("q", "").strip()
    found, total = store().search(query, limit, offset) if query else store().recent(limit, offset)
    return jsonify(notes=[entry.note.as_dict() for entry in found], total=total)


@blueprint.post("")
def create():
    data = body()
    note = store().create(data.get("title", ""), data.get("body", ""))
    return jsonify(note.as_dict()), 201, {"Location": url_for("api.get", id=note.id)}


@blueprint.get("/<int:id>")
def get(id: int):
    return jsonify(store().get(id).as_dict())


@blueprint.put("/<int:id>")
def update(id: int):
    data = body()
    old = store().get(id)
    note = store().update(id, data.get("title", old.title), data.get("body", old.body), data.get("version"))
    return jsonify(note.as_dict())


@blueprint.delete("/<int:id>")
def delete(id: int):
    store().delete(id)
    return Response(status=204)


@blueprint.errorhandler(Invalid)
def invalid(error: Invalid):
    return jsonify(error=str(error)), 400


@blueprint.errorhandler(Missing)
def missing(error: Missing):
    return jsonify(error=str(error)), 404


@blueprint.errorhandler(Conflict)
def conflict(error: Conflict):
    return jsonify(error=str(error), note=error.note.as_dict()), 409


@blueprint.errorhandler(HTTPException)
def refused(error: HTTPException):
    return jsonify(error=error.description), error.code
