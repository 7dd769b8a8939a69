"""Data come as they are stored or not at all: shipped digits, public files, folders of images; and shipped models."""

import gzip
import io
import os
import pickle
import random
import re
import shutil
import struct
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny_data import (
    TEST,
    TRAIN,
    cifar_batch,
    idx,
    list_checksums,
    pictures,
    py2_array,
    py2_batch,
    py2_int,
    py2_list,
    py2_text,
    py2_tuple,
    tiny_data,
)

from ddpm_lib import Gaussian, data, digits, download, pretrained, pretrained_classifier, sample, spiral
from ddpm_lib.data import as_floats, cifar10, emoji, fashion_mnist, image_folder, load_images, mnist
from ddpm_lib.download import DataError
from ddpm_lib.evaluation import _share_nearest

REAL = os.environ.get("DDPM_DATA", "")


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No network, no DDPM_DATA, an empty cache."""

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("there is no network in tests")

    monkeypatch.setattr(download, "urlopen", unreachable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("DDPM_DATA", raising=False)


def test_digits_are_those_of_scikit_learn():
    """The same images with the same labels, in another order."""
    images, labels = digits("all")
    bunch = load_digits()
    levels = (images[:, 0] * 8 + 8).numpy()
    assert np.array_equal(levels, levels.round())
    ours = sorted((*image.flatten().astype(int), label) for image, label in zip(levels, labels.tolist()))
    theirs = sorted((*image.astype(int), label) for image, label in zip(bunch.data, bunch.target.tolist()))
    assert ours == theirs


def test_shapes_types_and_range():
    for split, n in (("train", 1347), ("test", 450), ("all", 1797)):
        images, labels = digits(split)
        assert images.shape == (n, 1, 8, 8)
        assert labels.shape == (n,)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert (images.min(), images.max()) == (-1, 1)
        assert labels.unique().tolist() == list(range(10))


def test_training_and_test_images_do_not_overlap():
    train, test, whole = (digits(split)[0] for split in ("train", "test", "all"))
    assert torch.equal(torch.cat([train, test]), whole)
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in test}


def test_digits_are_a_copy_each_time():
    digits("test")[0].zero_()
    assert digits("test")[0].abs().sum() > 0


def test_every_class_is_about_equally_frequent_in_both_parts():
    for split in ("train", "test"):
        counts = torch.bincount(digits(split)[1]).double()
        assert (counts / counts.mean() - 1).abs().max() < 0.25


def test_emoji_are_pictures_on_white_with_names():
    images, names = emoji("all")
    assert images.shape == (len(names), 3, 32, 32) == (1900, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert len(set(names)) == len(names)
    assert (images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] > 200).float().mean() > 0.95  # their corners
    assert "woman firefighter, medium-dark skin tone" in names


def test_no_emoji_of_the_test_part_is_in_training_but_all_are_there_in_another_tone():
    tone = re.compile(", (?:medium-)?(?:light|dark|medium) skin tone")
    (images, train), (held_out, test), (whole, names) = (emoji(split) for split in ("train", "test", "all"))
    assert len(images) == 1720
    assert sorted(train + test) == sorted(names)
    assert not set(train) & set(test)
    assert {tone.sub("", name) for name in test} <= {tone.sub("", name) for name in train}
    assert all(tone.search(name) for name in test)
    for parts, told in ((images, train), (held_out, test)):
        assert torch.equal(parts[-1], whole[names.index(told[-1])])


def test_the_darkest_tone_is_darker_than_the_lightest():
    images, names = emoji("all")
    brightness = dict(zip(names, images.float().mean((1, 2, 3)).tolist()))
    light, dark = ", light skin tone", ", dark skin tone"
    toned = [name.removesuffix(light) for name in names if name.endswith(light)]
    assert len(toned) > 200
    assert [name for name in toned if brightness[name + light] <= brightness[name + dark]] == ["snowboarder"]  # masked


def test_each_emoji_is_nearest_to_itself_even_through_noise_and_others_are_not():
    images, names = emoji("test")
    seen = as_floats(images) + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert _share_nearest(seen, names) == 1
    assert _share_nearest(seen, names[1:] + names[:1]) == 0


def test_the_spiral_is_centred_with_unit_variances(generator):
    points = spiral(200_000, generator)
    assert points.shape == (200_000, 2)
    assert points.mean(0).abs().max() < 0.01
    assert (points.var(0) - 1).abs().max() < 0.01
    assert torch.equal(spiral(3, torch.Generator().manual_seed(1)), spiral(3, torch.Generator().manual_seed(1)))


def test_the_spiral_winds_once_and_a_half(generator):
    """Its radius is its angle, up to the noise of 0.3: points lie near r = angle + 2 pi k, with radius up to 3 pi."""
    points = spiral(20_000, generator) * data.SPIRAL_STD + data.SPIRAL_MEAN
    radius, angle = points.norm(dim=1), torch.atan2(points[:, 1], points[:, 0])
    off = (radius - angle + torch.pi) % (2 * torch.pi) - torch.pi
    far = radius > 3
    assert float(off[far].std()) == pytest.approx(0.3, abs=0.03)
    assert float(radius.max()) < 3 * torch.pi + 1.5


def test_the_shipped_classifier_reads_real_test_digits():
    images, labels = digits("test")
    classifier = pretrained_classifier()
    assert float((classifier(images).argmax(1) == labels).double().mean()) > 0.99
    assert classifier.features(images).shape == (450, 64)
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


@pytest.mark.parametrize("t", [50, 100, 250])
def test_the_shipped_denoiser_beats_the_best_linear_guess_on_real_test_digits(t, generator):
    """Its guess of x0 is nearer to the truth than that of the Gaussian fitted to the training digits.

    At later steps a linear guess is almost the best there is: at t = 500 the two are level (0.264 and 0.269).
    """
    denoiser = pretrained("digits")
    schedule, images, train = denoiser.schedule, digits("test")[0], digits("train")[0].flatten(1).double()
    x_t = schedule.q_sample(images, t, torch.randn(images.shape, generator=generator))
    covariance = train.T.cov()
    gaussian = Gaussian(train.mean(0), (covariance + covariance.T) / 2)
    linear = gaussian.denoise(x_t.flatten(1), float(schedule.alpha_bar[t])).view_as(images)
    with torch.no_grad():
        guess = denoiser(x_t, t).x0
    ours, theirs = ((x0.clamp(-1, 1) - images).square().mean() for x0 in (guess, linear))
    assert ours < theirs


def test_the_shipped_denoiser_knows_its_labels(generator):
    """At a step where the digit can hardly be seen, the right label helps and a wrong one harms."""
    denoiser = pretrained("digits")
    images, labels = digits("test")
    x_t = denoiser.schedule.q_sample(images, 500, torch.randn(images.shape, generator=generator))
    with torch.no_grad():
        guesses = [denoiser(x_t, 500, label).x0 for label in (labels, None, (labels + 1) % 10)]
    right, none, wrong = ((x0.clamp(-1, 1) - images).square().mean() for x0 in guesses)
    assert right < none < wrong


def test_the_shipped_clothes_are_what_was_asked_for(generator):
    """The card says 87% of a thousand; here fifty, in 20 steps."""
    label = torch.arange(50) % 10
    walk = {"steps": 20, "eta": 0.0, "generator": generator}
    images = sample(pretrained("fashion-mnist"), (50, 1, 28, 28), condition=label, **walk).clamp(-1, 1)
    read = pretrained_classifier("fashion-mnist")(images).argmax(1)
    assert (read == label).float().mean() > 0.7


# Public data sets, tiny ones of the same form


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own(tiny, tmp_path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(tiny, tmp_path / "own")


def same(a: tuple, b: tuple) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("dataset", "channels", "size"), [("mnist", 1, 28), ("fashion-mnist", 1, 28), ("cifar10", 3, 32)]
)
def test_shapes_and_types_of_public_data(tiny, dataset, channels, size, split):
    images, labels = load_images(dataset, split, root=tiny)
    n = {"train": TRAIN, "test": TEST}[split]
    assert (images.shape, images.dtype) == ((n, channels, size, size), torch.uint8)
    assert (labels.shape, labels.dtype) == ((n,), torch.int64)
    assert same((images, labels), load_images(dataset, split, root=tiny, image_size=size))


def test_idx_files_are_read_as_they_are_written(tmp_path):
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    labels = np.array([7, 0, 9], np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    list_checksums(tmp_path)
    for load in (mnist, fashion_mnist):
        found, numbers = load("test", tmp_path)
        assert np.array_equal(found[:, 0], images)
        assert numbers.tolist() == [7, 0, 9]


def test_cifar_batches_are_what_pickle_makes_of_them(own):
    """Python's own unpickler, on files that we wrote, gives the same; channels come first, batches in order."""
    with tarfile.open(own / "cifar10" / "cifar-10-python.tar.gz") as archive:
        archive.extractall(own / "unpacked", filter="data")
    for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        contents = [(own / "unpacked" / "cifar-10-batches-py" / name).read_bytes() for name in names]
        batches = [pickle.loads(content, encoding="bytes") for content in contents]
        images, labels = cifar10(split, own)
        assert np.array_equal(images, np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32))
        assert labels.tolist() == [label for batch in batches for label in batch[b"labels"]]


def test_arrays_in_either_order_of_memory(tmp_path):
    """Python 2 stored an array column by column where it lay so in memory."""
    values = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    labels = py2_list(py2_int(3), py2_int(4))
    for fortran in (False, True):
        stored = values.tobytes("F" if fortran else "C")
        (tmp_path / "test_batch").write_bytes(py2_batch(py2_array((2, 3072), stored, fortran=fortran), labels))
        list_checksums(tmp_path)
        assert np.array_equal(cifar10("test", tmp_path)[0], values.reshape(2, 3, 32, 32))


def test_the_unpacked_folder_of_cifar_serves_as_well(own):
    packed = cifar10("train", own)
    with tarfile.open(own / "cifar10" / "cifar-10-python.tar.gz") as archive:
        archive.extractall(own / "unpacked", filter="data")
    list_checksums(own / "unpacked" / "cifar-10-batches-py")
    for root in (own / "unpacked", own / "unpacked" / "cifar-10-batches-py"):
        assert same(cifar10("train", root), packed)


# Where data are looked for


def test_root_comes_before_the_variable_and_that_before_the_cache(tmp_path, monkeypatch):
    places = [tiny_data(tmp_path / str(seed), seed) for seed in range(2)]
    cached = tiny_data(tmp_path / "home" / "ddpm_lib", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DDPM_DATA", str(places[1]))
    for dataset in ("mnist", "fashion-mnist", "cifar10"):
        wanted = [load_images(dataset, root=place) for place in (*places, cached)]
        assert not same(wanted[0], wanted[1])
        assert not same(wanted[1], wanted[2])
        assert same(load_images(dataset, root=places[0]), wanted[0])
        assert same(load_images(dataset), wanted[1])
        with monkeypatch.context() as unset:
            unset.delenv("DDPM_DATA")
            assert same(load_images(dataset), wanted[2])
        (tmp_path / "nothing").mkdir(exist_ok=True)
        assert same(load_images(dataset, root=tmp_path / "nothing"), wanted[1])


def test_the_cache_is_in_the_home_folder(own, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".cache").mkdir(parents=True)
    own.rename(tmp_path / "home" / ".cache" / "ddpm_lib")
    assert len(mnist()[0]) == TRAIN


@pytest.mark.parametrize("subfolder", ["", "mnist", "MNIST/raw"])
def test_files_may_lie_alone_or_in_a_folder_of_their_own(own, tmp_path, subfolder):
    wanted = mnist("train", own)
    target = tmp_path / "place" / subfolder
    target.parent.mkdir(parents=True, exist_ok=True)
    (own / "mnist").rename(target)
    assert same(mnist("train", tmp_path / "place"), wanted)


def test_the_folder_named_as_the_data_set_comes_first(own):
    """A root may hold the files of MNIST beside a folder of Fashion-MNIST; the names of the files are the same."""
    wanted = fashion_mnist("train", own)
    for path in (own / "mnist").iterdir():
        path.rename(own / path.name)
    assert same(fashion_mnist("train", own), wanted)


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist", "cifar10"])
def test_absent_and_offline_is_one_error_that_says_all(dataset, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.setenv("DDPM_DATA", str(tmp_path / "b"))
    with pytest.raises(DataError) as caught:
        load_images(dataset, root=tmp_path / "a")
    message, name = str(caught.value), next(iter(download.ORIGINALS[dataset]))
    cache = tmp_path / "empty" / "ddpm_lib"
    sites = download.ORIGINALS[dataset][name].sites
    assert len(sites) == 2
    for said in (name, tmp_path / "a", tmp_path / "b", cache, "DDPM_DATA", *(f"{site}/{name}: " for site in sites)):
        assert str(said) in message
    assert f"curl -L --create-dirs -o {cache / dataset / name} {sites[0]}/{name}" in message


def test_what_is_nowhere_is_downloaded_to_the_cache_once(own, tmp_path, monkeypatch):
    """Both files of the split, with the md5 and the size of the originals, from addresses that end in their names."""
    asked = []

    def bring(addresses, path, md5, size):
        assert all(address.startswith("http") and address.endswith(f"/{path.name}") for address in addresses)
        assert (md5, size) == download.ORIGINALS["mnist"][path.name][:2]
        asked.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((own / "mnist" / path.name).read_bytes())
        list_checksums(path.parent)

    monkeypatch.setattr(download, "download", bring)
    wanted = mnist("test", own)
    assert same(mnist("test"), wanted)
    assert same(mnist("test"), wanted)
    folder = tmp_path / "empty" / "ddpm_lib" / "mnist"
    assert asked == [folder / "t10k-images-idx3-ubyte.gz", folder / "t10k-labels-idx1-ubyte.gz"]


def test_the_archive_of_cifar_is_downloaded_whole(own, monkeypatch):
    def bring(addresses, path, md5, size):
        assert path.name == "cifar-10-python.tar.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes((own / "cifar10" / path.name).read_bytes())
        list_checksums(path.parent)

    monkeypatch.setattr(download, "download", bring)
    assert same(cifar10("test"), cifar10("test", own))


def test_a_named_folder_that_is_not_there_is_an_error(tiny, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"root names the folder .*typo, which does not exist"):
        mnist(root=tmp_path / "typo")
    monkeypatch.setenv("DDPM_DATA", str(tmp_path / "typo"))
    with pytest.raises(DataError, match=r"DDPM_DATA names the folder .*typo, which does not exist"):
        mnist()
    assert len(mnist(root=tiny)[0]) == TRAIN


@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_half_of_a_data_set_is_an_error_and_not_filled_up_from_elsewhere(own, tiny, monkeypatch, kind):
    monkeypatch.setenv("DDPM_DATA", str(tiny))
    (own / "mnist" / f"train-{kind}-ubyte.gz").unlink()
    with pytest.raises(DataError, match=f"mnist holds a part of mnist, but not train-{kind}-ubyte.gz"):
        mnist("train", own)
    assert len(mnist("test", own)[0]) == TEST


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "given", "allowed"),
    [
        ({"dataset": "imagenet"}, "'imagenet'", "digits, emoji, mnist, fashion-mnist, cifar10, scenes, image-folder"),
        ({"dataset": "mnist", "split": "all"}, "'all'", "'train' or 'test'"),
        ({"dataset": "cifar10", "split": "valid"}, "'valid'", "'train' or 'test'"),
        ({"dataset": "digits", "split": "valid"}, "'valid'", "'train', 'test' or 'all'"),
        ({"dataset": "digits", "image_size": 16}, "got 16", "None or 8"),
        ({"dataset": "image-folder", "image_size": 8}, "None", "needs root and image_size"),
        ({"dataset": "image-folder", "root": "."}, "None", "needs root and image_size"),
        ({"dataset": "image-folder", "root": ".", "image_size": 8, "split": "test"}, "'test'", "'train' only"),
        ({"dataset": "image-folder", "root": ".", "image_size": 0}, "got 0", "1 or more"),
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_met(arguments, given, allowed):
    with pytest.raises(ValueError, match=re.escape(allowed)) as caught:
        load_images(**arguments)
    assert given in str(caught.value)


def test_digits_by_name_are_the_shipped_ones():
    assert same(load_images("digits", "test", image_size=8), digits("test"))


# Damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A bit flipped, a piece cut off, a piece lost in the middle, or zeros where a page was not written."""
    place = rng.randrange(len(content))
    length = rng.randint(1, 200)
    return rng.choice(
        [
            content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :],
            content[:place],
            content[:place] + content[place + length :],
            content[:place] + bytes(b ^ 0xFF for b in content[place : place + length]) + content[place + length :],
        ]
    )


FILES = [
    ("mnist", "train-images-idx3-ubyte.gz"),
    ("mnist", "train-labels-idx1-ubyte.gz"),
    ("fashion-mnist", "train-images-idx3-ubyte.gz"),
    ("cifar10", "cifar-10-python.tar.gz"),
    ("unpacked", "cifar-10-batches-py/data_batch_3"),
    ("image-folder", "cats/00.png"),
    ("image-folder", "dogs/01.jpg"),
    ("image-folder", "dogs/02.webp"),
]


@pytest.fixture
def few(own) -> Path:
    """Tiny data with CIFAR-10 unpacked, and six images in the folder."""
    with tarfile.open(own / "cifar10" / "cifar-10-python.tar.gz") as archive:
        archive.extractall(own / "unpacked", filter="data")
    list_checksums(own / "unpacked" / "cifar-10-batches-py")
    for path in (own / "image-folder").glob("*/*"):
        if int(path.stem) > 2:
            path.unlink()
    list_checksums(own / "image-folder")
    return own


def load_part(few: Path, folder: str) -> tuple:
    if folder == "image-folder":
        return image_folder(few / folder, 16)
    return load_images("cifar10" if folder == "unpacked" else folder, root=few / folder)


@pytest.mark.parametrize(("folder", "name"), FILES, ids=[name for _, name in FILES])
def test_damage_is_always_seen(few, folder, name):
    """25 damaged copies of each of 8 files, 200 in all."""
    path, rng = few / folder / name, random.Random(name)
    whole = path.read_bytes()
    load_part(few, folder)
    for _ in range(25):
        path.write_bytes(damaged(whole, rng))
        with pytest.raises(DataError, match=re.escape(path.name)):
            load_part(few, folder)


@pytest.mark.parametrize(("folder", "name"), FILES, ids=[name for _, name in FILES])
def test_damage_that_no_md5_shows_crashes_nothing(few, folder, name):
    """25 times again, with the list of checksums made anew: a DataError, or images of the right form. In gzip files,
    which have checksums of their own, these are the right images.
    """
    path, rng = few / folder / name, random.Random(name)
    whole, wanted = path.read_bytes(), load_part(few, folder)
    for _ in range(25):
        path.write_bytes(damaged(whole, rng))
        list_checksums(few / folder / "cifar-10-batches-py" if folder == "unpacked" else few / folder)
        try:
            found = load_part(few, folder)
        except DataError:
            continue
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in wanted]
        assert same(found, wanted) or not name.endswith("gz")


def test_the_message_about_a_damaged_file_says_how_to_mend_it(own):
    path = own / "mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"damaged, cut short, or another file: .* Take another copy.* md5sums\.txt"):
        mnist("train", own)


def test_without_a_list_only_the_originals_are_accepted(own):
    for folder, load in (("mnist", mnist), ("fashion-mnist", fashion_mnist), ("cifar10", cifar10)):
        (own / folder / "md5sums.txt").unlink()
        original = next(iter(download.ORIGINALS[folder].values()))
        with pytest.raises(DataError, match=f"not {original.md5}"):
            load("train", own)


@pytest.mark.parametrize(
    ("listed", "right"),
    [
        ("{md5}  ./train-labels-idx1-ubyte.gz\n", True),
        ("{md5} *train-labels-idx1-ubyte.gz\n\n", True),
        ("{md5} train-labels-idx1-ubyte.gz", True),
        ("{md5}  other\n", False),
        ("MD5 (train-labels-idx1-ubyte.gz) = {md5}\n", False),
        ("\0\xff", False),
    ],
    ids=["./", "binary", "as on a Mac", "not listed", "another form", "garbage"],
)
def test_lists_of_checksums(own, listed, right):
    path = own / "mnist" / "md5sums.txt"
    lines = path.read_text().splitlines(keepends=True)
    others, (line,) = [x for x in lines if "train-labels" not in x], [x for x in lines if "train-labels" in x]
    path.write_text("".join(others) + listed.format(md5=line[:32]), encoding="latin1")
    if right:
        assert len(mnist("train", own)[0]) == TRAIN
    else:
        with pytest.raises(DataError, match=r"md5sums\.txt"):
            mnist("train", own)


def rewritten(own: Path, name: str, content: bytes) -> Path:
    (own / name).write_bytes(content)
    list_checksums((own / name).parent)
    return own


IMAGES = pictures(np.random.default_rng(0), TRAIN, 28, 28)
BODY, WHOLE = IMAGES.tobytes(), idx(IMAGES)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\x08\x01" + WHOLE[4:], "begins with '00000801'"),
        (b"\0\0\x09\x03" + WHOLE[4:], "begins with '00000903'"),
        (b"\x89PNG" + WHOLE[4:], "begins with '89504e47'"),
        (b"", "begins with ''"),
        (WHOLE[:10], "begins with"),
        (WHOLE[:-1], "holds"),
        (WHOLE + b"\0", "holds"),
        (idx(IMAGES)[:4] + struct.pack(">3I", TRAIN + 1, 28, 28) + BODY, "announces the shape"),
        (idx(IMAGES)[:4] + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + BODY, "announces the shape"),
        (idx(IMAGES)[:4] + struct.pack(">3I", 0, 28, 28) + BODY, "announces the shape"),
        (idx(IMAGES[:-1]), f"{TRAIN} labels"),
        (idx(IMAGES[:0]), f"{TRAIN} labels"),
        (idx(IMAGES.reshape(TRAIN, 14, 56)), "must have the shape"),
    ],
)
def test_wrong_headers_and_counts(own, content, said):
    rewritten(own, "mnist/train-images-idx3-ubyte.gz", gzip.compress(content))
    with pytest.raises(DataError, match=re.escape(said)):
        mnist("train", own)


def test_no_images_at_all(own):
    rewritten(own, "mnist/train-images-idx3-ubyte.gz", gzip.compress(idx(IMAGES[:0])))
    rewritten(own, "mnist/train-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(0, np.uint8))))
    with pytest.raises(DataError, match="N > 0"):
        mnist("train", own)


def test_labels_beyond_nine(own):
    labels = np.full(TRAIN, 10, np.uint8)
    rewritten(own, "mnist/train-labels-idx1-ubyte.gz", gzip.compress(idx(labels)))
    with pytest.raises(DataError, match=r"train-labels.* is damaged: its labels are not all in 0\.\.9"):
        mnist("train", own)


@pytest.mark.parametrize(
    "content",
    [WHOLE, b"", gzip.compress(WHOLE)[:-1], gzip.compress(WHOLE) + b"\0", gzip.compress(WHOLE) * 2],
    ids=["plain", "empty", "cut in the trailer", "a byte more", "two streams"],
)
def test_what_is_not_one_whole_gzip_stream(own, content):
    rewritten(own, "mnist/train-images-idx3-ubyte.gz", content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        mnist("train", own)


def test_a_file_that_unpacks_to_far_too_much(own, monkeypatch):
    monkeypatch.setattr(data, "UNPACKED", 1_000_000)
    for name, load in (("mnist/train-images-idx3-ubyte.gz", mnist), ("cifar10/cifar-10-python.tar.gz", cifar10)):
        rewritten(own, name, gzip.compress(WHOLE[:16] + bytes(1_000_001)))
        with pytest.raises(DataError, match="or is over 1,000,000 bytes"):
            load("train", own)


# CIFAR-10: pickles that are no batches


class Bomb:
    """Unpickling it leaves a folder behind."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, protocol):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"labels": [1], "data": Bomb(tmp_path / "fired")}, protocol))
    list_checksums(tmp_path)
    with pytest.raises(DataError, match=r"it asks for \w+\.mkdir, which no batch"):
        cifar10("test", tmp_path)
    assert not (tmp_path / "fired").exists()
    pickle.loads((tmp_path / "test_batch").read_bytes())
    assert (tmp_path / "fired").exists()


ONE = py2_list(py2_int(1))
ARRAY = py2_array((1, 3072), bytes(3072))


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "os system",
        "numpy load",
        "numpy.core.multiarray fromfile",
        "_codecs encode",
        "copyreg __newobj__",
    ],
)
def test_no_other_name_is_looked_up(tmp_path, name):
    called = b"c%b\n%b\n" % tuple(name.encode().split()) + py2_tuple(py2_text(b"print()")) + pickle.REDUCE
    (tmp_path / "test_batch").write_bytes(py2_batch(called, ONE))
    list_checksums(tmp_path)
    with pytest.raises(DataError, match=f"it asks for {name.replace(' ', '.')}"):
        cifar10("test", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        pickle.NONE + pickle.STOP,
        pickle.EMPTY_DICT + pickle.STOP,
        py2_batch(ARRAY, ONE)[:-1],
        py2_batch(ARRAY, ONE)[:-1500],
        py2_batch(ARRAY, py2_list(py2_int(1), py2_int(2))),
        py2_batch(ARRAY, pickle.EMPTY_LIST),
        py2_batch(ARRAY, py2_list(py2_int(10))),
        py2_batch(ARRAY, py2_list(py2_int(-1))),
        py2_batch(ARRAY, py2_list(pickle.NEWTRUE)),
        py2_batch(ARRAY, py2_list(py2_text(b"1"))),
        py2_batch(ARRAY, py2_text(b"1")),
        py2_batch(ARRAY, pickle.NONE),
        py2_batch(py2_array((1, 3072), bytes(3071)), ONE),
        py2_batch(py2_array((1, 3072), bytes(3073)), ONE),
        py2_batch(py2_array((1, 3072), bytes(4 * 3072), b"f4"), ONE),
        py2_batch(py2_array((1, 3072), bytes(3072), b"i1"), ONE),
        py2_batch(py2_array((1, 3072), bytes(3072), b"O8"), ONE),
        py2_batch(py2_array((3072,), bytes(3072)), ONE),
        py2_batch(py2_array((-1, 3072), bytes(3072)), ONE),
        py2_batch(py2_array((2**31 - 1, 3072), bytes(3072)), ONE),
        py2_batch(py2_text(bytes(3072)), ONE),
        py2_batch(b"cnumpy\nndarray\n", ONE),
        py2_batch(b"cnumpy\nndarray\n" + py2_tuple(py2_tuple(py2_int(2**31 - 1))) + pickle.REDUCE, ONE),
        pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 1) + py2_batch(ARRAY, ONE)[:100],
        pickle.PROTO + b"\5" + pickle.BYTEARRAY8 + struct.pack("<Q", 2**62),
        pickle.PROTO + b"\5" + pickle.FRAME + struct.pack("<Q", 2**62),
        pickle.EXT1 + b"\1" + pickle.STOP,
        pickle.PERSID + b"x\n" + pickle.STOP,
    ],
)
def test_a_pickle_that_is_no_batch(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    list_checksums(tmp_path)
    with pytest.raises(DataError, match="test_batch"):
        cifar10("test", tmp_path)


def test_a_wild_memo_index_reserves_no_memory(tmp_path):
    """The unpickler in C would fill 16 GB of memory for this one; it is a whole batch, and is read."""
    content = py2_batch(ARRAY, ONE)
    marked = content[:2] + pickle.EMPTY_TUPLE + pickle.LONG_BINPUT + struct.pack("<I", 10**9) + pickle.POP + content[2:]
    (tmp_path / "test_batch").write_bytes(marked)
    list_checksums(tmp_path)
    assert cifar10("test", tmp_path)[1].tolist() == [1]


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_archives_without_the_batch(own):
    name = "cifar-10-batches-py/test_batch"
    link, folder = tarfile.TarInfo(name), tarfile.TarInfo(name)
    link.type, link.linkname, folder.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.DIRTYPE
    batch = cifar_batch(pictures(np.random.default_rng(0), 3, 3, 32, 32))
    for content in (
        tar_of(),
        tar_of((tarfile.TarInfo("test_batch"), batch)),
        tar_of((tarfile.TarInfo(f"../{name}"), batch)),
        tar_of((link, b"")),
        tar_of((folder, b"")),
        gzip.compress(b"no archive"),
        gzip.compress(bytes(10240)),
        gzip.compress(b""),
        gzip.compress(gzip.decompress(tar_of((tarfile.TarInfo(name), batch)))[:5000]),
    ):
        rewritten(own, "cifar10/cifar-10-python.tar.gz", content)
        with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz"):
            cifar10("test", own)
    rewritten(own, "cifar10/cifar-10-python.tar.gz", tar_of((tarfile.TarInfo(name), batch)))
    assert len(cifar10("test", own)[0]) == 3


# Folders of images


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def flat(value: int, *shape: int) -> np.ndarray:
    return np.full(shape or (4, 4, 3), value, np.uint8)


def values(images: torch.Tensor) -> list[int]:
    """The one grey level of each image."""
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def test_a_folder_of_images(tiny):
    images, labels = load_images("image-folder", root=tiny / "image-folder", image_size=24)
    assert (images.shape, images.dtype) == ((TRAIN + TEST, 3, 24, 24), torch.uint8)
    assert labels.tolist() == [0] * 30 + [1] * 30
    assert labels.dtype == torch.int64


def test_images_come_in_the_order_of_their_paths(tmp_path):
    order = ["10.png", "9.jpg", "B.webp", "a.PNG", "b/c/x.png", "b/d.jpeg", "b/e.JPG"]
    for i in (3, 0, 6, 2, 5, 1, 4):
        save(tmp_path / order[i], flat(20 * i))
    assert values(image_folder(tmp_path, 4)[0]) == [20 * i for i in range(7)]


def test_other_and_hidden_files_are_passed_over(tmp_path):
    save(tmp_path / "a.png", flat(7))
    for name in (".b.png", "._a.png", ".cache/c.png", "notes.txt", "d.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "folder.png").mkdir()
    assert values(image_folder(tmp_path, 2)[0]) == [7]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["b/x.png", "a/y.png", "a/z/w.png", "c/x.png"], [0, 0, 1, 2]),
        (["a/x.png", "b/y.png", "z.png"], None),
        (["a/x.png", "a/y.png"], None),
        (["x.png"], None),
    ],
    ids=["classes", "one outside", "one folder", "flat"],
)
def test_labels_are_the_subfolders(tmp_path, names, labels):
    for name in names:
        save(tmp_path / name, flat(0))
    found = image_folder(tmp_path, 2)[1]
    assert (found if found is None else found.tolist()) == labels


def test_the_centre_is_cut_out(tmp_path):
    """Columns 0..7 of height 4: the centre holds columns 2..5. The same upright."""
    pixels = np.arange(8, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2) * 30
    save(tmp_path / "a.png", pixels)
    save(tmp_path / "b.png", pixels.transpose(1, 0, 2))
    wide, high = image_folder(tmp_path, 4)[0]
    assert wide[0, 0].tolist() == [60, 90, 120, 150]
    assert torch.equal(high, wide.transpose(1, 2))


def test_resizing_averages_and_does_not_skip(tmp_path):
    """A chessboard of single pixels becomes grey, where taking every fourth pixel would give black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    save(tmp_path / "a.png", np.stack([board] * 3, 2))
    images = image_folder(tmp_path, 16)[0].float()
    assert (images - 127.5).abs().max() < 8


def test_a_size_that_fits_keeps_every_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    save(tmp_path / "a.png", pixels)
    assert np.array_equal(image_folder(tmp_path, 9)[0][0].permute(1, 2, 0), pixels)


def test_an_odd_rest_is_cut_evenly(tmp_path):
    """5 columns onto 4: half a column goes on either side, so that a symmetric image stays symmetric."""
    pixels = np.array([0, 100, 200, 100, 0], np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    save(tmp_path / "a.png", pixels)
    row = image_folder(tmp_path, 4)[0][0, 0, 0].int()
    assert (row - row.flip(0)).abs().max() <= 1


def test_every_kind_of_image_becomes_rgb(tmp_path):
    save(tmp_path / "0 grey.png", flat(50, 4, 4))
    Image.new("P", (4, 4), 1).save(tmp_path / "1 palette.png")
    save(tmp_path / "2 transparent.png", np.dstack([flat(10), flat(0, 4, 4)]))
    save(tmp_path / "3 opaque.png", np.dstack([flat(10), flat(255, 4, 4)]))
    Image.new("1", (4, 4), 1).save(tmp_path / "4 bits.png")
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "5 print.jpg")
    images = image_folder(tmp_path, 4)[0][:, :, 0, 0].tolist()
    assert images[0] == [50] * 3
    assert images[2:] == [[255] * 3, [10] * 3, [255] * 3, [255] * 3]


def test_photographs_stand_upright(tmp_path):
    """Orientation 6: the camera was turned, and the first row of the file is the right column of the scene."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", pixels, exif=exif)
    assert image_folder(tmp_path, 4)[0][0, 0, 0].tolist() == [0, 0, 0, 200]


def test_more_than_eight_bits_are_refused(tmp_path):
    """Pillow would cut 16 bits at 255, and the image turn white."""
    save(tmp_path / "deep.png", np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(DataError, match=r"deep\.png: its mode I;16 has more than 8 bits per channel"):
        image_folder(tmp_path, 4)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", None], ids=["empty", "text", "cut", "gif"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    """A picture of another format does not come in under a false name either."""
    save(tmp_path / "a.png", flat(0))
    save(tmp_path / "b.gif", flat(0))
    (tmp_path / "b.png").write_bytes((tmp_path / "b.gif").read_bytes() if content is None else content)
    with pytest.raises(DataError, match=r"cannot read the image .*b\.png"):
        image_folder(tmp_path, 4)


def test_an_image_that_announces_a_gigantic_size(tmp_path):
    save(tmp_path / "a.png", flat(0))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png"):
        image_folder(tmp_path, 4)


def test_a_folder_without_images(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder of images .*none"):
        image_folder(tmp_path / "none", 4)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="no png, jpg, jpeg or webp file in"):
        image_folder(tmp_path, 4)


def test_the_list_of_checksums_of_a_folder_must_fit(own):
    folder = own / "image-folder"
    (folder / "cats" / "00.png").rename(folder / "cats" / "zz.png")
    with pytest.raises(DataError, match=r"lists other images .*; cats/00\.png is in one of them only"):
        image_folder(folder, 4)
    list_checksums(folder)
    save(folder / "cats" / "new.png", flat(0))
    with pytest.raises(DataError, match=r"cats/new\.png is in one of them only"):
        image_folder(folder, 4)


# The real files


@pytest.mark.skipif(
    not REAL, reason="needs the real files: set DDPM_DATA to the folder that holds mnist/ and fashion-mnist/"
)
@pytest.mark.parametrize(
    ("dataset", "split", "n", "mean", "std", "first"),
    [
        ("mnist", "train", 60_000, 0.1307, 0.3081, [5, 0, 4, 1, 9]),
        ("mnist", "test", 10_000, 0.1325, 0.3105, [7, 2, 1, 0, 4]),
        ("fashion-mnist", "train", 60_000, 0.2860, 0.3530, [9, 0, 0, 3, 0]),
        ("fashion-mnist", "test", 10_000, 0.2868, 0.3524, [9, 2, 1, 1, 6]),
    ],
)
def test_the_real_files_are_the_known_data(dataset, split, n, mean, std, first):
    """Their mean and deviation, as everybody normalises by them, and their first labels."""
    images, labels = load_images(dataset, split, root=REAL)
    assert images.shape == (n, 1, 28, 28)
    assert float(images.double().mean() / 255) == pytest.approx(mean, abs=1e-4)
    assert float(images.double().std() / 255) == pytest.approx(std, abs=1e-4)
    assert labels[:5].tolist() == first
    assert labels.unique().tolist() == list(range(10))
