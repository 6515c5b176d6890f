"""Tiny runs of the class transfer from the command line: what they record, resume, data, budgets, refusals."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import cli
from experiments.class_transfer import data
from experiments.class_transfer.model import load_trained, make_players
from experiments.class_transfer.setup import BUDGETS, Setup, choose
from experiments.common.images import decode
from experiments.common.record import Run
from experiments.common.resumable import CHECKPOINT
from experiments.common.synthetic.sets import synthetic_set
from tests.experiments.image_files import encoded, members, pixels, png, write_archive, write_folder

TINY = ["class-transfer", "--budget", "cpu", "--widths", "1,2", "--discriminator-widths", "1,2", "--branches", "3"]
TINY += ["--train-images", "12", "--test-images", "9", "--steps", "2", "--batch-size", "3", "--report-steps", "1"]
TINY += ["--classifier-steps", "2", "--score-images", "6"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BSFAST_DATA", raising=False)
    monkeypatch.setenv("BSFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path


def only_run(folder):
    (found,) = (folder / "runs").glob("class-transfer-*")
    return found


@pytest.mark.parametrize("smoother", ["gaussian", "learnt"])
def test_class_transfer_records_samples_and_exactness(own_folder, capsys, smoother):
    assert cli.main([*TINY, "--smoother", smoother]) == 0
    folder = only_run(own_folder)
    assert capsys.readouterr().out.splitlines()[-1] == f"runs/{folder.name}/report.html"
    record = Run.load(folder)
    assert record.finished
    assert (record.config["image_size"], record.config["smoother"], record.config["budget"]) == (32, smoother, "cpu")
    assert record.config["inputs"] == ("image" if smoother == "gaussian" else "bands")
    names = ["transfer", *(f"figure-{number}" for number in (9, 11, 14, 15, 18, 19, 20)), "training"]
    names += ["figure-12", "figure-21"]
    drawn_names = [entry["name"] for entry in record.figures]
    assert [name for name in drawn_names if name != "figure-12-photographs"] == names  # where there is scikit-image
    assert "budget cpu, 32 x 32 pixels, R: " in record.figures[0]["note"]
    assert record.figures[0]["note"].endswith(
        "Data: SynthAnimals, 12 training and 9 test images of 32 x 32 pixels, seed 0."
    )
    verdicts = {claim["figure"]: claim["verdict"] for claim in record.claims}
    assert verdicts["eq. 15"] == "holds"
    assert verdicts["eq. 16, 17"] == ("not tested" if smoother == "gaussian" else "holds")
    metrics = record.metrics
    assert metrics["classes"] == ["cat", "dog", "wild"]
    assert metrics["parameters"]["smoother"] == (40_464 if smoother == "learnt" else 0)
    assert [entry["steps"] for entry in metrics["history"]] == [1, 2]
    assert sum(metrics["decomposition"]["shares"]) == pytest.approx(1)
    sheet = np.asarray(Image.open(folder / "samples" / "step-0000002.png"))
    assert sheet.shape == (8 * 34 - 2, (2 + 3 + 3) * 34 - 2, 3)
    first = synthetic_set("SynthAnimals", 32, train_images=1, test_images=9).test_images[0]
    np.testing.assert_array_equal(sheet[:32, :32], first.permute(1, 2, 0))
    assert set(metrics["class_accuracy"]) == {"real", "own class", "other class", "R", "x as another"}
    assert list(metrics["scores"]["contestants"])[:2] == ["trained branches", "random branches"]
    assert len(metrics["eyes"]["dice"]) == 6
    speed = metrics["speed"]
    assert "M=3 generators, 3 images of 3 x 32 x 32, float32, cpu" in speed["what"]
    assert [row["baseline"] for row in speed["rows"]] == [False, True, True]
    assert all(0 < low <= median <= high for row in speed["rows"] for median, low, high in row["values"])
    fused, *loops = ([median for median, _, _ in row["values"]] for row in speed["rows"])
    assert metrics["fused_speedup"]["Training step"] == min(loop[1] for loop in loops) / fused[1]
    judged = [claim["figure"] for claim in record.claims]
    assert (judged.count("Fig. 9"), judged.count("layers"), judged.count("Fig. 12")) == (3, 2, 1)
    assert metrics["page"]["file"] == "sliders.html"
    assert 'href="sliders.html">One slider per branch</a>' in (folder / "report.html").read_text()
    page = (folder / "sliders.html").read_bytes()
    (folder / "sliders.html").unlink()
    assert cli.main(["sliders", str(folder)]) == 0
    assert (folder / "sliders.html").read_bytes() == page
    drawn = (folder / "figure-14.png").read_bytes()
    record.redraw()
    assert (folder / "figure-14.png").read_bytes() == drawn


def test_class_transfer_resumes_and_loads(own_folder, capsys):
    assert cli.main([*TINY, "--smoother", "learnt", "--warm-start", "1", "--seed", "3", "--tensorboard"]) == 0
    folder = only_run(own_folder)
    assert list((folder / "tensorboard" / "class-transfer").glob("events.*"))
    before = json.loads((folder / "run.json").read_text())
    assert cli.main(["class-transfer", "--resume", str(folder)]) == 0
    after = json.loads((folder / "run.json").read_text())
    for stored in (before, after):  # times
        stored["seconds"] = 0
        del stored["metrics"]["speed"], stored["metrics"]["fused_speedup"]
    assert before == after

    decomposer, classes, setup = load_trained(folder)
    assert classes == ("cat", "dog", "wild")
    assert setup == Setup.from_json(before["config"])
    stored = torch.load(folder / CHECKPOINT, weights_only=True)["state"]["nets"]["average"]
    assert all(torch.equal(value, stored[name]) for name, value in decomposer.state_dict().items())
    parts = decomposer.decompose(torch.rand(1, 3, 32, 32), torch.tensor([1]))
    assert parts.v.shape == (3, 1, 3, 32, 32)
    assert not parts.f.requires_grad

    (folder / CHECKPOINT).write_bytes(b"damaged")
    assert cli.main(["class-transfer", "--resume", str(folder)]) == 1
    assert "must be a whole checkpoint, but it is damaged" in capsys.readouterr().err


def test_class_transfer_takes_folders_archives_and_classes(own_folder):
    files = {name: png(seed, 48) for seed, name in enumerate(members(classes=("dog", "cat", "owl")))}
    folder = write_folder(own_folder / "zoo", files)
    archive = write_archive(own_folder / "zoo.tar.xz", files)
    setup = dataclasses.replace(choose("cpu", {"data": str(folder), "widths": (1, 2)}), classes=("owl", "cat"))
    assert (setup.train_images, setup.test_images) == (None, None)
    one = data.load(setup)
    assert one.classes == ("owl", "cat")
    assert one.train_images.shape == (6, 3, 32, 32)
    assert one.train_labels.bincount().tolist() == [3, 3]
    assert one.note.endswith("cut and scaled to 32 x 32 where larger; of them the classes owl, cat")
    other = data.load(dataclasses.replace(setup, data=str(archive)))
    assert torch.equal(one.train_images, other.train_images)
    assert torch.equal(one.test_labels, other.test_labels)
    with pytest.raises(ValueError, match="classes must be different ones of cat, dog, owl, got owl, bat"):
        data.load(dataclasses.replace(setup, classes=("owl", "bat")))
    with pytest.raises(ValueError, match="train_images must be in 1 to 6 for zoo, got 7"):
        data.load(dataclasses.replace(setup, train_images=7))
    arguments = ["--widths", "1,2", "--discriminator-widths", "1,2", "--steps", "1", "--batch-size", "2"]
    arguments += ["--branches", "2", "--classifier-steps", "1"]
    assert cli.main(["class-transfer", "--budget", "cpu", "--data", str(archive), *arguments]) == 0
    assert Run.load(only_run(own_folder)).metrics["classes"] == ["cat", "dog", "owl"]


def test_class_transfer_takes_three_classes_of_cifar10(own_folder, monkeypatch, capsys):
    assert cli.main(["class-transfer", "--data", "cifar", "--budget", "cpu"]) == 1
    assert "BSFAST_DATA must name CIFAR-10 or the folder that holds it, got none" in capsys.readouterr().err
    names = ("airplane", "cat", "dog", "horse")
    files = {name: png(seed, 32) for seed, name in enumerate(members(classes=names))}
    write_archive(own_folder / "cifar10-jpeg.tar.xz", files)
    monkeypatch.setenv("BSFAST_DATA", str(own_folder))
    dataset = data.load(choose("gpu" if torch.cuda.is_available() else "cpu", {"data": "CIFAR-10"}))
    assert dataset.classes == ("cat", "dog", "horse")
    assert len(dataset.train_images) == 9


def test_decode_resizes_the_central_square():
    wide = np.zeros((40, 120, 3), dtype=np.uint8)
    wide[:, 40:80] = pixels(1, 40).mean((0, 1)).astype(np.uint8)
    content = encoded(Image.fromarray(wide))
    made = decode(content, "wide", 16, resize=True)
    assert made.shape == (3, 16, 16)
    np.testing.assert_array_equal(made, np.broadcast_to(wide[0, 50][:, None, None], (3, 16, 16)))
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[:, None, None], 64, 1).repeat(3, 2)
    small = decode(encoded(Image.fromarray(ramp)), "ramp", 16, resize=True)
    means = ramp[:, 0, 0].reshape(16, 4).mean(1)
    np.testing.assert_allclose(small[:, 2:-2], np.broadcast_to(means[2:-2, None], (3, 12, 16)), atol=1)
    with pytest.raises(ValueError, match="small must be at least 64 x 64 pixels, got 120 x 40"):
        decode(content, "small", 64, resize=True)
    with pytest.raises(ValueError, match="wide must be 16 x 16 pixels, got 120 x 40"):
        decode(content, "wide", 16)


def test_choose_completes_a_budget(monkeypatch):
    setup = choose("cpu", {"seed": 2})
    assert (setup.image_size, setup.widths, setup.inputs, setup.seed) == (32, (4, 16), "image", 2)
    assert choose("cpu", {"image_size": 64}).widths is None
    assert choose("cpu", {"smoother": "tv"}).inputs == "bands"
    assert choose("cpu", {"smoother": "tv", "inputs": "image"}).inputs == "image"
    assert (choose("cpu", {}).r1, choose("cpu", {"r1": 0.5}).r1) == (1 / 64, 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu, paper = choose("auto", {}), choose("paper", {"data": "a folder"})
    assert (gpu.r1, paper.r1) == (1 / 16, 1)
    assert (gpu.budget, gpu.image_size, gpu.precision, gpu.train_images) == ("gpu", 64, "bf16", 12_000)
    assert (paper.image_size, paper.steps, paper.batch_size, paper.train_images) == (256, 100_000, 8, None)
    assert choose("gpu", {"data": "CIFAR-10"}).image_size == 32
    for setup in (gpu, paper):
        assert Setup.from_json(json.loads(json.dumps(setup.to_json()))) == setup
    assert set(BUDGETS) == {"cpu", "gpu", "paper"}


def test_make_players_is_a_function_of_the_seed():
    setup = choose("cpu", {"widths": (1, 2), "discriminator_widths": (1, 2), "branches": 2})
    one, two, other = (make_players(dataclasses.replace(setup, seed=seed), 3) for seed in (0, 0, 1))
    weights = [net.decomposer.branches.state_dict()["from_rgb.weight"] for net in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0][0], weights[0][1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "4"], "--widths: must be two integers BASE,MOST with 1 <= BASE <= MOST, got '4'"),
        (["--widths", "8,4"], "got '8,4'"),
        (["--classes", "cat"], "--classes: must be two names or more with commas between, got 'cat'"),
        (["--smoother", "median"], "invalid choice: 'median'"),
        (["--steps", "0"], "--steps: must be an integer of at least 1, got '0'"),
    ],
)
def test_class_transfer_refuses_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["class-transfer", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "paper"], "--data, or BSFAST_DATA, must name a folder or archive of class folders"),
        (["--budget", "cpu", "--data", "nothing"], "path must be an existing folder or archive"),
        (["--budget", "cpu", "--inputs", "bands"], "inputs must be image for the smoother gaussian"),
        (["--budget", "cpu", "--warm-start", "5"], "warm_start is of the smoother learnt, got the smoother gaussian"),
        (["--budget", "cpu", "--image-size", "48"], "size must be a power of 2 from 16, got 48"),
        (["--resume", "runs", "--lr", "1"], "--resume continues with the run's own options and takes --data only"),
    ],
)
def test_class_transfer_reports_what_cannot_be_done(arguments, message, capsys):
    assert cli.main(["class-transfer", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_resume_and_load_refuse_the_run_of_another_experiment(capsys):
    folder = Run("toy", {}).folder
    assert cli.main(["class-transfer", "--resume", str(folder)]) == 1
    assert "--resume must name a run of class-transfer, got one of toy" in capsys.readouterr().err
    assert cli.main(["sliders", str(folder)]) == 1
    assert "folder must be of a class transfer, got one of toy" in capsys.readouterr().err
    with pytest.raises(ValueError, match="folder must be of a class transfer, got one of toy"):
        load_trained(folder)
