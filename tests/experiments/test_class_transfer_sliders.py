"""The page of sliders: its numbers against the generator's, and its controls in a real headless browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.class_transfer import sliders
from experiments.class_transfer.decomposer import decompose_all
from experiments.class_transfer.model import make_players
from experiments.class_transfer.pictures import shown_images
from experiments.class_transfer.setup import choose
from experiments.common.synthetic.sets import synthetic_set

SIZE, BRANCHES = 32, 3
CLASSES = ("cat", "dog", "wild")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Sets an image by its radio button, another target, and sliders, as a person would, and says what is drawn.
ACTIONS = """
<script>
const said = {}, drawing = document.getElementById("f").getContext("2d");
const drawn = () => Array.from(drawing.getImageData(0, 0, 32, 32).data);
const choose = (name, value) => document.querySelector(`[name=${name}][value="${value}"]`).click();
const move = (k, alpha) => {
  const slider = document.getElementById(`alpha${k}`);
  slider.value = alpha;
  slider.dispatchEvent(new Event("input"));
};
said.start = drawn();
choose("image", 4);
said.target = document.querySelector("[name=target]:checked").value;
choose("target", 2);
move(1, 2.5); move(3, -1);
said.moved = drawn(); said.outputs = [...document.querySelectorAll("output")].map((output) => output.textContent);
said.status = document.getElementById("said").textContent;
document.querySelectorAll("[data-only]")[1].click();
said.only = drawn();
document.querySelector('[data-all="0"]').click();
said.none = drawn();
document.querySelector('[data-all="1"]').click();
said.all = drawn();
document.getElementById("alpha2").focus();
said.focused = document.activeElement.id;
const result = document.createElement("pre");
result.id = "result"; result.textContent = JSON.stringify(said); document.body.append(result);
</script>"""


@pytest.fixture(scope="module")
def generator():
    setup = choose("cpu", {"widths": (1, 2), "discriminator_widths": (1, 2), "branches": BRANCHES, "output_scale": 1.0})
    decomposer = make_players(setup, len(CLASSES)).average
    with torch.no_grad():  # styles that differ between classes, which they do not before training
        for name, parameter in decomposer.named_parameters():
            if "linear" in name:
                parameter.normal_(std=0.5)
    return decomposer


@pytest.fixture(scope="module")
def dataset():
    return synthetic_set("SynthAnimals", SIZE, train_images=3, test_images=15)


@pytest.fixture(scope="module")
def page(generator, dataset, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "sliders.html"
    return sliders.write_sliders(file, generator, dataset, "Made by <hand>.").read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def unpacked(part, size=SIZE):
    return np.frombuffer(base64.b64decode(part["numbers"]), "<i2").reshape(3, size, size) * part["step"]


def test_write_sliders_sums_to_the_generators_output(generator, dataset, page):
    data = data_of(page)
    x, labels = shown_images(dataset, 12)
    assert [image["label"] for image in data["images"]] == labels.tolist()
    off = float(re.search(r"at most (\S+) of 255 grey", page)[1]) * 2 / 255 * 1.05  # rounded to two digits
    assert 0 < off < 2e-3
    for target in range(3):
        with torch.no_grad():
            f = generator(x, torch.full_like(labels, target)).numpy()
        parts = decompose_all(generator, x, torch.full_like(labels, target))
        for index, image in enumerate(data["images"]):
            v = [unpacked(part) for part in image["v"][target]]
            assert len(v) == BRANCHES
            assert np.abs(unpacked(image["R"]) + sum(v) - f[index]).max() <= off
            alphas = (3.0, -1.0, 3.0)  # at the ends, where rounding counts most
            made = unpacked(image["R"]) + sum(alpha * part for alpha, part in zip(alphas, v, strict=True))
            expected = parts.R[index] + sum(alpha * part for alpha, part in zip(alphas, parts.v[:, index], strict=True))
            assert np.abs(made - expected.numpy()).max() <= off
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["x"].partition(",")[2]))))
            np.testing.assert_array_equal(shown, np.rint((x[index].numpy() + 1) * 127.5).transpose(1, 2, 0))


def test_sliders_data_averages_large_images_down():
    x = torch.rand(1, 3, 256, 256) * 2 - 1

    def parts(*sizes):
        v = torch.stack([size * x for size in sizes])
        return sliders.Decomposition(x + v.sum(0), x, v, None)

    data = sliders.sliders_data(x, torch.tensor([1]), [parts(0.1, 0.0), parts(0.2, 3.0)])
    assert data["size"] == 128
    blocks = x.reshape(3, 128, 2, 128, 2).mean((2, 4)).numpy()
    (image,) = data["images"]
    np.testing.assert_allclose(unpacked(image["R"], 128), blocks, atol=1e-4)
    np.testing.assert_allclose(unpacked(image["v"][1][1], 128), 3 * blocks, atol=1e-4)
    assert not unpacked(image["v"][0][1], 128).any()


def test_write_sliders_shows_fewer_images_where_they_are_large(generator, dataset, tmp_path, monkeypatch):
    each = 2 * 3 * SIZE**2 * (1 + 3 * BRANCHES)
    monkeypatch.setattr(sliders, "_LARGEST_DATA", 5 * each)
    page = sliders.write_sliders(tmp_path / "few.html", generator, dataset, "").read_text(encoding="utf-8")
    assert len(data_of(page)["images"]) == 5


def test_write_sliders_needs_nothing_else_and_names_its_controls(page):
    assert "default-src 'none'" in page
    assert "Made by &lt;hand&gt;." in page
    assert not re.search(r"https?://|@import|fetch\(|XMLHttpRequest|import\(", page)
    controls, labels = [], set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            own = dict(attributes)
            if tag in {"input", "button", "a", "select"}:
                controls.append((tag, own))
            if tag == "label":
                labels.add(own.get("for"))
            assert tag not in {"link", "iframe", "object"}
            assert own.get("src", "data:").startswith("data:")
            assert "tabindex" not in own

    Reader().feed(page)
    kinds = [(tag, own.get("type")) for tag, own in controls]
    assert kinds.count(("input", "radio")) == 12 + 3
    ranges = [own for tag, own in controls if own.get("type") == "range"]
    assert [own["id"] in labels for own in ranges] == [True] * BRANCHES
    assert {(own["min"], own["max"], own["value"]) for own in ranges} == {("-1", "3", "1")}
    assert kinds.count(("button", "button")) == BRANCHES + 2


@pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium: no chromium, chromium-browser or google-chrome on the PATH"
)
def test_sliders_change_the_image_in_a_browser(generator, dataset, page, tmp_path):
    file = tmp_path / "acting.html"
    file.write_text(page.replace("</body>", f"{ACTIONS}</body>"), encoding="utf-8")
    said = json.loads(result_of(dump(file)))
    x, labels = shown_images(dataset, 12)
    first = decompose_all(generator, x[:1], labels[:1])
    parts = decompose_all(generator, x[4:5], torch.tensor([2]))
    near(said["start"], first.f[0])
    assert said["target"] == str(labels[4].item())
    v1, v2, v3 = parts.v[:, 0]
    near(said["moved"], parts.R[0] + 2.5 * v1 + v2 - v3)
    assert said["outputs"] == ["2.50", "1.00", "-1.00"]
    change = 127.5 * (1.5 * v1 - 2 * v3).abs().mean().item()
    assert float(re.search(r"from f: (\S+) grey", said["status"])[1]) == pytest.approx(change, abs=0.06)
    near(said["only"], parts.R[0] + v2)
    near(said["none"], parts.R[0])
    near(said["all"], parts.f[0])
    assert said["focused"] == "alpha2"


def dump(file):
    """Let the browser run the page's scripts, and return the document that they leave."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={file.parent / 'profile'}"]
    made = subprocess.run(
        [BROWSER, *options, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return made.stdout


def result_of(document):
    return unescape(re.search(r'<pre id="result">(.*?)</pre>', document, re.S)[1])


def near(drawn, expected):
    """Compare a canvas's pixels with a signal ``(3, H, W)``: half a level of rounding, and what 16 bits lose."""
    pixels = np.array(drawn).reshape(SIZE, SIZE, 4)
    assert (pixels[..., 3] == 255).all()
    wanted = ((expected.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(pixels[..., :3] - wanted).max() <= 0.65
