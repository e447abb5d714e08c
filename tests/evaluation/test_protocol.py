"""Protocols survive JSON and refuse comparison by the name of the field."""

import dataclasses
import json

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.metrics import measure
from diffdistill.evaluation.protocol import Protocol, require_same, tensor_sha256
from diffdistill.evaluation.reference import Reference


@pytest.fixture
def protocol():
    points = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    return measure(points[:20], None, Reference("points", points, None), ["swd"], None, seed=1)[1]


def test_json_round_trip_is_the_identity(protocol):
    image = dataclasses.replace(protocol, clip=(-1.0, 1.0))
    for each in (protocol, image):
        again = Protocol.from_json(json.loads(json.dumps(each.to_json())))
        assert again == each
        require_same(again, each)


CHANGES = {
    "reference": "other", "reference_sha256": "00", "reference_size": 7, "features": "ff", "num_samples": 21, "seed": 2,
    "resize": "bilinear", "clip": (-1.0, 1.0), "dtype": "bfloat16", "statistics_dtype": "float32",
    "covariance_eps": 1e-6, "interval": "percentile", "replicates": 9, "prdc_space": "features",
    "precision_recall_k": 4, "density_coverage_k": 6, "kid_subsets": 9, "kid_subset_size": 10,
    "swd_projections": 2, "swd_seed": 3, "clip_model": "ee", "schema": 0,
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Protocol)])
def test_comparison_is_refused_by_the_name_of_the_field_with_both_values(protocol, field):
    other = dataclasses.replace(protocol, **{field: CHANGES[field]})
    with pytest.raises(UserError) as refusal:
        require_same(protocol, other)
    assert refusal.value.key == f"protocol.{field}"
    assert repr(getattr(protocol, field)) in str(refusal.value)
    assert repr(CHANGES[field]) in str(refusal.value)


def test_another_schema_and_a_missing_field_are_refused(protocol):
    plain = protocol.to_json()
    with pytest.raises(UserError, match=r"protocol\.schema must be 2, got 99"):
        Protocol.from_json({**plain, "schema": 99})
    del plain["resize"]
    with pytest.raises(UserError, match="resize"):
        Protocol.from_json(plain)


def test_hash_depends_on_values_shape_dtype_and_order():
    a, b = torch.arange(4.0), torch.ones(2)
    variants = [(a, b), (b, a), (a.view(2, 2), b), (a.double(), b), (a + 1, b), (a, None)]
    assert len({tensor_sha256(*each) for each in variants}) == len(variants)
    assert tensor_sha256(a, b) == tensor_sha256(a.clone(), b.clone())


def test_a_card_of_schema_1_is_one_without_clip_score(protocol):
    plain = protocol.to_json()
    del plain["clip_model"]
    assert Protocol.from_json({**plain, "schema": 1}) == protocol
