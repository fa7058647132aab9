"""How much of a perturbation 16-bit weights take on, rounded to nearest and at random.

    python benchmarks/rounding.py [--device cuda]

Weights N(0, 0.02) on the bf16 grid, a Gaussian perturbation of length rho: its component along itself (should be 1)
and the noise added, in units of its length.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from hf_sharp._engine.measure import measure_shift
from hf_sharp._engine.rounding import move_rounded_


def measure(entries: int, rho: float, device: str, rounding: str) -> tuple[float, float, float]:
    draw = torch.Generator(device).manual_seed(0)
    weight = nn.Parameter(torch.randn(entries, generator=draw, device=device).mul_(0.02).bfloat16())
    step = torch.randn(entries, generator=draw, device=device)
    step = step.mul_(rho / step.norm()).bfloat16()
    saved = weight.detach().clone()
    start = time.perf_counter()
    with torch.no_grad():
        if rounding == "nearest":
            weight.add_(step)
        else:
            move_rounded_(weight, step, torch.bfloat16, draw)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    metrics: dict[str, Tensor] = measure_shift([weight], [saved], [step], [torch.bfloat16], [None])
    return float(metrics["sharp_component"]), float(metrics["sharp_noise"]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    print("| entries | rho | rounding | component | noise | ms |\n|---|---|---|---|---|---|")
    for entries in (10**7, 10**8):
        for rho in (0.05, 0.01):
            for rounding in ("nearest", "stochastic"):
                component, noise, seconds = measure(entries, rho, device, rounding)
                print(f"| {entries:.0e} | {rho} | {rounding} | {component:.3f} | {noise:.2f} | {1000 * seconds:.0f} |")


if __name__ == "__main__":
    main()
