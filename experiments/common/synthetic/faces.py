"""SynthFaces: human faces of two classes as exact sums of eight layers."""

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
    turned,
    union,
)

CLASSES = ("long hair", "short hair")
LAYERS = ("base", "skin hue", "diffuse light", "specular light", "make-up", "mouth", "eyes", "hair")
NOISE_PLANES = 5
_SKINS = (
    (0.93, 0.76, 0.66),
    (0.87, 0.67, 0.54),
    (0.78, 0.57, 0.43),
    (0.66, 0.46, 0.33),
    (0.50, 0.34, 0.24),
    (0.38, 0.25, 0.18),
)
_HAIRS = ((0.12, 0.09, 0.08), (0.28, 0.18, 0.11), (0.47, 0.31, 0.17), (0.80, 0.64, 0.38), (0.55, 0.24, 0.12))
_IRISES = ((0.25, 0.15, 0.08), (0.35, 0.25, 0.12), (0.30, 0.47, 0.62), (0.33, 0.48, 0.33))
_WHITE = torch.tensor([0.95, 0.94, 0.92]).view(1, 3, 1, 1)
_BLACK = torch.tensor([0.06, 0.04, 0.04]).view(1, 3, 1, 1)
_RED = torch.tensor([0.80, 0.25, 0.24]).view(1, 3, 1, 1)


def paint(canvas: Canvas, draws: Draws, labels: Tensor, size: int) -> None:
    """Paint the layers of faces; ``labels`` are their classes, int64, shape ``(N,)``."""
    head = _Head.draw(draws, labels, size)
    _paint_base(canvas, draws, head)
    _paint_skin_hue(canvas, draws, head)
    _paint_diffuse_light(canvas, draws, head)
    _paint_specular_light(canvas, draws, head)
    _paint_make_up(canvas, draws, head)
    _paint_mouth(canvas, draws, head)
    _paint_eyes(canvas, draws, head)
    _paint_hair(canvas, draws, head)


@dataclass
class _Head(Head):
    """The head of a human."""

    width: Tensor
    eye_x: Tensor
    eye_y: Tensor
    nose_y: Tensor
    mouth_y: Tensor
    mouth_width: Tensor
    lip: Tensor
    smile: Tensor
    face: Tensor  # signed distances
    neck: Tensor

    @classmethod
    def draw(cls, draws: Draws, labels: Tensor, size: int) -> _Head:
        x, y = grid(size)
        u, v = turned(x - draws.uniform(-0.1, 0.1), y - draws.uniform(0.0, 0.12), draws.uniform(-0.16, 0.16))
        scale = draws.uniform(0.92, 1.12)
        u, v = u / scale, v / scale
        width = by_class(labels, 0.46, 0.49) * draws.uniform(0.92, 1.08)
        chin = by_class(labels, 0.2, 0.28) * draws.uniform(0.9, 1.1)
        face = union(
            ellipse(u, v + 0.12, width, 0.56),
            ellipse(u, v - 0.22, 0.86 * width, 0.36),
            ellipse(u, v - 0.44, chin, 0.17),
            smoothness=0.07,
        )
        return cls(
            labels=labels,
            size=size,
            u=u,
            v=v,
            turn=draws.uniform(-1, 1),
            width=width,
            eye_x=0.195 * draws.uniform(0.93, 1.07),
            eye_y=-0.07 + draws.uniform(-0.02, 0.02),
            nose_y=0.17 + draws.uniform(-0.02, 0.03),
            mouth_y=0.36 + draws.uniform(-0.02, 0.03),
            mouth_width=draws.uniform(0.15, 0.21),
            lip=by_class(labels, 0.058, 0.042) * draws.uniform(0.85, 1.2),
            smile=draws.uniform(0.0, 1.0),
            face=face,
            neck=torch.maximum(u.abs() - by_class(labels, 0.2, 0.28) - 0.1 * (v - 0.7).clamp(min=0), 0.3 - v),
        )

    def skin(self) -> Tensor:
        ears = ellipse(self.u.abs() - self.width - 0.02, self.v - 0.02, 0.06, 0.13)
        return self.covers(torch.minimum(torch.minimum(self.face, self.neck), ears))

    def lips(self) -> tuple[Tensor, Tensor, Tensor]:
        """Signed distance to the lips, unsigned one to the line between them, and height above that line."""
        u = self.at_depth(0.06)
        share = (u / self.mouth_width).clamp(-1, 1)
        middle = self.mouth_y - 0.05 * self.smile * share * share - 0.008 * torch.cos(3 * math.pi * share)
        height = self.v - middle
        bow = 1 - share * share
        upper = -height - self.lip * (0.8 * bow - 0.25 * bump(share, 0, 0.22, 1.0))
        lower = height - self.lip * 1.15 * bow
        aside = u.abs() - self.mouth_width
        return torch.maximum(torch.maximum(upper, lower), aside), torch.maximum(height.abs(), aside), -height


def _paint_base(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Background, clothes, and skin of one flat colour."""
    background = torch.cat([draws.uniform(0.1, 0.9) for _ in range(3)], dim=1)[..., None]
    background = background.mean(1, keepdim=True) + 0.5 * (background - background.mean(1, keepdim=True))
    image = contrast(background.expand(-1, -1, head.size, head.size), 0.5 * draws.smooth(0.25))
    image = contrast(image, draws.uniform(-0.6, 0.6) * grid(head.size)[0])
    skin = colours(_SKINS, draws.uniform(), [draws.uniform(-0.03, 0.03)] * 3)
    clothes = torch.cat([draws.uniform(0.08, 0.9) for _ in range(3)], dim=1)[..., None]
    body = ellipse(head.u, head.v - 1.32, draws.uniform(0.75, 0.95), 0.62)
    image = over(image, head.covers(head.neck) * (head.v < 1.0), skin)
    neckline = ellipse(head.u, head.v - 0.66, 0.3, draws.uniform(0.12, 0.3))
    image = over(image, head.covers(torch.maximum(body, -neckline)), clothes)
    image = over(image, head.skin() * head.covers(torch.minimum(head.v - 0.6, head.face)), skin)
    canvas.paint("base", image, torch.ones(1, head.size, head.size))


def _paint_skin_hue(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Redder cheeks, nose and ears, yellower forehead, freckles on some."""
    u, v = head.at_depth(0.05), head.v
    red = bump(u.abs() - 0.25, v - 0.17, 0.17, 0.13) + 0.8 * bump(u, v - head.nose_y, 0.09, 0.1)
    red = red + 0.7 * head.covers(head.u.abs() * -1 + head.width - 0.02, 0.05) - 0.5 * bump(u, v + 0.42, 0.35, 0.2)
    freckles = torch.sigmoid(8 * (draws.smooth(0.012) - 1.5)) * bump(u, v - 0.1, 0.33, 0.12)
    mottled = 0.25 * draws.smooth(0.09)
    flush = draws.uniform(0.15, 0.5) * (red + mottled) * head.covers(head.face)
    dark = 0.5 * freckles * (draws.uniform() > 0.65) * head.covers(head.face)
    tint = torch.tensor([0.25, -0.55, -0.6]).view(1, 3, 1, 1)
    canvas.paint(
        "skin hue",
        lambda image: contrast(image + (flush[:, None] * tint).clamp(-1, 1) * image * (1 - image), -dark),
        head.covers(head.face),
    )


def _paint_diffuse_light(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Lambert's cosine on the face's relief, nostrils, and the shadow below the chin."""
    u, v = head.u, head.v
    inside = (1 - (u / (1.12 * head.width)) ** 2 - ((v - 0.02) / 0.76) ** 2).clamp(min=0)
    relief = 0.42 * (inside + 0.03).sqrt()
    near = head.at_depth(0.1)
    middle = head.at_depth(0.07)
    ridge = (
        torch.exp(-((middle / 0.055) ** 2))
        * torch.sigmoid((v + 0.12) * 18)
        * torch.sigmoid((head.nose_y + 0.02 - v) * 40)
    )
    relief = relief + 0.075 * ridge + 0.085 * bump(near, v - head.nose_y, 0.07, 0.055)
    relief = relief + 0.03 * bump(near.abs() - 0.06, v - head.nose_y - 0.015, 0.035, 0.035)
    relief = relief - 0.055 * bump(head.at_depth(0.04).abs() - head.eye_x, v - head.eye_y - 0.005, 0.11, 0.07)
    relief = relief + 0.03 * bump(head.at_depth(0.04).abs() - head.eye_x, v - head.eye_y + 0.11, 0.14, 0.045)
    relief = relief + 0.035 * bump(middle.abs() - 0.25, v - 0.14, 0.13, 0.1)
    relief = relief + 0.03 * bump(head.at_depth(0.06), v - head.mouth_y, 0.16, 0.07)
    relief = relief - 0.02 * bump(head.at_depth(0.06), v - head.mouth_y - 0.085, 0.08, 0.025)
    relief = relief + 0.04 * bump(head.at_depth(0.06), v - head.mouth_y - 0.17, 0.1, 0.07)
    light_x, light_y = draws.uniform(-1.2, 1.2), draws.uniform(-0.9, 0.25)
    ambient = draws.uniform(0.35, 0.6)
    face = head.covers(head.face)
    shade = ambient + (1.06 - ambient) * lambert(relief * head.covers(head.face, 0.04), light_x, light_y)
    nostrils = bump(near.abs() - 0.045, v - head.nose_y - 0.04, 0.022, 0.014)
    shade = shade * (1 - 0.6 * nostrils)
    below = 1 - 0.5 * head.covers(head.face - 0.16, 0.3) * head.covers(head.neck)
    shade = (face * shade + (1 - face) * below).clamp(0, 1)
    canvas.paint("diffuse light", lambda image: multiply(image, shade), face)


def _paint_specular_light(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Gloss of forehead, nose, cheeks and chin on the side of the light."""
    side = draws.uniform(-1, 1)
    u, v = head.u - 0.09 * side, head.v
    gloss = bump(u - 0.1 * side, v + 0.38, 0.2, 0.09) + 0.8 * bump(
        head.at_depth(0.1) - 0.015 * side, v - head.nose_y + 0.03, 0.022, 0.05
    )
    gloss = gloss + 0.6 * bump(u.abs() - 0.25, v - 0.1, 0.07, 0.05) * (1 + side * torch.sign(u))
    gloss = gloss + 0.4 * bump(head.at_depth(0.06) - 0.03 * side, v - head.mouth_y - 0.17, 0.05, 0.035)
    light = draws.uniform(0.08, 0.42) * gloss * head.covers(head.face)
    canvas.paint("specular light", lambda image: screen(image, light), 3 * light)


def _paint_make_up(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Shadow above the eyes, rouge, lipstick: strong on the first class, nearly none on the second."""
    strength = head.of_class(0.75, 0.06) * draws.uniform(0.5, 1.0)
    w = head.at_depth(0.04).abs() - head.eye_x
    lid = bump(w - 0.02, head.v - head.eye_y + 0.05, 0.1, 0.05)
    rouge = bump(head.at_depth(0.05).abs() - 0.29, head.v - 0.18, 0.12, 0.08)
    shadow = torch.cat([draws.uniform(0.15, 0.6), draws.uniform(0.1, 0.4), draws.uniform(0.2, 0.7)], dim=1)[..., None]
    lipstick = colours(
        ((0.72, 0.10, 0.16), (0.82, 0.30, 0.36), (0.55, 0.08, 0.22)), draws.uniform(), [draws.uniform(-0.05, 0.05)] * 3
    )
    lips = head.covers(head.lips()[0], 0.015)
    face = head.covers(head.face)

    def change(image: Tensor) -> Tensor:
        image = over(image, 0.8 * strength * lid * face, shadow)
        image = over(image, 0.55 * strength * rouge * face, _RED)
        return over(image, 0.9 * strength * lips, lipstick)

    canvas.paint("make-up", change, strength * torch.maximum(torch.maximum(lid, rouge), lips) * 1.5)


def _paint_mouth(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Tint of the lips, the dark line between them, and teeth where the smile is broad."""
    distance, line, above = head.lips()
    lips = head.covers(distance, 0.01)
    open_mouth = ((head.smile - 0.55) / 0.45).clamp(0, 1)
    gap = (1 - (head.at_depth(0.06) / (0.8 * head.mouth_width)) ** 2).clamp(min=0) * 0.045 * open_mouth
    teeth = coverage((above + 0.3 * gap).abs() - gap, head.size) * (gap > 0)
    seam = 0.75 * stroke(line, 0.016, head.size)
    plump = draws.uniform(0.1, 0.3) * bump(above + 0.5 * head.lip, 0, 0.3 * head.lip, 1.0) * lips

    def change(image: Tensor) -> Tensor:
        image = screen(over(image, 0.35 * lips, _RED * 0.8), plump)
        image = over(image, seam, 0.35 * _RED)
        return over(image, 0.95 * teeth, _WHITE)

    canvas.paint("mouth", change, torch.maximum(lips, seam))


def _paint_eyes(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """White, iris, pupil, glint, and the line of the lashes."""
    size = head.size
    w = head.at_depth(0.04)
    a, b = turned(w.abs() - head.eye_x, head.v - head.eye_y, -0.06)
    half_width, half_height = 0.088, 0.046 * draws.uniform(0.85, 1.2)
    almond = ellipse(a, b * (1 + 1.6 * a.clamp(-0.1, 0.1).abs()), half_width, half_height)
    white = coverage(almond, size)
    gaze_x, gaze_y = draws.uniform(-0.02, 0.02), draws.uniform(-0.006, 0.01)
    px, py = w.abs() - head.eye_x - gaze_x * torch.sign(w), head.v - head.eye_y - gaze_y
    radius = 0.042 * draws.uniform(0.95, 1.12)
    iris, pupil = (
        coverage(ellipse(px, py, radius, radius), size) * white,
        coverage(ellipse(px, py, 0.019, 0.019), size) * white,
    )
    colour = colours(_IRISES, draws.uniform(), [draws.uniform(-0.05, 0.05) for _ in range(3)])
    lashes = stroke((almond - 0.004).abs() + 0.02 * (b > 0), head.of_class(0.03, 0.018), size) * (b < 0.02)
    glint = coverage(ellipse(px - 0.016 * torch.sign(w), py + 0.016, 0.013, 0.013), size) * white
    shade = 0.72 + 0.28 * ((b / half_height + 1) / 1.2).clamp(0, 1)

    def change(image: Tensor) -> Tensor:
        image = over(image, white, _WHITE * shade[:, None])
        image = over(over(image, iris, colour * shade[:, None]), pupil, _BLACK)
        return over(over(image, glint, _WHITE), head.of_class(0.9, 0.6) * lashes, _BLACK)

    canvas.paint("eyes", change, torch.maximum(white, lashes))


def _paint_hair(canvas: Canvas, draws: Draws, head: _Head) -> None:
    """Hair in strands with its own sheen, brows, and a beard on some of the second class."""
    u, v = head.u, head.v
    wave = 0.05 * draws.smooth(0.08)
    parting = draws.uniform(-0.22, 0.22)
    cap = ellipse(u, v + 0.22, head.width + head.of_class(0.16, 0.085), head.of_class(0.62, 0.55))
    fringe = v + 0.36 - 0.9 * (u - parting) ** 2 * draws.uniform(-0.4, 1.2) - head.of_class(0.0, -0.05)
    fall = u.abs() - head.width - draws.uniform(0.08, 0.24) - 0.1 * torch.sin(4 * v)
    length = draws.uniform(0.45, 1.3)
    sides = torch.maximum(torch.maximum(fall, v - length), -v - 0.2)
    outside_face = -(head.face + head.of_class(0.045, 0.0))
    long_hair = torch.minimum(
        torch.maximum(cap, torch.minimum(fringe, outside_face)), torch.maximum(sides, outside_face)
    )
    front_neck = torch.maximum(u.abs() - 0.27, 0.3 - v)
    long_hair = torch.maximum(long_hair, -front_neck)
    short_hair = torch.maximum(cap, torch.minimum(fringe, torch.maximum(outside_face, v - 0.05)))
    region = torch.where(head.of_class(1, 0) > 0, long_hair, short_hair) + wave
    grow_x = torch.where(v < -0.3, (u - parting) * 1.2, 0.25 * torch.sign(u) * (v + 0.3) + 0.2 * torch.sign(u))
    texture = strands(draws.smooth(0.014), grow_x, 0.35 + (v + 0.7).clamp(min=0), 0.3)
    hair = head.covers(region + 0.012 * texture, 0.012)
    along = head.at_depth(0.04).abs() - head.eye_x
    brow_y = head.v - head.eye_y + 0.115 - 1.8 * along.clamp(-0.12, 0.12) ** 2
    brows = ellipse(along, brow_y, 0.105, head.of_class(0.014, 0.024))
    brows = 0.85 * head.covers(brows + 0.004 * texture, 0.012)
    beard = torch.maximum(head.face + 0.01, torch.minimum(0.3 - v - 1.3 * u * u, 0.44 - v))
    beard = torch.maximum(beard, 0.012 - head.lips()[0])
    beard = (
        head.covers(beard + 0.01 * texture, 0.06)
        * head.of_class(0, 0.85)
        * (draws.uniform() > 0.5)
        * draws.uniform(0.35, 1)
    )
    colour = colours(_HAIRS, draws.uniform(), [draws.uniform(-0.04, 0.04)] * 3)
    sheen = draws.uniform(0.2, 0.7) * bump(v + 0.5 - 0.35 * u * u, 0, 0.12, 1.0) + 0.25
    strand = contrast(colour.expand(-1, -1, head.size, head.size), 0.55 * texture)
    strand = screen(strand, 0.35 * sheen * torch.sigmoid(1.5 * texture))
    depth = 1 - 0.5 * head.covers(head.face - 0.1, 0.25) * (1 - head.covers(head.face)) * (v > -0.2)
    alpha = torch.maximum(torch.maximum(hair, brows), beard)
    canvas.paint("hair", lambda image: over(image, alpha, multiply(strand, depth.clamp(0, 1))), alpha)
