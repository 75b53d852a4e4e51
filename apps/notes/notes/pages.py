"""The HTML pages."""

from flask import Blueprint, current_app, flash, redirect, render_template, request, url_for
from werkzeug.exceptions import HTTPException

from . import render
from .store import Conflict, Invalid, Missing

blueprint = Blueprint("pages", __name__)

PAGE = 30


def store():
    return current_app.extensions["store"]


@blueprint.app_template_filter("markdown")
def markdown_filter(text: str):
    return render.markdown(text)


@blueprint.app_template_filter("snippet")
def snippet_filter(text: str):
    return render.snippet(text)


@blueprint.app_template_filter("day")
def day_filter(time: str) -> str:
    """`2024-05-01T10:20:30.000000Z` as `2024-05-01 10:20`."""
    return time[:16].replace("T", " ")


@blueprint.get("/")
def index():
    query = request.args.get("q", "").strip()
    page = max(1, min(request.args.get("page", 1, type=int), 1_000_000))
    offset = (page - 1) * PAGE
    found, total = store().search(query, PAGE, offset) if query else store().recent(PAGE, offset)
    pages = max(1, -(-total // PAGE))
    return render_template("index.html", found=found, total=total, query=query, page=page, pages=pages)


@blueprint.get("/new")
def new():
    return render_template("edit.html", note=None, title="", body="", version=None, error=None)


@blueprint.post("/new")
def create():
    title, body = request.form.get("title", ""), request.form.get("body", "")
    try:
        note = store().create(title, body)
    except Invalid as error:
        return render_template("edit.html", note=None, title=title, body=body, version=None, error=str(error)), 400
    flash("Saved.")
    return redirect(url_for("pages.show", id=note.id), 303)


@blueprint.get("/notes/<int:id>")
def show(id: int):
    return render_template("show.html", note=store().get(id))


@blueprint.get("/notes/<int:id>/edit")
def edit(id: int):
    note = store().get(id)
    return render_template("edit.html", note=note, title=note.title, body=note.body, version=note.version, error=None)


@blueprint.post("/notes/<int:id>/edit")
def update(id: int):
    title, body = request.form.get("title", ""), request.form.get("body", "")
    version = request.form.get("version", type=int)
    try:
        store().update(id, title, body, version)
    except Invalid as error:
        note, message, status = store().get(id), str(error), 400
    except Conflict as error:
        # Their words are kept; saving again, now on top of the newer version, replaces it knowingly.
        note, version, status = error.note, error.note.version, 409
        message = "Somebody else changed this note meanwhile. Compare with the saved note below, then save again."
    else:
        flash("Saved.")
        return redirect(url_for("pages.show", id=id), 303)
    page = render_template("edit.html", note=note, title=title, body=body, version=version, error=message, theirs=status == 409)
    return page, status


@blueprint.post("/notes/<int:id>/delete")
def delete(id: int):
    store().delete(id)
    flash("Deleted.")
    return redirect(url_for("pages.index"), 303)


@blueprint.app_errorhandler(Missing)
def missing(error: Missing):
    return render_template("error.html", title="Not found", text=str(error)), 404


@blueprint.app_errorhandler(HTTPException)
def refused(error: HTTPException):
    if error.code is None or error.code < 400:
        return error
    return render_template("error.html", title=error.name, text=error.description), error.code
