"""Where one method's step spends its time: kernels on the GPU, operators on the host."""

import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from .timing import seconds_of, synchronize, warm_up

STEPS = 5
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
# Every call that puts work on a GPU: cudaLaunchKernel(ExC), cuLaunchKernel(Ex), cudaGraphLaunch, cudaMemcpyAsync, ...
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset", "cuMemcpy", "cuMemset")
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
NOISE = ("void ", "at::native::", "(anonymous namespace)::", "<unnamed>::", "at::")


def profile(step, device, top=40):
    """A text: totals a step, then the `top` kernels (without a GPU: operators) by time.

    Wall and host time are taken without the profiler, which slows the host; the rest with it, over STEPS steps.
    """
    warm_up(step, device)
    issued = sorted(host_milliseconds(step, device) for _ in range(STEPS))[STEPS // 2]
    wall = seconds_of(step, STEPS, device) / STEPS * 1e3

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        seconds_of(step, STEPS, device)
    operators = [
        (e.key, e.count, e.self_cpu_time_total) for e in profiler.key_averages() if not e.key.startswith(WAITS)
    ]
    operators = [row for row in operators if row[2] > 0]
    cpu = sum(us for _, _, us in operators) / STEPS / 1e3
    lines = [f"wall {wall:.3f} ms a step"]
    if device.type == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(errors="replace"))["traceEvents"]
        kernels, launches = gpu_events(events)
        busy = sum(us for _, _, us in kernels) / STEPS / 1e3
        count = sum(count for _, count, _ in kernels) / STEPS
        lines += [
            f"GPU busy {busy:.3f} ms a step, {count:g} kernels and copies; the rest of the wall time it waits",
            f"host done after {issued:.3f} ms, {launches / STEPS:g} launching calls a step; under the profiler its "
            f"operators take {cpu:.3f} ms a step",
            "",
            *table(kernels, "kernel", top),
        ]
    else:
        lines += [f"operators' own time under the profiler {cpu:.3f} ms a step", "", *table(operators, "operator", top)]
    return "\n".join(lines)


def host_milliseconds(step, device):
    """Until an idle device has been given one whole step; what exceeds the GPU's own time is waited for."""
    synchronize(device)
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def gpu_events(events):
    """Of a Chrome trace's events: [(kernel, count, total us)] and the number of launching calls."""
    counts, times, launches = defaultdict(int), defaultdict(float), 0
    for event in events:
        category, name = event.get("cat", ""), event.get("name", "")
        if event.get("ph") != "X":
            continue
        if category in ON_GPU:
            counts[name] += 1
            times[name] += event["dur"]
        elif category in ("cuda_runtime", "cuda_driver") and name.startswith(LAUNCHES):
            launches += 1
    return [(name, counts[name], times[name]) for name in counts], launches


def table(rows, title, top):
    """Lines, slowest first; `rows` are (name, count, total us) over STEPS steps."""
    total = sum(us for _, _, us in rows) or 1.0
    rows = sorted(rows, key=lambda row: -row[2])
    lines = [f"{'count':>7} {'total us':>11} {'a step':>8} {'us a step':>10} {'us each':>9} {'share':>6}  {title}"]
    for name, count, us in rows[:top]:
        lines.append(
            f"{count:>7} {us:>11.1f} {count / STEPS:>8g} {us / STEPS:>10.1f} {us / count:>9.2f} {us / total:>6.1%}  "
            f"{shorten(name)}"
        )
    if rest := rows[top:]:
        us = sum(row[2] for row in rest)
        lines.append(f"{sum(row[1] for row in rest):>7} {us:>11.1f} {'':>29} {us / total:>6.1%}  {len(rest)} more")
    return lines


def shorten(name, length=150):
    """A kernel's name without what all of PyTorch's share; both ends of what is still too long."""
    for noise in NOISE:
        name = name.replace(noise, "")
    return name if len(name) <= length else f"{name[: length // 2]} ... {name[5 - length // 2 :]}"
