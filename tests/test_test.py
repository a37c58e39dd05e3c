"""test.py from end to end, also on what people feed to it without meaning to."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import test as script
from ablations import build
from evaluations.metrics import psnr_ssim
from tests.conftest import make_pairs
from utils.checkpoint import load_network, save_checkpoint
from utils.derain import Derainer
from utils.pictures import read_image, read_picture, write_png

ROOT = Path(__file__).parent.parent
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path):
    """A folder tree of three pictures."""
    for name in ("a.png", "b.jpg", "sub/c.bmp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(path)
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path, narrow_weights):
    """Runs test.py on sources with a narrow network -> the names of the pictures and tables in out/."""

    def run_script(source, *options):
        out = tmp_path / "out"
        common = ["--weights", str(narrow_weights), "--output_dir", str(out), "--win_size", "32"]
        script.main(["--input_dir", *map(str, np.atleast_1d(source)), *common, *map(str, options)])
        names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        return [name for name in names if name != "settings.json"]

    return run_script


def failure(run, *args):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    return str(caught.value.code)


def test_a_tree_is_derained_under_its_names(run, photos, narrow_weights, tmp_path, capsys):
    assert run(photos) == ["a.png", "b.png", "sub/c.png"]
    expected = Derainer(load_network(narrow_weights), "tile", 32)(read_image(photos / "b.jpg"))
    assert np.array_equal(read_image(tmp_path / "out" / "b.png"), expected)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "a network of width 8" in first and "cpu" in first and "--mode tile" in first
    assert last.startswith("3 pictures derained in ") and last.endswith(f"-> {tmp_path / 'out'}")


def test_files_and_patterns_are_derained(run, photos):
    assert run(photos / "b.jpg") == ["b.png"]
    assert run([photos / "a.png", photos / "a.png", photos / "sub" / "c.bmp"]) == ["a.png", "b.png", "c.png"]
    assert run(f"{photos}/*/*.bmp")[-1] == "sub/c.png"


def test_one_picture_may_name_its_result_file(photos, narrow_weights, tmp_path, capsys):
    options = ["--weights", str(narrow_weights), "--output_dir", str(tmp_path / "x" / "out.webp")]
    script.main(["--input_dir", str(photos / "a.png"), *options])
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["out.webp"]
    assert f"-> {tmp_path / 'x' / 'out.webp'}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"out\.webp is one picture's name, not a folder for 3 pictures"):
        script.main(["--input_dir", str(photos), *options])
    with pytest.raises(SystemExit, match=r"its result would overwrite .*a\.png"):
        script.main(["--input_dir", str(photos / "a.png"), *options[:3], str(photos / "a.png")])


@pytest.mark.parametrize("source, expected", [("x/Rain200L/test/input", "Rain200L"), ("x/album", "album")])
def test_results_go_to_a_folder_named_after_the_input(tmp_path, monkeypatch, source, expected):
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / source / "a.png", np.zeros((16, 16, 3), np.uint8))
    assert script.default_output_dir(source) == Path("results", expected)
    assert script.default_output_dir(f"{source}/*.png") == Path("results", expected)
    assert script.default_output_dir(f"{source}/a.png") == Path("results")
    monkeypatch.setattr(script, "find_pictures", lambda source: ([], Path(source)))
    assert script.default_output_dir("/input") == Path("results")


def test_test_sets_get_the_published_windows_and_photographs_tiles(run, tmp_path, capsys, narrow_weights):
    for folder, mode in (("Rain12/test", "window"), ("photos", "tile"), ("Rain12/mine", "tile")):
        pairs = make_pairs(tmp_path / folder, count=1)
        for source in (pairs, pairs / "input"):  # a data set's folder stands for the rainy pictures in it
            assert run(source) == ["0.png"]
            assert f"--mode {mode}" in capsys.readouterr().out
        expected = Derainer(load_network(narrow_weights), mode, 32)(read_image(pairs / "input" / "0.png"))
        assert np.array_equal(read_image(tmp_path / "out" / "0.png"), expected)
    run(pairs, "--target_dir", pairs)
    assert "--mode window" in capsys.readouterr().out
    run(tmp_path / "Rain12/test", "--mode", "whole")
    assert "--mode whole" in capsys.readouterr().out


def test_psnr_and_ssim_are_printed_written_and_shown(run, tmp_path, capsys):
    pairs, panel = make_pairs(tmp_path / "pairs", count=2), tmp_path / "panel.png"
    names = run(pairs / "input", "--target_dir", pairs / "target", "--panel", panel)
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
    assert f"{mean:.2f}" in printed and "2 pictures; Y channel, protocol rain200" in printed
    sheet = read_image(panel)
    assert sheet.shape[1] > 3 * 48 and sheet.shape[0] > 2 * 40


def test_a_set_is_measured_under_its_own_protocol(run, tmp_path, capsys):
    pairs = make_pairs(tmp_path / "DID-Data" / "test", count=1)
    rainy, clean = (read_image(pairs / name / "0.png") for name in ("input", "target"))
    for options, protocol in (((), "did"), (("--protocol", "rain200"), "rain200")):
        run(pairs, "--target_dir", pairs, *options)
        assert f"protocol {protocol}" in capsys.readouterr().out
        with open(tmp_path / "out" / "psnr_ssim.csv", newline="") as file:
            (row,) = csv.DictReader(file)
        assert (float(row["psnr_rainy"]), float(row["ssim_rainy"])) == pytest.approx(psnr_ssim(rainy, clean, protocol))


def test_the_wrong_clean_pictures_are_noticed_before_the_work(run, tmp_path, photos):
    clean = make_pairs(tmp_path / "pairs", count=2) / "target"
    message = failure(run, photos, "--target_dir", clean)
    assert f"none of the pictures has a clean one in {clean}" in message and "a.png has no clean picture" in message
    assert not (tmp_path / "out").exists()


def test_two_named_files_are_a_pair(run, tmp_path, photos):
    write_png(tmp_path / "anything.png", read_image(photos / "a.png"))
    assert run(photos / "a.png", "--target_dir", tmp_path / "anything.png") == ["a.png", "psnr_ssim.csv"]


def test_pairs_that_do_not_fit_are_listed_and_the_others_measured(run, tmp_path, capsys):
    pairs = make_pairs(tmp_path / "pairs", count=3)
    write_png(pairs / "target" / "0.png", np.zeros((20, 20, 3), np.uint8))
    (pairs / "target" / "1.png").unlink()
    message = failure(run, pairs / "input", "--target_dir", pairs / "target")
    assert "error: 2 of 3 files failed" in message
    assert f"{pairs / 'input' / '0.png'} (48×40)" in message and "input/1.png has no clean picture" in message
    printed = capsys.readouterr().out
    assert "1 picture; Y channel" in printed and "3 pictures derained" in printed
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"0.png", "1.png", "2.png"}


def test_broken_pictures_do_not_stop_the_others(run, photos, tmp_path, capsys):
    (photos / "a.png").write_bytes(b"broken")
    (photos / "z.png").symlink_to("nowhere")
    (tmp_path / "out" / "b.png").mkdir(parents=True)
    message = failure(run, photos)
    assert message.startswith("error: 3 of 4 files failed:") and f"{photos / 'a.png'} cannot be read" in message
    assert f"{photos / 'z.png'} does not exist" in message and "b.png cannot be written" in message
    assert "1 picture derained" in capsys.readouterr().out
    assert read_image(tmp_path / "out" / "sub" / "c.png").shape == PIXELS.shape
    assert "error: 1 of 1 files failed" in failure(run, photos / "a.png")


def test_results_overwrite_neither_what_was_given_nor_each_other(run, photos, tmp_path):
    write_png(photos / "b.png", np.zeros((20, 20, 3), np.uint8))
    assert "b.png: rename one of them" in failure(run, photos)
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    for options in (["--output_dir", photos], ["--output_dir", photos, "--target_dir", photos]):
        for source in (f"{photos}/*", photos / "a.png"):
            assert "would overwrite" in failure(run, source, *options)
    write_png(tmp_path / "clean" / "c.png", np.zeros((40, 56, 3), np.uint8))
    clean = (tmp_path / "clean" / "c.png").read_bytes()
    assert "would overwrite" in failure(
        run, photos / "sub", "--target_dir", tmp_path / "clean", "--output_dir", tmp_path / "clean"
    )
    assert (tmp_path / "clean" / "c.png").read_bytes() == clean
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("victim", ["pairs/input/0.png", "pairs/target/0.png", "out/0.png"])
def test_a_panel_overwrites_neither_picture_nor_result(run, tmp_path, victim):
    pairs = make_pairs(tmp_path / "pairs", count=1)
    options = ("--target_dir", pairs / "target", "--panel", tmp_path / victim)
    assert f"--panel would overwrite {tmp_path / victim}" in failure(run, pairs / "input", *options)


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (300, 17), (17, 33)])
def test_pictures_of_any_size(run, tmp_path, size):
    write_png(tmp_path / "tiny.png", np.full((*size, 3), 77, np.uint8))
    assert run(tmp_path / "tiny.png") == ["tiny.png"]
    assert read_image(tmp_path / "out" / "tiny.png").shape == (*size, 3)


@pytest.mark.parametrize("mode, kept", [("L", "L"), ("LA", "LA"), ("RGBA", "RGBA"), ("P", "RGB"), ("CMYK", "RGB")])
def test_grey_and_alpha_are_kept(run, tmp_path, mode, kept):
    Image.fromarray(PIXELS[:, :24, 0]).convert(mode).save(tmp_path / "odd.tif")
    run(tmp_path / "odd.tif")
    with Image.open(tmp_path / "out" / "odd.png") as result:
        assert result.mode == kept and result.size == (24, 40)


def test_sixteen_bits_are_kept(run, tmp_path):
    write_png(tmp_path / "deep.png", PIXELS.astype(np.uint16) * 257)
    run(tmp_path / "deep.png")
    result = read_picture(tmp_path / "out" / "deep.png").pixels
    assert result.dtype == np.uint16 and len(np.unique(result)) > 256


def test_the_format_is_kept_on_request(run, photos, tmp_path):
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(photos / "d.gif")
    assert run(photos, "--keep_format") == ["a.png", "b.jpg", "d.png", "sub/c.bmp"]
    best = (tmp_path / "out" / "b.jpg").stat().st_size
    run(photos, "--keep_format", "--quality", "20")
    assert (tmp_path / "out" / "b.jpg").stat().st_size < 0.6 * best
    assert failure(run, photos, "--quality", "0") == "2"


def test_existing_results_are_kept_if_made_with_the_same_weights_and_settings(run, photos, tmp_path, capsys):
    weights = tmp_path / "weights.pth"

    def remade(*options):
        (tmp_path / "out").mkdir(exist_ok=True)
        before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
        Image.new("RGB", (8, 8)).save(tmp_path / "out" / "b.png")  # newer than settings.json, so kept with its settings
        run(photos, "--skip_existing", "--weights", weights, *options)
        after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
        kept = read_image(tmp_path / "out" / "b.png").shape == (8, 8, 3)
        assert ("3 pictures kept" in capsys.readouterr().out) == kept
        assert kept <= (before.get(tmp_path / "out" / "a.png") == after[tmp_path / "out" / "a.png"])
        return not kept

    for seed in (1, 2):
        torch.manual_seed(seed)
        save_checkpoint(weights, state_dict=build(dim=8, num_blocks=(1, 1, 1)).state_dict())
        assert remade() and not remade()
    assert remade("--mode", "window") and not remade("--mode", "window")
    assert remade("--mode", "window", "--win_size", "48")
    assert remade("--bf16") and remade("--ensemble") and remade("--steady") and remade()
    (tmp_path / "out" / "sub" / "c.png").unlink()
    run(photos, "--skip_existing", "--weights", weights)
    assert "1 picture derained" in (printed := capsys.readouterr().out) and "2 pictures kept" in printed


def test_kept_results_are_measured(run, tmp_path):
    pairs = make_pairs(tmp_path / "pairs", count=3)
    options = ("--skip_existing", "--target_dir", pairs / "target")
    run(pairs / "input", *options)
    shutil.copy(pairs / "target" / "1.png", tmp_path / "out" / "1.png")
    (tmp_path / "out" / "2.png").unlink()
    run(pairs / "input", *options)
    with open(tmp_path / "out" / "psnr_ssim.csv", newline="") as file:
        psnr = {row["picture"]: float(row["psnr_derained"]) for row in csv.DictReader(file)}
    assert psnr["1.png"] == float("inf") and psnr["0.png"] < 60 and psnr["2.png"] < 60


def test_what_a_folder_holds_besides_pictures_is_mentioned(run, photos, capsys):
    for name in ("clip.mp4", "notes.txt", "raw.dng"):
        (photos / name).touch()
    (photos / "linked").symlink_to(photos / "sub")
    assert run(photos) == ["a.png", "b.png", "sub/c.png"]
    assert "\nskipped: 1 clip, 2 files of unknown kind, 1 linked folder\n" in capsys.readouterr().out


def test_clips_are_derained_by_name_and_pattern(run, photos, tmp_path, monkeypatch, capsys):
    class Clip:
        length = 3

        def __init__(self, path):
            if path.name == "c.mov":
                raise script.UserError(f"{path} cannot be read as a video.")

        __enter__ = __exit__ = lambda *_: None
        __enter__ = lambda self: self  # noqa: E731

    def derain_clip(path, output, derainer, steady, progress):
        progress(3)
        output.write_text(f"{path.name} {derainer.window} {steady}")

    monkeypatch.setattr(script, "Clip", Clip)
    monkeypatch.setattr(script, "derain_clip", derain_clip)
    for name in ("a.mp4", "b.webm", "c.mov"):
        (photos / name).touch()
    message = failure(run, [photos / "a.mp4", f"{photos}/*"], "--steady")
    assert "1 of 5 files failed" in message and "c.mov cannot be read as a video" in message
    assert "2 pictures and 2 clips derained" in capsys.readouterr().out
    assert (tmp_path / "out" / "b.webm.mp4").read_text() == "b.webm 32 True"
    run([photos / "a.mp4", photos / "b.webm"], "--steady", "--skip_existing")
    assert "nothing derained" in (printed := capsys.readouterr().out) and "2 clips kept" in printed
    run(photos / "a.mp4", "--skip_existing")
    assert "1 clip derained" in capsys.readouterr().out
    assert (tmp_path / "out" / "a.mp4").read_text() == "a.mp4 32 False"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_a_hint_and_leave_nothing_half_written(run, tmp_path, monkeypatch, capsys, number):
    pairs, write = make_pairs(tmp_path / "pairs", count=8), script.pictures.write_picture

    def interrupted(path, picture, quality):
        write(path, picture, quality)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(script.pictures, "write_picture", interrupted)
    assert failure(run, pairs / "input") == str(128 + number)
    assert "stopped: what was finished is kept. With --skip_existing" in capsys.readouterr().err
    results = sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != "settings.json")
    assert 1 <= len(results) < 8 and all(name.endswith(".png") for name in results)
    monkeypatch.setattr(script.pictures, "write_picture", write)
    assert len(run(pairs / "input", "--skip_existing")) == 8
    assert f"{len(results)} picture" in capsys.readouterr().out


def test_several_processes_share_the_pictures(run, photos, tmp_path, monkeypatch, capsys):
    (photos / "a.png").write_bytes(b"broken")
    write_png(photos / "d.png", PIXELS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, written in ((1, ["b.png", "sub/c.png"]), (0, ["b.png", "d.png", "sub/c.png"])):
        monkeypatch.setenv("RANK", str(rank))
        if rank == 0:
            assert "1 of 2 files failed" in failure(run, photos)
        else:
            assert run(photos) == written
    assert run(tmp_path / "photos" / "d.png") == written
    printed = capsys.readouterr().out
    assert printed.count("--mode tile") == 2 and "2 pictures derained" in printed
    message = failure(run, photos, "--target_dir", photos)
    assert "--target_dir" in message and "python -m evaluations.evaluate" in message


def test_under_torchrun_a_broken_picture_does_not_end_the_other_processes(tmp_path, narrow_weights):
    pairs = make_pairs(tmp_path / "pairs", count=8)
    (pairs / "input" / "0.png").write_bytes(b"broken")
    for i in (2, 4, 6):  # the first process has nothing else to do
        (pairs / "input" / f"{i}.png").unlink()
        (pairs / "input" / f"{i}.png").symlink_to("nowhere")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "test.py"]
    options = ["--input_dir", pairs / "input", "--weights", narrow_weights, "--output_dir", tmp_path / "out"]
    result = subprocess.run([*torchrun, *options], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "4 of 4 files failed" in result.stderr and "stopped" not in result.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"1.png", "3.png", "5.png", "7.png"}
    assert "4 pictures derained" in result.stdout


def test_results_within_the_input_folder_are_no_inputs(photos, narrow_weights, capsys):
    options = ["--input_dir", str(photos), "--weights", str(narrow_weights), "--win_size", "32"]
    for _ in range(2):
        script.main([*options, "--output_dir", str(photos / "derained")])
        assert "3 pictures derained" in (printed := capsys.readouterr().out) and "skipped" not in printed
    results = photos / "derained"
    assert {str(path.relative_to(results)) for path in results.rglob("*.png")} == {"a.png", "b.png", "sub/c.png"}
    for name in ("a.png", "b.jpg", "sub/c.bmp"):
        (photos / name).unlink()
    with pytest.raises(SystemExit, match="photos holds only results of earlier runs"):
        script.main([*options, "--output_dir", str(photos / "derained")])


def test_an_output_folder_may_hold_the_input_folder(photos, narrow_weights):
    options = ["--weights", str(narrow_weights), "--output_dir"]
    script.main(["--input_dir", str(photos / "sub"), *options, str(photos)])
    script.main(["--input_dir", str(photos / "b.jpg"), *options, str(photos.parent)])
    assert (photos / "c.png").is_file() and (photos.parent / "b.png").is_file()


def test_our_own_weights_and_the_ensemble(run, photos, narrow_weights, monkeypatch, capsys):
    run(photos / "a.png", "--ensemble")
    assert script.ENSEMBLE_NOTE not in capsys.readouterr().out
    monkeypatch.setattr(script, "OWN_WEIGHTS", narrow_weights)
    run(photos / "a.png", "--ensemble")
    assert script.ENSEMBLE_NOTE in capsys.readouterr().out


def test_warnings_about_the_cpu_are_printed(run, photos, monkeypatch, capsys):
    monkeypatch.setattr(script, "cpu_warnings", lambda: ["WARNING: one", "note: two"])
    run(photos)
    assert capsys.readouterr().out.count("\nWARNING: one\nnote: two\n") == 1


def test_wrong_sources_outputs_weights_and_devices_are_named(run, photos, tmp_path, capsys):
    assert "nowhere does not exist" in failure(run, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty holds no pictures" in failure(run, tmp_path / "empty")
    assert "a.png cannot be read as a checkpoint" in failure(run, photos, "--weights", photos / "a.png")
    assert "sees 0 GPUs here" in failure(run, photos, "--gpus", "0")
    assert failure(run, photos, "--win_size", "100") == failure(run, photos, "--panel", "a.png") == "2"
    assert failure(run, photos, "--compile", "--mode", "whole") == "2"
    printed = capsys.readouterr().err
    assert "--win_size must be a multiple of 16" in printed and "give their folder with --target_dir" in printed
    for options in ((), ("--skip_existing",)):
        assert "is the input folder: choose another" in failure(
            run, photos, "--output_dir", photos / "sub/..", *options
        )
    (tmp_path / "file").touch()
    assert "file is a file: choose another --output_dir" in failure(run, photos, "--output_dir", tmp_path / "file")
    message = failure(run, photos, "--output_dir", tmp_path / "file" / "x")
    assert "cannot be written" in message and "choose another folder" in message
    assert not (tmp_path / "out").exists() and len(list(photos.rglob("*"))) == 4


def test_a_full_disk_stops_at_once_and_leaves_no_half_picture(photos, narrow_weights, tmp_path):
    command = "import resource, test; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); test.main()"
    options = ["--input_dir", photos, "--weights", narrow_weights, "--output_dir", tmp_path / "out"]
    result = subprocess.run([sys.executable, "-c", command, *options], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "a.png cannot be written" in result.stderr and "files failed" not in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_the_script_itself_prints_its_own_sentences_only(tmp_path, narrow_weights):
    """With a name that is not Unicode, as from a zip file, and a file about which the decoders have things to say."""
    name = os.fsdecode("雨.png".encode("shift-jis"))
    write_png(tmp_path / "in" / name, PIXELS)
    tifffile.imwrite(
        tmp_path / "in" / "broken.tif", np.random.default_rng(0).integers(0, 65535, (64, 64, 3), np.uint16)
    )
    os.truncate(tmp_path / "in" / "broken.tif", 9000)
    shutil.copy(tmp_path / "in" / name, tmp_path / "in" / "broken.png")
    options = ["--input_dir", tmp_path / "in", "--target_dir", tmp_path / "in", "--output_dir", tmp_path / "out"]
    result = subprocess.run(
        [sys.executable, "test.py", *options, "--weights", narrow_weights, "--gpus", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert result.returncode == 1
    assert "\\udc89J.png" in result.stdout
    assert os.fsencode(name) in (tmp_path / "out" / "psnr_ssim.csv").read_bytes()
    said = [line.strip() for line in result.stderr.splitlines() if line and "%|" not in line]
    assert said[0].startswith("error: ") and "of 3 files failed" in said[0] and "Traceback" not in result.stderr
    assert all("broken" in line and "libtiff" not in line for line in said[1:]), result.stderr


def encoded(kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind)
    return buffer.getvalue()


OUTCOMES = {  # what it is: (its name, how it is made, what becomes of it: a sentence, DERAINED or IGNORED)
    "zero bytes": ("a.png", lambda path: path.touch(), "cannot be read as a picture"),
    "text": ("a.jpg", lambda path: path.write_text("hello"), "cannot be read as a picture"),
    "half a download": ("a.png", lambda path: path.write_bytes(encoded()[:600]), "cannot be read as a picture"),
    "wrong ending": ("a.jpg", lambda path: path.write_bytes(encoded("PNG")), "DERAINED"),
    "rubbish behind the picture": ("a.png", lambda path: path.write_bytes(encoded() + bytes(999)), "DERAINED"),
    "upper-case ending": ("A.PNG", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "unknown ending": ("a.doc", lambda path: path.write_bytes(encoded()), "IGNORED"),
    "hidden file": (".a.png", lambda path: path.write_bytes(encoded()), "IGNORED"),
    "link to nowhere": ("a.png", lambda path: path.symlink_to("nowhere.png"), "does not exist"),
    "link to itself": ("a.png", lambda path: path.symlink_to("a.png"), "cannot be read as a picture"),
    "folder that links to itself": ("sub", lambda path: path.symlink_to("."), "IGNORED"),
    "folder named like a picture": ("a.png", lambda path: path.mkdir(), "IGNORED"),
    "pipe": ("a.png", os.mkfifo, "IGNORED"),
    "newline in the name": ("a\nb.png", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "leading dash": ("-rf.png", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "other scripts": ("雨 ☔ é.png", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "brackets and stars": ("a[1]*?.png", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "longest name": ("x" * 251 + ".png", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "dots": ("a.b.c..png", lambda path: path.write_bytes(encoded()), "DERAINED"),
}


@pytest.mark.parametrize("situation", OUTCOMES)
def test_odd_files_beside_a_good_one(run, tmp_path, situation):
    name, make, outcome = OUTCOMES[situation]
    write_png(tmp_path / "in" / "good.png", PIXELS)
    make(tmp_path / "in" / name)
    if outcome in ("DERAINED", "IGNORED"):
        expected = {"good.png", str(Path(name).with_suffix(".png"))} if outcome == "DERAINED" else {"good.png"}
        assert set(run(tmp_path / "in")) == expected
        return
    message = failure(run, tmp_path / "in")
    assert name in message and outcome in message and "1 of 2 files failed" in message
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"good.png", "settings.json"}


def test_results_that_a_kept_format_cannot_hold_are_named(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encoded("PNG", "RGBA"))
    assert "holds no alpha" in failure(run, tmp_path / "in", "--keep_format")
    assert run(tmp_path / "in") == ["a.png"]
