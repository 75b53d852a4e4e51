"""How gunicorn serves notes. Bind address and worker count come from PORT and WEB_CONCURRENCY."""

wsgi_app = "wsgi:application"
worker_class = "gthread"
threads = 4
# Loaded once and then forked: one migration, one import, and pages of memory that the workers share.
preload_app = True
# After SIGTERM requests under way have this long, in seconds, to finish.
graceful_timeout = 20
# The application writes its own access log, one JSON object per line.
accesslog = None
errorlog = "-"
# No second way in: nobody talks to the running server but over HTTP and signals.
control_socket_disable = True
