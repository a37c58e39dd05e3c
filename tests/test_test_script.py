import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import test as script
from evaluations.metrics import psnr_ssim
from tests.conftest import make_pairs
from utils.checkpoint import load_network
from utils.images import read_image, write_png
from utils.inference import Derainer

ROOT = Path(__file__).parent.parent
ENDED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import test as script

def write_picture(path, picture, quality):
    rank = os.environ.get("RANK")
    if rank in (None, "1") and any(path.parent.glob("*.png")):
        os.kill(os.getpid(), signal.SIGKILL if rank else signal.SIGTERM)
    time.sleep(1)
    write(path, picture, quality)

write, script.write_picture = script.write_picture, write_picture
script.main()
"""


@pytest.fixture
def photos(tmp_path):
    """A folder tree of three pictures."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "sub/c.bmp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path, narrow_weights, monkeypatch):
    """Runs test.py on a source with a narrow network -> the names it wrote below out/."""

    def run_script(source, *options):
        out = tmp_path / "out"
        common = ["--weights", str(narrow_weights), "--output_dir", str(out), "--win_size", "32"]
        script.main(["--input_dir", *np.atleast_1d(source).astype(str), *common, *options])
        return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())

    return run_script


def failure(run, *args):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    return str(caught.value.code)


def test_a_tree_is_derained_under_its_names(run, photos, narrow_weights, tmp_path, capsys):
    assert run(photos) == ["a.png", "b.png", "sub/c.png"]
    net = load_network(narrow_weights)
    expected = Derainer(net, window=32)(read_image(photos / "b.jpg"))
    difference = np.abs(read_image(tmp_path / "out" / "b.png").astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert "a network of width 8" in capsys.readouterr().out


def test_files_and_patterns_are_derained(run, photos):
    assert run(photos / "b.jpg") == ["b.png"]
    assert run([photos / "a.png", photos / "a.png", photos / "sub" / "c.bmp"]) == ["a.png", "b.png", "c.png"]
    assert run(f"{photos}/*/*.bmp")[-1] == "sub/c.png"


@pytest.mark.parametrize("source, expected", [("x/Rain200L/test/input", "Rain200L"), ("x/album", "album")])
def test_results_go_to_a_folder_named_after_the_input(tmp_path, monkeypatch, source, expected):
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / source / "a.png", np.zeros((16, 16, 3), np.uint8))
    assert script.default_output_dir(source) == Path("results", expected)
    assert script.default_output_dir(f"{source}/*.png") == Path("results", expected)
    assert script.default_output_dir(f"{source}/a.png") == Path("results")
    monkeypatch.setattr(script, "find_pictures", lambda source: ([], Path(source)))
    assert script.default_output_dir("/input") == Path("results")


def test_psnr_and_ssim_are_printed_written_and_shown(run, tmp_path, capsys):
    pairs = make_pairs(tmp_path / "pairs", count=2)
    panel = tmp_path / "panel.png"
    names = run(pairs / "input", "--target_dir", str(pairs / "target"), "--panel", str(panel))
    assert names == ["0.png", "1.png", "psnr_ssim.csv"]
    printed = capsys.readouterr().out
    with open(tmp_path / "out" / "psnr_ssim.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == ["0.png", "1.png"]
    for row in rows:
        clean = read_image(pairs / "target" / row["picture"])
        for column, folder in (("rainy", pairs / "input"), ("derained", tmp_path / "out")):
            expected = psnr_ssim(read_image(folder / row["picture"]), clean, "rain200")
            assert (float(row[f"psnr_{column}"]), float(row[f"ssim_{column}"])) == pytest.approx(expected)
            assert f"{expected[0]:.2f}" in printed
    mean = np.mean([float(row["psnr_derained"]) for row in rows])
    assert f"{mean:.2f}" in printed and "2 pictures" in printed and "rain200" in printed
    sheet = read_image(panel)
    assert sheet.shape[1] > 3 * 48 and sheet.shape[0] > 2 * 40


def test_the_wrong_clean_pictures_are_noticed_before_the_work(run, tmp_path, photos):
    clean = make_pairs(tmp_path / "pairs", count=2) / "target"
    message = failure(run, photos, "--target_dir", str(clean))
    assert f"none of the pictures has a clean one in {clean}" in message and "a.png has no clean picture" in message
    assert not (tmp_path / "out").exists()


def test_two_named_files_are_a_pair(run, tmp_path, photos):
    clean = tmp_path / "anything.png"
    write_png(clean, read_image(photos / "a.png"))
    assert run(photos / "a.png", "--target_dir", str(clean)) == ["a.png", "psnr_ssim.csv"]


def test_one_bad_picture_does_not_lose_the_others(run, photos, tmp_path):
    (photos / "a.png").write_bytes(b"broken")
    (photos / "z.png").symlink_to("nowhere")
    message = failure(run, photos)
    assert "all is done but for 2 files" in message and f"{photos / 'a.png'} cannot be read" in message
    assert f"{photos / 'z.png'} does not exist" in message
    assert {path.name for path in (tmp_path / "out").rglob("*.png")} == {"b.png", "c.png"}


def test_a_name_that_cannot_be_written_does_not_lose_the_others(run, photos, tmp_path):
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    assert "a.png cannot be written" in failure(run, photos)
    assert (tmp_path / "out" / "b.png").exists() and (tmp_path / "out" / "sub" / "c.png").exists()


def test_pairs_that_do_not_fit_are_listed_and_the_others_measured(run, tmp_path, capsys):
    pairs = make_pairs(tmp_path / "pairs", count=3)
    write_png(pairs / "target" / "0.png", np.zeros((20, 20, 3), np.uint8))
    (pairs / "target" / "1.png").unlink()
    message = failure(run, pairs / "input", "--target_dir", str(pairs / "target"))
    assert "0.png are not of one size" in message and "input/1.png has no clean picture" in message
    assert "1 picture; Y channel" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"0.png", "1.png", "2.png"}


def test_results_never_overwrite_what_was_given_or_each_other(run, photos, tmp_path, narrow_weights):
    write_png(photos / "b.png", np.zeros((20, 20, 3), np.uint8))
    assert "b.png: rename one of them" in failure(run, photos)
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    for options in (["--output_dir", str(photos)], ["--output_dir", str(photos), "--target_dir", str(photos)]):
        for source in (f"{photos}/*", photos / "a.png"):
            assert "would overwrite" in failure(run, source, *options)
    write_png(tmp_path / "clean" / "c.png", np.zeros((40, 56, 3), np.uint8))
    clean = (tmp_path / "clean" / "c.png").read_bytes()
    options = ["--target_dir", str(tmp_path / "clean"), "--output_dir", str(tmp_path / "clean")]
    assert "would overwrite" in failure(run, photos / "sub", *options)
    assert (tmp_path / "clean" / "c.png").read_bytes() == clean
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (300, 1), (17, 33)])
def test_pictures_of_any_size(run, tmp_path, size):
    write_png(tmp_path / "tiny.png", np.full((*size, 3), 77, np.uint8))
    assert run(tmp_path / "tiny.png") == ["tiny.png"]
    assert read_image(tmp_path / "out" / "tiny.png").shape == (*size, 3)


@pytest.mark.parametrize("mode, kept", [("L", "L"), ("LA", "LA"), ("RGBA", "RGBA"), ("P", "RGB"), ("CMYK", "RGB")])
def test_grey_and_alpha_are_kept_and_conversions_are_mentioned(run, tmp_path, mode, kept, caplog):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24), dtype=np.uint8))
    image.convert(mode).save(tmp_path / "odd.tif")
    with caplog.at_level("INFO"):
        run(tmp_path / "odd.tif")
    assert ("odd.tif: its mode" in caplog.text) == (mode in ("P", "CMYK"))
    with Image.open(tmp_path / "out" / "odd.png") as result:
        assert result.mode == kept and result.size == (24, 24)


def test_the_format_is_kept_on_request(run, photos, tmp_path):
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(photos / "d.gif")
    names = run(photos, "--keep_format")
    assert names == ["a.png", "b.jpg", "d.png", "sub/c.bmp"]
    best = (tmp_path / "out" / "b.jpg").stat().st_size
    run(photos, "--keep_format", "--quality", "20")
    assert (tmp_path / "out" / "b.jpg").stat().st_size < 0.6 * best
    assert failure(run, photos, "--quality", "0") == "2"


@pytest.mark.parametrize("victim", ["pairs/input/0.png", "pairs/target/0.png", "out/0.png"])
def test_a_panel_overwrites_neither_picture_nor_result(run, tmp_path, victim):
    pairs = make_pairs(tmp_path / "pairs", count=1)
    options = ("--target_dir", str(pairs / "target"), "--panel", str(tmp_path / victim))
    assert f"--panel would overwrite {tmp_path / victim}" in failure(run, pairs / "input", *options)


def test_a_folder_is_no_result_that_is_there(run, photos, tmp_path):
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    assert "a.png" in failure(run, photos, "--skip_existing")


def test_existing_results_are_kept_on_request_and_measured(run, tmp_path):
    pairs = make_pairs(tmp_path / "pairs", count=3)
    write_png(tmp_path / "out" / "1.png", read_image(pairs / "target" / "1.png"))
    run(pairs / "input", "--skip_existing", "--target_dir", str(pairs / "target"))
    with open(tmp_path / "out" / "psnr_ssim.csv", newline="") as file:
        psnr = {row["picture"]: float(row["psnr_derained"]) for row in csv.DictReader(file)}
    assert psnr["1.png"] == float("inf") and psnr["0.png"] < 60 and psnr["2.png"] < 60
    run(pairs / "input")
    assert not np.array_equal(read_image(tmp_path / "out" / "1.png"), read_image(pairs / "target" / "1.png"))


def test_a_result_that_became_png_is_found_again_and_shares_its_name_with_no_other(run, tmp_path, caplog):
    Image.new("RGBA", (20, 24)).save(tmp_path / "in.png")
    for name in ("a.jpg", "b.jpg"):  # with alpha, which JPEG does not hold
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes((tmp_path / "in.png").read_bytes())
    assert run(tmp_path / "in", "--keep_format") == ["a.jpg.png", "b.jpg.png"]
    caplog.clear()
    run(tmp_path / "in", "--keep_format", "--skip_existing", "--target_dir", str(tmp_path / "in"))
    assert not caplog.records
    write_png(tmp_path / "in" / "a.jpg.png", np.full((30, 40, 3), 99, np.uint8))
    for options in ((), ("--skip_existing",)):
        message = failure(run, tmp_path / "in", "--keep_format", *options)
        assert "a.jpg.png and" in message and "a.jpg could both become" in message and "1 file:" in message
        assert read_image(tmp_path / "out" / "a.jpg.png").shape == (24, 20, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_names_that_are_not_unicode_are_measured_and_printed(tmp_path, narrow_weights):
    name = os.fsdecode("雨.png".encode("shift-jis"))  # from a zip file
    write_png(tmp_path / "in" / name, np.zeros((20, 24, 3), np.uint8))
    options = ["--input_dir", tmp_path / "in", "--target_dir", tmp_path / "in", "--output_dir", tmp_path / "out"]
    run = subprocess.run(
        [sys.executable, "test.py", *options, "--weights", narrow_weights],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert run.returncode == 0, run.stderr
    assert "\\udc89J.png" in run.stdout
    assert os.fsencode(name) in (tmp_path / "out" / "psnr_ssim.csv").read_bytes()


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]])
def test_sigterm_and_lost_processes_end_with_a_sentence_and_leave_nothing_half(tmp_path, narrow_weights, launcher):
    script = tmp_path / "ended.py"
    script.write_text(ENDED.format(root=str(ROOT)))
    make_pairs(tmp_path, count=6)
    options = ["--input_dir", tmp_path / "input", "--output_dir", tmp_path / "out", "--weights", narrow_weights]
    command = [sys.executable, *launcher, script, *options, "--gpus", "cpu", "--win_size", "32"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == (1 if launcher else 143)  # torchrun's own
    assert "stopped: what was finished is kept. With --skip_existing" in run.stderr
    results = list((tmp_path / "out").iterdir())
    assert 1 <= len(results) < 6 and all(path.suffix == ".png" for path in results)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_pictures_are_shared_out_by_size_and_each_once(tmp_path, world):
    paths = [tmp_path / f"{i}" for i in range(40)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes((i * 37) % 500))
    outputs = {path: path.with_suffix(".png") for path in [*paths, tmp_path / "missing"]}
    shares = [script.share(outputs, rank, world) for rank in range(world)]
    assert sorted(path for part in shares for path in part) == sorted(outputs)
    loads = [sum(path.stat().st_size for path in part if path.exists()) for part in shares]
    assert max(loads) - min(loads) <= 500


def test_two_processes_do_what_one_does_and_a_rerun_finishes_the_rest(tmp_path, narrow_weights):
    pairs = make_pairs(tmp_path / "pairs", count=5)
    (pairs / "input" / "3.png").write_bytes(b"broken")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--input_dir", pairs / "input", "--weights", narrow_weights, "--target_dir", pairs / "target"]
    options += ["--win_size", "32", "--gpus", "cpu", "--skip_existing", "--output_dir"]
    for launcher, out in (([sys.executable], "one"), (torchrun, "two"), (torchrun, "two")):
        run = subprocess.run([*launcher, "test.py", *options, tmp_path / out], cwd=ROOT, capture_output=True, text=True)
        said = run.stderr.partition("Traceback")[0]  # torchrun's comes after it
        assert run.returncode == 1 and "all is done but for 1 file" in said and "3.png cannot be read" in said
        assert "4 pictures; Y channel" in run.stdout
        results = {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
        if out == "one":
            expected = results
        assert results == expected
        (tmp_path / out / "2.png").unlink()  # as if a process had died before


def test_results_within_the_input_folder_are_no_inputs(photos, narrow_weights, capsys):
    options = ["--input_dir", str(photos), "--weights", str(narrow_weights), "--win_size", "32"]
    for _ in range(2):
        script.main([*options, "--output_dir", str(photos / "derained")])
        assert "3 pictures" in capsys.readouterr().out
    results = photos / "derained"
    assert {str(path.relative_to(results)) for path in results.rglob("*.*")} == {"a.png", "b.png", "sub/c.png"}


def test_an_output_folder_may_hold_the_input_folder(photos, narrow_weights):
    options = ["--weights", str(narrow_weights), "--output_dir"]
    script.main(["--input_dir", str(photos / "sub"), *options, str(photos)])
    script.main(["--input_dir", str(photos / "b.jpg"), *options, str(photos.parent)])
    assert (photos / "c.png").is_file() and (photos.parent / "b.png").is_file()


def test_a_folder_that_holds_results_only_is_named(photos, narrow_weights):
    options = ["--input_dir", str(photos), "--weights", str(narrow_weights), "--output_dir", str(photos / "sub")]
    for name in ("a.png", "b.jpg"):
        (photos / name).unlink()
    with pytest.raises(SystemExit, match="photos holds results of earlier runs only"):
        script.main(options)


def test_own_weights_are_not_for_turned_pictures(narrow_weights, monkeypatch, photos, capsys):
    options = ["--input_dir", str(photos / "a.png"), "--output_dir", str(photos / "out"), "--ensemble"]
    script.main([*options, "--weights", str(narrow_weights)])
    assert "does harm" not in capsys.readouterr().out
    monkeypatch.setattr(script, "OWN_WEIGHTS", narrow_weights)
    script.main(options)
    assert "--ensemble, which also turns pictures on their side, does harm" in capsys.readouterr().out


def test_an_output_folder_that_is_the_input_folder_is_refused_before_the_work(photos, narrow_weights):
    before = sorted(photos.rglob("*"))
    options = ["--input_dir", str(photos), "--weights", str(narrow_weights), "--output_dir", f"{photos}/sub/.."]
    for more in ([], ["--skip_existing"]):
        with pytest.raises(SystemExit) as caught:
            script.main([*options, *more])
        assert caught.value.code.startswith("error: ") and "is the input folder" in caught.value.code
        assert "choose another --output_dir" in caught.value.code and "\n" not in caught.value.code
    assert sorted(photos.rglob("*")) == before


def test_huge_pictures_go_band_by_band_beside_the_others(run, photos, tmp_path, monkeypatch):
    pytest.importorskip("pyvips", reason="pyvips is not installed: pip install -r requirements-extras.txt")
    write_png(photos / "huge.png", np.full((50, 60, 3), 99, np.uint8))
    monkeypatch.setattr("utils.huge.HUGE", 50 * 60 - 1)
    assert run(photos) == ["a.png", "b.png", "huge.png", "sub/c.png"]
    banded = read_image(tmp_path / "out" / "huge.png")
    monkeypatch.undo()
    run(photos)
    assert np.array_equal(banded, read_image(tmp_path / "out" / "huge.png"))


def test_wrong_sources_and_weights_are_named(run, photos, tmp_path, capsys):
    assert "nowhere does not exist" in failure(run, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty holds no pictures" in failure(run, tmp_path / "empty")
    assert "a.png cannot be read as a checkpoint" in failure(run, photos, "--weights", str(photos / "a.png"))
    assert failure(run, photos, "--win_size", "100") == "2"
    assert "--win_size must be a multiple of 16" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed(run, photos, tmp_path):
    assert "sees 0 GPUs here" in failure(run, photos, "--gpus", "0")
    assert not (tmp_path / "out").exists()
    assert run(photos / "a.png", "--gpus", "cpu") == ["a.png"]


def test_an_output_folder_that_cannot_be_made_is_named(photos, narrow_weights, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        script.main(
            ["--input_dir", str(photos), "--weights", str(narrow_weights), "--output_dir", str(tmp_path / "file" / "x")]
        )
    assert "cannot be written" in str(caught.value.code) and "choose another folder" in str(caught.value.code)


def test_an_output_folder_that_is_a_file_is_named_before_the_work(photos, narrow_weights, tmp_path):
    (tmp_path / "file").touch()
    options = ["--input_dir", str(photos), "--weights", str(narrow_weights), "--output_dir", str(tmp_path / "file")]
    with pytest.raises(SystemExit, match="file is a file: choose another --output_dir"):
        script.main(options)


def test_a_full_disk_leaves_no_half_picture(photos, narrow_weights, tmp_path):
    command = "import resource, test; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); test.main()"
    options = ["--input_dir", photos, "--weights", narrow_weights, "--output_dir", tmp_path / "out"]
    run = subprocess.run([sys.executable, "-c", command, *options], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "a.png cannot be written" in run.stderr and "Traceback" not in run.stderr
    assert not list((tmp_path / "out").iterdir())
