"""`ParamVector` against flat vectors."""

import pytest
import torch

from hf_sharp import ParamVector

pytestmark = pytest.mark.fast

DRAW = torch.Generator().manual_seed(0)
A = [
    torch.randn(3, 2, dtype=torch.float64, generator=DRAW),
    None,
    torch.randn(4, dtype=torch.float64, generator=DRAW),
    None,
]
B = [
    torch.randn(3, 2, dtype=torch.float64, generator=DRAW),
    torch.randn(2, dtype=torch.float64, generator=DRAW),
    None,
    None,
]
SHAPES = [(3, 2), (2,), (4,), (1,)]


def flat(vector):
    pairs = zip(vector.tensors, SHAPES, strict=True)
    return torch.cat([(torch.zeros(s, dtype=torch.float64) if t is None else t).reshape(-1) for t, s in pairs])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_arithmetic_counts_none_as_zero_and_is_none_only_where_both_are():
    a, b = ParamVector(A), ParamVector(B)
    fa, fb = flat(a), flat(b)
    close(a.norm(), fa.norm())
    close(a.dot(b), fa @ fb)
    close(flat(a.add(b, 0.3)), fa + 0.3 * fb)
    close(flat(a.add(b, torch.tensor(0.3, dtype=torch.float64))), fa + 0.3 * fb)
    close(flat(a.sub(b)), fa - fb)
    close(flat(a.scale(2.5)), 2.5 * fa)
    close(flat(a.unit()), fa / fa.norm())
    close(flat(a.reject(b)), fa - (fa @ fb) / (fb @ fb) * fb)
    assert [t is None for t in a.add(b).tensors] == [False, False, False, True]
    assert torch.equal(flat(a), fa) and torch.equal(flat(b), fb)  # the operands are as they were


def test_zero_gives_no_nan():
    zero = ParamVector([torch.zeros(3), None])
    assert zero.norm() == 0 and torch.equal(zero.unit().tensors[0], torch.zeros(3))
    assert torch.equal(zero.reject(zero).tensors[0], torch.zeros(3))
    assert ParamVector([None]).norm() == 0 and ParamVector([None]).dot(ParamVector([None])) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_16_bit_tensors_are_taken_in_float32(dtype):
    values = torch.full((4096,), 300.0, dtype=dtype)  # the squares overflow in float16, the sum is coarse in bfloat16
    norm = ParamVector([values, values[:1]]).norm()
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, values.float().norm().square().add(90000).sqrt(), rtol=1e-6, atol=0)
    mixed = ParamVector([values, torch.full((10,), 2.0, dtype=torch.float64)]).norm()
    torch.testing.assert_close(mixed.double(), (values.double().square().sum() + 40).sqrt(), rtol=1e-6, atol=0)


def test_scaling_16_bit_tensors_by_a_float32_number_rounds_once():
    values = torch.linspace(1, 2, 100).bfloat16()
    factor = torch.tensor(0.1234567)
    assert torch.equal(ParamVector([values]).scale(factor).tensors[0], (values.float() * factor).bfloat16())


def test_a_vector_given_up_is_worked_on_in_place_and_any_other_is_copied():
    kept, spent = ParamVector([torch.ones(2)]), ParamVector([torch.ones(2)])
    spent.donated = True
    assert kept.own().tensors[0] is not kept.tensors[0]
    memory = spent.tensors[0]
    assert spent.own().tensors[0] is memory
    with pytest.raises(RuntimeError, match="donated and has been used"):
        spent.own()


@pytest.mark.parametrize("write", [lambda v: 0.05 * v, lambda v: v / 2, lambda v: v + v, lambda v: -v])
def test_operators_say_what_to_write(write):
    with pytest.raises(TypeError, match=r"vector\.scale"):
        write(ParamVector([torch.ones(2)]))
