"""test.py as a whole: how long it takes to start, and how much of its time on a folder of pictures of 481×321 passes
outside the network, in reading, writing and waiting.

python -m benchmarks.pipeline             # 200 pictures on a GPU, 4 on a CPU
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from skimage import data

from benchmarks.common import parse_args, report
from tests.golden import golden_network
from utils.checkpoint import save_checkpoint
from utils.formats import write_picture
from utils.images import read_image, write_png
from utils.inference import Derainer

HEIGHT, WIDTH = 321, 481
ROOT = Path(__file__).parent.parent


def start_up(folder, weights, gpus, repeats):
    """-> median seconds of test.py on one picture of 16×16, from the command to its end."""
    write_png(folder / "dot.png", np.zeros((16, 16, 3), np.uint8))
    command = [sys.executable, "test.py", "--input_dir", folder / "dot.png", "--output_dir", folder / "out"]
    command += ["--weights", weights, *(["--gpus", gpus] if gpus else [])]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def shares(derainer, paths, repeats):
    """-> median seconds of deraining files, and of the network alone on the same pictures in memory."""
    pictures = [(path, read_image(path)) for path in paths]

    def finish(path, _, result):
        write_picture(path.with_name("out") / path.name, result)

    seconds = {"files": [], "network": []}
    for _ in range(repeats + 1):
        for name, run in (
            ("network", lambda: derainer.pictures(pictures)),
            ("files", lambda: derainer.files(paths, finish)),
        ):
            start = time.perf_counter()
            assert sum(1 for _ in run()) == len(paths)
            seconds[name].append(time.perf_counter() - start)
    return tuple(statistics.median(seconds[name][1:]) for name in ("files", "network"))  # the first warms up


def main():
    args = parse_args(__doc__, ("nerd_rain_s",), repeats=3)
    gpu = args.device.type == "cuda"
    count = 200 if gpu else 4
    photograph = data.astronaut()[:HEIGHT, :WIDTH]
    rows = []
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            folder, weights = Path(folder), Path(folder, "weights.pth")
            net = golden_network(name)
            save_checkpoint(weights, state_dict=net.state_dict())
            seconds = start_up(folder, weights, args.gpus, args.repeats)
            paths = [folder / f"{i}.png" for i in range(count)]
            for shift, path in enumerate(paths):
                write_png(path, np.roll(photograph, shift, axis=1))
            net = net.to(args.device)
            for options in ({}, {"bf16": True, "fused": True}) if gpu else ({}, {"bf16": True}):
                files, network = shares(Derainer(net, **options), paths, args.repeats)
                rows.append(
                    {
                        "network": name,
                        "options": " ".join(f"--{option}" for option in options),
                        "start-up in seconds": seconds,
                        "pictures per second": count / files,
                        "outside the network": f"{max(0, 1 - network / files):.1%}",
                    }
                )
    report("pipeline", rows, args.device, repeats=args.repeats, pictures=f"{count} PNG of {WIDTH}×{HEIGHT}")


if __name__ == "__main__":
    main()
