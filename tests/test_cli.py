"""cli: exit statuses, one message per mistake, help without heavy imports, what a verb receives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

import diffdistill
from diffdistill import UserError, cli, config_check, config_files
from diffdistill.cli import VERBS, Verb, function_of, main
from diffdistill.config import check, compose

pytestmark = pytest.mark.usefixtures("composed_by_hydra")

VERB_MODULE = """
import json, os
from omegaconf import DictConfig, OmegaConf
from diffdistill import UserError
class Trainer:
    def __init__(self, networks, steps: int, seed: int = 0): ...
CALLS = []
def train(trainer: DictConfig, run_dir: str, outcome: str | int | None = None, roles: dict[str, str] | None = None,
          names: list[str] = []):
    CALLS.append(dict(trainer=OmegaConf.to_container(trainer), run_dir=run_dir, roles=roles, names=names))
    if outcome == "user":
        raise UserError("trainer.steps", "must be even", 3, "Add one.")
    if outcome == "own":
        raise ValueError("trainer.steps is odd, got 3. Add one.")
    if outcome == "foreign":
        json.loads("nonsense")
    if outcome == "defect":
        raise KeyError("a defect")
    if outcome == "exit":
        raise SystemExit(7)
    if outcome == "interrupt":
        raise KeyboardInterrupt
    return outcome if isinstance(outcome, int) else {"fd": 1.0}
"""
FILES = {
    "__init__.py": "",
    "train.yaml": "# Distil.\ndefaults:\n  - _self_\n  - trainer: default\n\nrun_dir: null  # where it writes\n"
    "outcome: null\nroles: {}\nnames: [a]\n",
    "trainer/default.yaml": "_target_: diffdistill_fake.Trainer\n_partial_: true\nsteps: 10  # of the student\n",
    "trainer/long.yaml": "_target_: diffdistill_fake.Trainer\n_partial_: true\nsteps: 1000\n",
}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A `train` of our own; what it was called with. The working directory is empty."""
    for name, text in FILES.items():
        path = tmp_path / "path" / "cli_configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "path" / "diffdistill_fake.py").write_text(VERB_MODULE)
    monkeypatch.syspath_prepend(tmp_path / "path")
    for name in ("cli_configs", "diffdistill_fake"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(config_files, "PACKAGE", "cli_configs")
    monkeypatch.setattr(config_check, "ALLOWED", (*config_check.ALLOWED, "diffdistill_fake."))
    monkeypatch.setitem(VERBS, "train", Verb("diffdistill_fake:train", "train", "distil", ("train run_dir=runs/x",)))
    # A ValueError raised by a module beside cli.py is a message for the user.
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "path" / "cli.py"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return import_module("diffdistill_fake").CALLS


# --- what a verb receives


def test_verb_receives_the_keys_of_its_configuration(calls):
    words = ["run_dir=runs/a b", "trainer=long", "+trainer.seed=3", "roles.student=lora", "names=[x,y]"]
    assert main(["train", *words]) == 0
    (call,) = calls
    assert call["trainer"]["steps"] == 1000
    assert call["trainer"]["seed"] == 3
    assert call["run_dir"] == "runs/a b"
    assert call["roles"] == {"student": "lora"}
    assert call["names"] == ["x", "y"]
    assert type(call["names"]) is list


def test_hydra_writes_nothing_also_in_a_sweep(calls):
    assert main(["train", "run_dir=x"]) == 0
    assert main(["train", "--multirun", "trainer.steps=1,2", "run_dir=x"]) == 0
    assert [call["trainer"]["steps"] for call in calls] == [10, 1, 2]
    assert list(Path.cwd().iterdir()) == []


def test_jobs_of_a_sweep_get_run_directories_of_their_own(calls):
    assert main(["train", "trainer.steps=1,2", "-m"]) == 0
    assert len({call["run_dir"] for call in calls}) == 2
    assert all(call["run_dir"].startswith("runs/") for call in calls)


def test_options_may_stand_anywhere(calls, capsys):
    assert main(["train", "run_dir=x", "--cfg", "job", "trainer.steps=4"]) == 0
    assert "steps: 4" in capsys.readouterr().out
    assert calls == []


@pytest.mark.parametrize("verb", ["plan", "doctor", "distill"])
@pytest.mark.parametrize("option", [["--cfg", "job"], ["--cfg=job"]])
def test_options_are_no_keys_of_train(verb: str, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, *option, "data=gmm2d", "~sampler.grid"]) == 0
    assert "overrides:\n- data=gmm2d\n- ~sampler.grid\n" in capsys.readouterr().out


def test_functions_take_overrides_and_keywords(calls):
    assert diffdistill.train("trainer=long", run_dir="it's here", roles={"student": "lora"}) == {"fd": 1.0}
    assert calls[0]["run_dir"] == "it's here"
    assert calls[0]["roles"] == {"student": "lora"}
    assert calls[0]["trainer"]["steps"] == 1000
    with pytest.raises(UserError, match=r"^run_di is not a key of train"):
        diffdistill.train(run_di="x")
    with pytest.raises(UserError, match="must be even"):
        diffdistill.train(run_dir="x", outcome="user")


# --- exit statuses


@pytest.mark.parametrize(("outcome", "status"), [("null", 0), ("0", 0), ("1", 1), ("3", 3), ("user", 2), ("own", 2)])
def test_exit_status_of_an_outcome(calls, capsys, outcome, status):
    assert main(["train", "run_dir=x", f"outcome={outcome}"]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == (status == 2)
    assert error.startswith("error: trainer.steps ") == (status == 2)


def test_a_sweep_stops_at_a_mistake_and_reports_the_worst_status(calls, capsys):
    assert main(["train", "-m", "run_dir=x", "outcome=1,3,0"]) == 3
    assert main(["train", "-m", "run_dir=x", "outcome=0,user,0"]) == 2
    assert len(calls) == 3 + 2
    assert capsys.readouterr().err.count("\n") == 1


def test_interrupt_is_130_and_system_exit_passes(calls, capsys):
    assert main(["train", "run_dir=x", "outcome=interrupt"]) == 130
    with pytest.raises(SystemExit, match="7"):
        main(["train", "run_dir=x", "outcome=exit"])


@pytest.mark.parametrize(("outcome", "kind"), [("defect", KeyError), ("foreign", json.JSONDecodeError)])
def test_defects_are_not_dressed_up_as_mistakes_of_the_user(calls, outcome, kind):
    with pytest.raises(kind):
        main(["train", "run_dir=x", f"outcome={outcome}"])


def test_only_the_first_rank_prints(calls, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "run_dir=x", "outcome=user"]) == 2
    assert capsys.readouterr().err == ""


def test_environment_and_arguments_are_left_as_they_were(calls, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = list(sys.argv)
    main(["train", "run_dir=x"])
    main(["train", "nonsense"])
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ


FIRST_WORDS = {name.split()[0] for name in VERBS}
MISTAKES = [
    (["trian"], f"the verb must be one of {', '.join(sorted(FIRST_WORDS))}, got 'trian'. Did you mean train?"),
    (["bench"], "bench must be followed by one of step, pipeline, attention, got nothing."),
    (["bench", "kernel"], "bench must be followed by one of step, pipeline, attention, got 'kernel'."),
    (["train", "--multi"], "the option must be one that exists, got '--multi'. Did you mean --multirun?"),
    (["train", "--cfg"], "--cfg must be followed by one of job, hydra, all, got nothing."),
    (["train", "--cfg", "jop"], "--cfg must be followed by one of job, hydra, all, got 'jop'."),
    (["train", "--cfg", "job", "--package", "nope"], "--package must name a part of the configuration, got 'nope'."),
    (["train", "--config-dir", "nowhere"], "--config-dir must name a folder, got 'nowhere'."),
    (["train", "digits"], "'digits' must be a key=value override, got a word without =."),
    (["train", "trainer=lang"], "trainer must be one of default, long, got 'lang'. Did you mean long?"),
    (["train", "trainer.stps=3"], "trainer.stps is not a key of train, got 3. Did you mean trainer.steps?"),
    (
        ["train", "trainer.steps=minus"],
        "trainer.steps must be an integer, got 'minus'. Write for example trainer.steps=1.",
    ),
    (["train", "trainer.steps=1,2"], "trainer.steps must be one value, got 1,2."),
    (["train", "trainer.steps=???"], "trainer.steps must be given, got nothing."),
    (["train", "+trainer.sed=3"], "trainer.sed is not a key of Trainer, got 3. Did you mean trainer.seed"),
    (["train", "~trainer"], "trainer is required by train, got nothing. Add trainer=VALUE."),
    (["train", "run_dir=${nope}"], "run_dir must refer to a key that exists, got ${nope}."),
    (["train", "trainer._target_=os.system"], "trainer._target_ must lie inside diffdistill, "),
    (["train", "roles=lora"], "roles must be a mapping, each value text or null, got 'lora'."),
    (["train", "roles.student=3"], "roles.student must be text, got 3."),
    (["train", "-m", "trainer.steps=1,minus"], "trainer.steps must be an integer, got 'minus'."),
    (["train", "-m", "trainer=default,lang"], "trainer must be one of default, long, got 'lang'."),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_end_with_status_2_and_one_message(calls, capsys, words, message):
    given = ["train", "run_dir=x", *words[1:]] if words[0] == "train" else words
    assert main(given) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(Path.cwd().iterdir()) == []


# --- help


def test_help_of_a_verb_shows_keys_defaults_groups_and_comments(calls, capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "run_dir: null  # where it writes" in text
    assert "trainer=default*, long" in text
    assert "steps: 10  # of the student" in text
    assert "_target_" not in text
    assert calls == []


@pytest.mark.parametrize(
    "words", ["", "--help", "-h", "--version", "bench --help", "bench step --help", "train x=y -h"]
)
def test_help_ends_with_status_0(words, capsys):
    assert main(words.split()) == 0
    assert capsys.readouterr().out


def test_every_verb_has_help_and_its_examples_name_existing_keys(capsys):
    for name, verb in VERBS.items():
        assert main([*name.split(), "--help"]) == 0
        assert verb.summary.lower() in capsys.readouterr().out.lower()
        for example in verb.examples:
            assert example.split()[: len(name.split())] == name.split()


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_answers_at_once_and_loads_nothing_heavy(words, tmp_path):
    code = (
        "import sys; from diffdistill.cli import main; status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'hydra', 'diffusers', 'omegaconf', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: diffdistill" in done.stdout
    assert time.monotonic() - start < 4  # 0.2 s on a quiet machine


def test_module_and_console_script_are_the_same_command(tmp_path):
    script = Path(sys.executable).parent / "diffdistill"
    for command in ([sys.executable, "-m", "diffdistill"], [str(script)]):
        done = subprocess.run([*command, "trian"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: the verb must be one of")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("diffdistill ", "bench compare demo distill doctor evaluate export plan precompute report sample train"),
        ("diffdistill bench ", "attention pipeline step"),
        ("diffdistill sample see", "seed="),
        ("diffdistill bench step pai", "pairs="),
        ("diffdistill bench attention rep", "repeats="),
        ("diffdistill bench pipeline prec", "precision="),
    ],
)
def test_completion_offers_verbs_then_keys(line, words, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["--shell-completion", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == words.split()


# Options that cannot go without a key of the user.
GIVEN = {name: ["data.path=images"] for name in ("data=image_folder", "experiment=image_folder_teacher")}
GIVEN |= {"data=noise": ["networks=unet_100m"]}
T2I = ("dmd2", "vsd", "tdm", "sid_lsg")
GIVEN |= {f"experiment=t2i_{name}": ["data.path=x", "networks.path=x"] for name in T2I}
GIVEN |= {f"data={name}": ["data.path=x", "networks=sd15", "networks.path=x"] for name in ("prompts", "latents")}
CHOICES = [
    f"{group}={option}"
    for group in ("experiment", "data", "distiller", "evaluation", "tracker", "trainer")
    for option in config_files.groups().get(group, [])
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_shipped_option_composes_and_fits_its_annotations(choice):
    alone = [] if choice.startswith("experiment=") else ["experiment=none"]  # its keys are for its own choices
    check(compose("train", [choice, *alone, *GIVEN.get(choice, [])]), function_of(VERBS["train"]))


@pytest.mark.parametrize("name", [name for name in VERBS if name not in ("demo", "export", "precompute", "report")])
def test_every_verb_accepts_its_own_configuration(name):
    given = {"distill": ["model=x", "prompts=y"], "bench pipeline": ["pipeline=x"]}.get(name, [])
    check(compose(VERBS[name].config, given), function_of(VERBS[name]))


def test_verbs_keep_their_names_beside_modules_of_the_same_name(monkeypatch):
    module = type(sys)("diffdistill.export")
    diffdistill.export = module  # what importing a submodule does
    assert callable(diffdistill.export)
