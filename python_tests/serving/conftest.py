"""A running application over the fake pool, and a real pool over a tiny ViT with an adapter of each method."""

import contextlib
import copy

import pytest

# The zoo is imported where it is used: it needs timm, which the tests of batching and bodies do without.


@pytest.fixture
def base(device):
    from zoo import ZOO

    return ZOO["vit"].build(device)


@pytest.fixture
def files(base, tmp_path):
    from pools import CONFIGS, adapter_file
    from zoo import ZOO

    configs = {name: make(ZOO["vit"]) for name, make in CONFIGS.items()}
    return {name: adapter_file(base, config, tmp_path / f"{name}.safetensors") for name, config in configs.items()}


@pytest.fixture
def pool(base, files):
    from alore_ext.serving import AdapterPool

    made = AdapterPool(copy.deepcopy(base))
    for name, path in files.items():
        made.add(name, path)
    return made


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
