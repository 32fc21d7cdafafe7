"""`AdapterPool`: one backbone, many adapters."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from alore_ext._example_images import image_channels
from alore_ext.config import Config
from alore_ext.patching.apply import check_unpatched
from alore_ext.patching.registry import find_structure

from .arguments import (
    as_batch_sizes,
    as_names,
    check_images,
    example_for_capture,
    sizes_refused_by_name,
)
from .clones import logits_of
from .entry import Entry, load_entry
from .graphs import ForwardGraphs
from .live import LiveModel
from .mixed import MixedModel
from .report import MergeReport, check_report, layer_errors, logit_errors

# The living pools by their model's id: a pool keeps its model alive, so no other has that id.
_POOLS: weakref.WeakValueDictionary[int, AdapterPool] = weakref.WeakValueDictionary()


class AdapterPool:
    """Serves many adapters over one frozen backbone.

    - `activate` merges one adapter into the backbone's own weights: the forward is the plain backbone's, at its speed.
    - `predict` runs a batch, also one in which every image asks for another adapter, in one pass.

    Adapters may be of ALoRE, MLAE and LoRA, of any number of experts and rank, on any layers, with classifiers of any
    size. Beside the model the pool keeps one copy of the weights that adapters write, and each adapter's tensors.

    On CUDA a layer of a mixed batch takes the fused kernels where the pool is in 16 bits and each adapter of the batch
    has at most 64 rank rows there (`num_experts * rank`; MLAE: `num_experts * expert_rank`). In float32, and with
    larger ranks, it is composed of several products, which is slower: one such adapter makes that layer composed for
    the whole batch. `alore_ext.ops.plan_alore` and `plan_lora_grouped` say which shapes are fused.

    All methods may be called from several threads; one runs at a time. On CUDA each also waits for what the call
    before it left on the device, whatever streams the callers are on.

    The model itself stays yours: call it, compile it (`model.compile()`), capture it. Do not change its weights, its
    dtype or its device behind the pool's back.

    Args:
        model: a plain backbone of a known family, unpatched. Works in place: it is put in eval mode, moved, and its
            weights are what `activate` writes.
        device, dtype: where to; the model's own by default.

    Raises:
        TypeError: not a module, a dtype that is not floating.
        ValueError: patched, or of no known family; made under `torch.inference_mode`; in another pool's hands.
    """

    @torch.inference_mode(False)  # what it makes could not be written outside of inference mode
    def __init__(
        self, model: nn.Module, *, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"AdapterPool: expected an nn.Module, got {type(model).__name__}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"AdapterPool: dtype must be a floating torch.dtype, got {dtype!r}")
        try:
            check_unpatched(model)
        except ValueError as error:
            raise ValueError(
                f"AdapterPool: expected a plain backbone, {type(model).__name__} is patched; unpatch it, or give its "
                "adapters to add(name, adapter_state_dict(model)) of a pool on another copy"
            ) from error
        try:
            find_structure(model)
        except ValueError as error:
            raise ValueError(f"AdapterPool: {str(error).removeprefix('patch: ')}") from error
        if made := next((name for name, value in model.named_parameters() if value.is_inference()), None):
            raise ValueError(
                f"AdapterPool: {made} was made under torch.inference_mode and cannot be written outside of it; build "
                "or copy the model outside"
            )
        if id(model) in _POOLS:
            raise ValueError(
                f"AdapterPool: this {type(model).__name__} is in another pool, and both would write its weights; use "
                "that pool, delete it first (deactivated), or give this one a copy.deepcopy of the model"
            )
        self.model = model.to(device=device, dtype=dtype).eval()
        like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        self.device: torch.device = like.device
        self.dtype: torch.dtype = like.dtype
        self._channels = image_channels(model)
        self._live = LiveModel(model)
        self._mixed = MixedModel(self._live.base)
        self._entries: dict[str, Entry] = {}
        self._graphs: ForwardGraphs | None = None
        self._lock = threading.RLock()
        self._done: torch.cuda.Event | None = None
        _POOLS[id(model)] = self

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order in which they were added."""
        return list(self._entries)

    @property
    def active(self) -> str | None:
        """Name of the adapter that is merged into the model; None for the base."""
        return self._live.active

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self,
        name: str,
        adapter: str | os.PathLike | Mapping[str, Tensor],
        config: Config | list[Config] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Take in an adapter.

        Args:
            name: what requests call it.
            adapter: a file of `save_adapter`, or what `adapter_state_dict` gives. A plain dict of the same tensors will
                do where names and shapes say all: ALoRE and MLAE. It has no fingerprint of its base: that it was
                trained on another one is noticed only where shapes differ. The classifier may be missing; the base's is
                used.
            config: for a plain dict: what the model was patched with. LoRA's scaling is in nothing else.
            replace: take the place of an adapter of this name, in one step. Not while it is active.

        Raises:
            FileNotFoundError: no such file.
            TypeError, ValueError: a name that is taken; a damaged file; an adapter of another base, family or method;
                NaN or infinity; a classifier that no linear or layer norm is; a config besides the one that `adapter`
                holds. The pool is left as it was.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"AdapterPool.add: name must be a non-empty string, got {name!r}")
        with self._exclusive():
            if name in self._entries and not replace:
                raise ValueError(f"AdapterPool.add: {name!r} is taken; remove it first, or give replace=True")
            if name == self.active:
                raise ValueError(f"AdapterPool.add: {name!r} is active and cannot be replaced; deactivate it first")
            entry = load_entry(self._live.base, name, adapter, config)
            self._mixed.check(entry)
            self._settle()
            try:
                copies = self._live.missing_copies(entry)
                for weight, copy in copies.items():
                    self._mixed.replace_parameter(weight, copy)
                prepared, served = self._live.prepare(entry, copies), self._mixed.prepare(entry)
                if self._graphs is not None:
                    self._capture_for(entry.head, self._graphs)
                # Whatever can fail is behind us.
                self._live.add(prepared)
                self._mixed.add(name, served)
                self._entries[name] = entry
            finally:
                self._drop_unused_heads()

    def remove(self, name: str) -> None:
        """Forget an adapter and free its tensors. Raises ValueError for an unknown name and for the active one."""
        with self._exclusive():
            self._require(name, "remove")
            if name == self.active:
                raise ValueError(f"AdapterPool.remove: {name!r} is active; deactivate it first")
            self._settle()
            self._live.remove(name)
            self._mixed.remove(name)
            del self._entries[name]
            self._drop_unused_heads()

    def num_classes(self, name: str) -> int:
        """How many logits this adapter gives; raises ValueError where neither it nor the base has a classifier."""
        with self._lock:
            if (classes := self._require(name, "num_classes").num_classes) is None:
                raise ValueError(f"AdapterPool.num_classes: neither {name!r} nor the base has a linear classifier")
            return classes

    def labels(self, name: str) -> list[str] | None:
        """The names of this adapter's classes in the order of its logits; None where its file has none."""
        with self._lock:
            labels = self._require(name, "labels").labels
            return None if labels is None else list(labels)

    def activate(self, name: str) -> None:
        """Merge an adapter into the model, in place of the one that was.

        Merged from the pristine weights and written where the weights are: nothing is reallocated and nothing adds up
        over many swaps. The same adapter gives the same bits each time.

        A classifier of another shape than the last brings its own module in. `capture` and `model.compile()` see to
        that. A graph of your own is valid only while the active classifier has the shape that it was recorded with, and
        no longer than the pool has an adapter of that shape; the base's shape is always there.

        Raises:
            ValueError: an unknown name; a merged weight that the dtype cannot hold. The former adapter stays active.
        """
        with self._exclusive():
            self._require(name, "activate")
            self._live.activate(name)

    def deactivate(self) -> None:
        """Bring the base back, weights and classifier, bit for bit."""
        with self._exclusive():
            self._live.activate(None)

    def predict(
        self, images: Tensor, adapter: str | None = None, adapters: Sequence[str | None] | None = None
    ) -> Tensor | list[Tensor]:
        """Logits of a batch.

        Args:
            images: floating point [batch, 3, height, width] (or as many channels as the model takes), preprocessed;
                moved to the pool's device and dtype.
            adapter: one adapter for all images. The active one, or None for whatever the model now is, takes the merged
                path; any other is run beside the base weights, and what is active stays so.
            adapters: one name an image instead, None being the base with its own classifier.

        Returns:
            [batch, classes], or with `adapters` a list of [classes], one an image, in the pool's dtype and device,
            under `torch.autocast` too.

        Raises:
            TypeError: images that are no floating tensor.
            ValueError: images of another shape; an unknown name; as many names as there are images were expected; both
                adapter and adapters; a base without classifier; a merged model that was put in training mode.
        """
        check_images(images, self._channels, "AdapterPool.predict")
        if adapter is not None and adapters is not None:
            raise ValueError("AdapterPool.predict: give adapter for all images or adapters, one an image; got both")
        names = None if adapters is None else as_names(adapters, len(images))
        with self._exclusive(), sizes_refused_by_name(images, "AdapterPool.predict"):
            for name in names or [adapter]:
                if name is not None:
                    self._require(name, "predict")
            images = images.to(device=self.device, dtype=self.dtype)
            if names is None:
                is_merged = adapter is None or adapter == self.active
                return self._merged(images) if is_merged else self._mixed.run(images, [adapter])
            if not names:
                return []
            if set(names) == {self.active}:
                return list(self._merged(images).unbind(0))
            logits = self._mixed.run(images, names)
            return list(logits.unbind(0)) if isinstance(logits, Tensor) else logits

    def capture(self, batch_sizes: Iterable[int], example_image: Tensor | None = None) -> None:
        """Record the merged forward as CUDA graphs, which `predict` then replays.

        A batch is padded to the next captured size; one larger than all runs without a graph, as do batches of mixed
        adapters. Graphs are per batch size and shape of classifier: adapters that are added later are captured then.

        Args:
            batch_sizes: how many images at a time.
            example_image: as `predict`'s images, of the size to capture; by default the model's own.

        Raises:
            TypeError: an example that is no floating tensor.
            ValueError: not on CUDA; a batch size below 1; a size that the model does not take, or that cannot be found
                out.
        """
        sizes = as_batch_sizes(batch_sizes)
        example = example_for_capture(self.model, example_image, self._channels)
        if self.device.type != "cuda":
            raise ValueError(f"AdapterPool.capture: CUDA graphs need a CUDA device, the pool is on {self.device}")
        with self._exclusive():
            self._check_eval("capture")
            graphs = ForwardGraphs(self.model, sizes, example)
            self._settle()
            with sizes_refused_by_name(example, "AdapterPool.capture"):
                for head in self._heads():
                    self._capture_for(head, graphs)
            self._graphs = graphs

    def merge_report(
        self,
        name: str,
        images: Tensor,
        *,
        max_lost: float | None = None,
        max_logit_difference: float | None = None,
    ) -> MergeReport:
        """How exactly this adapter merges at the pool's dtype.

        Each merged weight is compared with its merge in float64, and the logits of the merged model with those of the
        base with the adapter beside it. In 16 bits a small update partly vanishes in the weight's rounding; `lost`
        says how much of it. What was active stays active.

        Args:
            name: an adapter.
            images: as for `predict`, at least one.
            max_lost: most that any weight may lose of its update, as a fraction of it.
            max_logit_difference: most that a logit may differ by, as a fraction of the largest logit.

        Raises:
            MergeError: a bound is not kept; its `report` has the figures.
            TypeError, ValueError: as `predict`; no images.
        """
        with self._exclusive():
            entry = self._require(name, "merge_report")
            check_images(images, self._channels, "AdapterPool.merge_report")
            if len(images) == 0:
                raise ValueError("AdapterPool.merge_report: images must be a tensor of at least one image")
            with sizes_refused_by_name(images, "AdapterPool.merge_report"):
                unmerged = self._mixed.run(images.to(device=self.device, dtype=self.dtype), [name])
            former = self.active
            self._live.activate(name)
            try:
                merged = self.predict(images)
                layers = tuple(layer_errors(self.model, self._live.base, entry))
            finally:
                self._live.activate(former)
            difference, agreement = logit_errors(merged, unmerged)
            report = MergeReport(name, self.dtype, layers, difference, agreement, len(images))
        check_report(report, max_lost, max_logit_difference)
        return report

    def _merged(self, images: Tensor) -> Tensor:
        self._check_eval("predict")
        if self._graphs is not None:
            logits = self._graphs.run(images, self._live.heads.shapes(self._head(self.active)))
            if logits is not None:
                return logits
        return logits_of(self.model(images))

    def _check_eval(self, caller: str) -> None:
        if self.model.training:
            raise ValueError(f"AdapterPool.{caller}: the model was put in training mode; call its eval() first")

    def _head(self, name: str | None) -> dict[str, dict[str, Tensor]]:
        return {} if name is None else self._entries[name].head

    def _heads(self) -> list[dict[str, dict[str, Tensor]]]:
        """The base's classifier and every adapter's."""
        return [self._head(name) for name in (None, *self._entries)]

    def _drop_unused_heads(self) -> None:
        """Free the modules and graphs of classifiers whose shape no adapter has any more."""
        heads = self._heads()
        self._live.heads.keep(heads)
        if self._graphs is not None:
            self._graphs.keep({self._live.heads.shapes(head) for head in heads})

    def _capture_for(self, head: dict[str, dict[str, Tensor]], graphs: ForwardGraphs) -> None:
        """Capture for a classifier; the graphs read the weights only when they are replayed."""
        self._live.heads.install(head)
        try:
            graphs.capture(self._live.heads.shapes(head))
        finally:
            self._live.heads.install(self._head(self.active))

    def _require(self, name: str, caller: str) -> Entry:
        if not isinstance(name, str) or name not in self._entries:
            known = ", ".join(map(repr, self._entries)) or "none"
            raise ValueError(f"AdapterPool.{caller}: unknown adapter {name!r}; the pool has {known}")
        return self._entries[name]

    def _settle(self) -> None:
        """Wait for the device before tensors or graphs are dropped.

        Another caller's stream may still read them, and the allocator knows only of the stream that they were made on.
        """
        if self._done is not None:
            self._done.synchronize()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One call at a time, on the device too: callers may be on streams of their own."""
        # Tensors made under inference mode could not be written outside of it, and no call may build a graph. Autocast
        # would answer in its own dtype, and be recorded by whatever captures under it.
        plain = torch.autocast(self.device.type, enabled=False)
        with self._lock, torch.inference_mode(False), torch.no_grad(), plain:
            if self.device.type != "cuda":
                yield
                return
            with torch.cuda.device(self.device):
                if self._done is not None:
                    torch.cuda.current_stream().wait_event(self._done)
                try:
                    yield
                finally:
                    self._done = torch.cuda.Event()
                    self._done.record()
