"""A server on a real socket, in a thread of the test's process."""

import asyncio
import contextlib
import socket
import threading
import time

import uvicorn


@contextlib.contextmanager
def running(app):
    """The application's address, served by uvicorn until the block ends; ends as it does on SIGTERM."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=75))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
