"""The report: right sentences on constructed points, honest errors, and one self-contained page."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from libs import report
from libs.report import panels, plots, verdict
from libs.report.text import duration, plus_minus, sig

DEPTH, STEPS, KEY = 7, 20, "fd_digits_cnn"

# family, label, mean depth, steps, seconds per 1000 images, quality: in the shape a small network on digits gives
SWEEP = (
    ("full", "full depth", 7.0, 20, 3.58, 25.9),
    ("threshold", "threshold 0.99", 5.2, 20, 2.73, 25.8),
    ("threshold", "threshold 0.98", 4.1, 20, 2.13, 26.0),
    ("threshold", "threshold 0.95", 3.4, 20, 1.80, 27.4),
    ("threshold", "threshold 0.90", 2.5, 20, 1.44, 41.5),
    ("calibrated", "calibrated 60 %", 4.2, 20, 2.06, 26.4),
    ("calibrated", "calibrated 40 %", 2.9, 20, 1.57, 38.0),
    ("fixed", "fixed layer 6", 6.0, 20, 2.96, 26.1),
    ("fixed", "fixed layer 4", 4.0, 20, 2.40, 26.0),
    ("fixed", "fixed layer 3", 3.0, 20, 1.82, 39.0),
    ("fixed", "fixed layer 2", 2.0, 20, 1.23, 92.0),
    ("fixed", "fixed layer 1", 1.0, 20, 0.69, 185.0),
    ("steps", "15 steps", 7.0, 15, 2.42, 40.5),
    ("steps", "10 steps", 7.0, 10, 1.79, 57.0),
    ("steps", "8 steps", 7.0, 8, 1.43, 77.0),
    ("steps", "6 steps", 7.0, 6, 1.07, 230.0),
)


def record(family, label, mean_depth, steps, ms, quality, spread=0.4, timing=0.02, recommended=False, **more) -> dict:
    """One line of results.jsonl, as the evaluation writes it."""
    runs = [ms * 1e-3 * (1 + timing * offset) for offset in (-1, -0.4, 0, 0.5, 1)]
    metrics = {
        KEY: quality,
        f"{KEY}_per_seed": [quality - spread, quality, quality + spread],
        "psnr": 60.0 if family == "full" else 20 + 3 * mean_depth,
        "ssim": 1.0 if family == "full" else 1 - 1 / (1 + 8 * mean_depth),
        "mean_depth": mean_depth,
        "gmacs": 0.021 * steps * (0.15 + mean_depth),
        "seconds_per_image": ms * 1e-3,
        "seconds_per_image_runs": runs,
        "images_per_s": 1e3 / ms,
    }
    return {
        "slug": label.replace(" ", "-").replace("%", "percent"),
        "family": family,
        "label": label,
        "exit": {"name": family},
        "sampler": {"name": "dpm_solver_pp_2m", "steps": steps},
        "nfe": steps,
        "seeds": [1, 2, 3],
        "n_images": 2048,
        "batch_size": 256,
        "guidance": {"scale": 0.0, "pair": "free"},
        "quality_key": KEY,
        "metrics": metrics,
        "depth": DEPTH,
        "recommended": recommended,
        "config_hash": "5d3f0c1a",
        "commit": "0f1e2d3c",
        "versions": {"python": "3.11.2", "torch": "2.9.0"},
        "device": "CPU, 2 cores",
        "threads": 2,
        "time": "2025-01-01T12:00:00",
    } | more


def exits(n: int = 600, branches: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """t (calls,) and used (calls, branches, n): deep near the data, and a little deeper for some images."""
    rng = np.random.default_rng(seed)
    t = np.linspace(1, 1e-3, STEPS)
    mean = 1.6 + 5.2 / (1 + np.exp(9 * (t - 0.42)))  # (calls,)
    noise = rng.normal(0, 0.45, (STEPS, branches, n)) + rng.normal(0, 0.3, (1, branches, n))
    return t, np.clip(np.rint(mean[:, None, None] + noise), 1, DEPTH).astype(np.uint8)


def write_results(directory: Path, records: list[dict]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


def evaluation(directory: Path, branches: int = 1, size: int = 12, real_grids: bool = False) -> Path:
    """A complete evaluation directory with plausible contents; the recommended point is `threshold 0.98`."""
    rng = np.random.default_rng(1)
    records = [record(*row, recommended=row[1] == "threshold 0.98") for row in SWEEP]
    write_results(directory, records)
    (directory / "config.json").write_text(json.dumps({"nnet": {"depth": 6, "note": "<b>&"}, "seed": 1234}))
    (directory / "reference.json").write_text(json.dumps({f"{KEY}_real_halves": 4.65, "n_real": 1797}))
    y, x = np.mgrid[:size, :size] / size - 0.5
    rings = [np.exp(-((np.hypot(x - a, y - b) - 0.25) ** 2) / 0.008) for a, b in rng.normal(0, 0.12, (64, 2))]
    for r in records:
        folder = directory / "points" / r["slug"]
        folder.mkdir(parents=True)
        noise = 0.004 * max(0.0, r["metrics"][KEY] - 26)
        tiles = [np.clip(ring + noise * rng.normal(size=ring.shape), 0, 1) for ring in rings]
        grid = np.block([[tiles[8 * i + j] for j in range(8)] for i in range(8)])
        Image.fromarray((255 * grid).astype(np.uint8)).save(folder / "grid.png")
        if r["family"] in ("threshold", "calibrated"):
            t, used = exits(branches=branches)
            np.savez(folder / "trace.npz", t=t, used=used, depth=DEPTH, asked=[1, 3], ids=np.arange(used.shape[2]))
    t, k, n = np.linspace(1, 0.05, 8), np.arange(1, DEPTH), 3
    sharp = np.stack(rings[:n])  # (n, H, W)
    clean = (1 - t)[:, None, None, None] * sharp + t[:, None, None, None] * rng.uniform(0, 1, (8, n, size, size))
    fall = (0.15 + t)[:, None, None, None, None] / k[None, :, None, None, None]
    error = fall * (0.2 + sharp) * rng.uniform(0.6, 1.4, (8, len(k), n, size, size))
    u = np.tanh(fall * (0.25 + sharp)) * rng.uniform(0.9, 1.1, error.shape)
    x0 = (255 * clean[:, :, None]).astype(np.uint8)  # (T, n, 1, H, W)
    np.savez(directory / "umaps.npz", t=t, k=k, u=u, error=error, x0=x0, ids=np.arange(n))
    with open(directory / "train.jsonl", "w") as file:
        for step in range(10, 1510, 10):
            down = 0.08 + 0.5 * np.exp(-step / 200) + 0.004 * rng.normal()
            row = {"step": step, "seconds": 0.17 * step, "loss": 3 * down, "simple": down, "uem": down / 2, "layers": 2 * down}
            row |= {f"err_{i}": down * (1 + 0.3 / i) for i in range(1, DEPTH + 1)}
            row |= {f"u_{i}": 0.9 * down * (1 + 0.3 / i) for i in range(1, DEPTH + 1)}
            file.write(json.dumps(row | {"lr": 1e-3, "grad_norm": 1.0}) + "\n")
    return directory
