"""A real S3 API on loopback, in a process of its own: prints its port, ends with its stdin."""

import io
import logging
import os
import sys
import threading

import click
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class OneAtATime:
    """Moto, made as strict as S3: a conditional put is one step, half a body is no object."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()

    def __call__(self, environ, start_response):
        length = int(environ.get("CONTENT_LENGTH") or 0)
        try:
            body = environ["wsgi.input"].read(length)
        except OSError:  # of werkzeug too, when its client has gone
            body = b""
        if len(body) != length:
            start_response("400 Bad Request", [("Content-Length", "0")])
            return []
        environ["wsgi.input"] = io.BytesIO(body)
        with self._lock:
            return self._app(environ, start_response)


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = make_server("127.0.0.1", 0, OneAtATime(), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    click.echo(server.port)
    sys.stdin.read()
    os._exit(0)
