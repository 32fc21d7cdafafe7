"""A running application over the fake pool."""

import contextlib

import pytest


@pytest.fixture
def serving():
    """serving(pool, directory=None, **settings) -> a client of the running application."""
    for package in ("fastapi", "httpx", "python_multipart", "prometheus_client", "PIL"):
        pytest.importorskip(package)  # what the extra `serve` installs: the pool's tests here need none of it
    from fastapi.testclient import TestClient
    from serving_fakes import SPEC, FakePool

    from alore_ext.serving.app import create_app
    from alore_ext.serving.settings import Settings

    with contextlib.ExitStack() as stack:

        def start(pool=None, directory=None, **settings):
            app = create_app(pool or FakePool({"a": 3, "b": 5}), SPEC, Settings(**settings), directory)
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield start
