"""A folder of adapters that changes under a running server."""

import contextlib
import errno
import os
import threading
import time

import pytest

pytest.importorskip("PIL")

from serving_fakes import FakePool, form

from alore_ext.serving.reload import AdapterDirectory
from alore_ext.training.errors import InputError

TOKEN = {"authorization": "Bearer geheim"}


def write(folder, name, text):
    """As `save_adapter` does: complete or not there."""
    (folder / ".tmp").write_text(text)
    os.replace(folder / ".tmp", folder / f"{name}.safetensors")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    write(folder, "a", "3")
    write(folder, "b", "5")
    return folder


def test_files_come_change_and_go(folder):
    pool = FakePool({"mine": 2})
    directory = AdapterDirectory(folder, pool)
    assert directory.reload().to_dict() == {"added": ["a", "b"], "replaced": [], "removed": [], "failed": {}}
    assert not directory.reload()
    write(folder, "a", "7")
    write(folder, "c", "4")
    (folder / "b.safetensors").unlink()
    report = directory.reload()
    assert (report.added, report.replaced, report.removed) == (["c"], ["a"], ["b"])
    assert {name: pool.num_classes(name) for name in pool.names} == {"mine": 2, "a": 7, "c": 4}


def test_what_is_not_looked_at(folder):
    (folder / ".hidden.safetensors").write_text("3")
    (folder / "notes.txt").write_text("3")
    (folder / "folder.safetensors").mkdir()
    (folder / "dangling.safetensors").symlink_to(folder / "nowhere")
    pool = FakePool({})
    assert AdapterDirectory(folder, pool).reload().failed == {}
    assert pool.names == ["a", "b"]


def test_a_broken_file_is_reported_and_the_former_adapter_stays(folder):
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    write(folder, "a", "broken")
    write(folder, "new", "broken")
    write(folder, "line\nbreak", "4")
    report = directory.reload()
    assert set(report.failed) == {"a", "new", "line\nbreak"} and not report.added
    assert report.failed["a"] == "a.safetensors: not an adapter file"
    assert pool.names == ["a", "b"] and pool.num_classes("a") == 3
    write(folder, "a", "9")
    assert directory.reload().replaced == ["a"] and pool.num_classes("a") == 9


def test_a_file_that_the_check_refuses_is_not_loaded(folder):
    def check(file):
        if file.read_text() == "3":
            raise ValueError("three is too few")

    pool = FakePool({})
    report = AdapterDirectory(folder, pool, check).reload()
    assert report.failed == {"a": "three is too few"} and pool.names == ["b"]


def test_a_name_that_is_taken_by_other_means_is_left_alone(folder):
    pool = FakePool({"a": 2})
    report = AdapterDirectory(folder, pool).reload()
    assert report.added == ["b"] and "taken" in report.failed["a"] and pool.num_classes("a") == 2


def test_the_active_adapter_is_replaced_and_removed(folder):
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    pool.activate("a")
    write(folder, "a", "9")
    assert directory.reload().replaced == ["a"] and pool.active == "a" and pool.num_classes("a") == 9
    write(folder, "a", "bad")
    assert "a" in directory.reload().failed and pool.active == "a" and pool.num_classes("a") == 9
    (folder / "a.safetensors").unlink()
    assert directory.reload().removed == ["a"] and pool.active is None


def test_the_active_adapter_is_activated_again_when_its_file_is_back(folder, caplog):
    caplog.set_level("INFO")
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    pool.activate("a")
    (folder / "a.safetensors").unlink()
    directory.reload()
    assert pool.active is None and "'a' was active" in caplog.text
    write(folder, "a", "bad")
    assert "a" in directory.reload().failed and pool.active is None
    write(folder, "a", "9")
    assert directory.reload().added == ["a"] and pool.active == "a"
    assert "'a' is back, and active again" in caplog.text


def test_one_that_does_not_merge_any_more_is_not_added(folder, monkeypatch):
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    pool.activate("a")
    (folder / "a.safetensors").rename(folder / "away")
    directory.reload()

    def fail(name):
        raise ValueError("cannot merge")

    (folder / "away").rename(folder / "a.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(pool, "activate", fail)
        assert directory.reload().failed == {"a": "cannot merge"} and pool.names == ["b"]
    assert directory.reload().added == ["a"] and pool.active == "a"


def test_another_that_is_active_by_then_stays_so(folder):
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    pool.activate("a")
    (folder / "a.safetensors").rename(folder / "away")
    directory.reload()
    pool.activate("b")
    (folder / "away").rename(folder / "a.safetensors")
    assert directory.reload().added == ["a"] and pool.active == "b"


def test_a_file_that_cannot_be_looked_at_is_not_gone(folder, monkeypatch):
    """As on a network's disk that does not answer."""

    class Entry:
        def __init__(self, entry):
            self.name, self.stat = entry.name, entry.stat
            if entry.name == "a.safetensors":
                self.stat = self.fail

        def fail(self):
            raise OSError(errno.EIO, "Input/output error")

    @contextlib.contextmanager
    def scandir(path):
        with real(path) as entries:
            yield [Entry(entry) for entry in entries]

    real, pool = os.scandir, FakePool({})
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    pool.activate("a")
    with monkeypatch.context() as patched:
        patched.setattr("alore_ext.serving.reload.os.scandir", scandir)
        assert directory.reload(settled_only=True).to_dict() | {"failed": {"a": "Input/output error"}} == (
            directory.reload().to_dict()
        )
        assert not directory.reload(settled_only=True)  # said once
        assert pool.active == "a" and pool.names == ["a", "b"]
    assert not directory.reload() and not directory.reload()


def test_the_watcher_leaves_a_file_alone_until_it_rests(folder):
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    assert not directory.reload(settled_only=True)  # seen for the first time
    with open(folder / "slow.safetensors", "w") as file:
        assert directory.reload(settled_only=True).added == ["a", "b"]
        for _ in range(3):
            file.write("1")
            file.flush()
            assert not directory.reload(settled_only=True)
    assert directory.reload(settled_only=True).added == ["slow"] and pool.num_classes("slow") == 111


def test_the_watcher_tries_a_broken_file_once_and_a_call_every_time(folder):
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    write(folder, "bad", "bad")
    directory.reload(settled_only=True)
    assert list(directory.reload(settled_only=True).failed) == ["bad"]
    assert not directory.reload(settled_only=True)
    assert list(directory.reload().failed) == ["bad"]


def test_a_file_that_changes_while_it_is_read_is_not_loaded(folder, monkeypatch):
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    read = type(folder).read_bytes

    def growing(path):
        data = read(path)
        if path.name == "a.safetensors":
            write(folder, "a", "44")
        return data

    monkeypatch.setattr(type(folder), "read_bytes", growing)
    report = directory.reload()
    assert report.added == ["b"] and "changed while" in report.failed["a"]
    monkeypatch.undo()
    assert directory.reload().added == ["a"] and pool.num_classes("a") == 44


def test_no_folder(tmp_path, folder):
    with pytest.raises(InputError, match="there is no folder"):
        AdapterDirectory(tmp_path / "none", FakePool({}))
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        directory.reload()
    assert pool.names == ["a", "b"]  # a mount that is gone for a moment takes no adapter away


def test_reload_by_a_call(serving, folder):
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    client = serving(pool, directory, reload_token="geheim")
    write(folder, "c", "4")
    write(folder, "a", "bad")
    assert client.post("/predict", **form(1, "c")).status_code == 404
    answer = client.post("/adapters/reload", headers=TOKEN)
    assert answer.status_code == 200
    body = answer.json()
    assert body["added"] == ["c"] and list(body["failed"]) == ["a"] and body["adapters"] == ["a", "b", "c"]
    assert client.post("/predict", **form(1, "c")).status_code == 200
    assert client.post("/predict", **form(1, "a")).status_code == 200
    (folder / "a.safetensors").unlink()
    assert client.post("/adapters/reload", headers=TOKEN).json()["removed"] == ["a"]
    assert client.post("/predict", **form(1, "a")).status_code == 404
    assert [adapter["name"] for adapter in client.get("/adapters").json()["adapters"]] == ["b", "c"]


def test_reload_of_a_folder_that_is_gone(serving, folder):
    pool = FakePool({})
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    client = serving(pool, directory, reload_token="geheim")
    folder.rename(folder.with_name("gone"))
    answer = client.post("/adapters/reload", headers=TOKEN)
    assert answer.status_code == 500 and "No such file" in answer.json()["detail"]
    assert client.post("/predict", **form(1, "a")).status_code == 200


@pytest.mark.parametrize("header", [None, "", "geheim", "Bearer", "Bearer falsch", "Bearer geheim2", "Basic geheim"])
def test_reload_needs_the_token(serving, folder, header):
    client = serving(FakePool({}), AdapterDirectory(folder, FakePool({})), reload_token="geheim")
    answer = client.post("/adapters/reload", headers={} if header is None else {"authorization": header})
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert "geheim" not in answer.text


def test_reload_with_a_token_that_is_not_ascii(serving, folder):
    pool = FakePool({})
    client = serving(pool, AdapterDirectory(folder, pool), reload_token="geheim")
    answer = client.post("/adapters/reload", headers={b"authorization": "Bearer gehüm".encode()})
    assert answer.status_code == 401


@pytest.mark.parametrize("token, with_folder", [(None, True), ("geheim", False)])
def test_reload_that_is_off(serving, folder, token, with_folder):
    pool = FakePool({})
    client = serving(pool, AdapterDirectory(folder, pool) if with_folder else None, reload_token=token)
    assert client.post("/adapters/reload", headers=TOKEN).status_code == 403
    assert pool.names == []


def test_the_folder_is_watched(serving, folder):
    pool = FakePool({})
    client = serving(pool, AdapterDirectory(folder, pool), watch_s=0.05)
    deadline = time.monotonic() + 10
    while client.get("/health").json()["adapters"] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    folder.rename(folder.with_name("gone"))
    time.sleep(0.15)
    folder.with_name("gone").rename(folder)
    (folder / "b.safetensors").unlink()
    while client.get("/health").json()["adapters"] > 1:  # the watcher outlived the folder's absence
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_replacing_under_load_loses_no_request(serving, folder):
    """While adapters are replaced by ones of other answers, every answer is one file's or the other's."""
    pool = FakePool({}, seconds=0.002)
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    client = serving(pool, directory, reload_token="geheim")
    stop, replaced = threading.Event(), []

    def churn():
        while not stop.is_set():
            write(folder, "a", "3" if len(replaced) % 2 else "1")
            replaced.extend(client.post("/adapters/reload", headers=TOKEN).json()["replaced"])

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        answers = [client.post("/predict", **form(value, "a", top_k=3)) for value in range(80)]
    finally:
        stop.set()
        thread.join()
    assert len(replaced) > 5
    assert {answer.status_code for answer in answers} == {200}
    assert {len(answer.json()["predictions"]) for answer in answers} == {1, 3}
