"""Taking a merged model out of Python, or into a plain state dict: files that need no alore_ext.

A merged model is its backbone and nothing else, so whatever reads the backbone reads the file. AS-MLP alone runs an
operator of this package; its graph gets that operator's plain form.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from . import reference
from ._example_images import example_images
from ._extension import build_info
from ._files import write_atomic
from ._untouched import full_float32, left_as_it_was, same_bits
from .patching.dataflow import TRACING
from .patching.state import get_state
from .verification import VerificationError

SUFFIXES = {"torch-export": ".pt2", "onnx": ".onnx", "state-dict": ".safetensors"}

# The check's bound on the largest difference, relative to the largest logit. Another runtime sums in another order,
# which costs some 1e-6 in float32; in 16 bits every operator rounds its output.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# What onnxruntime has CPU kernels of a whole backbone for.
_ONNXRUNTIME_DTYPES = (torch.float32, torch.float16)
# A protocol buffer ends at 2 GiB. Beyond this, where torch draws its line too, the weights get a file of their own.
ONNX_ONE_FILE = 3 * 2**29

# What the file's metadata says of itself; "format" is safetensors' own.
_RESERVED = ("format", "alore_ext", "torch", "class")

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

# A backbone's own operators of this package, and what they are in plain PyTorch.
_PLAIN_FORMS = {
    torch.ops.alore_ext.axial_shift.default: reference.axial_shift,
    torch.ops.alore_ext.axial_shift_pair.default: reference.axial_shift_pair,
}


def export(
    model: nn.Module,
    path: str | os.PathLike,
    format: str = "torch-export",
    *,
    example_input: Tensor | None = None,
    dynamic_batch: bool = True,
    opset: int | None = None,
    check: bool = True,
    tolerance: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a merged model to one file that needs no alore_ext to be used.

    - "torch-export" (.pt2): `torch.export.load(path).module()(images)` gives the logits, with torch alone, on the
      device and in the dtype that the model had.
    - "onnx" (.onnx): input `images`, output `logits`. Needs onnx and onnxscript, and onnxruntime for the check
      (`pip install 'alore_ext[export]'`). Weights of more than 1.5 GiB go to a second file, `<name>.onnx.data`.
    - "state-dict" (.safetensors): `state_dict()` as it is, under the backbone's own keys. It loads into the
      backbone's class with `strict=True`, and into timm by `checkpoint_path=`.

    The graphs hold plain operators only: one with an `alore_ext::` operator is refused. They compute what the model
    computes in eval mode, and return the logits alone where the model returns an output with `logits`
    (transformers). The model is left as it was, to the bit, which takes memory for a copy of it. The file is complete
    and checked, or not there: it is written beside `path` and moved into place.

    Args:
        model: merged (`merge_`, `merge_and_unload`, `AdapterPool.activate`), or any model without adapters.
        path: the file; it ends in the format's suffix. One that exists is replaced.
        format: one of the above.
        example_input: images [batch, channels, height, width] to trace and check with, moved to the model's device
            and dtype. None makes random ones of the size that the model names (timm, transformers, torchvision's
            ViT). A state dict needs none.
        dynamic_batch: whether the graph takes any number of images, or the example's number alone.
        opset: of ONNX; None for torch's default.
        check: read the file back and compare. Graphs are run (ONNX by onnxruntime on the CPU) on the example, and
            with `dynamic_batch` also on one image and on one image more; of a state dict every bit is compared.
        tolerance: the check's bound on max |difference| / max |logits|; None for `TOLERANCES` of the model's dtype:
            1e-4 in float32, 2e-2 in float16, 1e-1 in bfloat16.
        metadata: more entries for the file's metadata, beside the versions and the model's class, whose keys
            ("format", "alore_ext", "torch", "class") are reserved. They are safetensors metadata, ONNX metadata_props,
            or extra_files of `torch.export.load`.

    Returns:
        The path.

    Raises:
        ValueError: patched and not merged; an unknown format, another suffix; no example_input where the model names
            no size, or one that the model does not take; a model that torch cannot trace, or whose batch it fixes;
            an alore_ext operator in the graph; an opset that the graph cannot be converted to; a reserved key of
            metadata; a check of ONNX in bfloat16 or float64, for which onnxruntime has no CPU kernels.
        TypeError: an argument of another kind.
        ImportError: a package that the format or its check needs is missing; names it.
        OSError: the file cannot be written.
        VerificationError: the file does not compute what the model computes.
    """
    if format not in SUFFIXES:
        raise ValueError(f"export: format must be one of {', '.join(map(repr, SUFFIXES))}, got {format!r}")
    path = _checked_path(path, format)
    _check_options(format, opset, tolerance, metadata)
    _check_model(model)
    kind = type(model)
    entries = dict(metadata or {}) | {
        "alore_ext": build_info()["version"],
        "torch": torch.__version__,
        "class": f"{kind.__module__}.{kind.__qualname__}",
    }
    if format == "state-dict":
        _write_state_dict(model, path, entries, check)
        return path
    if format == "onnx":
        _check_onnx(model, path, opset, check)
    # Under inference mode nothing can be traced: what it makes is no normal tensor.
    with torch.inference_mode(False), torch.no_grad(), left_as_it_was(model), full_float32():
        model.eval().requires_grad_(False)
        images = example_images(model, example_input, "export")
        if dynamic_batch and len(images) == 1:
            images = torch.cat([images, images])  # torch takes a size of 1 for a constant
        network = _with_logits(model, images, path)
        program = _trace(network, images, dynamic_batch, path)
        compare = _comparison(network, images, dynamic_batch, path, tolerance) if check else None
        if format == "onnx":
            _write_onnx(_to_onnx(program, images, dynamic_batch, opset, path), path, entries, compare)
        else:
            _write_program(program, path, entries, compare)
    return path


def _checked_path(path: str | os.PathLike, format: str) -> Path:
    path = Path(path)
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"export: a file of format {format!r} ends in {SUFFIXES[format]}, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export: there is no folder {path.parent} to write {path.name} to")
    if path.is_dir():
        raise IsADirectoryError(f"export: {path} is a folder")
    return path


def _check_options(format: str, opset: int | None, tolerance: float | None, metadata: Mapping[str, str] | None) -> None:
    if opset is not None:
        if format != "onnx":
            raise ValueError(f"export: opset is for format 'onnx', got {opset!r} with {format!r}")
        if isinstance(opset, bool) or not isinstance(opset, int):
            raise TypeError(f"export: opset must be None or an int, got {opset!r}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"export: tolerance must be None or at least 0, got {tolerance!r}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"export: metadata must be strings by strings, got {key!r}: {value!r}")
        if key in _RESERVED:
            raise ValueError(f"export: metadata: the key {key!r} is reserved, as are {', '.join(map(repr, _RESERVED))}")


def _check_model(model: nn.Module) -> None:
    """Raises where the model is no plain backbone with values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"export: model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        state = get_state(module)
        if state is not None and state.merged is None:
            which = f"the submodule {name!r} ({type(module).__name__})" if name else type(module).__name__
            raise ValueError(f"export: {which} is patched and not merged; call merge_ or merge_and_unload first")
    # Their names stand in front of every key of the state dict.
    wrapped = "_orig_mod" if hasattr(model, "_orig_mod") else "module" if isinstance(model, _PARALLEL) else None
    if wrapped is not None:
        raise ValueError(f"export: {type(model).__name__} is a wrapper; export the model inside, model.{wrapped}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"export: {name} is on the meta device, which holds no values to write")


def _write_state_dict(model: nn.Module, path: Path, entries: Mapping[str, str], check: bool) -> None:
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"export: {path}: state_dict()[{name!r}] is a {type(value).__name__}; expected a tensor")
    # Contiguous copies, each in memory of its own: safetensors refuses views and tied tensors, and a strict load
    # wants every key of them.
    contents = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}

    def write(temporary: str) -> None:
        save_file(contents, temporary, {"format": "pt", **entries})
        if check:
            read = load_file(temporary)
            changed = [name for name in contents if name not in read or not same_bits(read[name], contents[name])]
            if changed:
                raise VerificationError(f"export: {path}: {changed[0]} was not read back as it was written")

    write_atomic(path, write)


class _Logits(nn.Module):
    """A model that returns its logits among other things, as one that returns them alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def _with_logits(model: nn.Module, images: Tensor, path: Path) -> nn.Module:
    """The model, or a wrapper of it, whose output is one tensor. Raises ValueError where there is none."""
    name = type(model).__name__
    try:
        output = model(images)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise ValueError(
            f"export: {path}: {name} does not take an example_input of {list(images.shape)}: {_first_line(error)}"
        ) from error
    if isinstance(output, Tensor):
        return model
    if isinstance(getattr(output, "logits", None), Tensor):
        return _Logits(model).eval()
    raise ValueError(
        f"export: {path}: {name} returns a {type(output).__name__}; expected a tensor, or an output with logits"
    )


def _trace(network: nn.Module, images: Tensor, dynamic_batch: bool, path: Path) -> ExportedProgram:
    """The graph, of plain operators alone."""
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    try:
        with TRACING:  # it traces by torch.fx, which is one at a time in a process
            program = torch.export.export(network, (images,), dynamic_shapes=shapes)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch has many, without a common base
        hint = "; with dynamic_batch=False the batch is the example's" if dynamic_batch else ""
        raise ValueError(
            f"export: {path}: torch.export cannot trace {type(network).__name__}: {_first_line(error)}{hint}"
        ) from error
    if not _own_operators(program).isdisjoint(_PLAIN_FORMS):
        program = program.run_decompositions(_PLAIN_FORMS)
    if left := sorted(str(operator) for operator in _own_operators(program)):
        raise ValueError(f"export: {path}: the graph holds {', '.join(left)}, which only alore_ext can run")
    return program


def _own_operators(program: ExportedProgram) -> set[torch._ops.OpOverload]:
    """This package's operators in the graph and in the graphs within it."""
    graphs = (part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule))
    targets = {node.target for graph in graphs for node in graph.nodes}
    return {target for target in targets if getattr(target, "namespace", None) == "alore_ext"}


def _comparison(
    network: nn.Module, images: Tensor, dynamic_batch: bool, path: Path, tolerance: float | None
) -> Callable[[Callable[[Tensor], Tensor]], None]:
    """A function that raises VerificationError where another form of the network computes something else."""
    bound = TOLERANCES[images.dtype] if tolerance is None else tolerance
    batches = [images, images[:1], torch.cat([images, images[:1]])] if dynamic_batch else [images]

    def compare(run: Callable[[Tensor], Tensor]) -> None:
        for batch in batches:
            expected, got = network(batch).double(), run(batch).to(batch.device).double()
            if got.shape != expected.shape:
                raise VerificationError(
                    f"export: {path}: the file returns {list(got.shape)}, the model {list(expected.shape)}"
                )
            error, largest = (got - expected).abs().max(), expected.abs().max()  # which may be 0
            if not error <= bound * largest:  # NaN is no match either
                raise VerificationError(
                    f"export: {path}: the file's logits of {list(batch.shape)} differ from the model's by "
                    f"{(error / largest).item():.1e} of the largest, more than the tolerance of {bound:.1e}"
                )

    return compare


def _write_program(program: ExportedProgram, path: Path, entries: Mapping[str, str], compare: Callable | None) -> None:
    def write(temporary: str) -> None:
        torch.export.save(program, temporary, extra_files=dict(entries))
        if compare is not None:
            compare(torch.export.load(temporary).module())

    write_atomic(path, write)


def _check_onnx(model: nn.Module, path: Path, opset: int | None, check: bool) -> None:
    """Raises where ONNX, or its check, is not to be had: better now than after the trace."""
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise  # it is there, but broken: its own message is the useful one
            way_out = ", or check=False" if package == "onnxruntime" else ""
            raise ImportError(
                f"export: {path}: format 'onnx' needs {package}: pip install 'alore_ext[export]'{way_out}", name=package
            ) from error
    newest = import_module("onnx").defs.onnx_opset_version()
    if opset is not None and not 1 <= opset <= newest:
        raise ValueError(f"export: {path}: opset must be from 1 to {newest}, the newest that onnx knows, got {opset}")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if check and dtype not in _ONNXRUNTIME_DTYPES:
        raise ValueError(
            f"export: {path}: the model is {dtype}, and onnxruntime's CPU kernels take float32 and float16, so the "
            "file cannot be checked: export model.float() or model.half(), or give check=False"
        )


def _to_onnx(program: ExportedProgram, images: Tensor, dynamic_batch: bool, opset: int | None, path: Path):
    """A torch.onnx.ONNXProgram."""
    try:
        converted = torch.onnx.export(
            program,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            opset_version=opset,
            dynamic_shapes=({0: "batch"},) if dynamic_batch else None,  # names the axis in the file
        )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise ValueError(f"export: {path}: torch.onnx cannot convert the graph: {_first_line(cause)}") from error
    version = converted.model.opset_imports[""]
    if opset not in (None, version):
        raise ValueError(f"export: {path}: the graph cannot be converted to opset {opset}; it is in opset {version}")
    return converted


def _write_onnx(converted, path: Path, entries: Mapping[str, str], compare: Callable | None) -> None:
    converted.model.metadata_props.update(entries)
    size = sum(value.const_value.nbytes for value in converted.model.graph.initializers.values())
    # In a folder of its own, because the model names the file of its weights.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder, path.name)
        converted.save(written, external_data=size > ONNX_ONE_FILE)
        if compare is not None:
            compare(_onnxruntime(written, path))
        for file in sorted(Path(folder).iterdir(), reverse=True):  # weights before the model that names them
            write_atomic(path.with_name(file.name), partial(os.replace, file))


def _onnxruntime(file: Path, path: Path) -> Callable[[Tensor], Tensor]:
    """The file as a function, on the CPU."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has one for each of its codes, on no common base of its own
        raise VerificationError(f"export: {path}: onnxruntime does not load it: {_first_line(error)}") from error

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.cpu().numpy()})[0])

    return run


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
