"""Muon for matrices and convolutions, AdamW for the rest; a run that ends at a given time and can be resumed."""

import csv
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


def orthogonal(m: Tensor) -> Tensor:
    """Nearest matrix with singular values of about 1: five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    turned = m.shape[0] > m.shape[1]
    x = m.T if turned else m
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if turned else x


class Optimiser:
    """`rate` is AdamW's; Muon moves as far at twice that."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, decay: float = 0.0):
        self.matrices = [p for p in parameters if p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 3]
        known = {id(p) for p in self.matrices}
        rest = [p for p in parameters if id(p) not in known]
        self.adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.rate, self.decay = rate, decay

    @torch.no_grad()
    def step(self, scale: float):
        """One update at `scale` times the rate."""
        for group in self.adam.param_groups:
            group["lr"] = self.rate * scale
        self.adam.step()
        for p, m in zip(self.matrices, self.momentum, strict=True):
            if p.grad is None:
                continue
            m.lerp_(p.grad, 0.06)
            update = orthogonal(p.grad.lerp(m, 0.94).flatten(1))
            p.mul_(1 - self.decay * self.rate * scale)
            p.add_(update.view_as(p), alpha=-2 * self.rate * scale * 0.2 * math.sqrt(max(update.shape)))
        for p in self.matrices:
            p.grad = None
        self.adam.zero_grad(set_to_none=True)

    def state(self) -> dict:
        return {"adam": self.adam.state_dict(), "momentum": self.momentum}

    def restore(self, state: dict):
        self.adam.load_state_dict(state["adam"])
        self.momentum = state["momentum"]


class Run:
    """Counts the processor's time of a run over all its resumptions; saves and logs.

    The processor's time (of all threads) is what a run is worth, whoever else uses the machine: the rate follows it.
    """

    def __init__(self, out: Path, name: str, minutes: float, columns: list[str]):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.csv = out / f"{name}.pt", out / f"{name}.csv"
        self.seconds = minutes * 60
        self.spent, self.steps = 0.0, 0
        self.columns, self.saved = columns, time.time()
        self.mark = time.process_time()

    def resume(self) -> dict | None:
        """What was saved, if a run was cut off."""
        if not self.path.exists():
            with self.csv.open("w") as file:
                csv.writer(file).writerow(["seconds", "step", *self.columns])
            return None
        state = torch.load(self.path, weights_only=False)
        self.spent, self.steps = state["spent"], state["steps"]
        return state

    @property
    def elapsed(self) -> float:
        """Seconds of the processor."""
        now = time.process_time()
        self.spent += now - self.mark
        self.mark = now
        return self.spent

    @property
    def done(self) -> float:
        """Share of the run that is over, 0..1."""
        return min(self.elapsed / self.seconds, 1.0)

    def rate(self, warm_up: int = 30) -> float:
        """Factor on the learning rate: up quickly, then down along a cosine to nearly nothing."""
        return min((self.steps + 1) / warm_up, 1.0) * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * self.done)))

    def log(self, **values: float):
        with self.csv.open("a") as file:
            csv.writer(file).writerow([f"{self.elapsed:.1f}", self.steps, *(f"{values[c]:.5f}" for c in self.columns)])
        print(f"{self.elapsed:7.1f} s  step {self.steps:6}", *(f"{k} {v:.4f}" for k, v in values.items()), flush=True)

    def save(self, every: float = 0.0, **state):
        if time.time() - self.saved < every:
            return
        self.saved = time.time()
        part = self.path.with_suffix(".part")
        torch.save({**state, "spent": self.elapsed, "steps": self.steps}, part)
        os.replace(part, self.path)
