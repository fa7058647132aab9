"""Images for a Trainer: where they come from, how views are drawn, what corruptions do, and the yardstick."""

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_sharp._extras import optional
from hf_sharp.recipes.tasks import image_data
from hf_sharp.recipes.tasks.augmentation import Augmentation
from hf_sharp.recipes.tasks.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corrupted_accuracy, corrupted_rows
from hf_sharp.recipes.tasks.image_data import ImageSplit, load_digits, load_image_folder, load_image_hub
from hf_sharp.recipes.tasks.image_models import pick_model, small_vit
from hf_sharp.recipes.tasks.images import Batches, Images, decode
from hf_sharp.recipes.tasks.linear import linear_scores


def pictures(count=4, channels=3, side=16, seed=0):
    """Smooth pictures: a few bright blobs, so that neighbouring pixels are alike, as in photographs."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 3, 3, generator=draw)
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=False).clamp(0.05, 0.95)


# --- corruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 16), (3, 33)])
def test_a_corruption_keeps_shape_and_range_and_grows(kind, channels, side):
    images = pictures(6, channels, side)
    before, distances = images.clone(), []
    for severity in SEVERITIES:
        corrupted = corrupt(images, kind, severity)
        assert corrupted.shape == images.shape and corrupted.dtype == images.dtype
        assert corrupted.min() >= 0 and corrupted.max() <= 1
        torch.testing.assert_close(corrupted, corrupt(images, kind, severity), rtol=0, atol=0)
        distances.append(float((corrupted - images).square().mean()))
    torch.testing.assert_close(images, before, rtol=0, atol=0)
    assert distances[0] > 0
    assert all(later > earlier for earlier, later in pairwise(distances)), distances


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_an_image_is_corrupted_without_regard_to_its_neighbours(kind):
    images = pictures(5)
    alone = torch.cat([corrupt(images[:2], kind, 3), corrupt(images, kind, 3)[2:]])
    if kind == "noise":  # drawn for all of them, so only the law is the same
        return
    torch.testing.assert_close(alone, corrupt(images, kind, 3), rtol=0, atol=1e-6)


def test_noise_has_its_deviation_and_its_seed():
    grey = torch.full((8, 1, 32, 32), 0.5)
    for severity, deviation in ((1, 0.04), (3, 0.12)):
        noise = corrupt(grey, "noise", severity, seed=3) - grey
        assert noise.std().item() == pytest.approx(deviation, rel=0.03)  # 8,192 draws: 1.6 standard errors a per cent
        assert abs(noise.mean().item()) < 0.005
        assert not torch.equal(noise, corrupt(grey, "noise", severity, seed=4) - grey)


def test_corruptions_do_what_they_are_called():
    images = pictures(3)
    torch.testing.assert_close(corrupt(images, "brightness", 3), (images + 0.3).clamp(max=1))
    pale = corrupt(images, "contrast", 4)
    torch.testing.assert_close(pale.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(pale.std((2, 3)), 0.2 * images.std((2, 3)))
    point = torch.zeros(1, 1, 31, 31)
    point[0, 0, 15, 15] = 1
    blurred = corrupt(point, "blur", 5)
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    places = torch.arange(31.0) - 15
    assert (blurred.sum((0, 1, 3)) * places.square()).sum().item() == pytest.approx(0.35**2 * 31, rel=0.03)
    torch.testing.assert_close(blurred, blurred.transpose(2, 3))
    coarse = corrupt(images, "pixelate", 3)  # 16 pixels become 8
    means = images.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    torch.testing.assert_close(coarse, means.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_jpeg_is_pillows():
    images = pictures(2)
    file = io.BytesIO()
    pixels = (images[1] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, format="JPEG", quality=25)
    theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    torch.testing.assert_close(corrupt(images, "jpeg", 3)[1], theirs)


WRONG = {
    "unknown": ((torch.rand(1, 1, 8, 8), "fog", 1), "no corruption 'fog'. Known: noise, blur"),
    "severity": ((torch.rand(1, 1, 8, 8), "blur", 6), "severity is one of 1, 2, 3, 4, 5; got 6"),
    "bytes": ((torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "blur", 1), "got torch.uint8"),
    "one image": ((torch.rand(3, 8, 8), "blur", 1), r"of shape \(3, 8, 8\)"),
    "channels": ((torch.rand(1, 4, 8, 8), "blur", 1), "1 or 3 channels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_corruptions_refuse(case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        corrupt(*arguments)


def test_rows_and_their_scores_are_in_one_order():
    images, labels = pictures(2, 1, 8), [4, 7]
    rows = corrupted_rows(images, labels, seed=5)
    assert len(rows) == 6 * 5 * 2
    blurred = rows[(1 * 5 + 1) * 2 + 1]  # second kind, second severity, second image
    assert blurred["labels"] == 7 and blurred["pixel_values"].dtype == torch.uint8
    expected = (corrupt(images, "blur", 2, seed=5)[1] * 255).round().byte()
    torch.testing.assert_close(blurred["pixel_values"], expected, rtol=0, atol=0)
    guesses = [row["labels"] for row in rows]
    guesses[(1 * 5 + 1) * 2 + 1] = 0
    scores = corrupted_accuracy(guesses, rows)
    assert list(scores) == list(CORRUPTIONS)
    assert scores["blur"] == [1, 0.5, 1, 1, 1] and scores["noise"] == [1] * 5


# --- views -----------------------------------------------------------------------------------------------------------


def seeded(augmentation, images, seed=0):
    return augmentation(images, torch.Generator().manual_seed(seed))


def test_views_depend_on_the_seed_alone():
    images = pictures(6)
    before, views = images.clone(), seeded(Augmentation(), images, 1)
    torch.testing.assert_close(images, before, rtol=0, atol=0)
    torch.testing.assert_close(views, seeded(Augmentation(), images, 1), rtol=0, atol=0)
    assert (views - seeded(Augmentation(), images, 2)).abs().flatten(1).max(1).values.min() > 0.01
    torch.manual_seed(3)
    first = Augmentation()(images)
    torch.manual_seed(3)
    torch.testing.assert_close(Augmentation()(images), first, rtol=0, atol=0)
    assert views.shape == images.shape and views.min() >= 0 and views.max() <= 1


def test_nothing_to_do_is_nothing_done():
    images = pictures(6)
    torch.testing.assert_close(seeded(Augmentation(1.0, False, 0.0), images), images, rtol=0, atol=1e-6)


def test_a_flip_mirrors_half_of_the_images():
    images = pictures(200, 1, 8)
    views = seeded(Augmentation(1.0, True, 0.0), images)
    mirrored = [torch.allclose(view, image.flip(-1), atol=1e-5) for view, image in zip(views, images, strict=True)]
    kept = [torch.allclose(view, image, atol=1e-5) for view, image in zip(views, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True)) and 70 < sum(mirrored) < 130


def test_a_crop_is_a_part_of_the_image_of_the_right_area():
    side = 64
    ramp = torch.arange(side).float().div(side)
    places = torch.stack([ramp.expand(side, side), ramp.view(-1, 1).expand(side, side)])  # x and y of each pixel
    views = seeded(Augmentation(0.25, False, 0.0), places.expand(400, 2, side, side))
    width, height = (views[:, 0, 0, -1] - views[:, 0, 0, 0]), (views[:, 1, -1, 0] - views[:, 1, 0, 0])
    area, aspect = width * height, width / height
    assert 0.2 < area.min() < 0.35 and 0.85 < area.max() <= 1
    assert area.mean().item() == pytest.approx(0.6, abs=0.06)
    assert 0.7 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.42
    assert views.min() >= 0 and views.max() <= ramp[-1]  # never from outside
    assert views[:, 0, 0, 0].max() > 0.3 and views[:, 1, 0, 0].max() > 0.3  # not always from the corner


def test_colours_move_within_their_limits():
    grey = torch.full((300, 3, 4, 4), 0.4)
    views = seeded(Augmentation(1.0, False, 0.25), grey)
    assert views.flatten(1).std(1).max() < 1e-6  # an even grey has no contrast and no colour
    assert 0.3 <= views.min() < 0.31 and 0.49 < views.max() <= 0.5 + 1e-6
    images = pictures(300)
    ratio = (seeded(Augmentation(1.0, False, 0.25), images) - images).abs().flatten(1).mean(1)
    assert ratio.min() < 0.02 < ratio.max()


@pytest.mark.parametrize(
    ("settings", "message"), [({"area": 0.0}, "area is the smallest"), ({"jitter": 1.0}, "jitter")]
)
def test_augmentation_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


# --- where images come from ------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    task = load_digits()
    theirs = optional("sklearn.datasets").load_digits()
    assert (len(task.train.labels), len(task.test.labels), len(task.classes)) == (1200, 597, 10)
    assert [*task.train.labels, *task.test.labels] == theirs.target.tolist()
    pixels = Images(task.test, 8, 1)[5]["pixel_values"]
    assert pixels.shape == (1, 8, 8) and pixels.dtype == torch.uint8
    assert (pixels[0].float() / 255 * 16 - torch.from_numpy(theirs.images[1205])).abs().max() < 0.05


def save(path, colour, size=(10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        for index in range(count):
            save(tmp_path / "data" / split / "red" / f"{index}.png", (200 + index, 0, 0))
            save(tmp_path / "data" / split / "blue" / f"{index}.jpg", (0, 0, 200 + index))
    (tmp_path / "data" / "train" / "red" / "notes.txt").write_text("not an image")
    return tmp_path / "data"


def test_a_folder_and_its_archive_hold_the_same(folder, tmp_path):
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "data.tar.gz", "w:gz") as archive:
        archive.add(folder, "wrapped")
    task = load_image_folder(folder)
    assert (task.name, task.classes) == ("data", ["blue", "red"])
    assert (task.train.labels, task.test.labels) == ([0] * 6 + [1] * 6, [0, 0, 1, 1])
    for other in (tmp_path / "packed", tmp_path / "packed" / "data.tar.gz"):
        packed = load_image_folder(other)
        assert (packed.classes, packed.train.labels, packed.test.labels) == (
            task.classes, task.train.labels, task.test.labels
        )  # fmt: skip
        for ours, theirs in ((task.train, packed.train), (task.test, packed.test)):
            torch.testing.assert_close(Images(ours, 4, 3).pixels(), Images(theirs, 4, 3).pixels(), rtol=0, atol=0)
    assert Images(task.train, 4, 3)[11]["pixel_values"][:, 0, 0].tolist() == [205, 0, 0]


def test_classes_alone_are_split_by_name(tmp_path):
    for index in range(60):
        save(tmp_path / "red" / f"{index}.png", (index, 0, 0))
        save(tmp_path / "blue" / "deeper" / f"{index}.png", (0, 0, index))
    task = load_image_folder(tmp_path)
    assert task.classes == ["blue", "red"] and len(task.train.labels) + len(task.test.labels) == 120
    assert 2 < len(task.test.labels) < 30
    again = load_image_folder(tmp_path)
    assert (again.train, again.test) == (task.train, task.test)


def test_folders_that_cannot_be_right(tmp_path, folder):
    with pytest.raises(ValueError, match="There is no folder of images and no archive"):
        load_image_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found 0 images of 0 classes"):
        load_image_folder(tmp_path / "empty")
    save(folder / "test" / "green" / "0.png", (0, 255, 0))
    with pytest.raises(ValueError, match="in the test that are not in training: green"):
        load_image_folder(folder)
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"broken\.tar cannot be read"):
        load_image_folder(tmp_path / "broken.tar")


def test_some_of_the_images_are_always_the_same(folder):
    split = load_image_folder(folder).train
    some = split.take(5).take(3)
    assert len(some.labels) == 3 and some == split.take(5).take(3) and split.take(100) is split is split.take(None)
    for index, label in enumerate(some.labels):
        source = some.source(index)
        assert source.parent.name == ("blue", "red")[label] and source == split.sources[some.places[index]]


@pytest.fixture
def hub(monkeypatch):
    datasets, splits = optional("datasets"), {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits)
    return splits


def hub_split(count, names=("no", "yes"), **columns):
    datasets = optional("datasets")
    images = [Image.new("RGB", (6, 6), (index, 0, 0)) for index in range(count)]
    rows = datasets.Dataset.from_dict(
        {"id": range(count), "img": images, "fine": [i % 2 for i in range(count)], **columns}
    )
    rows = rows.cast_column("img", datasets.Image())
    return rows.cast_column("fine", datasets.ClassLabel(names=list(names))) if names else rows


def test_hub_columns_are_found_by_their_kind(hub):
    hub |= {"train": hub_split(5), "validation": hub_split(3)}
    task = load_image_hub("someone/pictures")
    assert (task.name, list(task.classes)) == ("pictures", ["no", "yes"])
    assert (list(task.train.labels), list(task.test.labels)) == ([0, 1, 0, 1, 0], [0, 1, 0])
    assert Images(task.train, 6, 3)[4]["pixel_values"][:, 0, 0].tolist() == [4, 0, 0]


def test_hub_classes_without_names_and_without_a_test(hub):
    hub["train"] = hub_split(40, names=None, kind=["b", "a"] * 20)
    task = load_image_hub("pictures", label_column="kind")
    assert sorted(task.classes) == ["a", "b"] and (len(task.train.labels), len(task.test.labels)) == (36, 4)
    for index in range(4):
        red = Images(task.test, 6, 3)[index]["pixel_values"][0, 0, 0].item()
        assert task.classes[task.test.labels[index]] == "ba"[red % 2]


def test_hub_refuses(hub):
    hub["test"] = hub_split(3)
    with pytest.raises(ValueError, match="no split train; it has test"):
        load_image_hub("pictures")
    hub["train"] = hub_split(3, names=None)
    with pytest.raises(ValueError, match=r"--label_column\); got img and None, and it has id, img, fine"):
        load_image_hub("pictures")


# --- as a Trainer takes them -----------------------------------------------------------------------------------------


def test_images_are_decoded_from_whatever_they_are(tmp_path):
    wide = Image.new("RGB", (20, 10), (255, 0, 0))
    wide.paste((0, 0, 255), (5, 0, 15, 10))  # the middle square
    wide.save(tmp_path / "wide.png")
    for source in (wide, tmp_path / "wide.png", (tmp_path / "wide.png").read_bytes()):
        pixels = decode(source, 10, 3)
        assert pixels.shape == (3, 10, 10) and (pixels.flatten(1) == torch.tensor([[0], [0], [255]])).all()
        assert decode(source, 4, 1).shape == (1, 4, 4)
    grey = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    assert decode(grey, 4, 1) is grey and decode(grey, 8, 3).shape == (3, 8, 8)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"Pillow cannot read .*broken\.png"):
        decode(tmp_path / "broken.png", 4, 3)
    with pytest.raises(ValueError, match="Pillow cannot read an image of the archive"):
        decode(b"no image", 4, 3)


def test_batches_are_normalised_and_only_training_images_augmented():
    pixels = (pictures(4, 3, 8) * 255).byte()
    split, mean, std = ImageSplit(pixels, [0, 1, 2, 3]), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    batches = Batches(Augmentation(), mean, std)
    batch = batches([Images(split, 8, 3)[index] for index in (2, 0)])
    assert set(batch) == {"pixel_values", "labels"} and batch["labels"].tolist() == [2, 0]
    expected = (pixels[[2, 0]].double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(batch["pixel_values"], expected.float())
    noisy = Images(split, 8, 3, augment=True, labels=[9, 9, 9, 9])
    rows = [noisy[index] for index in (2, 0)]
    torch.manual_seed(0)
    other = batches(rows)
    assert other["labels"].tolist() == [9, 9] and not torch.allclose(other["pixel_values"], batch["pixel_values"])
    torch.manual_seed(0)
    torch.testing.assert_close(batches(rows)["pixel_values"], other["pixel_values"], rtol=0, atol=0)


def test_small_vits_and_models_of_ones_own(tmp_path):
    model = small_vit(["a", "b", "c"], 8, 1, hidden=16, layers=1)
    network = model.make()
    assert network(torch.zeros(2, 1, 8, 8)).logits.shape == (2, 3) and network.config.id2label[2] == "c"
    with pytest.raises(ValueError, match="got 64, 4 and 10"):
        small_vit(["a", "b"], 10, 1)
    network.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.25], "image_std": [0.75]}')
    tuned = pick_model(str(tmp_path), ["a", "b"])
    assert (tuned.size, tuned.channels, tuned.mean, tuned.std) == (8, 1, [0.25], [0.75])
    weights, again = dict(network.named_parameters()), tuned.make()
    assert again.config.num_labels == 2 and again.classifier.weight.shape == (2, 16)
    for name, weight in again.named_parameters():
        assert name.startswith("classifier") or torch.equal(weight, weights[name])
    with pytest.raises(ValueError, match="takes images of 8 pixels, not 12"):
        pick_model(str(tmp_path), ["a", "b"], size=12)
    fresh = pick_model(str(tmp_path), ["a", "b"], size=12, from_scratch=True)
    assert fresh.size == 12 and fresh.make()(torch.zeros(2, 1, 12, 12)).logits.shape == (2, 2)


def test_the_linear_model_is_scikit_learns():
    task = load_digits()
    train, test = Images(task.train, 8, 1), Images(task.test.take(50), 8, 1)
    corrupted = corrupted_rows(test.pixels()[:10], test.labels[:10])
    clean, others = linear_scores(train, test, corrupted, most=300)
    model = optional("sklearn.linear_model").LogisticRegression(max_iter=2000)
    x = train.pixels().flatten(1).numpy()
    model.fit(x[::4], task.train.labels[::4])
    assert clean == pytest.approx(model.score(test.pixels().flatten(1).numpy(), test.labels), abs=0.021)  # one image
    assert 0.7 < clean <= 1 and set(others) == set(CORRUPTIONS) and np.mean(others["contrast"]) < clean


def test_no_torchvision_anywhere():
    root = Path(image_data.__file__).parents[2]
    for file in (*root.glob("hf_sharp/**/*.py"), *root.glob("recipes/*.py"), *root.glob("examples/*.py")):
        assert "import torchvision" not in file.read_text() and "from torchvision" not in file.read_text(), file
