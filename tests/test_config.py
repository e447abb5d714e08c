"""config: composing, checking against annotations, building."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from diffdistill import UserError, config_check, config_files
from diffdistill.config import build, call, check, compose, override, prepared

pytestmark = pytest.mark.usefixtures("composed_by_hydra")

TARGETS = """
from __future__ import annotations
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from omegaconf import DictConfig
if TYPE_CHECKING:
    from nowhere import Unknown
class Weight(Protocol):
    def __call__(self, t): ...
class Process:
    def __init__(self, sigma: float = 1.0):
        if sigma <= 0:
            raise ValueError(f"sigma must be positive, got {sigma}. Give a larger one.")
        self.sigma = sigma
class EDM(Process): ...
class Other: ...
def unit(t): return 1.0
class Method:
    def __init__(self, networks: object, rate: int, times: tuple[float, ...] = (1.0,), pair: tuple[int, str] = (0, ""),
                 process: Process | None = None, weight: Weight | Callable[..., float] | None = None,
                 kind: Literal["x0", "eps", 2] = "x0", names: Sequence[str] = (), where: Path | None = None,
                 rates: Mapping[str, float] = {}, fast: bool = False, size: float = 1.0, label: str = "",
                 later: Unknown = None, either: int | tuple[int, ...] = 1):
        self.__dict__.update(locals())
@dataclass
class Composite:
    parts: Mapping[str, Callable[..., Method]]
    weights: Mapping[str, float]
SEEN = {}
def train(distiller: DictConfig, run_dir: str, metrics: list[str], steps: int = 1, times: tuple[float, ...] = (),
          seed: int | None = None):
    SEEN.update(locals())
    return 0
"""

FILES = {
    "__init__": "",
    "train.yaml": """
defaults:
  - _self_
  - data: digits
  - networks: ${data}
  - distiller: method
  - experiment: plain
run_dir: null
metrics: [fd]
roles: {}
times: [2, 1]
""",
    "data/digits.yaml": "name: digits",
    "data/gmm2d.yaml": "name: gmm2d",
    "networks/digits.yaml": "name: digits\nwidth: 3",
    "networks/gmm2d.yaml": "name: gmm2d",
    "networks/exact.yaml": "name: exact",
    "distiller/method.yaml": "_target_: fake_targets.Method\n_partial_: true\nrate: 5\ntimes: [80.0]\n",
    "distiller/other.yaml": "_target_: fake_targets.Method\n_partial_: true\nrate: 2\n",
    "distiller/both.yaml": "defaults: [method@parts.a, other@parts.b, _self_]\n_target_: fake_targets.Composite\n"
    "weights: {a: 1.0, b: 0.5}\n",
    "experiment/plain.yaml": "# @package _global_\n",
    "experiment/none.yaml": "# @package _global_\n",
    "experiment/small.yaml": "# @package _global_\ndefaults: [override /data: gmm2d, override /distiller: other]\n"
    "metrics: [swd]\nroles: {student: lora}\ndistiller: {size: 3}\n",
    "experiment/exact.yaml": "# @package _global_\ndefaults: [override /data: gmm2d, override /networks: exact]\n",
}


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch):
    """Configuration files and targets of our own, in place of the shipped ones."""
    for name, text in FILES.items():
        path = tmp_path / "fake_configs" / (name if name.endswith(".yaml") else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "fake_targets.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(config_files, "PACKAGE", "fake_configs")
    monkeypatch.setattr(config_check, "ALLOWED", (*config_check.ALLOWED, "fake_targets."))
    for name in ("fake_configs", "fake_targets"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def targets():
    import fake_targets

    return fake_targets


# --- compose


@pytest.mark.parametrize(
    ("overrides", "data", "networks", "rate"),
    [
        ([], "digits", "digits", 5),
        (["data=gmm2d"], "gmm2d", "gmm2d", 5),
        (["data=gmm2d", "networks=digits"], "gmm2d", "digits", 5),
        (["networks=exact"], "digits", "exact", 5),
        (["experiment=small"], "gmm2d", "gmm2d", 2),
        (["experiment=small", "data=digits"], "digits", "digits", 2),
        (["experiment=small", "distiller=method"], "gmm2d", "gmm2d", 5),
        (["experiment=exact"], "gmm2d", "exact", 5),
        (["experiment=exact", "networks=gmm2d"], "gmm2d", "gmm2d", 5),
        (["experiment=exact", "data=digits"], "digits", "exact", 5),
    ],
)
def test_data_chooses_networks_unless_something_nearer_does(overrides, data, networks, rate):
    cfg = compose("train", overrides)
    assert (cfg.data.name, cfg.networks.name, cfg.distiller.rate) == (data, networks, rate)


def test_command_line_wins_over_experiment_and_experiment_over_groups():
    assert compose("train", ["experiment=small"]).distiller.size == 3
    assert compose("train", ["experiment=small"]).metrics == ["swd"]
    assert compose("train", ["experiment=small", "metrics=[kid]", "roles.student=copy"]).metrics == ["kid"]
    assert compose("train", ["experiment=small", "roles.student=copy"]).roles == {"student": "copy"}


def test_role_keys_need_no_plus():
    assert compose("train", ["roles.student=lora", "roles.fake_score_1=copy"]).roles.fake_score_1 == "copy"


def test_run_dir_names_the_experiment_unless_given(monkeypatch):
    assert compose("train", ["experiment=small"]).run_dir.startswith("runs/small-2")
    assert compose("train", ["run_dir=runs/x"]).run_dir == "runs/x"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compose("train", ["run_dir=runs/x"]).run_dir == "runs/x"
    with pytest.raises(UserError, match="run_dir must be given when several processes train"):
        compose("train")


def test_compose_inside_a_composed_job_leaves_the_outer_one():
    from hydra import compose as outer
    from hydra import initialize_config_module

    with initialize_config_module("fake_configs", version_base="1.3"):
        compose("train", ["data=gmm2d"])
        assert outer("train").data.name == "digits"


MISTAKES = [
    ("data=gmm", r"^data must be one of digits, gmm2d, got 'gmm'\. Did you mean gmm2d\?$"),
    ("data=3", r"^data must be one of digits, gmm2d, got 3\."),
    ("data=null", r"^data must be one of digits, gmm2d, got null\."),
    ("data=[digits,x]", r"^data must be one of digits, gmm2d, got 'x'\."),
    ("experiment=smal", r"^experiment must be one of .* Did you mean small\?$"),
    ("distiller.rat=3", r"^distiller\.rat is not a key of train, got 3\. Did you mean distiller\.rate"),
    ("rate=3", r"^rate is not a key of train, got 3\. Did you mean distiller\.rate\?$"),
    ("distillers=x", r"^distillers is not a key of train, got x\. Did you mean distiller"),
    ("dat@x=digits", r"^dat is not a key of train"),
    ("+distiller.rate=3", r"^distiller\.rate exists already, without a \+, got \+distiller\.rate\."),
    ("++data=gmm2d", r"^data exists already, without a \+"),
    ("~distiller.rat", r"^~distiller\.rat must name a key that exists, got none\. Did you mean distiller\.rate"),
    ("distiller.rate=1,2", r"^distiller\.rate must be one value, got 1,2\. .*--multirun"),
    ("digits", r"^'digits' must be a key=value override, got a word without ="),
    ("metrics=[fd", r"^'metrics=\[fd' must be a key=value override"),
    ("run_dir=${nope}", r"^run_dir must refer to a key that exists, got \$\{nope\}\. .*nope"),
    ("run_dir=${oc.env:NO_SUCH_NAME}", r"^run_dir must refer .*NO_SUCH_NAME"),
    ("distiller.rate.x=1", r"^distiller\.rate\.x is not a key of train"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_mistakes_in_overrides_name_key_constraint_value_and_fix(text, message):
    with pytest.raises(UserError, match=message) as caught:
        compose("train", [text])
    assert "\n" not in str(caught.value)


def test_mistake_in_a_file_of_an_experiment_is_explained(tmp_path):
    path = tmp_path / "fake_configs" / "experiment" / "bad.yaml"
    path.write_text("# @package _global_\ndefaults:\n  - override /distiller: metod\n")
    with pytest.raises(UserError, match=r"^distiller must be one of both, method, other, got 'metod'"):
        compose("train", ["experiment=bad"])
    path.write_text("# @package _global_\na: [1\n")
    with pytest.raises(UserError, match="must compose to one configuration"):
        compose("train", ["experiment=bad"])


VALUES = [
    "a b",
    "it's",
    'say "x"',
    "x\\",
    "a\\'b",
    "",
    "null",
    "True",
    "1e5",
    "3",
    "runs/x-1",
    "a,b",
    "é",
    "$HOME",
    "a=b",
]
VALUES += ["~/x", "C:\\new", 1e-5, 3, True, None, [1, "a b", None], {"a": 1, "b": [True]}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_python_values_survive_as_overrides(value):
    given = OmegaConf.to_container(compose("train", [override("run_dir", "x"), override("+given", value)]))["given"]
    assert given == value
    assert type(given) is type(value)


# --- check


def node(**keys):
    return {"_target_": "fake_targets.Method", "_partial_": True, "rate": 5, **keys}


EDM, OTHER, UNIT = ({"_target_": f"fake_targets.{name}"} for name in ("EDM", "Other", "unit"))
GOOD = {
    "plain": node(),
    "whole": node(size=3),
    "tuples": node(times=[], pair=[1, "a"], names=["a", "b"]),
    "null": node(process=None, weight=None, where=None),
    "nodes": node(process=EDM, weight={**UNIT, "_partial_": True}),
    "literal": node(kind="eps"),
    "number in literal": node(kind=2),
    "path": node(where="a/b"),
    "mapping": node(rates={"student": 1, "fake_score": 0.5}),
    "union": node(either=[1, 2]),
    "annotation not importable": node(later={"a": 1}),
    "composite": {"_target_": "fake_targets.Composite", "parts": {"a": node()}, "weights": {"a": 1}},
    "torch": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-4, "betas": [0.0, 0.999]},
}
ROOT = {"run_dir": "x", "metrics": []}


@pytest.mark.parametrize("value", GOOD.values(), ids=list(GOOD))
def test_values_that_fit_their_annotations_pass(value):
    check({**ROOT, "distiller": value}, targets().train)


COMPOSITE = {"_target_": "fake_targets.Composite", "parts": {}, "weights": {}}
BAD = [
    (node(rate="minus"), r"^distiller\.rate must be an integer, got 'minus'\. Write for example distiller\.rate=1\.$"),
    (node(rate=1.5), r"^distiller\.rate must be an integer, got 1\.5\."),
    (node(rate=True), r"^distiller\.rate must be an integer, got true\."),
    (node(rate=None), r"^distiller\.rate must be an integer, got null\."),
    (node(rate="???"), r"^distiller\.rate must be given"),
    (node(size="big"), r"^distiller\.size must be a number, got 'big'\."),
    (node(size=True), r"^distiller\.size must be a number, got true\."),
    (node(fast=1), r"^distiller\.fast must be true or false, got 1\."),
    (node(label=3), r"^distiller\.label must be text, got 3\."),
    (node(times=80.0), r"^distiller\.times must be a list, each item a number, got 80\.0\. Write it as a list"),
    (node(times=[1, "x"]), r"^distiller\.times\[1\] must be a number, got 'x'\."),
    (node(pair=[1]), r"^distiller\.pair must be a list of 2 \(an integer, text\), got \[1\]\."),
    (node(pair=["a", "b"]), r"^distiller\.pair\[0\] must be an integer"),
    (node(names="a"), r"^distiller\.names must be a list"),
    (node(kind="score"), r"^distiller\.kind must be one of x0, eps, 2, got 'score'\."),
    (node(rates={"student": "x"}), r"^distiller\.rates\.student must be a number, got 'x'\."),
    (node(rates=3), r"^distiller\.rates must be a mapping, each value a number"),
    (node(where=3), r"^distiller\.where must be a path or null, got 3\."),
    (node(either="x"), r"^distiller\.either must be an integer or a list, each item an integer, got 'x'\."),
    (node(either=[1, "x"]), r"^distiller\.either\[1\] must be an integer, got 'x'\."),
    (node(process=3), r"^distiller\.process must be a node whose _target_ gives a Process or null, got 3\."),
    (node(process=OTHER), r"^distiller\.process must be a node .* got a node with _target_ fake_targets\.Other"),
    (node(process={**EDM, "sigm": 1}), r"^distiller\.process\.sigm is not a key of EDM, got 1\. Did you mean .*sigma"),
    (node(rate=EDM), r"^distiller\.rate must be an integer, got a node"),
    (node(tims=[1]), r"^distiller\.tims is not a key of Method, got \[1\]\. Did you mean distiller\.times"),
    (node(_partial_="yes"), r"^distiller\._partial_ must be true or false"),
    ({**node(), "_partial_": False}, r"^distiller\.networks is required by Method, got nothing\."),
    (
        {"_target_": "fake_targets.Composite", "parts": {"a": node(rate="x")}, "weights": {}},
        r"^distiller\.parts\.a\.rate ",
    ),
    ({**COMPOSITE, "z": 1}, r"^distiller\.z is not a key"),
    ({**COMPOSITE, "parts": {"a": 3}}, r"^distiller\.parts\.a must be a node"),
    ({"_target_": "fake_targets.Metod"}, r"^distiller\._target_ must exist, but fake_targets has no 'Metod'.*Method"),
    ({"_target_": "diffdistill.nope.X"}, r"^distiller\._target_ must exist, but diffdistill has no 'nope'"),
    ({"_target_": "os.system"}, r"^distiller\._target_ must lie inside diffdistill, .*got 'os\.system'"),
    ({"_target_": "diffdistill.cli.os.system"}, r"^distiller\._target_ must be a class or function defined inside"),
    ({"_target_": "torch.nn"}, r"^distiller\._target_ must lie inside"),
    ({"_target_": 3}, r"^distiller\._target_ must lie inside"),
    (3, r"^distiller must be a mapping, got 3\."),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=[message[1:40] for _, message in BAD])
def test_values_that_do_not_fit_are_named(value, message):
    with pytest.raises(UserError, match=message):
        check(OmegaConf.create({**ROOT, "distiller": value}), targets().train)


def test_the_environment_allows_packages_and_a_configuration_cannot(monkeypatch):
    cfg = {**ROOT, "distiller": node()}
    monkeypatch.setattr(config_check, "ALLOWED", ("diffdistill.",))
    with pytest.raises(
        UserError, match=r"lie inside diffdistill, got 'fake_targets\.Method'.*DIFFDISTILL_PACKAGES=NAME"
    ):
        check(cfg, targets().train)
    monkeypatch.setenv("DIFFDISTILL_PACKAGES", "nowhere, fake_targets")
    check(cfg, targets().train)
    with pytest.raises(
        UserError, match=r"^DIFFDISTILL_PACKAGES must name packages that Python can import, got nowhere"
    ):
        check({**ROOT, "distiller": {"_target_": "nowhere.Method"}}, targets().train)
    monkeypatch.setenv("DIFFDISTILL_PACKAGES", "fake")  # a whole name, not its beginning
    with pytest.raises(UserError, match=r"must lie inside diffdistill, fake, got"):
        check(cfg, targets().train)


def test_nodes_are_checked_where_the_annotation_says_nothing():
    with pytest.raises(UserError, match=r"^distiller\.inner\[0\]\.rate must be an integer"):
        check({**ROOT, "distiller": {"inner": [node(rate="x")]}}, targets().train)


def test_root_is_checked_like_a_node():
    with pytest.raises(UserError, match=r"^metricss is not a key of train, got 1\. Did you mean metrics\?"):
        check({**ROOT, "distiller": node(), "metricss": 1}, targets().train)
    with pytest.raises(UserError, match=r"^metrics is required by train"):
        check({"run_dir": "x", "distiller": node()}, targets().train)


# --- call and build


def test_call_hands_over_nodes_lists_and_tuples():
    cfg = OmegaConf.create({**ROOT, "metrics": ["fd"], "times": [2, 1], "distiller": node()})
    assert call(cfg, targets().train) == 0
    seen = targets().SEEN
    assert isinstance(seen["distiller"], DictConfig)
    assert type(seen["metrics"]) is list
    assert seen["times"] == (2, 1)


def test_build_makes_inner_nodes_tuples_and_paths():
    cfg = OmegaConf.create({"d": node(times=[2, 1], names=["a"], where="a/b", process={**EDM, "sigma": 2})})
    partial = build(cfg.d)
    assert isinstance(partial, functools.partial)
    assert partial.func is targets().Method
    assert partial.keywords["times"] == (2, 1)
    networks = object()
    made = build(cfg.d, networks=networks)
    assert made.networks is networks
    assert (made.names, made.where, made.process.sigma) == (["a"], Path("a/b"), 2)
    assert build(None) is None


def test_build_puts_the_key_before_a_constructors_message():
    cfg = OmegaConf.create({"d": node(names=[node(process={**EDM, "sigma": -1})])})
    wanted = r"^d\.names\[0\]\.process: sigma must be positive, got -1\. Give a larger one\.$"
    with pytest.raises(UserError, match=wanted):
        build(cfg.d)


def test_build_lets_other_exceptions_through():
    with pytest.raises(TypeError, match="unexpected keyword"):
        build({"_target_": "fake_targets.EDM", "sigm": 1})


def test_a_bare_train_is_the_default_experiment_and_a_choice_of_groups_is_none():
    assert prepared("train", ["trainer.steps=3"]) == ["trainer.steps=3"]
    assert prepared("train", ["distiller=dmd2"]) == ["distiller=dmd2", "experiment=none"]
    assert prepared("train", ["data=gmm2d", "experiment=small"]) == ["data=gmm2d", "experiment=small"]
    assert prepared("evaluate", ["data=digits"]) == ["data=digits"]
