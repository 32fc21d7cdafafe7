"""A pool whose answers say which adapter and which image they are for, and images that carry a number."""

import base64
import io
import threading
import time
from pathlib import Path

import torch
from PIL import Image

from alore_ext.training.loader import InputSpec

SPEC = InputSpec(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # the model sees pixel / 255


class FakePool:
    """Adapter number a with c classes says (value of the image * (a + 1)) % c: wrong routing is a wrong answer.

    ``seconds`` is how long a batch takes; none ends while ``gate`` is closed.
    Images of the value ``broken`` raise; those of ``nan`` give NaN.
    """

    device = torch.device("cpu")

    def __init__(self, classes, *, seconds=0.0, broken=None, nan=None, labels=None):
        self._classes, self._labels = dict(classes), labels or {}
        self._numbers = {name: number for number, name in enumerate(self._classes)}
        self.seconds, self.broken, self.nan = seconds, broken, nan
        self.active, self.batches, self.threads = None, [], set()
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    @property
    def names(self):
        with self._lock:
            return list(self._classes)

    def num_classes(self, name):
        return self._classes[name]

    def labels(self, name):
        return self._labels.get(name)

    def expected(self, name, value):
        return value * (self._numbers[name] + 1) % self._classes[name]

    def add(self, name, path, replace=False):
        """A file holds the adapter's number of classes, as text."""
        text = Path(path).read_text()
        if not text.isdecimal():
            raise ValueError(f"{path}: not an adapter file")
        with self._lock:
            if name in self._classes and not replace:
                raise ValueError(f"{name} is taken")
            if name == self.active:
                raise ValueError(f"{name} is active")
            self._classes[name] = int(text)
            self._numbers.setdefault(name, len(self._numbers))

    def remove(self, name):
        with self._lock:
            if self.active == name:
                raise ValueError(f"{name} is active")
            del self._classes[name]

    def activate(self, name):
        self.active = name

    def deactivate(self):
        self.active = None

    def predict(self, images, adapter=None, adapters=None):
        with self._lock:  # for as long as a batch runs, as the real one does
            self.threads.add(threading.current_thread().name)
            self.batches.append([adapter] * len(images) if adapters is None else list(adapters))
            time.sleep(self.seconds)
            assert self.gate.wait(30)
            values = (images[:, 0].mean(dim=(1, 2)) * 255).round().long().tolist()
            if self.broken in values:
                raise RuntimeError("the model broke")
            rows = [self._row(name, value) for name, value in zip(self.batches[-1], values, strict=True)]
        return torch.stack(rows) if adapters is None else rows

    def _row(self, name, value):
        if name not in self._classes:
            raise ValueError(f"unknown adapter {name}")
        row = -(torch.arange(self._classes[name]) - self.expected(name, value)).abs().float()
        return row * float("nan") if value == self.nan else row


def png(value, size=(8, 8), mode="RGB"):
    return encoded(Image.new(mode, size, (value,) * 3 if mode == "RGB" else value))


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def form(value, adapter, **fields):
    """Arguments of httpx' ``post`` for one image."""
    return {"files": {"file": ("image.png", png(value), "image/png")}, "data": {"adapter": adapter, **fields}}


def as_json(image, adapter, **fields):
    return {"json": {"image": base64.b64encode(image).decode(), "adapter": adapter, **fields}}
