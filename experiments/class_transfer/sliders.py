"""The interactive page of a generator: pick an image, scale each branch's part, see f = R + the sum of alpha_k v_k."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from experiments.class_transfer.decomposer import Decomposer, Decomposition, decompose_all
from experiments.class_transfer.pictures import gains, shown_images, to_pixels
from experiments.common.atomic import write_atomically
from experiments.common.data import ImageSet
from experiments.common.report import STYLE

SLIDERS = "sliders.html"  # in the run's folder
ALPHAS = (-1.0, 3.0)  # range of a slider, as Figures 13 and 14
_IMAGES = 12
_LARGEST_SIDE = 128  # pixels; larger images are averaged down
_LARGEST_DATA = 8_000_000  # bytes, before base64
_MOST = 2**15 - 1  # of the numbers that a part is stored as
_HERE = Path(__file__)


def write_sliders(path: Path, decomposer: Decomposer, dataset: ImageSet, made: str) -> Path:
    """Write one HTML file that shows test images as sums of parts with a slider each, and needs nothing else.

    Parts are stored as 16-bit numbers, each in units of its largest value over 32767; the page says what that loses.

    Args:
        path: The file to write.
        decomposer: Trained, on any device.
        dataset: Its first test images are shown, the classes in turn: 12, or as many as 8 MB hold.
        made: How the generator and the data were made.

    Returns:
        The file.
    """
    classes, branches = dataset.classes, decomposer.branches.num_branches
    side = min(dataset.test_images.shape[-1], _LARGEST_SIDE)
    each = 2 * 3 * side**2 * (1 + len(classes) * branches)
    x, labels = shown_images(dataset, max(1, min(_IMAGES, _LARGEST_DATA // each)))
    transfers = [decompose_all(decomposer, x, torch.full_like(labels, label)) for label in range(len(classes))]
    data = sliders_data(x, labels, transfers)
    write_atomically(path, _page(data, classes, branches, made).encode())
    return path


def sliders_data(x: Tensor, labels: Tensor, transfers: list[Decomposition]) -> dict[str, Any]:
    """Store images in parts.

    Args:
        x: Images in -1 to 1, shape ``(N, 3, H, W)``.
        labels: Their classes, int64, shape ``(N,)``.
        transfers: Their parts, with each class as the target.

    Returns:
        What the page holds, in JSON types: ``size`` in pixels; ``gains`` of the branches; ``images``, each with
        ``label``, ``x`` as a PNG, ``R``, and ``v`` by target and branch; ``error``, the largest of f with any sliders,
        in grey levels.
    """
    smaller = [_reduced(part.v) for part in transfers]
    smooth, pictures = _reduced(transfers[0].R), to_pixels(_reduced(x))
    images = [
        {
            "label": label,
            "x": f"data:image/png;base64,{_png(pictures[index])}",
            "R": _packed(smooth[index]),
            "v": [[_packed(v) for v in parts[:, index]] for parts in smaller],
        }
        for index, label in enumerate(labels.tolist())
    ]
    steps = [
        image["R"]["step"] + max(map(abs, ALPHAS)) * sum(part["step"] for part in parts)
        for image in images
        for parts in image["v"]
    ]
    return {
        "size": smooth.shape[-1],
        "gains": gains(torch.cat(smaller, dim=1)).tolist(),
        "images": images,
        "error": max(steps) / 2 * 127.5,
    }


def _reduced(signal: Tensor) -> Tensor:
    """Average blocks of images ``(..., H, W)`` that are too large; sums of parts stay sums."""
    factor = -(-signal.shape[-1] // _LARGEST_SIDE)
    return nn.functional.avg_pool2d(signal.flatten(0, -4), factor).unflatten(0, signal.shape[:-3])


def _packed(part: Tensor) -> dict[str, Any]:
    """Store a part ``(3, H, W)`` as 16-bit numbers, little end first, and the size of their unit."""
    step = max(part.abs().max().item(), 1e-12) / _MOST
    numbers = np.rint(part.double().numpy() / step).astype("<i2")
    return {"numbers": base64.b64encode(numbers.tobytes()).decode("ascii"), "step": step}


def _png(pixels: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode("ascii")


def _page(data: dict[str, Any], classes: tuple[str, ...], branches: int, made: str) -> str:
    side, first = data["size"], data["images"][0]
    style = STYLE.read_text(encoding="utf-8") + _HERE.with_suffix(".css").read_text(encoding="utf-8")
    stored = json.dumps({name: data[name] for name in ("size", "gains", "images")}, allow_nan=False)
    pictures = "".join(
        _choice(
            "image",
            index,
            f'<img src="{image["x"]}" alt="image {index + 1}"><span>{escape(classes[image["label"]])}</span>',
            chosen=0,
        )
        for index, image in enumerate(data["images"])
    )
    targets = "".join(
        _choice("target", label, f"<b>{escape(name)}</b>", chosen=first["label"]) for label, name in enumerate(classes)
    )
    rows = "".join(
        f'<div class="branch">{_canvas(f"v{k}", f"part of branch {k}", side)}'
        f'<label for="alpha{k}">v<sub>{k}</sub></label>'
        f'<input id="alpha{k}" type="range" min="{ALPHAS[0]:g}" max="{ALPHAS[1]:g}" step="0.05" value="1">'
        f'<output for="alpha{k}">1.00</output>'
        f'<button type="button" data-only aria-label="only branch {k}">only</button></div>'
        for k in range(1, branches + 1)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>One slider per branch</title><style>{style}</style></head><body><main>
<header><h1>One slider per branch</h1>
<p class="lead">The large image is R + &alpha;<sub>1</sub>v<sub>1</sub> + &hellip; +
&alpha;<sub>{branches}</sub>v<sub>{branches}</sub>: a smooth part of the image chosen, and what each branch adds.
With every &alpha; at 1 it is the generator's output f.</p></header>
<noscript><p class="note">This page computes in the browser and needs JavaScript; it fetches nothing.</p></noscript>
<div class="card"><fieldset><legend>Image</legend>{pictures}</fieldset>
<fieldset><legend>Drawn as</legend>{targets}</fieldset></div>
<div class="bench"><div class="card">{_canvas("f", "the sum", side)}
<p class="note" id="said" role="status"></p>
<div class="views"><figure><img id="x" src="{first["x"]}" alt="the image"><figcaption>x</figcaption></figure>
<figure>{_canvas("R", "the smooth part", side)}<figcaption>R</figcaption></figure></div>
</div><div class="card">{rows}
<div class="actions"><button type="button" data-all="1">All 1: f</button>
<button type="button" data-all="0">All 0: R alone</button></div>
<p class="note">Parts are shown with more contrast, each branch with a gain of its own; grey is 0.</p></div></div>
<p class="note">{escape(made)} Parts are stored with 16 bits: the sum is at most {data["error"]:.2g} of 255 grey
levels off, whatever the sliders. Shown at {side} x {side} pixels.</p></main>
<script id="data" type="application/json">{stored}</script>
<script>{_HERE.with_suffix(".js").read_text(encoding="utf-8")}</script></body></html>
"""


def _choice(name: str, value: int, shown: str, *, chosen: int) -> str:
    mark = " checked" if value == chosen else ""
    return f'<label class="pick"><input type="radio" name="{name}" value="{value}"{mark}>{shown}</label>'


def _canvas(name: str, said: str, side: int) -> str:
    return f'<canvas id="{name}" width="{side}" height="{side}" role="img" aria-label="{said}"></canvas>'
