"""The command line: what flags mean, what failures say, and that help is fast."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_report import fake_plan, fake_report, fake_table

from lwcompile import cli, errors, pipeline
from lwcompile.cli import flags, make, quality
from lwcompile.plans import Plan

COMMANDS = [
    "export",
    "compress",
    "inspect",
    "analyze",
    "plan",
    "plan show",
    "plan diff",
    "eval",
    "chat",
    "report",
    "runs",
    "passes",
    "backends",
]


def run_fresh(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


# --- help


def test_help_of_every_command_imports_nothing_heavy():
    code = """
import sys, io, contextlib
from lwcompile import cli
heavy = {"torch", "numpy", "transformers", "scipy", "onnx", "onnxruntime", "psutil"}
for command in ["", *sys.argv[1:]]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = cli.run([*command.split(), "--help"])
    assert code == 0 and "Usage" in text.getvalue(), command
    assert not heavy & set(sys.modules), (command, heavy & set(sys.modules))
"""
    done = run_fresh(code, *COMMANDS)
    assert done.returncode == 0, done.stderr


def test_help_takes_little_more_than_its_library():
    """0.36 s where typer alone takes 0.28 s: half a second there is 1.75 times that. A busy core takes longer for both."""

    def seconds(code: str, *arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_fresh(code, *arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    plain = "import typer; app = typer.Typer(); app.command()(lambda: None); app()"
    pairs = [(seconds("from lwcompile.cli import main; main()", "--help"), seconds(plain, "--help")) for _ in range(3)]
    assert min(ours for ours, _ in pairs) < 1.75 * min(library for _, library in pairs)


@pytest.mark.parametrize("command", ["export", "compress", "plan"])
def test_every_flag_of_the_compiler_is_there(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run([command, "--help"]) == 0
    text = capsys.readouterr().out
    wanted = (
        "--model --recipe --plan --avg-bits --bits --max-size --drop-sublayers --max-kl --dataset --samples --seqlen --metric "
        "--device --run-dir --seed --dry-run --json --backend --eval-dataset"
    )
    assert [flag for flag in wanted.split() if flag not in text] == []


def test_version_and_no_command(capsys):
    from lwcompile import __version__

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert cli.run([]) in (0, 2)  # help either way
    assert "Usage" in "".join(capsys.readouterr())


# --- what flags mean


@pytest.fixture
def pipeline_calls(monkeypatch) -> list[tuple[str, Any, dict[str, Any]]]:
    """The pipeline, recording what it is asked for; its result is a made-up report."""
    calls: list[tuple[str, Any, dict[str, Any]]] = []
    report = fake_report(4)

    def record(name: str) -> Any:
        def step(program: Any, path: Any = None, *, progress: Any = None, **words: Any) -> Any:
            with progress.task("pretending", 2) as task:
                task.advance(2)
            calls.append((name, path, words))
            plan = fake_plan(fake_table(4), 1e-9)
            if name == "plan":
                return plan
            return SimpleNamespace(program=program, plan=plan, report=report, path=path, run_dir=Path("runs/one"))

        return step

    monkeypatch.setattr(pipeline, "capture", lambda source: SimpleNamespace(name=str(source)))
    for name in ("export", "compress", "plan"):
        monkeypatch.setattr(pipeline, name, record(name))
    return calls


def test_flags_become_the_settings_of_the_pipeline(pipeline_calls):
    line = (
        "export out/model.onnx --model m --recipe fast --bits 4.25 --drop-sublayers 2 --max-kl 0.3 --dataset d --samples 7 "
        "--seqlen 64 --metric kl --device cpu --run-dir r --seed 3 --backend onnx --heal distill{steps=9} --eval-dataset e"
    )
    assert cli.run([*line.split(), "--max-size", "45 MB"]) == 0
    [(name, path, words)] = pipeline_calls
    assert (name, path) == ("export", Path("out/model.onnx"))
    assert words == {
        "recipe": "fast", "plan": None, "avg_bits": 4.25, "max_bytes": 45_000_000, "drop_sublayers": 2, "max_kl": 0.3,
        "heal": "distill{steps=9}", "dataset": "d", "samples": 7, "seqlen": 64,
        "metric": "kl", "device": "cpu", "seed": 3, "backend": "onnx", "run_dir": Path("r"), "eval_dataset": "e",
    }  # fmt: skip
    resolved = pipeline.Settings(**words).resolved()
    assert resolved.budget.to_dict() == {"bytes": 45_000_000, "avg_bits": 4.25, "drop_sublayers": 2}
    assert (resolved.calibration.dataset, resolved.calibration.samples, resolved.calibration.seqlen) == ("d", 7, 64)
    assert (resolved.evaluation.dataset, resolved.evaluation.seqlen) == ("e", 64)


def test_left_out_flags_leave_everything_to_the_recipe(pipeline_calls):
    assert cli.run(["compress", "out", "--model", "m"]) == 0
    assert pipeline.Settings(**pipeline_calls[0][2]) == pipeline.Settings()


def test_no_model_means_the_demo_model(pipeline_calls, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lwcompile.demo", SimpleNamespace(demo_model=lambda progress: Path("demo.gguf")))
    assert cli.run(["compress", "out"]) == 0
    assert "demo model" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("80MB", 80_000_000), ("45 MB", 45_000_000), ("1.2GB", 1_200_000_000), ("99", 99)])
def test_sizes(text, size):
    assert flags.settings(flags.Budgets(max_size=text))["max_bytes"] == size


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--max-size", "large"], "--max-size: cannot read 'large'"),
        (["--avg-bits", "0"], "--avg-bits must be above 0"),
        (["--avg-bits", "many"], "avg-bits"),
        (["--samples", "0"], "samples"),
        (["--plan", "p.yaml", "--avg-bits", "4"], "--plan"),
        (["--device", "tpu"], "cpu, cuda or cuda:N"),
        (["--device", "cpu:1"], "cpu, cuda or cuda:N"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_flags_that_cannot_be_meant(extra, said, pipeline_calls, capsys):
    assert cli.run(["export", "model.onnx", "--model", "m", *extra]) == 2
    error = capsys.readouterr().err
    assert said in " ".join(error.split()) and "Traceback" not in error
    assert pipeline_calls == []


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--recipe", "balancd"], "did you mean 'balanced'"),
        (["--plan", "none.yaml"], "none.yaml"),
        (["--heal", "distil"], "did you mean 'distill'"),
        (["--backend", "onx"], "did you mean 'onnx'"),
    ],
)
def test_names_are_looked_up_before_a_model_is_downloaded_or_traced(extra, said, monkeypatch, capsys):
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(make, "open_model", fail)
    monkeypatch.setattr("lwcompile.cli.plans.open_model", fail)
    for command in (["export", "model.onnx"], ["plan"]):
        if command == ["plan"] and extra[0] == "--heal":
            continue
        assert cli.run([*command, *extra]) == 2
        assert said in capsys.readouterr().err


def test_a_file_that_no_backend_writes_is_refused_first(pipeline_calls, capsys):
    for name in ("model.xyz", "model"):
        assert cli.run(["export", name, "--model", "m"]) == 2
        assert ".onnx" in capsys.readouterr().err
    assert cli.run(["export", "model.xyz", "--model", "m", "--backend", "onnx"]) == 0
    assert len(pipeline_calls) == 1


def test_a_folder_that_cannot_be_written_is_refused_first(pipeline_calls, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.run(["compress", str(tmp_path / "file" / "out"), "--model", "m"]) == 2
    assert "cannot write into" in capsys.readouterr().err and pipeline_calls == []


def test_a_missing_device_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.BadInput, match="no CUDA device"):
        flags.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert flags.device("cuda:1") == "cuda:1"
    with pytest.raises(errors.BadInput, match="has 2 CUDA devices"):
        flags.device("cuda:2")


# --- what is printed


def test_json_is_all_there_is_on_stdout(pipeline_calls, capsys):
    assert cli.run(["export", "model.onnx", "--model", "m", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["path"] == "model.onnx" and found["report"] == "runs/one/report.html"
    assert found["measured"]["value"] == pytest.approx(fake_report(4).data["measured"]["value"])
    assert "pretending" in printed.err


def test_what_native_libraries_print_is_kept_out_of_the_results():
    code = """
import os
from lwcompile import cli
def run():
    os.write(1, b"a solver's own words")
    print("the result")
    return 0
cli.run = run
cli.main()
"""
    done = run_fresh(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the result\n", "a solver's own words")


def test_an_export_ends_with_the_strip_and_the_figures(pipeline_calls, capsys):
    assert cli.run(["export", "model.onnx", "--model", "m"]) == 0
    printed = capsys.readouterr()
    for word in ("embedding", "head", "size", "538.1 MB", "74.31 MB", "damage", "perplexity", "decode a token"):
        assert word in printed.out, word
    assert "wrote model.onnx" in printed.err


def test_plan_to_stdout_and_to_a_file(pipeline_calls, capsys, tmp_path):
    assert cli.run(["plan", "--model", "m", "--avg-bits", "4"]) == 0
    assert Plan.parse(capsys.readouterr().out).choices
    assert cli.run(["plan", "--model", "m", "-o", str(tmp_path / "p.yaml")]) == 0
    assert capsys.readouterr().out == ""
    assert Plan.load(tmp_path / "p.yaml").choices == fake_plan(fake_table(4), 1e-9).choices


def test_plan_show_and_diff(tmp_path, capsys):
    table = fake_table(4)
    a, b = fake_plan(table, 1e-9), fake_plan(table, 3e-8, ("block2.attention",))
    a.save(tmp_path / "a.yaml")
    b.save(tmp_path / "b.yaml")
    assert cli.run(["plan", "show", str(tmp_path / "b.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "block2.attention" in shown and "predicted damage" in shown and "quantize{bits=" in shown
    assert cli.run(["plan", "diff", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["site"] for row in found["sites"]} == {change.site for change in a.diff(b)}
    assert found["bytes"] == {"before": a.bytes, "after": b.bytes}
    assert cli.run(["plan", "diff", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]) == 0
    assert "block2.attention" in capsys.readouterr().out
    assert cli.run(["plan", "diff", str(tmp_path / "a.yaml"), str(tmp_path / "a.yaml")]) == 0
    assert "the same" in capsys.readouterr().out


def test_a_damaged_plan_is_one_sentence_with_its_line(tmp_path, capsys):
    (tmp_path / "p.yaml").write_text("unit: nats/token\nsites:\n  head: quantize{bits=}\n")
    assert cli.run(["plan", "show", str(tmp_path / "p.yaml")]) == 2
    error = capsys.readouterr().err
    assert "p.yaml:3" in error and len(error.strip().splitlines()) == 1
    assert cli.run(["plan", "show", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml" in capsys.readouterr().err


# --- failures


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (errors.BadInput("model.gguf is cut short; get it again"), 2, "model.gguf is cut short"),
        (errors.BadPlan("plan.yaml:17: site 'x' is unknown"), 2, "plan.yaml:17"),
        (errors.Refused("no branch there", site="block3.attention"), 2, "block3.attention: no branch there"),
        (errors.InfeasibleBudget("3 MB cannot be met; 41 MB can"), 2, "41 MB can"),
        (errors.VerificationError("parity 3e-2 is above 1e-3"), 2, "parity"),
        (errors.PluginError("the pass 'p' of plug raised ValueError: no [bold] way"), 2, "no [bold] way"),
        (OSError(errno.ENOSPC, "No space left on device", "out/model.onnx"), 2, "the disk is full while writing out/model.onnx"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "no permission for /root/x"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/x"), 2, "no permission for /mnt/x"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "m.safetensors"), 2, "m.safetensors does not exist"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
        (MemoryError(), 2, "the memory is full"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 2, "the memory is full"),
        (errors.InternalError("two heads"), 70, "internal error: InternalError: two heads"),
        (ZeroDivisionError("by [red]zero"), 70, "internal error: ZeroDivisionError: by [red]zero"),
        (KeyboardInterrupt(), 130, "stopped; run the same command again to go on"),
    ],
)  # fmt: skip
def test_failures_end_in_one_sentence_and_their_code(raised, code, said, monkeypatch, capsys):
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(pipeline, "capture", fail)
    assert cli.run(["compress", "out", "--model", "m"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert ("Traceback" in printed.err) == (code == 70)
    if code != 70:
        assert len(printed.err.strip().splitlines()) == 1


def test_the_console_script_exits_with_the_code(tmp_path):
    done = run_fresh("from lwcompile.cli import main; main()", "plan", "show", str(tmp_path / "none.yaml"))
    assert done.returncode == 2 and "none.yaml" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_fault(tmp_path):
    line = f"{sys.executable} -c 'from lwcompile.cli import main; main()' passes --json | head -c 1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and done.stdout == "["


# --- runs and reports


def _runs_folder() -> Path:
    return Path(os.environ["LWCOMPILE_RUNS"])


def test_runs_are_listed_and_cleaned(capsys):
    from lwcompile.rundir import RunDir

    assert cli.run(["runs"]) == 0
    assert "no runs" in capsys.readouterr().err
    for name in ("aaa", "bbb"):
        run = RunDir(_runs_folder() / name)
        run.describe(model=f"model-{name}")
        run.put("key", {"x": 1})
    fake_report(4).save(_runs_folder() / "bbb")
    (_runs_folder() / "other").mkdir()
    assert cli.run(["runs", "--json"]) == 0
    found = {Path(row["path"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["finished"] for name, row in found.items()} == {"aaa": False, "bbb": True}
    assert found["aaa"]["model"] == "model-aaa" and found["aaa"]["bytes"] > 0
    assert cli.run(["runs"]) == 0
    assert "not finished" in capsys.readouterr().out
    assert cli.run(["runs", "ccc", "--clean"]) == 2
    assert "ccc" in capsys.readouterr().err
    assert cli.run(["runs", "aaa", "--clean", "--yes"]) == 0
    assert sorted(p.name for p in _runs_folder().iterdir()) == ["bbb", "other"]
    assert cli.run(["runs", "--clean", "-y", "--json"]) == 0
    assert [p.name for p in _runs_folder().iterdir()] == ["other"]  # what is no run is left alone


def test_report_of_a_run_by_name_and_of_the_last(capsys, tmp_path):
    from lwcompile.rundir import RunDir

    assert cli.run(["report"]) == 2
    assert "no finished run" in capsys.readouterr().err
    RunDir(_runs_folder() / "one").describe(model="m")
    fake_report(3, name="some model").save(_runs_folder() / "one")
    (_runs_folder() / "one" / "report.html").unlink()
    assert cli.run(["report", "one", "-o", str(tmp_path / "page.html")]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert "some model" in (tmp_path / "page.html").read_text() and (_runs_folder() / "one" / "report.html").is_file()
    assert cli.run(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "some model"
    assert cli.run(["report", "two"]) == 2
    (tmp_path / "report.json").write_text("{")
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "is not a report" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_leaves_no_file(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "run"
    fake_report(4).save(folder)
    before = sorted(p.name for p in folder.iterdir())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.run(["report", str(folder)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == before


# --- plugins


def test_passes_are_listed_without_importing_them():
    code = """
import sys
from lwcompile import cli
assert cli.run(["passes", "--json"]) == 0
assert not [name for name in sys.modules if name.startswith(("lwcompile.passes", "torch"))]
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
    found = {(row["kind"], row["name"]) for row in json.loads(done.stdout)}
    assert {("allocator", "greedy"), ("allocator", "integer_program"), ("metric", "kl")} <= found
    assert all(row["distribution"] == "lwcompile" for row in json.loads(done.stdout) if row["name"] == "greedy")


def test_a_pass_is_described_with_its_options(capsys):
    assert cli.run(["passes", "feature_kl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name": "temperature", "type": "float", "default": "0.1"} in found["options"]
    assert "cosine-similarity" in found["documentation"]
    assert cli.run(["passes", "feature_kl"]) == 0
    assert "temperature" in capsys.readouterr().out
    assert cli.run(["passes", "feature_lk"]) == 2
    assert "did you mean 'feature_kl'" in capsys.readouterr().err


def test_a_broken_plugin_is_listed_and_named_when_it_is_asked_for(monkeypatch, capsys):
    from importlib.metadata import EntryPoint

    from lwcompile import registry

    broken = EntryPoint("broken", "no_such_module_here:Pass", "lwcompile.passes")
    monkeypatch.setattr(registry, "_points", lambda group: [broken] if group == "passes" else [])
    assert cli.run(["passes"]) == 0
    assert "broken" in capsys.readouterr().out
    assert cli.run(["passes", "broken"]) == 2
    assert "no_such_module_here" in capsys.readouterr().err


# --- chat


class _Words:
    """A tokenizer of words: token i is `w{i}`, 0 ends."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.tensor([[len(word) for word in text.split()]])}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(f"w{i}" for i in ids)


class _Counter:
    """A decode step that counts on from the last token, and ends after `end`; `slip` doubles one token."""

    def __init__(self, end: int = 9, slip: int = -1) -> None:
        self.end, self.slip, self.seen = end, slip, []

    def __call__(self, input_ids: Any, mask: Any, positions: Any, cache: Any) -> tuple[Any, Any]:
        import torch

        self.seen.append(input_ids[0].tolist())
        last = int(input_ids[0, -1])
        following = 0 if last >= self.end else 7 if last == self.slip else last + 1
        return torch.nn.functional.one_hot(torch.tensor([following]), 12).float(), None


def _speakers(monkeypatch, **steps: _Counter) -> None:
    monkeypatch.setattr(quality, "open_speaker", lambda source, raw: quality.Speaker(source, steps[source], _Words(), raw))


def test_chat_marks_where_the_answers_part(monkeypatch, capsys):
    _speakers(monkeypatch, small=_Counter(slip=5), dense=_Counter())
    line = ["chat", "small", "--compare", "dense", "--prompt", "hi there", "--max-tokens", "3"]  # the last word is token 5
    assert cli.run(line) == 0
    printed = capsys.readouterr()
    assert "[w7]" in printed.out and "[w6]" in printed.out and "up to token 0" in printed.err
    _speakers(monkeypatch, small=_Counter(slip=7), dense=_Counter())
    assert cli.run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["diverges_at"] == 2
    assert [row["tokens"] for row in found["replies"]] == [[6, 7, 7], [6, 7, 8]]
    _speakers(monkeypatch, small=_Counter(), dense=_Counter())
    assert cli.run(line) == 0
    assert "the same 3 tokens" in capsys.readouterr().err
    assert cli.run(["chat", "small", "--json"]) == 2


def test_chat_answers_line_by_line_until_an_empty_one(monkeypatch, capsys):
    step = _Counter()
    _speakers(monkeypatch, small=step)
    lines = iter(["to seven", "again", ""])
    monkeypatch.setattr(quality, "ask", lambda: next(lines))
    assert cli.run(["chat", "small"]) == 0
    assert capsys.readouterr().out == "w6 w7 w8 w9\nw6 w7 w8 w9\n"
    assert step.seen[0] == [2, 5]


# --- estimates


def test_dry_run_says_what_it_takes_and_refuses_what_does_not_fit(monkeypatch, capsys, tmp_path):
    psutil = pytest.importorskip("psutil")
    from tiny import llama_program

    recipe = tmp_path / "r.yaml"
    recipe.write_text("options: {linear: ['quantize{solver=rtn}']}\ncalibration: {dataset: random, samples: 4, seqlen: 16}\n")
    monkeypatch.setattr(pipeline, "capture", lambda source: llama_program())
    line = ["export", str(tmp_path / "o" / "m.onnx"), "--model", "m", "--recipe", str(recipe), "--dry-run"]
    assert cli.run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total_seconds"] > 0 and found["memory"] > llama_program().nbytes() and found["disk"] > 0
    assert not (tmp_path / "o").exists()
    assert set(found["seconds"]) == {"compressing", "measuring", "writing"}
    for command, steps in (("analyze", set()), ("plan", set()), ("plan --max-kl 1", {"compressing", "measuring"})):
        assert cli.run([*command.split(), *line[2:], "--json"]) == 0
        assert set(json.loads(capsys.readouterr().out)["seconds"]) == steps
    assert cli.run([*line, "--eval-dataset", "none.npz"]) == 2  # what the run would stop at, the dry run says
    assert "none.npz" in capsys.readouterr().err
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    assert cli.run(line) == 2
    printed = capsys.readouterr()
    assert "peak memory" in printed.out and "1 MB are available" in printed.err


def test_damage_table_puts_the_most_sensitive_sites_first():
    table = fake_table(3)
    drawn = make.damage_table(table, 2)
    worst = max(table.sites.values(), key=lambda row: max(c.predicted for c in row.choices if c.refused is None))
    assert drawn.row_count == 2 and next(iter(drawn.columns[0].cells)) == worst.site


# --- the real pipeline, on a model of 30,000 parameters

RECIPE = """
analyses: [fisher]
options:
  linear: ["quantize{bits=[3,8],group_size=32,solver=rtn}"]
  embedding: ["quantize{bits=8,group_size=32,solver=rtn}"]
  mlp: [drop]
budget: {avg_bits: 20}
calibration: {dataset: random, samples: 8, seqlen: 16}
evaluation: {dataset: random, samples: 8, seqlen: 16}
"""


def test_compress_eval_replan_and_report_a_real_program(tmp_path, capsys):
    from tiny import llama_program

    from lwcompile.artifact import load
    from lwcompile.table import format_options

    model, recipe, small = tmp_path / "model", tmp_path / "r.yaml", tmp_path / "small"
    llama_program().save(model)
    recipe.write_text(RECIPE)
    given = ["--model", str(model), "--recipe", str(recipe)]
    assert cli.run(["compress", str(small), *given, "--drop-sublayers", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    plan = load(small).plan
    assert [format_options(o) for s, o in plan.choices.items() if s.endswith(".mlp")] == ["drop"]
    assert made["bytes"]["avg_bits"] <= 20 and Path(made["report"]).is_file()

    assert cli.run(["eval", str(small), *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["damage"]["mean"] == pytest.approx(made["measured"]["value"], rel=1e-6)
    assert found["perplexity"]["low"] <= found["perplexity"]["mean"] <= found["perplexity"]["high"]

    file = tmp_path / "edited.yaml"
    dropped = next(site for site in plan.choices if site.endswith(".mlp"))
    for wrong, said in ((f"{dropped}: explode", "is not offered explode"), ("block9.mlp: drop", "unknown site 'block9.mlp'")):
        file.write_text((small / "plan.yaml").read_text().replace(f"{dropped}: drop", wrong))
        line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if wrong in text)
        assert cli.run(["compress", str(tmp_path / "other"), *given, "--plan", str(file)]) == 2
        error = capsys.readouterr().err
        assert f"edited.yaml:{line}: " in error and said in error
        assert not (tmp_path / "other").exists()

    both = ["compress", str(tmp_path / "both"), *given, "--bits", "18"]
    assert cli.run([*both, "--max-kl", "1e-9"]) == 2
    assert "past the limit of 1e-09" in capsys.readouterr().err and not (tmp_path / "both").exists()
    assert cli.run([*both, "--max-kl", "99", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"]["avg_bits"] <= 18 and found["measured"]["high"] <= 99

    assert cli.run(["analyze", *given, "--rows", "3"]) == 0
    assert "3 of" in capsys.readouterr().out
    assert cli.run(["report"]) == 0
    assert "damage" in capsys.readouterr().out


def test_a_folder_goes_to_the_recipes_backend_if_that_writes_folders(tmp_path):
    make.require_backend(tmp_path / "out", None, "transformers")
    with pytest.raises(errors.BadInput, match="without a suffix"):
        make.require_backend(tmp_path / "out", None, "balanced")
