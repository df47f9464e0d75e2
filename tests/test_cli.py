"""The command line: results on stdout, everything else on stderr, one clean line and an exit code for every fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from hdcache import cli

TEACHER = "t=random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=3&embed_dim=48&num_heads=3"
STUDENT = 'student.arguments={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}'


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Run the command line in this process, signals left alone."""
    monkeypatch.setattr("hdcache.stopping.install", lambda: None)

    def call(*arguments: object) -> Ran:
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(int(left.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small images of two classes that differ in brightness."""
    path = tmp_path_factory.mktemp("cli") / "images.npz"
    labels = np.arange(40) % 2
    noise = np.random.default_rng(0).integers(0, 90, (40, 36, 36, 3))
    np.savez(path, images=(noise + 150 * labels[:, None, None, None]).astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="module")
def store(data: Path) -> Path:
    """A store of one tiny teacher, made by the command line."""
    path = data.parent / "store.hdc"
    with pytest.raises(SystemExit) as left:
        cli.main(["extract", str(data), "--store", str(path), "--teacher", TEACHER, "--rows-per-shard", "16", "-q"])
    assert not left.value.code
    return path


def one_line(text: str) -> bool:
    return text.startswith("hdcache: ") and text.count("\n") == 1


def test_extract_distill_and_score_speak_json_on_stdout(run, data, store, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The three commands leave one JSON document each on stdout, and the same extract again has nothing to do."""
    again = run("extract", data, "--store", store, "--teacher", TEACHER, "--json")
    assert again.code == 0
    assert json.loads(again.out)["teachers"]["t"]["rows_written"] == 0
    arguments = ["--set", STUDENT, "--set", "epochs=1", "--set", "warmup_epochs=0", "--set", "batch_size=20"]
    trained = run("distill", "tinymim-tiny", "--store", store, "--out", tmp_path / "run", *arguments, "--json", "-q")
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["steps"] == 2
    scored = run("knn-eval", tmp_path / "run", "--train", data, "--k", 3, "--json", "-q")
    assert scored.code == 0, scored.err
    assert json.loads(scored.out)["knn"][0]["k"] == 3
    assert not scored.err


def test_several_students_from_one_read(run, data, store, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A folder for each; one JSON list, or their lines one after the other."""
    arguments = [
        "--set",
        STUDENT,
        "--set",
        "epochs=1",
        "--set",
        "warmup_epochs=0",
        "--set",
        "batch_size=20",
        "--store",
        store,
    ]
    many = [
        "distill",
        "tinymim-tiny",
        "supervised-tiny",
        *arguments,
        "--set-recipe",
        "2:name=labels",
        "--sweep",
        "lr=1e-3,1e-4",
    ]
    trained = run(*many, "--out", tmp_path / "runs", "--json", "-q")
    assert trained.code == 0, trained.err
    found = json.loads(trained.out)
    names = [f"{name}-lr-{rate}" for name in ("tinymim-tiny", "labels") for rate in ("0.001", "0.0001")]
    assert [result["out"] for result in found] == [str(tmp_path / "runs" / name) for name in names]
    assert [result["beside"] for result in found] == [[other for other in names if other != name] for name in names]
    again = run(*many, "--out", tmp_path / "runs")
    assert [line.split(":")[0] for line in again.out.splitlines() if "2 steps" in line] == names
    assert again.err.count("peak learning rate 0.0001") == 2
    one = run("distill", "tinymim-tiny", *arguments, "--out", tmp_path / "one", "--json", "-q")
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("one", f"runs/{names[0]}")]
    assert json.loads(one.out)["out"] == str(tmp_path / "one")
    assert weights[0] == weights[1]


def test_text_answers(run, data, store, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Without --json the same commands print a few lines for people."""
    assert "nothing left to do" in run("extract", data, "--store", store, "--teacher", TEACHER).out
    arguments = ["--set", STUDENT, "--set", "epochs=0", "--set", "warmup_epochs=0", "--set", "batch_size=20"]
    assert "0 steps" in run("distill", "tinymim-tiny", "--store", store, "--out", tmp_path / "run", *arguments).out
    assert "chance" in run("knn-eval", tmp_path / "run", "--train", data, "--k", 3).out.lower()


def test_knn_of_every_layer_on_the_way_and_after(run, data, store, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """``distill --knn-train`` leaves lines in metrics.jsonl; ``knn-eval --layer all`` prints a line for each layer."""
    changes = ["--set", STUDENT, "--set", "epochs=2", "--set", "warmup_epochs=0", "--set", "batch_size=20"]
    where = ["--store", store, "--out", tmp_path / "run", "--knn-train", data, "--knn-every", 2, "--knn-layers", "all"]
    trained = run("distill", "tinymim-tiny", *where, *changes, "-q")
    assert trained.code == 0, trained.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "knn" in line]
    assert [(line["epoch"], line["step"]) for line in found] == [(0, 0), (2, 4)]
    scored = json.loads(run("knn-eval", tmp_path / "run", "--train", data, "--layer", "all", "--json", "-q").out)
    assert {layer: entries[1]["top1"] for layer, entries in scored["layers"].items()} == found[-1]["knn"]
    some = run("knn-eval", tmp_path / "run", "--train", data, "--layer", "block1.out", "--layer", "final", "-q").out
    assert [line.split()[0] for line in some.splitlines() if line.lstrip().startswith(("block", "final"))] == [
        "block1.out",
        "final",
    ]


def test_info_and_verify(run, store) -> None:  # type: ignore[no-untyped-def]
    """A good store is described and found good."""
    assert "block3.attn_in" in run("info", store).out
    assert json.loads(run("info", store, "--json").out)["teachers"]["t"]["sealed_views"]["0"]["rows"] == 40
    assert "all good" in run("verify", store).out
    assert json.loads(run("verify", store, "--quick", "--json", "-q").out)["good"] is True


def test_logits_are_stored_as_soft_labels(run, data, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """--top-k concerns logits alone; info shows what it cost."""
    taps = ["--tap", "logits", "--tap", "final", "--top-k", "3", "-q", "--json"]
    left = run("extract", data, "--store", tmp_path / "s", "--teacher", f"{TEACHER}&num_classes=6", *taps)
    assert left.code == 0, left.err
    found = json.loads(left.out)["teachers"]["t"]["taps"]
    assert (found["logits"]["encoding"], found["final"]["encoding"]) == ("topk", "klt")
    assert found["logits"]["kl"] > 0
    assert "KL from the exact distributions" in run("info", tmp_path / "s").out


def test_verify_names_the_damaged_object(run, data, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A flipped bit is exit 5, with the object's path."""
    path = tmp_path / "s"
    assert run("extract", data, "--store", path, "--teacher", TEACHER, "-q").code == 0
    victim = next(iter(sorted(path.glob("teachers/t/views/0/final/codes/c.*"))))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    found = run("verify", path, "-q")
    assert found.code == 5
    assert str(victim) in found.out
    assert one_line(found.err)


def test_recipes(run) -> None:  # type: ignore[no-untyped-def]
    """Recipes are listed and shown, and the JSON of one is a recipe file."""
    assert "tinymim-b" in run("recipes", "list").out
    assert run("recipes").out == run("recipes", "list").out
    assert json.loads(run("recipes", "--json").out)["hybrid-b"]["method"] == "Hybrid Distill"
    assert "released README: 32 GPUs x 128" in run("recipes", "show", "tinymim-b").out
    assert (
        json.loads(run("recipes", "show", "tinymim-b", "--set", "epochs=7", "--set", "warmup_epochs=1", "--json").out)[
            "epochs"
        ]
        == 7
    )


def test_doctor_finds_this_installation_good(run) -> None:  # type: ignore[no-untyped-def]
    assert run("doctor").out.rstrip().endswith("all good")
    assert json.loads(run("doctor", "--json").out)["round_trip"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        pytest.param(["extract", "/nowhere", "--store", "S", "--teacher", TEACHER], 3, "/nowhere", id="no data"),
        pytest.param(["extract", "--store", "S", "--teacher", TEACHER], 3, "name the data set", id="no store, no data"),
        pytest.param(["extract", "DATA", "--store", "S", "--teacher", "vit_tinny_patch16_224"], 2, "did you mean 'vit_tiny_patch16_224'", id="model"),
        pytest.param(["extract", "DATA", "--store", "S", "--teacher", TEACHER, "--tap", "block9.attn_in"], 2, "has 3 blocks", id="tap"),
        pytest.param(["extract", "DATA", "--store", "S", "--teacher", TEACHER, "--views", "gental"], 2, "did you mean 'gentle'", id="views"),
        pytest.param(["extract", "DATA", "--store", "S", "--teacher", TEACHER, "--fidelity", "5"], 2, "between 0 and 1", id="fidelity"),
        pytest.param(["extract", "DATA", "--store", "S", "--teacher", TEACHER, "--top-k", "5"], 2, "add --tap logits", id="top-k"),
        pytest.param(["extract", "DATA", "--store", "S", "--teacher", TEACHER, "--encoding", "klt8"], 2, "did you mean 'klt'", id="encoding"),
        pytest.param(["distill", "tinymim-tinny", "--out", "R"], 2, "did you mean 'tinymim-tiny'", id="recipe"),
        pytest.param(["distill", "tinymim-tiny", "--out", "R"], 2, "give --store", id="distill without a store"),
        pytest.param(["distill", "mae-tiny", "mae-tiny", "--out", "R"], 2, "--set-recipe 2:name=OTHER", id="names"),
        pytest.param(["distill", "mae-tiny", "--out", "R", "--sweep", "seed=0,1", "--data", "DATA"], 2, "add --set data_seed=0", id="order"),
        pytest.param(["distill", "tinymim-tiny", "--out", "R", "--store", "S"], 3, "no store there", id="store"),
        pytest.param(["distill", "tinymim-tiny", "--out", "R", "--set", "epoch=3"], 2, "did you mean 'epochs'", id="field"),
        pytest.param(["distill", "tinymim-tiny", "--out", "R", "--knn-train", "nowhere"], 3, "nowhere", id="monitor data"),
        pytest.param(["distill", "tinymim-tiny", "--out", "R", "--knn-train", "DATA", "--knn-every", "0"], 2, "monitor_every 0", id="monitor period"),
        pytest.param(["knn-eval", TEACHER[2:], "--train", "DATA", "--layer", "block1.out", "--layer", "block7.out"], 2, "has 3 blocks", id="one layer of several"),
        pytest.param(["info", "S"], 3, "hdcache extract", id="info of nothing"),
        pytest.param(["verify", "S"], 3, "no store there", id="verify of nothing"),
        pytest.param(["recipes", "show", "x"], 2, "choose from", id="unknown recipe"),
        pytest.param(["knn-eval", "nowhere/run", "--train", "DATA"], 3, "nowhere/run", id="no student"),
    ],
)  # fmt: skip
def test_every_fault_is_one_line_and_its_exit_code(run, data, tmp_path, monkeypatch, arguments, code, words) -> None:  # type: ignore[no-untyped-def]
    """Usage errors leave with 2, missing inputs with 3; nothing is printed on stdout, no traceback."""
    monkeypatch.chdir(tmp_path)
    left = run(*[str(data) if argument == "DATA" else argument for argument in arguments])
    assert left.code == code, left
    assert one_line(left.err), left.err
    assert words in left.err
    assert left.out == ""


def test_mismatch_is_exit_5_with_the_field(run, data, store) -> None:  # type: ignore[no-untyped-def]
    left = run("extract", data, "--store", store, "--teacher", TEACHER, "--fidelity", "0.2")
    assert left.code == 5
    assert "fidelity" in left.err
    assert one_line(left.err)


def test_click_reports_bad_flags_with_exit_2(run) -> None:  # type: ignore[no-untyped-def]
    """Unknown commands and flags, and a --set without a value, are usage errors that name the nearest."""
    assert run("extrct").code == 2
    assert "extract" in run("extrct").err
    assert run("info", "--jsn", "x").code == 2
    assert "FIELD=VALUE" in run("distill", "tinymim-tiny", "--out", "R", "--set", "epochs").err
    assert run("knn_eval", "--help").code == 0
    assert "video:DIR" in run("extract", "--help").out
    for words, message in (
        ([], "Missing argument 'RECIPE...'"),
        (["mae-tiny", "--set-recipe", "1:lr=1"], "with one alone use --set"),
        (["mae-tiny", "tinymim-tiny", "--set-recipe", "lr=1"], "--set-recipe takes N:FIELD=VALUE, such as 2:"),
        (["mae-tiny", "--sweep", "lr"], "--sweep takes FIELD=VALUE, got 'lr'"),
    ):
        left = run("distill", "--out", "R", *words)
        assert left.code == 2
        assert message in left.err
    for option, value in (("--knn-test", "D"), ("--knn-every", "0"), ("--knn-layers", "all"), ("--knn-stride", "2")):
        left = run("distill", "tinymim-tiny", "--out", "R", option, value)
        assert left.code == 2
        assert "say how to measure; add --knn-train DATA" in left.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (PermissionError(13, "denied", "/x/y"), 3, "/x/y: permission denied"),
    ],
)
def test_interrupts_and_permissions(run, monkeypatch, error, code, words) -> None:  # type: ignore[no-untyped-def]
    """Ctrl-C leaves with 130; a folder that may not be written is named."""

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("hdcache.store.Store.open", fail)
    left = run("info", "s")
    assert left.code == code
    assert words in left.err


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hdcache", "--version"], capture_output=True, text=True, check=True
    )
    assert "0.1.0" in done.stdout
