"""SynthAnimals: faces of cats, dogs and wild cats as exact sums of eight layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.common.synthetic.head import Head
from experiments.common.synthetic.layered import (
    Canvas,
    by_class,
    colours,
    contrast,
    multiply,
    over,
    screen,
)
from experiments.common.synthetic.raster import (
    Draws,
    bump,
    coverage,
    ellipse,
    grid,
    lambert,
    strands,
    stroke,
    triangle,
    turned,
    union,
)

CLASSES = ("cat", "dog", "wild")
LAYERS = ("base", "pattern", "fur", "diffuse", "nose and mouth", "eyes", "whiskers", "specular")
NOISE_PLANES = 6
_WHISKERS = 5  # rows a side at most
_COATS = (
    ((0.63, 0.47, 0.30), (0.55, 0.54, 0.52), (0.87, 0.63, 0.37), (0.78, 0.75, 0.70), (0.36, 0.33, 0.32)),
    ((0.72, 0.52, 0.30), (0.45, 0.30, 0.19), (0.86, 0.80, 0.70), (0.30, 0.27, 0.26), (0.62, 0.58, 0.54)),
    ((0.85, 0.58, 0.27), (0.80, 0.66, 0.42), (0.74, 0.52, 0.30), (0.88, 0.72, 0.48), (0.66, 0.58, 0.46)),
)
_IRISES = (
    ((0.62, 0.72, 0.22), (0.85, 0.68, 0.18), (0.36, 0.66, 0.80), (0.40, 0.72, 0.45)),
    ((0.30, 0.17, 0.08), (0.42, 0.25, 0.10), (0.22, 0.13, 0.08)),
    ((0.85, 0.60, 0.15), (0.75, 0.68, 0.30), (0.62, 0.46, 0.14)),
)


def paint(canvas: Canvas, draws: Draws, labels: Tensor, size: int) -> None:
    """Paint the layers of animals; ``labels`` are their classes, int64, shape ``(N,)``."""
    head = _Head.draw(draws, labels, size)
    _paint_base(canvas, draws, head)
    _paint_pattern(canvas, draws, head)
    _paint_fur(canvas, draws, head)
    _paint_diffuse(canvas, draws, head)
    _paint_nose_and_mouth(canvas, draws, head)
    _paint_eyes(canvas, draws, head)
    _paint_whiskers(canvas, draws, head)
    _paint_specular(canvas, draws, head)


@dataclass
class _Head(Head):
    """The head of an animal."""

    width: Tensor
    height: Tensor
    eye_x: Tensor
    eye_y: Tensor
    nose_y: Tensor
    muzzle_width: Tensor
    fur_noise: Tensor
    face: Tensor  # signed distances
    ears: Tensor
    inner_ears: Tensor
    body: Tensor

    @classmethod
    def draw(cls, draws: Draws, labels: Tensor, size: int) -> _Head:
        x, y = grid(size)
        u, v = turned(x - draws.uniform(-0.08, 0.08), y - draws.uniform(0.02, 0.14), draws.uniform(-0.22, 0.22))
        scale = draws.uniform(0.9, 1.08)
        u, v = u / scale, v / scale
        turn = draws.uniform(-1, 1)
        width = by_class(labels, 0.66, 0.52, 0.64) * draws.uniform(0.94, 1.06)
        height = by_class(labels, 0.56, 0.66, 0.62) * draws.uniform(0.94, 1.06)
        flow_y = v - 0.1
        fur_noise = strands(draws.smooth(0.012), u + 0.15 * turn, flow_y, 0.12)
        cheeks = ellipse(
            u.abs() - by_class(labels, 0.36, 0.2, 0.38), v - by_class(labels, 0.2, 0.3, 0.2), 0.3 * width / 0.6, 0.33
        )
        face = union(ellipse(u, v, width, height), cheeks) + 0.018 * fur_noise
        ears, inner = _ears(draws, labels, u, v, turn)
        body = ellipse(u, v - 1.25, by_class(labels, 0.85, 0.8, 1.0), 0.8) + 0.03 * fur_noise
        return cls(
            labels=labels,
            size=size,
            u=u,
            v=v,
            turn=turn,
            width=width,
            height=height,
            eye_x=by_class(labels, 0.29, 0.24, 0.27) * draws.uniform(0.93, 1.07),
            eye_y=by_class(labels, -0.06, -0.14, -0.10) + draws.uniform(-0.03, 0.03),
            nose_y=by_class(labels, 0.2, 0.22, 0.24) + draws.uniform(-0.02, 0.03),
            muzzle_width=by_class(labels, 0.25, 0.25, 0.28) * draws.uniform(0.9, 1.12),
            fur_noise=fur_noise,
            face=face,
            ears=ears + 0.012 * fur_noise,
            inner_ears=inner,
            body=body,
        )

    def animal(self) -> Tensor:
        return self.covers(torch.minimum(torch.minimum(self.face, self.ears), self.body))


def _ears(draws: Draws, labels: Tensor, u: Tensor, v: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distances to the ears and to what is inside them: pointed, hanging, or round."""
    w = (u + 0.04 * turn).abs()
    spread = draws.uniform(-0.12, 0.12)
    a, b = turned(w - 0.36, v + 0.28, 0.34 + spread)
    tall = draws.uniform(0.5, 0.66)
    pointed = triangle(a, b, 0.25, tall)
    pointed_inner = torch.maximum(triangle(a + 0.02, b + 0.04, 0.15, 0.8 * tall), b + 0.12)
    c, d = turned(w - 0.56 - 0.2 * spread, v + 0.08, -0.22 + 1.2 * spread)
    hanging = ellipse(c, d, 0.17, draws.uniform(0.36, 0.5))
    e, f = w - 0.5 - 0.3 * spread, v + 0.5
    rounded = ellipse(e, f, 0.2, draws.uniform(0.18, 0.24))
    rounded_inner = ellipse(e, f - 0.01, 0.12, 0.13)
    choice = by_class(labels, 0, 1, 2)
    outer = torch.where(choice == 0, pointed, torch.where(choice == 1, hanging, rounded))
    inner = torch.where(choice == 0, pointed_inner, torch.where(choice == 1, hanging + 9.0, rounded_inner))
    return outer, inner


def _paint_base(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Background, coat, light muzzle and chest, hue that varies over the coat."""
    jitter = [draws.uniform(-0.06, 0.06) for _ in range(3)]
    choice = draws.uniform()
    coats = torch.stack([colours(table, choice, jitter) for table in _COATS])
    coat = coats[head.labels, torch.arange(len(head.labels))]
    light = coat + (draws.uniform(0.45, 0.85)[:, None]) * (torch.tensor([0.95, 0.91, 0.85]).view(3, 1, 1) - coat)
    background = torch.cat([draws.uniform(0.1, 0.85) for _ in range(3)], dim=1)[..., None]
    background = background.mean(1, keepdim=True) + 0.6 * (background - background.mean(1, keepdim=True))
    image = contrast(background.expand(-1, -1, head.size, head.size), 0.45 * draws.smooth(0.22))
    image = contrast(image, draws.uniform(-0.5, 0.5) * grid(head.size)[1])
    hue = 0.5 + 0.5 * torch.tanh(draws.smooth(0.25) - 0.7)[:, None]
    fur = coat + 0.35 * hue * (light - coat)
    image = over(image, head.covers(head.body), fur)
    chest = bump(head.u, head.v - 1.0, 0.35, 0.4) * head.covers(head.body)
    image = over(image, 0.9 * chest, light)
    ear_colour = torch.where(head.of_class(0, 1, 0)[..., None] > 0, 0.62 * coat, coat)
    behind, front = head.of_class(1, 0, 1), head.of_class(0, 1, 0)
    for before_face in (behind, front):
        ears = head.covers(head.ears) * before_face
        image = over(image, ears, ear_colour)
        pink = torch.tensor([0.80, 0.58, 0.53]).view(3, 1, 1) * (0.55 + 0.45 * coat)
        image = over(image, 0.85 * head.covers(head.inner_ears, 0.04) * ears, pink)
        if before_face is behind:
            image = over(image, head.covers(head.face), fur)
    u = head.at_depth(0.10)
    muzzle = union(
        ellipse(u.abs() - 0.11, head.v - head.nose_y - 0.14, head.muzzle_width * 0.8, 0.17),
        ellipse(u, head.v - head.nose_y - 0.25, head.muzzle_width * 0.7, 0.15),
    )
    blaze = ellipse(head.at_depth(0.06), head.v - 0.1, 0.06, 0.42) + 0.4 * (draws.uniform() > 0.35)
    eye_patch = ellipse(head.at_depth(0.03).abs() - head.eye_x, head.v - head.eye_y, 0.2, 0.16) + head.of_class(0, 9, 0)
    pale = head.covers(torch.minimum(muzzle, blaze), 0.12) + 0.55 * head.covers(eye_patch, 0.16)
    image = over(image, (0.85 * pale).clamp(0, 1) * head.covers(head.face), light)
    canvas.paint("base", image, torch.ones(1, head.size, head.size))


def _paint_pattern(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Stripes of a cat, one patch of a dog, spots of a wild cat: dark coat where a random field is high."""
    warp, spotted = draws.smooth(0.13), draws.smooth(0.045)
    angle = torch.atan2(head.at_depth(0.05), 0.42 - head.v)
    radius = (head.u**2 + (head.v - 0.42) ** 2).sqrt()
    stripes = torch.sin(draws.uniform(9, 14) * angle.abs() + 0.9 * warp + 3 * radius)
    stripes = torch.sigmoid(5 * (stripes - 0.15)) * torch.sigmoid(14 * (radius - 0.42))
    side = torch.sign(draws.uniform(-1, 1))
    patch = ellipse(head.u - side * 0.27, head.v + 0.14, draws.uniform(0.2, 0.34), draws.uniform(0.24, 0.5))
    patch = head.covers(patch + 0.05 * warp, 0.06) * (draws.uniform() > 0.3)
    spots = torch.sigmoid(7 * (spotted - 0.75)) * torch.sigmoid(12 * (radius - 0.40))
    shape = head.of_class(1, 0, 0) * stripes + head.of_class(0, 1, 0) * patch + head.of_class(0, 0, 1) * spots
    on = torch.maximum(head.covers(head.face), head.covers(head.body))
    on = torch.maximum(on, head.covers(head.ears) * head.of_class(0.6, 0, 0.3)) * (1 - head.covers(head.inner_ears))
    alpha = shape * on * draws.uniform(0.55, 0.9)
    dark = torch.tensor([0.16, 0.11, 0.08]).view(1, 3, 1, 1) + draws.uniform(0, 0.12)[..., None]
    canvas.paint("pattern", lambda image: over(image, alpha, dark.expand(len(image), -1, -1, -1)), alpha)


def _paint_fur(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Strands along a flow away from the nose; finer on cats, coarser on dogs."""
    coarse = strands(draws.smooth(0.035), head.u + 0.1 * head.turn, head.v - 0.12 + 0.3 * head.v.abs(), 0.22)
    mix = head.of_class(0.3, 0.75, 0.45)
    texture = (1 - mix) * head.fur_noise + mix * coarse
    smooth = 1 - 0.6 * bump(head.at_depth(0.1), head.v - head.nose_y - 0.03, 0.2, 0.14)
    amount = draws.uniform(0.22, 0.42) * texture * smooth * head.animal()
    canvas.paint("fur", lambda image: contrast(image, amount), head.animal())


def _paint_diffuse(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Lambert's cosine on the head's relief, and shadows around it."""
    size, u, v = head.size, head.u, head.v
    inside = (1 - (u / (1.12 * head.width)) ** 2 - (v / (1.2 * head.height)) ** 2).clamp(min=0)
    relief = 0.62 * (inside + 0.02).sqrt()
    near = head.at_depth(0.12)
    relief = relief + head.of_class(0.13, 0.3, 0.22) * bump(near, v - head.nose_y - 0.1, 0.26, 0.24)
    relief = relief + 0.05 * bump(near, v - head.nose_y + 0.2, 0.1, 0.25)
    sockets = bump(head.at_depth(0.05).abs() - head.eye_x, v - head.eye_y, 0.17, 0.15)
    relief = relief - 0.07 * sockets + 0.05 * bump(u.abs() - 0.3, v + 0.32, 0.25, 0.14)
    cosine = lambert(relief * head.covers(head.face, 0.03), draws.uniform(-1.1, 1.1), draws.uniform(-1.2, 0.2))
    ambient = draws.uniform(0.42, 0.62)
    head_shade = ambient + (1.06 - ambient) * cosine
    face = head.covers(head.face)
    below = head.covers(head.face - 0.3, 0.7) * (1 - face)  # the head shades the body
    body_shade = 1 - 0.45 * below * head.covers(head.body) - 0.12 * head.covers(head.ears)
    vignette = 1 - draws.uniform(0.0, 0.4) * (grid(size)[0] ** 2 + grid(size)[1] ** 2) * (1 - head.animal()) / 2
    hanging = head.covers(head.ears) * head.of_class(0, 1, 0)
    shade = torch.where(hanging > 0.5, 0.55 + 0.45 * head_shade, head_shade)
    shade = (vignette * body_shade * (1 - face) + shade * face).clamp(0, 1)
    canvas.paint("diffuse", lambda image: multiply(image, shade), head.animal())


def _paint_nose_and_mouth(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Nose leather, the line below it, two arcs of the mouth, sometimes a dog's tongue."""
    size, u, v = head.size, head.at_depth(0.14), head.v - head.nose_y
    wedge = -union(-triangle(u, -v - 0.055, 0.115, 0.15), v + 0.05, smoothness=0.012)
    leather = torch.where(head.of_class(0, 1, 0) > 0, ellipse(u, v, 0.13, 0.095), wedge - head.of_class(0, 0, 0.022))
    pink = colours(
        ((0.78, 0.47, 0.45), (0.35, 0.22, 0.20), (0.62, 0.38, 0.35)), draws.uniform(), [draws.uniform(-0.05, 0.05)] * 3
    )
    black = torch.tensor([0.09, 0.08, 0.09]).view(1, 3, 1, 1)
    colour = torch.where(head.of_class(0, 1, 0)[..., None] > 0, black, pink)
    w = u.abs()
    drop, span = head.of_class(0.12, 0.17, 0.14), head.of_class(0.15, 0.2, 0.2)
    arc = drop + 0.05 * torch.sin(math.pi * (w / span).clamp(0, 1))
    arcs = torch.maximum((v - arc).abs(), w - span)
    philtrum = torch.maximum(w, (v - 0.5 * drop - 0.02).abs() - 0.5 * drop)
    line = 0.8 * stroke(torch.minimum(arcs, philtrum), 0.026, size)
    out = head.of_class(0, 1, 0) * (draws.uniform() > 0.6)
    tongue = coverage(ellipse(u, v - drop - 0.12, 0.085, 0.13), size) * (v > drop + 0.02) * out
    nostrils = coverage(ellipse(w - 0.055, v - 0.012, 0.024, 0.02), size)
    red = torch.tensor([0.86, 0.42, 0.44]).view(1, 3, 1, 1)
    nose = head.covers(leather, 0.01)

    def change(image: Tensor) -> Tensor:
        image = over(image, tongue, red)
        image = over(image, line, 0.6 * black.expand_as(image[:1]) + 0.1 * red)
        return over(over(image, nose, colour), 0.8 * nostrils * nose, 0.4 * colour)

    canvas.paint("nose and mouth", change, torch.maximum(torch.maximum(nose, line), tongue))


def _paint_eyes(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Two mirrored eyes: dark rim, iris that is lighter at its edge, a slit or a round pupil."""
    size, labels = head.size, head.labels
    tilt = head.of_class(-0.28, -0.08, -0.32)
    w = head.at_depth(0.04)
    a, b = turned(w.abs() - head.eye_x, head.v - head.eye_y, tilt)
    half_width = head.of_class(0.145, 0.098, 0.115) * draws.uniform(0.9, 1.1)
    half_height = head.of_class(0.115, 0.092, 0.085) * draws.uniform(0.85, 1.1)
    lids = ellipse(a, b, half_width, half_height)
    rim, iris = coverage(lids - 0.022, size), coverage(lids + 0.012, size)
    choice, jitter = draws.uniform(), [draws.uniform(-0.06, 0.06) for _ in range(3)]
    tables = torch.stack([colours(table, choice, jitter) for table in _IRISES])
    colour = tables[labels, torch.arange(len(labels))]
    gaze = 0.02 * draws.uniform(-1, 1)
    px, py = w.abs() - head.eye_x - gaze * torch.sign(w), head.v - head.eye_y
    depth = 0.55 + 0.45 * ((px / half_width) ** 2 + (py / half_height) ** 2).clamp(0, 1)[:, None]
    pupil_width = half_width * head.of_class(0.18, 0.55, 0.32) * draws.uniform(0.8, 1.5)
    pupil_height = half_height * head.of_class(0.92, 0.6, 0.42)
    pupil = coverage(ellipse(px, py, pupil_width, pupil_height), size) * iris
    black = torch.tensor([0.05, 0.04, 0.05]).view(1, 3, 1, 1)

    def change(image: Tensor) -> Tensor:
        return over(over(over(image, rim, black), iris, colour * depth), pupil, black)

    canvas.paint("eyes", change, rim)


def _paint_whiskers(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Curved hairs from both sides of the muzzle that thin out; few and dark on dogs."""
    u, v = head.at_depth(0.12), head.v - head.nose_y
    alpha = torch.zeros_like(u + v)
    rows = head.of_class(5, 2, 4)
    for side in (-1, 1):
        for row in range(_WHISKERS):
            along = side * u - 0.13 - draws.uniform(0, 0.05)
            length = head.of_class(0.75, 0.3, 0.6) * draws.uniform(0.75, 1.15)
            slope = 0.16 * (row - 1.8) + draws.uniform(-0.06, 0.06)
            bend = draws.uniform(-0.25, 0.3)
            height = 0.08 + 0.035 * row + slope * along + bend * along * along
            steep = (1 + (slope + 2 * bend * along) ** 2).sqrt()
            share = (along / length).clamp(0, 1)
            line = stroke((v - height).abs() / steep, 0.014 * (1 - 0.7 * share), head.size)
            line = line * ((along > 0) & (along < length)) * (row < rows)
            alpha = torch.maximum(alpha, line)
    alpha = alpha * draws.uniform(0.75, 1.0)
    bright = head.of_class(0.96, 0.12, 0.96)[..., None].expand(-1, 3, -1, -1)
    canvas.paint("whiskers", lambda image: over(image, alpha, bright), alpha * 2)


def _paint_specular(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Gloss of the coat, of the nose, and a glint on each eye, from one light."""
    side, up = draws.uniform(-1, 1), draws.uniform(0.3, 1)
    gloss = bump(head.u - 0.25 * side, head.v + 0.2 + 0.2 * up, 0.22, 0.13) * (1 + 0.5 * head.fur_noise).clamp(0, 2)
    gloss = gloss + 0.8 * bump(head.u.abs() - 0.42, head.v - 0.18, 0.12, 0.16) * (0.5 + 0.5 * side * torch.sign(head.u))
    gloss = draws.uniform(0.08, 0.3) * gloss * head.covers(head.face)
    u = head.at_depth(0.04)
    size = 0.024 * draws.uniform(0.9, 1.4)
    glint = ellipse(u.abs() - head.eye_x - torch.sign(u) * 0.03 * side, head.v - head.eye_y + 0.035 * up, size, size)
    nose = bump(head.at_depth(0.14) - 0.04 * side, head.v - head.nose_y + 0.03, 0.06, 0.028) * draws.uniform(0.25, 0.6)
    light = (gloss + 0.95 * head.covers(glint, 0.012) + nose * head.covers(head.face)).clamp(0, 1)
    canvas.paint("specular", lambda image: screen(image, light), 2 * light)
