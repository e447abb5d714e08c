"""What is read runs nothing, keys stay where they are, and nobody listens but the demo: by the sources and by runs."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tiny_pipelines import written

import diffdistill
import diffdistill.kernels
from diffdistill import redaction
from diffdistill.cli import main
from diffdistill.config import build
from diffdistill.config_check import check
from diffdistill.errors import UserError

ROOT, KERNELS = Path(diffdistill.__file__).parent, Path(diffdistill.kernels.__file__).parent
FILES = {
    (Path("kernels") if top == KERNELS else Path()) / path.relative_to(top): path
    for top in (KERNELS, ROOT)
    for path in sorted(top.rglob("*.py"))
    if "assets" not in path.parts and (top == KERNELS or "kernels" not in path.relative_to(ROOT).parts)
}

# --- the sources

UNPICKLING = ("pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch.package")
SERVING = ("http.server", "socketserver", "flask", "fastapi", "uvicorn", "gradio", "socket")
# What reads or runs code, by the dotted name it is called by.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load", "torch.jit.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip
# File and name -> why it is allowed there.
EXCEPTIONS = {
    (
        "config_types.py",
        "eval",
    ): "annotations of functions that the allow-list let through, as their authors wrote them",
}
# The only modules that listen, or ask whether they could.
LISTENING = {"demo.py": {"socket"}, "demo_page.py": {"gradio"}}
# Receivers of from_pretrained that hold no weights.
WITHOUT_WEIGHTS = ("AutoTokenizer", "AutoImageProcessor", "CLIPImageProcessor", "getattr(diffusers, name)")
# The only modules that import by a name they compute, and where the name comes from.
IMPORTING = {
    "cli.py": "of the table of verbs",
    "config_check.py": "of a target that begins with an allowed package",
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name of what is called; also in texts that hold a program for another process."""
    trees = [tree(path)]
    for node in ast.walk(trees[0]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\nimport " in node.value:
            trees.append(ast.parse(node.value))
    for one in trees:
        yield from ((ast.unparse(node.func), node) for node in ast.walk(one) if isinstance(node, ast.Call))


def keyword(node: ast.Call, name: str) -> Any:
    """The constant given as a keyword; None if it is not given."""
    found = next((word.value for word in node.keywords if word.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else found


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


each_file = pytest.mark.parametrize("name", FILES, ids=str)


def test_the_sources_are_seen() -> None:
    assert {Path("cli.py"), Path("networks/roles.py"), Path("kernels/ordering.py")} <= FILES.keys()
    assert len(FILES) > 200
    program = [name for name, _ in calls(FILES[Path("export_check.py")]) if name.endswith("from_pretrained")]
    assert len(program) == 2  # of the child process


@each_file
def test_nothing_is_unpickled_evaluated_or_served(name: Path) -> None:
    path = FILES[name]
    for module in imported(path) - LISTENING.get(str(name), set()):
        assert not module.startswith(tuple(f"{bad}." for bad in (*UNPICKLING, *SERVING))), module
        assert module not in (*UNPICKLING, *SERVING)
    for called, node in calls(path):
        if (str(name), called) in EXCEPTIONS:
            continue
        assert called not in FORBIDDEN, (called, node.lineno)
        assert keyword(node, "shell") is not True, node.lineno
        assert keyword(node, "trust_remote_code") in (None, False), node.lineno
        assert keyword(node, "allow_pickle") in (None, False), node.lineno
        assert keyword(node, "weights_only") is None, node.lineno
        if called in ("np.load", "numpy.load"):
            assert keyword(node, "allow_pickle") is False, node.lineno
        if called.endswith("import_module") and not isinstance(node.args[0], ast.Constant):
            assert str(name) in IMPORTING, node.lineno
    assert "0.0.0.0" not in path.read_text()


@each_file
def test_weights_are_read_as_safetensors_alone(name: Path) -> None:
    for called, node in calls(FILES[name]):
        owner, _, method = called.rpartition(".")
        if method == "from_pretrained" and owner not in WITHOUT_WEIGHTS:
            assert keyword(node, "use_safetensors") is True, (called, node.lineno)
        if method == "load_lora_weights":
            assert keyword(node, "use_safetensors") is True, (called, node.lineno)


def test_every_exception_is_still_needed() -> None:
    for name, called in EXCEPTIONS:
        assert called in {word for word, _ in calls(FILES[Path(name)])}
    for name, modules in LISTENING.items():
        assert modules <= imported(FILES[Path(name)])
    for name in IMPORTING:
        assert any(word.endswith("import_module") for word, _ in calls(FILES[Path(name)]))


# --- folders of weights


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A copy of the shipped UNet2DModel."""
    shutil.copytree(ROOT / "assets" / "digits", tmp_path / "teacher")
    return tmp_path / "teacher"


def pickled(folder: Path) -> None:
    """Weights as a pickle in place of safetensors."""
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_a_pickled_network_is_refused_with_the_fix(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled(teacher)
    told = refused(["train", "data=digits", f"networks.path={teacher}", "dry_run=true", "run_dir=x"], capsys)
    assert "must hold weights as safetensors: a pickle may run code" in told
    assert "diffusion_pytorch_model.bin" in told
    assert "save_pretrained(DIR)" in told


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("sd15", tmp_path_factory.mktemp("families") / "sd15")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pickled_part_of_a_pipeline_is_refused(
    part: str, pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pipelines, tmp_path / "p")
    pickled(tmp_path / "p" / part)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    words = [
        "data=prompts",
        f"data.path={tmp_path / 'prompts.txt'}",
        "networks=sd15",
        f"networks.path={tmp_path / 'p'}",
    ]
    told = refused(["train", *words, "evaluation=none", "dry_run=true", "run_dir=x"], capsys)
    assert f"{tmp_path / 'p' / part}" in told
    assert "a pickle may run code" in told
    assert "a pickle may run code" in refused(["sample", f"pipeline={tmp_path / 'p'}", "data=digits"], capsys)


def test_code_in_a_pipeline_is_refused_before_it_runs(
    pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers would import unet/mine.py, which model_index.json names."""
    shutil.copytree(pipelines, tmp_path / "p")
    ran = tmp_path / "ran"
    (tmp_path / "p" / "unet" / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Net: pass\n")
    index = tmp_path / "p" / "model_index.json"
    index.write_text(index.read_text().replace('"unet": [\n    "diffusers"', '"unet": [\n    "mine"'))
    for words in (
        ["sample", f"pipeline={tmp_path / 'p'}", "data=digits"],
        ["distill", str(tmp_path / "p"), "prompts=x"],
    ):
        assert "must hold no code" in refused(words, capsys)
    assert not ran.exists()


# --- targets of a configuration

ESCAPES = (
    "os.system", "builtins.eval", "builtins.exec", "builtins.__import__", "subprocess.run", "shutil.rmtree",
    "functools.partial", "importlib.import_module", "pickle.loads", "torch.load", "torch.hub.load", "hydra.utils.call",
    "diffdistill.cli.os.system", "diffdistill.cli.sys.exit", "diffdistill.config_check.importlib.import_module",
    "diffdistill.export_check.subprocess.run", "diffdistill.checkpoint.shutil.rmtree", "diffdistill.config.build",
    "diffdistill.config.functools.partial", "diffdistill.cli.function_of", "diffdistill.cli.main",
    "diffdistill.launch.train", "diffdistill.cli_run.run", "diffdistill.run_folder.json.loads",
    "diffdistill.trainer.torch.load", "diffdistill.data.torch.hub.load", "diffdistill.export_check.made_alone",
    "torch.nn.modules.module.torch.load", "torch.optim.optimizer.torch.load", "torch.nn.Module.__subclasses__",
    "torch.optim.Optimizer.__init__.__globals__", "diffusers.DiffusionPipeline.from_pretrained",
    "diffusers.utils.dynamic_modules_utils.get_class_from_dynamic_module", "diffusers.UNet2DModel.from_pretrained",
    "diffusers.utils.import_utils.importlib.import_module", "diffusers.utils.import_utils.os.system",
    "torchvision.transforms.functional.torch.load", "torchvision.transforms.transforms.random.seed",
    "diffdistill.kernels.attention.build.subprocess.run", "diffdistill", "diffdistill.", "diffdistill.cli",
    "diffdistill.__builtins__.eval", "diffdistill.trainer.__builtins__", "diffdistill..cli.os.system",
    " os.system", "diffdistillery.system", "diffdistill.trainer.Trainer.__class__", "torch.nn.Module.__init_subclass__",
    "diffdistill.trainer.Trainer.fit.__globals__.get", "diffdistill.demo.demo", "diffdistill.demo_page.serve",
)  # fmt: skip


def anything(**keys: Any) -> None: ...


@pytest.mark.parametrize("target", ESCAPES)
def test_a_target_that_would_run_code_is_refused_wherever_it_stands(target: str) -> None:
    node = {"_target_": target, "command": "true"}
    partial = {"_target_": target, "_partial_": True}
    deep = {"_target_": "diffdistill.trainer.ConstantLR", "warmup": node}
    for found in (node, partial, deep, {"list": [1, {"of": node}]}, {"_target_": "torch.nn.Identity", "x": partial}):
        with pytest.raises(UserError):
            build(OmegaConf.create({"a": found}).a)
        with pytest.raises(UserError):
            check({"a": found}, anything)


@pytest.mark.parametrize(
    "target", ["torch.optim.AdamW", "diffdistill.trainer.ConstantLR", "diffdistill.generator.fresh", "torch.nn.SiLU"]
)
def test_what_a_run_is_made_of_is_allowed(target: str) -> None:
    assert callable(build(OmegaConf.create({"a": {"_target_": target, "_partial_": True}}).a))


def test_a_target_behind_an_interpolation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["trainer.lr.default._target_=${command}", "command=os.system"],
        ["trainer.lr.default={_target_:'${command}'}", "command=os.system"],
        ["+evaluation.x={_target_:os.system,command:true}"],
        ["trainer.lr.student={_target_:diffdistill.cli.os.system}"],
        ["'trainer.lr.default=${oc.create:{_target_:os.system}}'"],
    ):
        assert main(["train", "data=gmm2d", f"run_dir={tmp_path / 'x'}", "dry_run=true", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_runs_config_may_not_reach_into_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([*QUICK, f"run_dir={run_dir}"]) == 0
    monkeypatch.setenv("PRIVATE", "something private")
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        text.replace("name: null", "name: ${oc.env:PRIVATE}") + "x: ${oc.env:PRIVATE}\n"
    )
    capsys.readouterr()
    told = refused(["sample", f"run={run_dir}"], capsys)
    assert "holds an interpolation" in told
    assert "something private" not in told


# --- secrets

QUICK = [
    "train", "data=gmm2d", "distiller=dmd2", "trainer.steps=4", "trainer.batch_size=8", "trainer.log_every=1",
    "probe=null",
]  # fmt: skip
FIGURES = ["evaluation.teacher=none", "evaluation.metrics=[swd]", "evaluation.num_samples=50"]
VALUES = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "MY_PASSWORD": "correct horse battery",
}


def test_no_file_and_no_output_holds_a_secret_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in VALUES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    assert main(["--log-level", "debug", *QUICK, *FIGURES, f"run_dir={run_dir}"]) == 0
    assert main(["evaluate", f"run={run_dir}", "metrics=[swd]", "num_samples=50", "out=eval.json"]) == 0
    assert main(["sample", f"run={run_dir}", "num=8", "out=grid.png"]) == 0
    assert main(["doctor"]) == 0
    assert main(["doctor", f"run={run_dir}"]) in (0, 1)
    shown = "".join(capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    for name, value in VALUES.items():
        assert value not in shown, name
        assert [path for path in files if value.encode() in path.read_bytes()] == [], name


TYPED = [
    ["networks.path=hf_AbCdEfGhIjKlMnOpQrStUvWx"],
    ["+hf_token=whatever1234"],
    ["+trainer.api_key=whatever1234"],
    ["+data.password='whatever1234'"],
    ["networks.path=https://someone:whatever1234@host/model"],
    ["data.path=s3://AKIAIOSFODNN7EXAMPLE/x"],
    ["'command=${oc.env:MY_PASSWORD}'"],
    ["'run_dir=${oc.env:AWS_SECRET_ACCESS_KEY}'"],
    ["run_dir=runs/0123456789abcdef0123456789abcdef01234567"],
    ["ghp_AbCdEfGhIjKlMnOpQrStUvWxYz012345"],
    ["--config-dir", "hf_AbCdEfGhIjKlMnOpQrStUvWx"],
    ["--hf_AbCdEfGhIjKlMnOpQrStUvWx"],
]


@pytest.mark.parametrize("words", TYPED, ids=[" ".join(words)[:25] for words in TYPED])
@pytest.mark.parametrize("verb", ["train", "distill", "plan"])
def test_a_secret_on_the_command_line_is_refused_and_never_shown(
    verb: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in VALUES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    given = [*(word.strip("'") for word in words), *(["dry_run=true"] if verb != "plan" else [])]
    if verb == "plan" and any(word.startswith("run_dir") for word in given):
        pytest.skip("it writes no run")
    assert main([verb, *given]) == 2
    shown = "".join(capfd.readouterr())
    for value in ("whatever1234", "AbCdEfGhIjKlMnOpQrStUvWx", "AKIAIOSFODNN7EXAMPLE", *VALUES.values()):
        assert value not in shown
    assert not list(tmp_path.iterdir())


def test_a_secret_is_refused_from_python_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUES["HF_TOKEN"])
    with pytest.raises(UserError, match="must not hold a token") as caught:
        diffdistill.train("data=gmm2d", run_dir=f"runs/{VALUES['HF_TOKEN']}")
    assert VALUES["HF_TOKEN"] not in str(caught.value)


def test_a_defect_is_printed_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffdistill import cli

    def broken(argv: Any) -> int:
        raise RuntimeError(f"could not fetch https://me:whatever1234@host with {VALUES['MY_PASSWORD']}")

    monkeypatch.setenv("MY_PASSWORD", VALUES["MY_PASSWORD"])
    monkeypatch.setattr(cli, "main", broken)
    with pytest.raises(SystemExit) as caught:
        cli.entry()
    assert caught.value.code == 1
    shown = capsys.readouterr().err
    assert "RuntimeError: could not fetch https://***@host with ***" in shown
    assert "whatever1234" not in shown


def test_what_is_no_secret_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    monkeypatch.setenv("SHORT_KEY", "train")
    text = (
        "train networks.path=asset:digits data.path=s3://bucket/x 0123456789abcdef0123456789abcdef01234567 falsefalse"
    )
    assert redaction.redacted(text) == text
    redaction.refuse(["networks.path=a/b", "lora.rank=3", "run_dir=runs/token", "~stages.x", "init.student=run:tokens"])
