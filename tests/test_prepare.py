import shutil

import numpy as np
import pytest

from tests.conftest import failure, random_picture
from utils import prepare
from utils.pairs import find_pairs
from utils.pictures import from_channels, read_picture, to_channels, write_picture, write_png

# Original distributions: rainy file -> its clean one.
DISTRIBUTIONS = {
    "Rain200L": {f"rain/X2/norain-{i}x2.png": f"norain/norain-{i}.png" for i in (1, 2, 11)},
    "Rain100H, as PReNet has it": {f"rain/norain-{i}x2.png": f"norain/norain-{i}.png" for i in (1, 2)},
    "DDN-Data": {f"rainy_image/{i}_{v}.jpg": f"ground_truth/{i}.jpg" for i in (901, 902) for v in range(1, 15)},
    "Rain100H, one folder": {f"rain-{i:03}.png": f"norain-{i:03}.png" for i in (1, 2, 100)},
    "Rain100L, two folders": {f"rainy/rain-{i:03}.png": f"norain-{i:03}.png" for i in (1, 2)},
    "SPA-Data, training": {
        f"real_world/{i}/{i}_rain_{v:03}.png": f"real_world_gt/{i}/{i}_gt.png" for i in (501, 502) for v in range(3)
    },
    "SPA-Data, test": {f"rain/{i:03}.png": f"gt/{i:03}gt.png" for i in range(3)},
    "Rain12": {f"{i:03}_in.png": f"{i:03}_GT.png" for i in (1, 2, 12)},
    "redistributed": {f"input/{i}.png": f"target/{i}.png" for i in (1, 2, 10)},
}


def make(root, files):
    """Writes every file as a picture of its own."""
    for number, name in enumerate(dict.fromkeys([*files, *files.values()])):
        write_png(root / name, np.full((18, 20, 3), number, np.uint8))


def run(*arguments):
    prepare.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_become_pairs_of_the_same_files(tmp_path, name):
    files = DISTRIBUTIONS[name]
    make(tmp_path / "source", files)
    expected = {tuple((tmp_path / "source" / name).read_bytes() for name in names) for names in files.items()}
    for options in ([], ["--copy"]):
        run(tmp_path / "source", tmp_path / "set", *options)
        pairs = find_pairs(tmp_path / "set")
        assert {(pair.input.read_bytes(), pair.target.read_bytes()) for pair in pairs} == expected
        assert len(pairs) == len(files) and len({pair.target for pair in pairs}) == len(set(files.values()))
        assert all(pair.input.is_symlink() == (not options) for pair in pairs)
        shutil.rmtree(tmp_path / "set")


@pytest.mark.parametrize("clean_half", ["left", "right"])
def test_halves_of_pictures_keep_grey_alpha_and_bits(tmp_path, clean_half):
    source = tmp_path / "source"
    pictures = {
        "Rain_Light/1.jpg": random_picture(20, 48),
        "alpha.png": random_picture(20, 48, channels=4),
        "grey.png": random_picture(20, 48, channels=1, dtype=np.uint16),
    }
    for name, pixels in pictures.items():
        write_picture(source / name, from_channels(pixels))
    run(source, tmp_path / "set", "--clean_half", clean_half)
    for pair, name in zip(find_pairs(tmp_path / "set"), pictures, strict=True):
        halves = [to_channels(read_picture(path)) for path in (pair[:2] if clean_half == "right" else pair[1::-1])]
        whole = to_channels(read_picture(source / name))
        assert np.array_equal(np.concatenate(halves, axis=1), whole) and halves[0].dtype == whole.dtype


def test_halves_that_cannot_be_split_are_named(tmp_path):
    source, image = tmp_path / "source", random_picture(20, 48)
    write_png(source / "1.png", image)
    write_png(source / "2.png", image[:, :41])
    (source / "3.png").write_bytes(b"broken")
    message = failure(run, source, tmp_path / "set", "--clean_half", "left")
    assert "2 pictures left out" in message and "2.png is 41 pixels wide" in message and "3.png cannot" in message
    assert len(find_pairs(tmp_path / "set")) == 1
    first = (tmp_path / "set" / "target" / "1.png").read_bytes()
    message = failure(run, source / "1.png", tmp_path / "set", "--clean_half", "right")
    assert "already exists and is not a half" in message
    assert (tmp_path / "set" / "target" / "1.png").read_bytes() == first


def test_a_list_of_pairs_is_followed(tmp_path):
    files = {"a/7.png": "b/x.png", "a/8.png": "b/x.png", "a/9.png": "b/y_gt.png"}
    make(tmp_path, files)
    (tmp_path / "list.txt").write_text("/a/7.png /b/x.png\na/8.png b/x.png\n\n./a/9.png ./b/y_gt.png\n")
    run(tmp_path / "list.txt", tmp_path / "set")
    pairs = [[path.resolve() for path in pair[:2]] for pair in find_pairs(tmp_path / "set")]
    assert pairs == [[tmp_path / rainy, tmp_path / clean] for rainy, clean in files.items()]
    for content in (b"a/7.png b/none.png", b"a/7.png", b"PK\x03\x04\xff\xfe"):
        (tmp_path / "list.txt").write_bytes(content)
        assert "list.txt, line 1: " in failure(run, tmp_path / "list.txt", tmp_path / "other")


@pytest.mark.parametrize("options, count", [([], 1), (["--copy"], 1), (["--clean_half", "left"], 2)])
def test_a_second_run_changes_nothing_even_within_the_source(tmp_path, options, count):
    make(tmp_path, {"1_in.png": "1_gt.png"})
    for _ in range(2):
        run(tmp_path, tmp_path / "test", *options)
        assert len(find_pairs(tmp_path / "test")) == count


def test_what_does_not_fit_is_named_and_what_is_there_is_never_replaced(tmp_path):
    source, existing = tmp_path / "source", tmp_path / "set" / "input" / "901_1.jpg"
    make(source, DISTRIBUTIONS["DDN-Data"])
    (source / "ground_truth" / "902.jpg").unlink()
    assert "14 pictures left out" in failure(run, source, tmp_path / "set")
    assert len(find_pairs(tmp_path / "set")) == 14
    existing.unlink()
    existing.write_bytes(b"as it was")
    for options in ([], ["--copy"]):
        assert "already exists" in failure(run, source, tmp_path / "set", *options)
    assert existing.read_bytes() == b"as it was"
    (source / "rainy_image" / "901_1.jpg").unlink()
    (source / "rainy_image" / "901_1.jpg").symlink_to("nowhere")
    existing.unlink()
    assert "901_1.jpg cannot be used (No such file" in failure(run, source, tmp_path / "set", "--copy")
    shutil.rmtree(source / "ground_truth")
    assert "matches none of the layouts" in failure(run, source, tmp_path / "other")
    make(tmp_path / "both", {f"{part}/input/1.png": f"{part}/target/1.png" for part in ("train", "test")})
    assert "have the same name" in failure(run, tmp_path / "both", tmp_path / "other")
    assert not (tmp_path / "other").exists()
