"""One training step as a callable, the clock for whole steps, and the clocks for single calls."""

import contextlib
import statistics
import time

import torch
import torch.nn.functional as F

GROUP_SECONDS = 0.25  # steps are timed in groups of about this length
MIN_GROUPS = 3


class Step:
    """One optimisation step on fixed images, eager, compiled or as one CUDA graph.

    `autocast`: the dtype of the forward pass; None runs it in the weights' own. No loss scaling: with fp16 the time is
    right, the training is not.
    """

    def __init__(self, model, images, labels, mode, autocast=None):
        self.images, self.labels, self.autocast = images, labels, autocast
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, fused=True, capturable=mode == "graph")
        self.forward = torch.compile(model) if mode == "compile" else model
        self.graph = None
        if mode == "graph":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.run()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()

    def run(self):
        cast = contextlib.nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(self.images.device.type, self.autocast)
        with cast:
            logits = self.forward(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self):
        return self.graph.replay() if self.graph is not None else self.run()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step, count, device):
    """`count` steps from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return time.perf_counter() - start


def warm_up(step, device):
    """Runs the step until it is as fast as it gets; returns how many make a group."""
    seconds_of(step, 4, device)
    return max(1, round(GROUP_SECONDS / seconds_of(step, 1, device)))


def milliseconds(steps, device, seconds):
    """Milliseconds a step, one entry a group, for each of several steps taken in turns.

    A round gives every step one group, and each round starts with another step: drift and neighbours hit all alike.
    One untimed step before a group clears the caches of what ran before. Rounds go on for `seconds` a step.
    """
    groups = [warm_up(step, device) for step in steps]
    samples = [[] for _ in steps]
    turn, end = 0, time.perf_counter() + seconds * len(steps)
    while turn < MIN_GROUPS or time.perf_counter() < end:
        for position in range(len(steps)):
            i = (turn + position) % len(steps)
            if len(steps) > 1:
                steps[i]()
            samples[i].append(seconds_of(steps[i], groups[i], device) / groups[i] * 1e3)
        turn += 1
    return samples


def summary(samples):
    """What a row says of its groups."""
    return {"ms": statistics.median(samples), "ms_min": min(samples), "groups": len(samples)}


class DeviceTimer:
    """Microseconds of one call on the device, after the L2 cache has been overwritten."""

    def __init__(self, device):
        self.device = device
        self.flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def __call__(self, call):
        if self.flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        self.flush.zero_()
        # The device is kept busy while the host prepares the launches, so that their cost on the host is not timed.
        torch.cuda._sleep(4_000_000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3


def host_us(call, device, repeats):
    """Median microseconds until the call returns, its work queued and not waited for."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)
