from __future__ import annotations

import ot
import torch

from cmkd_scale.losses.class_bures import class_bures


def test_value_against_pot_and_gradient_against_autograd_of_pooled_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(30, 4, generator=generator).double()
    labels = torch.arange(30) % 3
    teacher_mean = torch.randn(3, 4, generator=generator).double()
    teacher_variance = torch.rand(3, 4, generator=generator).double() + 0.2
    exact = z.clone().requires_grad_()
    moments = [
        (exact[labels == c].mean(0), exact[labels == c].var(0, correction=0)) for c in range(3)
    ]
    distances = [
        (mean - teacher_mean[c]).square().sum()
        + (variance.sqrt() - teacher_variance[c].sqrt()).square().sum()
        for c, (mean, variance) in enumerate(moments)
    ]
    # Each class has a third of the samples.
    (torch.stack(distances).sum() / 3 / 2.0**2).backward()
    ours = z.float().requires_grad_()
    value = class_bures(
        ours,
        student_mean=torch.stack([mean for mean, _ in moments]).detach().float()[labels],
        student_variance=torch.stack([spread for _, spread in moments]).detach().float()[labels],
        teacher_mean=teacher_mean.float()[labels],
        teacher_variance=teacher_variance.float()[labels],
        scale=2.0,
    )
    value.mean().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    for c, (mean, variance) in enumerate(moments):
        reference = ot.gaussian.bures_wasserstein_distance(
            mean.detach().numpy(),
            teacher_mean[c].numpy(),
            torch.diag(variance.detach()).numpy(),
            torch.diag(teacher_variance[c]).numpy(),
        )
        torch.testing.assert_close(
            value[labels == c].detach().double(),
            torch.full((10,), float(reference) ** 2 / 4.0, dtype=torch.float64),
            rtol=1e-4,
            atol=1e-6,
        )


def test_a_class_without_spread_has_a_finite_gradient() -> None:
    z = torch.zeros(2, 3, requires_grad=True)
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    class_bures(
        z,
        student_mean=zeros,
        student_variance=zeros,
        teacher_mean=ones,
        teacher_variance=ones,
        scale=1.0,
    ).sum().backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
