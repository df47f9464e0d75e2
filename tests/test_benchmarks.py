"""The scripts under benchmarks/ run from end to end on a handful of images, and score what they say they score."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
TEACHER = "random:vit_tiny_patch16_224?img_size=64&patch_size=8&depth=2&embed_dim=48&num_heads=3"
LINES = {"amd": 4, "hybrid": 6, "sdssl": 9, "tinymim": 7, "video": 3}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/CLASS/FILE and test/CLASS/FILE: 160 and 16 images of four classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 4)):
        for label in "abcd":
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(root / split / label / f"{label}{number}.png")
    return root


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of videos."""
    av = pytest.importorskip("av")
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 2)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                with av.open(str(root / split / label / f"{label}{number}.mp4"), "w") as container:
                    stream = container.add_stream("libx264", rate=12)
                    stream.width = stream.height = 64
                    stream.pix_fmt = "yuv420p"
                    for _ in range(20):
                        frame = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                    container.mux(stream.encode())
    return root


@pytest.fixture
def claims() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    import claims

    yield claims
    sys.path.remove(str(SCRIPTS))


def call(script: str, *arguments: object) -> str:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(LINES))
def test_every_claim_ends_in_a_table(method: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = images
    data = [f"--train={root / 'train'}", f"--test={root / 'test'}", f"--probe-labels={root}", f"--teacher={TEACHER}"]
    if method == "video":
        root = request.getfixturevalue("videos")
        data = [f"--train=video:{root / 'train'}", f"--test=video:{root / 'test'}"]
    short = ["--seeds=1", "--epochs=1", "--teacher-epochs=1", "--num-views=1", f"--out={tmp_path}"]
    printed = call("claims.py", method, *data, *short)
    result = json.loads((tmp_path / f"{method}.json").read_text())
    assert len(result["scores"]) == LINES[method]
    first = printed.splitlines()[: LINES[method] + 2]
    assert first[0] == "| student | k-NN | linear probe |"
    assert [line.split(" | ")[0].strip("| ") for line in first[2:]] == list(result["scores"])


def test_what_is_scored_is_the_network_that_the_method_evaluates(claims: Any, tmp_path: Path) -> None:
    """BYOL and MoCo v3 are judged by their momentum copy."""
    scored: list[tuple[str, str]] = []

    class Bench(claims.Bench):  # type: ignore[misc]  # a script without types
        def __init__(self) -> None:
            self.settings = type("Settings", (), {"seeds": 2, "epochs": 3, "method": "sdssl"})()
            self.out, self.scorer = tmp_path, type("Scorer", (), {"score": lambda _, *of: scored.append(of)})()

        def train(self, folder: str, recipe: str, *_: Any) -> dict[str, Any]:
            out = str(tmp_path / folder)
            return {"out": out} | ({"preferred": f"{out}/ema"} if "byol" in recipe else {})

    variants = [claims.Variant(name, f"sdssl-{name}-tiny", pool="cls") for name in ("byol", "simclr")]
    Bench().compare(variants, {})
    assert scored == [
        (f"{tmp_path}/sdssl-{name}", "cls") for name in ("byol-0/ema", "simclr-0", "byol-1/ema", "simclr-1")
    ]


def test_a_table_names_the_best_layer_and_the_spread(claims: Any) -> None:
    runs = [{"k-NN": {"a": 10.0 + seed, "b": 30.0 - seed}, "linear probe": {"a": 5.0, "b": 5.0}} for seed in (0, 2, 4)]
    lines = claims.table({"one": runs}).splitlines()
    assert lines[2] == "| one | 28.00 ± 2.00 % (b) | 5.00 ± 0.00 % (a) |"
    assert claims.layer_tables({"one": runs}).splitlines()[:3] == [
        "| k-NN | a | b |", "|---|---|---|", "| one | 12.00 ± 2.00 | 28.00 ± 2.00 |"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("study", "lines"), [("fidelity", 11), ("views", 6)])
def test_every_study_ends_in_tables(
    study: str, lines: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = TEACHER.replace("depth=2", "depth=12")
    data = [f"--train={images / 'train'}", f"--test={images / 'test'}", f"--probe-labels={images}", f"--teacher={deep}"]
    printed = call("studies.py", study, *data, "--seeds=1", "--epochs=1", "--num-views=1", f"--out={tmp_path}")
    result = json.loads((tmp_path / f"{study}.json").read_text())
    assert len(result["scores"]) == lines
    costs = {
        "fidelity": ["| store | bytes a row |", "| student | seconds a run |"],
        "views": ["| | bytes of targets | seconds to extract |"],
    }
    for head in (*costs[study], "| student | k-NN | linear probe |"):
        assert head in printed


@pytest.mark.slow
def test_sizes_are_of_every_encoding_and_layout(images: Path, tmp_path: Path) -> None:
    taps = ["--tap=block2.attn_in", "--tap=final"]
    few = ["--calibration=40", "--images=24", "--precision=fp32", f"--out={tmp_path}"]
    printed = call("size.py", f"--train={images / 'train'}", f"--teacher=a={TEACHER}", *taps, *few)
    found = json.loads((tmp_path / "size.json").read_text())["lines"]
    assert len(found) == 2 * (4 + 9) == len(printed.splitlines()) - 2
    for line in found:
        if line["encoding"].startswith("klt"):
            asked = float(line["encoding"].split()[1]) / 100
            assert line["relative_rmse"] == pytest.approx(asked, rel=0.3)
        if line["encoding"] == "fp16":
            assert line["bytes_per_row"] == pytest.approx(2 * 65 * 48, rel=0.1)
            assert line["relative_rmse"] < 1e-3


@pytest.mark.slow
def test_extraction_is_measured_beside_the_bare_forward(images: Path, tmp_path: Path) -> None:
    few = [
        "--rows=64",
        "--rows-per-shard=16",
        "--bare-rows=32",
        "--shards=3",
        "--repeats=1",
        "--batch=8",
        "--device=cpu",
    ]
    printed = call("extract.py", f"--train={images / 'train'}", f"--teacher=t={TEACHER}", *few, f"--out={tmp_path}")
    lines = json.loads((tmp_path / "extract.json").read_text())["lines"]
    assert len(lines) == 8
    assert sum(line.startswith("| ") and " + " in line for line in printed.splitlines()) == 3 * 5
    for line in lines:
        assert line["ratio"] == line["steady"] / line["bare"]
        assert set(line["alone"]) == {"decode", "forward", "copy to the host", "encode", "compress", "write, fsync"}
        assert all(seconds > 0 for stage, seconds in line["alone"].items() if stage != "copy to the host")
    half = next(line for line in lines if line["variant"] == "final, fp16")
    assert half["bytes"] == pytest.approx(2 * 65 * 48, rel=0.1)


@pytest.mark.slow
def test_memory_prints_one_line_for_each_kind_of_run(images: Path, tmp_path: Path) -> None:
    student = '{"img_size":64,"patch_size":8,"embed_dim":48,"depth":3,"num_heads":3}'
    printed = call(
        "memory.py", f"--train={images / 'train'}", f"--relation-teacher=a={TEACHER}", f"--feature-teacher=b={TEACHER}",
        f"--out={tmp_path / 'out'}", f"--student={student}", "--relation-tap=block2.attn_in", "--repeats=1",
    )  # fmt: skip
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == ["| store", "| online", "| alone"]
    found = json.loads((tmp_path / "out" / "memory.json").read_text())["best"]
    assert all(kind["rss"] > 10**8 for kind in found.values())


@pytest.mark.slow
def test_students_are_timed_together_and_apart(tmp_path: Path) -> None:
    printed = call("students.py", "--quick", "--images=64", "--batch-size=16", f"--out={tmp_path}")
    found = json.loads((tmp_path / "students.json").read_text())["lines"]
    assert [(line["source"], line["students"]) for line in found] == [
        (s, n) for s in ("store", "online") for n in (1, 2, 4)
    ]
    for line in found:
        assert line["samples"] == 64
        for kind in ("together", "apart"):
            assert line[kind] == pytest.approx(64 * line["students"] / line["runs"][kind][0]["seconds"])
    assert len(printed.splitlines()) == 2 + len(found)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_decoders_and_reading_are_compared(tmp_path: Path) -> None:
    printed = call("decode.py", "--count=6", "--repeats=1", f"--out={tmp_path}")
    found = json.loads((tmp_path / "decode.json").read_text())
    kinds = found["decoders"]
    assert list(kinds) == ["JPEG, as it came", "JPEG, shorter side 256", "PNG, 64 px"]
    assert all(rows["Pillow (ours)"]["differs"] == 0 for rows in kinds.values())
    assert found["encodings"]["PNG"]["error"] == 0 < found["encodings"]["JPEG 95 4:4:4 (ours)"]["error"]
    assert found["reading"]["store (ours)"].keys() - found["reading"]["files"].keys() == {"made"}
    assert printed.count("\n| ") == 5 + sum(map(len, kinds.values())) + len(found["encodings"]) + 2
    assert [path.name for path in tmp_path.iterdir()] == ["decode.json"]


@pytest.mark.slow
def test_sizes_have_a_quick_form(tmp_path: Path) -> None:
    printed = call("size.py", "--quick", f"--out={tmp_path}")
    assert len(printed.splitlines()) == 2 + len(json.loads((tmp_path / "size.json").read_text())["lines"])


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen processes, each of which loads torch
def test_scale_measures_every_step_of_every_size(tmp_path: Path) -> None:
    printed = call("scale.py", "--rows", 64, 512, "--read-rows=600", "--repeats=1", f"--out={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "scale.json").read_text())
    assert printed.splitlines()[0] == "| | 64 rows | 512 rows |"
    assert len(printed.splitlines()) == 2 + len(found["lines"]["64"])
    for rows, steps in found["steps"].items():
        assert {step: len(runs) for step, runs in steps.items()} == {
            "data": 1, "build": 1, "open": 1, "epoch": 1, "verify": 1, "info": 1, "rerun": 1
        }  # fmt: skip
        assert all(
            run["peak"] >= run.get("begun", 0) > 10**7 for runs in steps.values() for run in runs if "begun" in run
        )
        line, build = found["lines"][rows], steps["build"][0]
        assert line["build: us a row"] == pytest.approx(1e6 * build["writing"] / int(rows))
        assert line["build: peak, MB"] == build["peak"] / 1e6
        assert steps["rerun"][0]["bytes"] == build["bytes"] > 0
    first, last = (found["lines"][rows]["read: peak, MB"] for rows in ("64", "512"))
    assert f"(+{1e6 * (last - first) / 448:.0f} bytes a row)" in printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_startup_times_commands_beside_libraries(tmp_path: Path) -> None:
    printed = call("startup.py", "--repeats=1", f"--out={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "startup.json").read_text())["medians"]
    assert {"python -c pass", "hdcache --help", "hdcache info STORE", "import torch"} <= found.keys()
    assert len(printed.splitlines()) == 2 + len(found)
    assert found["hdcache --help"]["peak"] < found["import zarr"]["peak"] < found["import torch"]["peak"]


@pytest.mark.slow
def test_all_knn_contenders_predict_the_same(tmp_path: Path) -> None:
    few = ["--bank=1200", "--queries=150", "--classes=20", "--repeats=1"]
    printed = call("knn.py", *few, f"--out={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "knn.json").read_text())["lines"]
    assert {"hdcache", "DINO's function", "scikit-learn, brute", "FAISS, search alone"} <= found.keys()
    assert len(printed.splitlines()) == 2 + len(found)
    chance, scores = 100 / 20, {name: line["top1"]["200"] for name, line in found.items() if "top1" in line}
    assert all(score > 5 * chance for score in scores.values())
    assert found["hdcache"]["agrees"] == 100
    # Sums of votes are added up in another order, in less precision.
    assert all(line["agrees"] > 99 for line in found.values() if "agrees" in line)
    assert all(line["peak"] > 10**7 for line in found.values())


@pytest.mark.slow
def test_workers_are_timed_beside_one_process(tmp_path: Path) -> None:
    teacher = f"--teacher=t={TEACHER}"
    few = ["--images=96", "--rows-per-shard=4", "--repeats=1", teacher]
    printed = call("workers.py", *few, f"--out={tmp_path}")
    found = json.loads((tmp_path / "workers.json").read_text())
    assert list(found["lines"]) == ["inline", "1 worker", "2 workers"]
    assert found["lines"]["inline"]["inline"] == found["lines"]["1 worker"]["one"] == 1
    for name, line in found["lines"].items():
        assert line["rate"] == found["rounds"][0][name]["rate"] > 96 / found["rounds"][0][name]["seconds"]
    assert len(printed.splitlines()) == 2 + 3
    assert [path.name for path in tmp_path.iterdir()] == ["workers.json"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_loader_is_timed_beside_layouts_and_limits(tmp_path: Path) -> None:
    """Peers that are not installed are named; all others read the same rows."""
    printed = call("loader.py", "--quick", "--rows=128", f"--out={tmp_path}")
    found = json.loads((tmp_path / "loader.json").read_text())
    lines = {
        line["name"].partition(",")[0] if line["kind"] == "peer" else line["name"]: line for line in found["lines"]
    }
    assert found["shape"] == [257, 384]
    codes = lines["ours, codes on the host"]
    assert codes["codes_to_it"] == 1
    assert lines["one .pt a sample"]["bytes_a_sample"] > 257 * 384 * 2 > 3 * codes["bytes_a_sample"]
    limits = [line for line in found["lines"] if line["kind"] == "limit"]
    assert [line["bytes_a_sample"] for line in limits[:3]] == [codes["bytes_a_sample"]] * 3
    for line in found["lines"]:
        assert line["codes_to_it"] == pytest.approx(codes["samples_per_second"] / line["samples_per_second"])
        assert line["samples_per_second"] == max(line["rounds"])
        assert (line["cold"] is None) == (line["kind"] == "limit" and "np.memmap" not in line["name"])
    absent = [name for name in ("webdataset", "streaming", "litdata", "h5py") if f"({name})" in str(found["absent"])]
    assert ("Not installed" in printed) == bool(absent)
    assert len(found["lines"]) + len(found["absent"]) == 14
    assert printed.count("\n| ") == len(found["lines"])


@pytest.mark.slow
def test_an_epoch_is_timed_beside_ram_and_live_teachers(tmp_path: Path) -> None:
    """All lines of one number of teachers end in the same loss: they saw the same targets, to the bit of their encoding."""
    printed = call("epoch.py", "--quick", "--quick-images=64", "--batch-size=16", f"--out={tmp_path}")
    found = json.loads((tmp_path / "epoch.json").read_text())
    assert [(line["teachers"], line["kind"]) for line in found["lines"]] == [
        (teachers, kind) for teachers in ("one", "two") for kind in ("store", "in RAM", "online")
    ]
    assert printed.count("\n| ") == 6
    for teachers, kinds in found["runs"].items():
        losses = {kind: runs[0]["loss"] for kind, runs in kinds.items()}
        assert losses["store"] == pytest.approx(losses["in RAM"], rel=1e-5)
        assert losses["store"] == pytest.approx(losses["online"], rel=0.05)
        assert [runs[0]["online"] for runs in kinds.values()] == [False, False, True]
        ideal = {line["ideal"] for line in found["lines"] if line["teachers"] == teachers}
        assert len(ideal) == 1 < min(ideal) + 1


@pytest.mark.slow
def test_whatever_is_killed_ends_in_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    printed = call("kills.py", "--quick", f"--out={tmp_path}")
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["wrong"] == []
    assert len(found["found"]) == 8 == printed.count("\n| ") - 1
    for name, counted in found["found"].items():
        assert counted["right"] == counted["same"] == counted["rounds"] > 0, name
        assert counted["left"] == counted["collected"]
    assert sum(counted["kills"] for counted in found["found"].values()) >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["kills.json"]


@pytest.mark.slow
def test_whatever_call_fails_is_waited_out_or_named(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    printed = call("failing_calls.py", "--quick", f"--out={tmp_path}")
    found = json.loads((tmp_path / "failing_calls.json").read_text())
    assert [tally["wrong"] for tally in found.values()] == [[]] * len(found)
    names = {tuple(key.split(": ")) for key in found}
    assert printed.count("\n| ") == sum(len({name[which] for name in names}) for which in (0, 1)) + 1
    assert sum(tally["faults"] for tally in found.values()) >= len(found) // 2


@pytest.mark.slow
def test_whatever_is_damaged_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    printed = call("faults.py", "--quick", f"--out={tmp_path}")
    found = json.loads((tmp_path / "faults.json").read_text())
    assert (found["wrong"], found["bugs"], found["unnamed"]) == ([], [], [])
    assert len(found["injections"]) == 60 + 8 + 8
    *kinds, whole, source, cache = found["lines"]
    assert printed.count("\n| ") == len(found["lines"])
    assert (whole["injections"], source["injections"], cache["injections"]) == (60, 8, 8)
    for line in found["lines"]:
        assert line["open"] + line["read"] + line["same"] + line["fewer"] == line["injections"]
        assert line["wrong"] == 0
    assert sum(line["injections"] for line in kinds) == 60
    assert whole["full"] == 60 - sum(found["not named by verify"].values())
    assert {part for key in found["not named by verify"] for part in key.split(" + ")} <= {"about.json"}


def test_make_bench_runs_every_script_that_has_a_quick_form() -> None:
    makefile = (SCRIPTS.parent / "Makefile").read_text(encoding="utf-8")
    listed = re.findall(r"^(?:BENCHMARKS|FAULTS) := (.*)$", makefile, re.MULTILINE)
    quick = sorted(
        path.stem
        for path in SCRIPTS.glob("*.py")
        if re.search(r'add_argument\(\s*"--quick"', path.read_text(encoding="utf-8"))
    )
    assert sorted(" ".join(listed).split()) == quick, "the lists of quick benchmarks in the Makefile"


@pytest.mark.slow
def test_a_remote_store_is_compared_with_a_folder(tmp_path: Path) -> None:
    printed = call("remote.py", "--quick", "--rows=512", f"--out={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "remote.json").read_text())
    ways = ["folder", "download alone", "streamed, first epoch", "streamed, later epochs", "streamed, small cache"]
    assert list(found["seconds"]) == [*ways, "pulled first, first epoch"]
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["fetched_small"] > 1, "what does not fit is fetched again"
    assert printed.splitlines()[2].endswith("| 1.00 |")
