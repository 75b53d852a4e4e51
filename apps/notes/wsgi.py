"""The WSGI application, for gunicorn: `gunicorn wsgi`."""

from notes import create_app

application = create_app()
