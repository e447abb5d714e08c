"""Every key of every shipped configuration given a wrong type, a value out of range, a misspelling."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import composing
import pytest
from config_keys import Key, command_lines, files_of, keys, run
from fuzz import fuzz
from omegaconf import OmegaConf
from PIL import Image
from tiny_families import write_families

from diffdistill import config_files
from diffdistill.cli import VERBS, main
from diffdistill.config_check import NODE_WORDS
from diffdistill.config_types import arms, form

# Values out of range by the last word of a key: `owner.word` (the class or function it is given to) wins over `word`.
# Numbers that may be fractions are also given nan and inf, nodes an unknown _target_, lists no item.
COUNT, FROM_ZERO, POSITIVE, SHARE = ("0",), ("-1",), ("0", "-1.0"), ("-0.1", "2.0")
RANGES: dict[str, tuple[str, ...]] = {
    "_target_": ("diffdistill.nowhere",),
    "_partial_": ("false",),
    # the verbs
    "run_dir": ("''", "FINISHED", "LONGNAME"),
    "resume": ("nowhere",),
    "run": ("nowhere", "''", "LONGNAME"),
    "pipeline": ("nowhere", "''", "LONGNAME"),
    "out": ("nowhere/x/y", "''", "FINISHED", "LONGNAME"),
    "checkpoint": ("nowhere", "-1", "99999"),
    "num": COUNT,
    "num_samples": COUNT,
    "interim_samples": COUNT,
    "batch_size": COUNT,
    "batch_sizes": ("[]", "[0]", "[1,-1]"),
    "replicates": COUNT,
    "pairs": ("1", "-1"),
    "repeats": ("4", "0", "-1"),
    "device": ("nowhere", "cuda:0"),
    "plot": ("nowhere/x/y.png", "''", "FINISHED", "LONGNAME", "x.nope"),
    "merge": ("nowhere", "''", "LONGNAME"),
    "merge_weight": SHARE,
    "cache": ("''", "FINISHED/config.yaml/x", "LONGNAME"),
    "PairSource.seed": FROM_ZERO,
    "TrajectorySource.seed": FROM_ZERO,
    "distillers": ("[]", "[nowhere]"),
    "teachers": ("[]", "[nowhere]"),
    "evaluate.steps": COUNT,
    "samples": ("nowhere", "''", "LONGNAME"),
    "reference": ("nowhere", "''", "LONGNAME"),
    "statistics": ("x.npz", "nowhere/x/y.safetensors", "FINISHED"),
    "against": ("nowhere", "FINISHED", "LONGNAME"),
    "evaluate.size": COUNT,
    "corrupt_share": ("-0.1", "1.0"),
    "evaluate.features": ("nowhere", "timm:", "inception:nowhere"),
    "evaluate.clip": ("nowhere", "timm:x"),
    "latency_batches": ("[0]", "[]"),
    "evaluate.replicates": FROM_ZERO,
    "work": ("FINISHED/config.yaml/x", "LONGNAME", "''"),
    "sample.steps": COUNT,
    "export.steps": COUNT,
    "export.out": ("''", "FINISHED", "LONGNAME"),
    "evaluate.seed": FROM_ZERO,
    "metrics": ("[nowhere]",),
    "init.student": ("nowhere", "stage:nowhere", "run:/nowhere", "run:FINISHED+2*run:FINISHED"),
    # compare
    "compare.data_name": ("gmm2d",),
    "compare.out": ("''", "FINISHED", "LONGNAME"),
    "iterations": COUNT,
    "seconds": POSITIVE,
    "overrides": ("[trainer.steps=3]", "[nowhere=1]"),
    # demo
    "demo.teacher": ("nowhere", "asset:nowhere", "asset:gmm2d", "asset:digits"),
    "demo.host": ("''", "203.0.113.1"),
    "demo.port": ("0", "65536"),
    # trackers
    "Wandb.project": ("''", "a/b"),
    "Trackio.project": ("''",),
    # trainer
    "steps": COUNT,
    "accumulate": COUNT,
    "log_every": COUNT,
    "checkpoint_every": FROM_ZERO,
    "keep": FROM_ZERO,
    "read_ahead": FROM_ZERO,
    "cpu_seconds": POSITIVE,
    "Watchdog.seconds": ("-1.0", "inf"),
    "exit_status": ("0", "256"),
    "warmup": FROM_ZERO,
    "final": SHARE,
    "clip.default": POSITIVE,
    "AdamW.lr": ("-1.0",),
    "betas": ("[0.9,1.0]", "[-0.1,0.9]", "[0.9]", "[]"),
    "weight_decay": ("-1.0",),
    "decay": ("1.0", "-0.1"),
    # evaluation
    "every": FROM_ZERO,
    "Evaluation.seed": FROM_ZERO,
    # networks
    "path": ("/nowhere", "''", "asset:nowhere"),
    "size": COUNT,
    "channels": ("2",),
    "sigma_data": POSITIVE,
    "sigma_min": ("0", "-1.0", "50.0"),
    "sigma_max": ("0", "-1.0", "0.001"),
    "seed": ("-1", str(2**63)),
    "dim": COUNT,
    "width": ("0", "-2", "7"),
    "depth": ("0", "-1", "1000000000"),
    "num_classes": FROM_ZERO,
    "sample_size": COUNT,
    "in_channels": COUNT,
    "out_channels": COUNT,
    "layers_per_block": COUNT,
    "block_out_channels": ("[]", "[0,64]", "[-32,64]"),
    "down_block_types": ("[]", "[DownBlock2D,Nowhere]"),
    "up_block_types": ("[]", "[UpBlock2D,Nowhere]"),
    "norm_num_groups": ("0", "-1", "7"),
    "num_class_embeds": COUNT,
    "num_modes": ("0", "-1", "1000000000"),
    "radius": POSITIVE,
    "std": POSITIVE,
    "Gaussian.mean": ("[]", "[[]]", "[[1.0],[1.0,2.0]]"),
    "GaussianData.mean": ("[]", "[[]]", "[[1.0],[1.0,2.0]]"),
    "Gaussian.std": ("[]", "[[0.0]]", "[[-1.0]]", "[[1.0,1.0]]"),
    "GaussianData.std": ("[]", "[[0.0]]", "[[-1.0]]", "[[1.0,1.0]]"),
    "t_min": ("-1.0", "100.0"),
    "t_max": ("-1.0", "0.0"),
    "rho": POSITIVE,
    "ode_sampler.num_steps": ("0", "-1", "1000000000"),
    "interval": ("[5.0,1.0]", "[-1.0,1.0]", "[1.0]", "[]"),
    "rank": COUNT,
    "alpha": POSITIVE,
    "targets": ("[nowhere] roles.student=lora", "['(']", "[] roles.student=lora"),
    # methods
    "times": ("[]", "[30.0]", "[0.001]", "[1.0,2.0]", "[2.0,2.0]", "[-1.0]"),
    "low": ("-0.1", "1.0", "2.0"),
    "high": ("-0.1", "0.0", "2.0"),
    "null_share": ("-0.1", "1.0"),
    "student_every": COUNT,
    "gan_weight": ("-1.0", "0.5"),
    "critic_gan_weight": ("-1.0", "0.5"),
    "c": POSITIVE,
    "regression_weight": FROM_ZERO,
    "student_from": FROM_ZERO,
    "gan_from": FROM_ZERO,
    "alignment_threshold": ("-2.0", "2.0"),
    "alignment_weight": FROM_ZERO,
    "alignment_steps": COUNT,
    "t_init": ("-1.0", "100.0"),
    "SiDFewStep.num_steps": COUNT,
    "Clamp.low": ("0", "30.0"),
    "Clamp.high": ("0.05",),
    "ratio_bins": COUNT,
    "ratio_rate": ("1.0", "-0.1"),
    "r1_weight": FROM_ZERO,
    "r1_std": POSITIVE,
    "target_decay": ("1.0", "-0.1"),
    "q": ("1.0", "-1.0"),
    "num_stages": COUNT,
    "total_steps": COUNT,
    "gain": ("-1.0",),
    "slope": POSITIVE,
    "first": COUNT,
    "last": COUNT,
    "ConstantSteps.num_steps": COUNT,
    "num_levels": COUNT,
    "normalise": POSITIVE,
    "step": ("0.0", "1.0", "-0.1"),
    "MeanFlow.power": ("-0.1", "1.5"),
    "power": FROM_ZERO,
    "to_end": ("-0.1", "1.5"),
    "points": ("1", "-1"),
    "boundary_weight": FROM_ZERO,
    "Progressive.num_steps": ("[]", "[3,1]", "[0]", "[1,2]"),
    "shares": ("[]", "[1.0]", "[0.0,1.0,1.0,1.0,1.0]"),
    "UniformScale.low": ("-1.0", "100.0"),
    "UniformScale.high": ("-1.0", "0.5"),
    "scale": ("0.5", "100.0"),
    "at_start": ("-0.1", "1.5"),
    "layers": ("[99]", "[-1]"),
    "weights.scm": ("-1.0",),
    "weights.ladd": ("-1.0",),
    "weights.dmd2": ("-1.0",),
    "weights.consistency": ("-1.0",),
    "AdapterSpec.width": ("0", "7"),
    "sites": ("['(']",),
    "TrajectorySource.num_steps": COUNT,
    "AGD.num_steps": COUNT,
    "GuidanceDistillation.num_steps": COUNT,
    # video
    "frames": COUNT,
    "stride": ("0", "5"),
    "zoom": COUNT,
    # families
    "prior_std": POSITIVE,
    "sizes": ("[]", "[[0,16]]", "[[7,8]]", "[8]"),
    "per_chunk": COUNT,
    "max_broken": ("-0.1", "1.0"),
    "precompute.path": ("nowhere", "''", "LONGNAME"),
    "precompute.out": ("''", "FINISHED", "LONGNAME"),
    "model": ("nowhere", "''", "LONGNAME"),
    "distill.steps": COUNT,
    "distill.overrides": ("[nowhere=1]",),
    "plan.overrides": ("[nowhere=1]",),
    "doctor.overrides": ("[nowhere=1]",),
    "Probe.num_samples": ("0", "1", "1.5"),
    "Probe.levels": ("0", "1", "1.5"),
    "Probe.margin": ("0.0", "1.0", "-1.0"),
    "Probe.batch_size": COUNT,
    "Probe.seed": ("-1", "1.5"),
    "Health.every": ("0", "1.5"),
    "Health.num_samples": ("7", "1.5"),
    "Health.seed": ("-1", "1.5"),
    "EarlyStop.metric": ("nowhere", "nfe", "swd"),
    "EarlyStop.target": ("0.5",),
    "EarlyStop.patience": ("0", "3"),
    "Parallel.shard_size": ("0", "2"),
    "Parallel.timeout": POSITIVE,
    "device_memory": ("0", "much", "24XB", "''"),
    "devices": COUNT,
    "device_rate": POSITIVE,
    "plan.size": ("[0,8]", "[8]", "[]", "[7,8]"),
    "stable_diffusion.guidance": POSITIVE,
    "flux.guidance": POSITIVE,
    "hunyuan_video.guidance": POSITIVE,
    "rate": POSITIVE,
    "in_time": COUNT,
    "in_space": COUNT,
    "stable_audio.seconds": POSITIVE,
    "Prompts.size": ("[0,8]", "[-8,8]", "[8]", "[]", "[7,8]"),
    "Noise.shape": ("[]", "[0,8]", "[-4]"),
    "tokens": COUNT,
    "caption_channels": COUNT,
    "column": ("nowhere",),
    "lowest": SHARE,
    "margin": SHARE,
    "patch_size": ("[0,4,4]", "[1,4]"),
    "num_attention_heads": COUNT,
    "attention_head_dim": COUNT,
    "text_dim": COUNT,
    "cross_attention_dim": COUNT,
    "freq_dim": COUNT,
    "ffn_dim": COUNT,
    "num_layers": COUNT,
    "prompts": ("nowhere", "''"),
}
ANY_VALUE = {
    "compare.seed": "every integer seeds the package's own draws",
    "compare.dry_run": "both are legal",
    "demo.dry_run": "both are legal",
    "evaluate.teacher": "both are legal for a run",
    "evaluate.clips": "refused for a folder that holds none, without meaning for a generator",
    **{
        f"{name}.alpha": "every finite alpha has a meaning: the loss is linear in it"
        for name in ("SiD", "SiDA", "SiDLSG", "SiDFewStep")
    },
    **{f"{name}_scale": "as guidance.scale" for name in ("critic", "gap", "projection")},
    "signal": "every finite exponent",
    "noise": "every finite exponent",
    "train.command": "text that cards quote",
    "train.channels_last": "both are legal",
    "train.onednn": "both are legal",
    "train.compile": "every value that its annotation allows",
    "train.together": "both are legal; where nothing can share a call nothing does",
    "train.checkpointing": "both are legal; a network that has none is refused",
    "train.dry_run": "both are legal",
    "distill.dry_run": "both are legal",
    "upscale": "both are legal",
    "bench step.quick": "both are legal",
    "bench pipeline.quick": "both are legal",
    "channels_last": "both are legal",
    "use_additional_conditions": "both are legal",
    "bench attention.quick": "both are legal",
    "Parallel.reshard_after_forward": "both are legal",
    "Parallel.backend": "one process has no collectives; a name that is none is refused",
    "Trainer.seed": "every integer seeds the package's own draws",
    "sample.seed": "every integer seeds the package's own draws",
    "name": "text for figures and cards",
    "entity": "the service knows who there is",
    "group": "text for the service",
    "tags": "text for the service",
    "description": "text for model cards",
    "licence": "text for model cards",
    "negative": "any text",
    "guidance.scale": "every finite w has a meaning: 0 is unconditional, below 0 leads away from the condition",
    "mean": "every finite mean of a log-normal law",
    "has_null": "the shipped teacher has classes: both are legal",
    "tame": "both are legal",
    "trainable": "both are legal, false only where no weights are copied",
    "fused": "both are legal",
    "adaptive": "both are legal",
    "mismatched": "both are legal",
    "shared": "both are legal",
    "random_s": "both are legal",
    "factors": "refused without masks, both are legal with them",
    "unconditional": "the shipped teacher has a null class: both are legal",
}


def ranges(key: Key) -> list[str]:
    """Values of the right type that are out of range; none where any is legal."""
    row = next((name for name in key.names if name in RANGES or name in ANY_VALUE), None)
    found = () if row is None or row in ANY_VALUE else RANGES[row]
    if any(arm is float for arm in arms(key.hint)):
        found = (*found, "nan")
    if any(form(arm) == "literal" for arm in arms(key.hint)):
        found = (*found, "nowhere")
    return list(found)


def is_node(key: Key) -> bool:
    """Whether the key holds a mapping or what a node builds, no value of its own."""
    others = [arm for arm in arms(key.hint) if arm is not type(None)]
    return isinstance(key.value, dict) or all(form(arm) in ("object", "mapping") for arm in others)


def wrong_type(key: Key) -> str | None:
    """A value that fits no alternative of the annotation."""
    shapes = {form(arm) for arm in arms(key.hint)}
    if "any" in shapes:
        return None
    numbers = any(arm in (int, float) for arm in arms(key.hint))
    return "3" if not numbers and ({"mapping", "object"} & shapes or isinstance(key.value, dict)) else "{a:1}"


def misspelt(key: Key) -> str:
    """The key with its last letter doubled."""
    return key.name + key.name[-1]


def enrolled() -> Iterator[Key]:
    """Every key of every shipped file; one that several files give to the same parameter of the same verb once."""
    seen = set()
    for verb, words in command_lines():
        for key in keys(verb, words):
            if (mark := (verb, key.name, key.owner)) not in seen:
                seen.add(mark)
                yield key


@functools.cache  # composing every file takes long: where a test asks for them, not where they are collected
def every_key() -> list[Key]:
    return list(enrolled())


def chosen_keys(places: str) -> list[Key]:
    """ "once": each parameter of each function and class at one place, the default; "everywhere": all places."""
    if places == "everywhere":
        return every_key()
    return list({(key.owner or key.name, key.name.rpartition(".")[2]): key for key in reversed(every_key())}.values())


in_places = pytest.mark.parametrize("places", ["once", pytest.param("everywhere", marks=pytest.mark.slow)])


@pytest.fixture
def composed_as(places: str, request: pytest.FixtureRequest) -> None:
    """Everywhere, each line is composed by Hydra from the files."""
    if places == "everywhere":
        request.getfixturevalue("composed_by_hydra")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of another command."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = ("experiment=gmm2d_dmd2", "trainer.steps=1", "trainer.batch_size=4", "evaluation=none", f"run_dir={folder}")
    assert run(["train", *words]).status == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three images, 32x32; beside them what networks of the families are built from."""
    folder = tmp_path_factory.mktemp("files") / "images"
    write_families(folder.parent)
    for number in range(6):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(path)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(key: Key, override: str, finished: Path, images: Path) -> list[str]:
    """The command line of a key with one more override."""
    dry = ["dry_run=true", "run_dir=new"] if key.verb == "train" and not override.startswith("dry_run") else []
    words = [*key.words, *dry, *override.split()]
    return [
        *key.verb.split(),
        *(filled(word, {"FINISHED": str(finished), "IMAGES": str(images), "LONGNAME": "x" * 5000}) for word in words),
    ]


def filled(word: str, values: Mapping[str, str]) -> str:
    return functools.reduce(lambda text, name: text.replace(name, values[name]), values, word)


def faults(cases: list[tuple[Key, str, str]], finished: Path, images: Path) -> list[str]:
    """What is wrong with the outcomes of command lines, each with what its message must name."""
    found = []
    for key, override, named in cases:
        outcome = run(line(key, override, finished, images))
        fault = outcome.fault or ("accepted" if outcome.status == 0 else "")
        if not fault and named not in outcome.err:
            fault = f"does not name {named}: {outcome.err.strip()}"
        if fault:
            found.append(f"{' '.join(line(key, override, Path('RUN'), Path('IMAGES')))[:150]}: {fault}")
    return found


def report(found: list[str]) -> None:
    assert not found, f"{len(found)} lines:\n" + "\n".join(found)


def named(key: Key) -> str:
    """What a message about a value must name: the key, or its node where another package's constructor refuses it."""
    foreign = key.owner.startswith(("torch.", "diffusers.")) or key.name.endswith("._partial_")
    return key.name.rpartition(".")[0] if foreign else key.name


def is_inner_word(key: Key) -> bool:
    """`_target_` and `_partial_` of inner nodes are read where those of outer ones are."""
    return key.name.rpartition(".")[2] in NODE_WORDS and key.name.count(".") > 1


def test_every_file_is_read_and_every_key_has_a_range_or_a_reason() -> None:
    read = frozenset().union(*(files_of(words, verb) for verb, words in command_lines()))
    shipped = {verb.config for verb in VERBS.values()}
    shipped |= {f"{group}/{option}" for group, options in config_files.groups().items() for option in options}
    assert read == shipped
    values = [key for key in every_key() if not is_node(key) and not ranges(key)]
    open_ = [key for key in values if not any(name in ANY_VALUE for name in key.names)]
    assert not open_, "give these a row in RANGES or ANY_VALUE: " + ", ".join(f"{k.name} ({k.owner})" for k in open_)
    names = {name for key in every_key() for name in key.names}
    assert not [name for name in (*RANGES, *ANY_VALUE) if name not in names and "." in name]


@in_places
@pytest.mark.usefixtures("composed_as")
def test_a_wrong_type_is_told_in_one_message_that_names_the_key(
    places: str, here: Path, finished: Path, images: Path
) -> None:
    cases = [
        (key, f"{key.name}={value}", key.name)
        for key in chosen_keys(places)
        if (value := wrong_type(key)) and not is_inner_word(key)
    ]
    report(faults(cases, finished, images))
    assert not list(here.iterdir())


@in_places
@pytest.mark.usefixtures("composed_as")
def test_a_value_out_of_range_is_told_in_one_message_that_names_the_key(
    places: str, here: Path, finished: Path, images: Path
) -> None:
    most = 1 if places == "once" else None
    cases = [(key, f"{key.name}={value}", named(key)) for key in chosen_keys(places) for value in ranges(key)[:most]]
    report(faults(cases, finished, images))
    assert not list(here.iterdir())


@in_places
@pytest.mark.usefixtures("composed_as")
def test_a_misspelt_key_is_told_with_the_right_one(places: str, here: Path, finished: Path, images: Path) -> None:
    # names in a plain mapping are the user's own: there the wrong one is named
    cases = [
        (key, f"{misspelt(key)}=1", f"Did you mean {key.name}" if key.owner else misspelt(key))
        for key in chosen_keys(places)
        if not is_inner_word(key)
        and key.verb not in ("distill", "plan", "doctor")  # what they do not know is a key of train
    ]
    report(faults(cases, finished, images))
    assert not list(here.iterdir())


def test_lines_composed_from_files_read_once_end_as_those_that_hydra_composes(
    here: Path, finished: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = chosen_keys("once")[::100]
    faulty = [(f"{misspelt(key)}=1", f"{key.name}={{a:1}}", f"{key.name}=nowhere") for key in chosen]
    lines = [line(key, word, finished, images) for key, words in zip(chosen, faulty, strict=True) for word in words]
    lines += [["train", "experiment=gmm2d_dmd2", "dry_run=true", *words] for words, _ in LINES.values()]
    quick = [run(words) for words in lines]
    good = config_files.composed("train", ["data=gmm2d", "distiller=sid", "trainer.steps=7"])
    monkeypatch.setattr(config_files, "composed", composing.by_hydra)
    assert [run(words) for words in lines] == quick
    same = config_files.composed("train", ["data=gmm2d", "distiller=sid", "trainer.steps=7"])
    for cfg in (good, same):  # the name of a folder of Hydra's, which nothing reads
        cfg.hydra.job.override_dirname = ""
    # as text: `==` would ask Hydra's clock twice
    assert OmegaConf.to_yaml(good) == OmegaConf.to_yaml(same)


def test_random_command_lines_end_in_one_message_and_touch_no_other_run(tmp_path: Path) -> None:
    found = fuzz(tmp_path, num_lines=150, num_real=0, seed=3)
    report(found.faults)
    assert set(found.statuses) == {0, 2}
    assert found.statuses[0] > 15  # good lines are among them


@pytest.mark.slow
@pytest.mark.usefixtures("composed_by_hydra")
def test_many_random_command_lines_also_as_processes_of_their_own(tmp_path: Path) -> None:
    found = fuzz(tmp_path, num_lines=10_000, num_real=200, seed=0)
    report(found.faults)


LINES = {
    "a mapping with a wrong name": (["guidance={a:1}"], "guidance.a is not a key of train"),
    "a node with a wrong key": (
        ["distiller.student_law={_target_:diffdistill.losses.EDMWeight,sigma_data:0.5}"],
        "distiller.student_law.sigma_data is not a key",
    ),
    "a callable of other arguments": (
        ["distiller.until._target_=diffdistill.generator.fresh"],
        "distiller.until must be a callable of (Rng, int, int)",
    ),
    "another package": (["trainer._target_=os.system"], "trainer._target_ must lie inside"),
    "a loop": (["trainer.steps=${trainer.batch_size}", "trainer.batch_size=${trainer.steps}"], "trainer.steps must"),
    "an interpolation of nothing": (["trainer.steps=${oc.env:NOPE}"], "trainer.steps must refer to a key that exists"),
    "a list of groups": (["trainer=[1]"], "trainer must be one of default"),
    "a group left out": (["~data"], "data must be one of"),
    "a node left out": (["~trainer"], "trainer._target_ must name what to build"),
    "a target left out": (["~sampler._target_"], "sampler._target_ must name what to build"),
    "a field that is no setting": (["+data.shape=[1,9,9]"], "data.shape is not a key of Mixture2D"),
    "a number beyond all": (["trainer.steps=" + "9" * 5000], "trainer.steps="),
    "an infinite number": (["trainer.optimizer.default.lr=inf"], "trainer.optimizer.default.lr must be finite"),
    "letters beyond a-z": (["trainer.steps=é"], "must be a key=value override"),
    "two lines": (['run_dir="a\nb"', "trainer.steps=0"], "trainer.steps must be >= 1"),
    "Hydra's folder": (["hydra.run.dir=up"], "hydra.run.dir is Hydra's own, and fixed here"),
    "Hydra's sweep": (["-m", "hydra.sweep.subdir=../up", "trainer.steps=1,2"], "hydra.sweep.subdir is Hydra's own"),
    "Hydra left out": (["~hydra"], "hydra is Hydra's own"),
    "a bad member of a sweep": (["-m", "trainer.batch_size=4,0"], "trainer.batch_size must be >= 1, got 0"),
    "an option with a value": (["--multirun=1"], "--multirun must stand alone"),
    "an option alone": (["--package", "trainer"], "--package must go with --cfg"),
    "two options": (["--multirun", "--cfg", "job"], "--multirun must not go with --cfg"),
    "no folder of files": (["--config-dir", "nowhere"], "--config-dir must name a folder"),
    "a name longer than a file's": (["trainer=" + "x" * 5000], "must be one that a file can have"),
    "a grid left out": (["~sampler.grid"], "sampler.grid is required by ode_sampler, got nothing"),
    "a group in a value": (["+trainer=${data}"], "the command line must compose to one configuration"),
    "a mistake under --info": (["trainer=nowhere", "--info", "defaults"], "trainer must be one of"),
    "a key with @": (["data@networks=gmm2d"], "data@networks is not a key of train"),
}


@pytest.mark.parametrize("case", LINES)
def test_odd_lines_end_in_one_message(case: str, here: Path) -> None:
    words, message = LINES[case]
    outcome = run(["train", "experiment=gmm2d_dmd2", "dry_run=true", *words])
    assert (outcome.status, outcome.fault) == (2, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert not list(here.iterdir())


def test_networks_without_weights_run_dry_as_far_as_the_method_allows(here: Path) -> None:
    outcome = run(["train", "data=gmm2d", "networks=gmm2d_exact", "evaluation=none", "dry_run=true"])
    assert "networks must be trainable" in outcome.err


@pytest.mark.parametrize("key", ["tracker", "data", "trainer", "parallel", "probe"])
@pytest.mark.usefixtures("here")
def test_a_class_of_another_kind_is_told(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A schedule has none of their keys, or, where no key is left, is told to be none of them."""
    target = "diffdistill.trainer.ConstantLR"
    assert main(["train", "experiment=digits_kd", f"{key}._target_={target}", "run_dir=new", "dry_run=true"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert f"error: {key}" in told
